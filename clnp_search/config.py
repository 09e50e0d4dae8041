"""A sweep file as frozen, validated objects. Every fault is named at once, before any work.

Torch is imported where it is needed, so that a faulty file is refused at once and Ray starts without waiting for it.
"""

from __future__ import annotations

import difflib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    ValidationError,
    model_validator,
)
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from clnp_search.errors import InputError
from clnp_search.storage import NAME_PATTERN, RunFolder
from clnp_search.tasks import SCENARIOS

if TYPE_CHECKING:
    from clnp_search.clnp.state import Architecture
    from clnp_search.clnp.training import TrainingSettings


def _parse_margin(value: Any) -> Any:
    if isinstance(value, str) and value.strip().endswith("%"):
        try:
            return float(value.strip().removesuffix("%")) / 100
        except ValueError:
            raise ValueError("write a percentage such as 0.05%, or a fraction such as 0.0005") from None
    if isinstance(value, int | float) and not isinstance(value, bool) and value >= 0.5:
        raise ValueError(
            f"a bare number is a fraction of 1, so {value} would allow a loss of {value:.0%} of accuracy; "
            f"write '{value}%' if you mean percentage points"
        )
    return value


def _check_alpha(value: Any) -> Any:
    values = value if isinstance(value, list | tuple) else [value]
    numbers = [each for each in values if isinstance(each, int | float) and not isinstance(each, bool)]
    if not values or len(numbers) < len(values) or not all(0 <= each < float("inf") for each in numbers):
        raise ValueError("write a number of 0 or more, or a list with one for each hidden layer and the head last")
    return float(value) if not isinstance(value, list | tuple) else tuple(float(each) for each in value)


def _list_or_one(item: Any) -> BeforeValidator:
    """Takes a single value for a list of one."""

    def as_list(value: Any) -> Any:
        return value if isinstance(value, list | tuple) else [value]

    return BeforeValidator(as_list, json_schema_input_type=item | Annotated[tuple[item, ...], Field(min_length=1)])


def _one_of(allowed: Mapping[str, object]) -> AfterValidator:
    def check(value: str) -> str:
        if value not in allowed:
            close = difflib.get_close_matches(value, allowed, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"allowed: {', '.join(allowed)}{hint}")
        return value

    return AfterValidator(check)


# Strict: YAML has numbers of its own, and `true` is none of them. What a validator takes before it is parsed is said by
# its `json_schema_input_type`, so that the schema for editors takes the same.
Count = Annotated[int, Field(strict=True, ge=0)]
PositiveCount = Annotated[int, Field(strict=True, ge=1)]
NonNegative = Annotated[FiniteFloat, Field(strict=True, ge=0)]
Positive = Annotated[FiniteFloat, Field(strict=True, gt=0)]
Text = Annotated[str, Field(min_length=1)]
_Fraction = Annotated[float, Field(ge=0, lt=0.5)]
_Percentage = Annotated[str, Field(pattern=r"^\s*\d+(\.\d*)?([eE][+-]?\d+)?\s*%\s*$")]
Margin = Annotated[
    float,
    Field(strict=True, ge=0, lt=1),
    BeforeValidator(_parse_margin, json_schema_input_type=_Fraction | _Percentage),
]
_AlphaInput = NonNegative | Annotated[tuple[NonNegative, ...], Field(min_length=1)]
Alpha = Annotated[float | tuple[float, ...], BeforeValidator(_check_alpha, json_schema_input_type=_AlphaInput)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ScenarioConfig(_Section):
    """The sequence of tasks."""

    name: Annotated[str, _one_of(SCENARIOS), Field(json_schema_extra={"enum": [*SCENARIOS]})]
    """Which scenario: permuted_digits, permuted_mnist, split_digits, split_mnist."""
    tasks: PositiveCount = 5
    """Number of tasks. Default: 10 for permuted_mnist, else 5."""
    validation: PositiveCount = 300
    """Samples held out of the training set to choose by. Default: by scenario (10000 for permuted_mnist)."""
    scaling: Literal["standard", "unit"] = "standard"
    """Of the inputs: mean 0 and deviation 1 over all training pixels, or raw values divided by their maximum."""
    root: Text = "data/"
    """Folder of the data sets, as torchvision lays it out; downloads go here."""

    @model_validator(mode="before")
    @classmethod
    def _scenario_defaults(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("name") in SCENARIOS:
            scenario = SCENARIOS[values["name"]]
            return {"tasks": scenario.tasks, "validation": scenario.validation, **values}
        return values


class NetworkConfig(_Section):
    """The network of fixed size that all tasks share."""

    name: Literal["mlp"] = "mlp"
    """Kind of network."""
    hidden: Annotated[tuple[PositiveCount, ...], Field(min_length=1)]
    """Units of each hidden layer."""
    activation: Literal["relu", "sigmoid", "tanh"] = "relu"
    """Activation of the hidden layers."""


class HeadConfig(_Section):
    """The output layer."""

    kind: Literal["single", "multi"] = "multi"
    """One output layer for all tasks, or one for each."""
    bias: Literal["frozen", "per_task", "none"] = "frozen"
    """Of a single head: frozen after the first task, one for each task, or none."""


class TrainingConfig(_Section):
    """How each grid point is trained."""

    epochs: PositiveCount = 12
    """Passes over the training split."""
    batch_size: PositiveCount = 256
    """Samples of a step."""
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    """A new one is made for every task."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """Learning rate over time: constant, or cosine to zero."""
    weight_decay: NonNegative = 0.0
    """Acts on free parameters only."""
    momentum: Annotated[float, Field(strict=True, ge=0, lt=1)] = 0.9
    """Of sgd."""
    precision: Literal["float32", "tf32", "bf16"] = "float32"
    """Of the matrix products; parameters and optimizer state stay float32. tf32 equals float32 on a CPU."""

    @property
    def settings(self) -> TrainingSettings:
        """The same for `clnp/`."""
        from clnp_search.clnp.training import TrainingSettings

        return TrainingSettings(**self.model_dump())


class SearchConfig(_Section):
    """The grid of each task."""

    tasks: Literal["every", "first"] = "every"
    """Search on every task, or on the first only: later tasks reuse its choice."""
    alpha: Annotated[tuple[Alpha, ...], Field(min_length=1), _list_or_one(Alpha)] = (1e-6, 1e-5, 1e-4)
    """L1 coefficients to try: each a number, or a list with one for each hidden layer and the head last."""
    learning_rate: Annotated[tuple[Positive, ...], Field(min_length=1), _list_or_one(Positive)] = (0.001, 0.002)
    """Learning rates to try."""
    points_per_trial: Literal["auto"] | PositiveCount = "auto"
    """Grid points that one Ray Tune trial trains together; auto keeps all devices busy within their memory."""
    max_failures: Count = 2
    """How often a pack or a threshold scan is tried again after a fault of the machine, such as a dead process."""


class ForgettingConfig(_Section):
    """How much accuracy may be given up for capacity, and how units are pruned."""

    margin: Margin = 0.0005
    """Allowed loss of validation accuracy: '0.05%' or 0.0005."""
    theta: Literal["global", "per_layer"] = "global"
    """One activity threshold for all layers, or one for each."""
    sparsity: Literal["units", "weights", "scarcest_layer"] = "units"
    """What the chosen model has most of: free units, free weights, or free units in its fullest layer."""
    finetune_rounds: Literal[0] = 0
    """Rounds of prune and retrain; only 0 in this version."""
    finetune_epochs: Count = 0
    """Epochs of each round."""


class CapacityConfig(_Section):
    """What happens when a layer has no free unit left."""

    on_depletion: Literal["continue", "stop"] = "continue"
    """Go on (a full network still trains new heads on its features), or end the sequence."""


class ResourcesConfig(_Section):
    """What each trial is given."""

    cpu: PositiveCount = 1
    """CPU cores, and threads, of each trial."""
    gpu: NonNegative = 0.0
    """GPUs of each trial; a fraction shares one."""

    @model_validator(mode="after")
    def _whole_or_fraction(self) -> ResourcesConfig:
        if self.gpu > 1 and self.gpu != int(self.gpu):
            raise ValueError(f"gpu: {self.gpu} is neither a fraction of one GPU nor a whole number")
        return self


class TrackingConfig(_Section):
    """Where MLflow records go."""

    uri: Text = "sqlite:///mlflow.db"
    """MLflow tracking URI; `none` switches tracking off."""


class Sweep(_Section):
    """A sweep file: one task sequence, and the search for the cheapest model of each task."""

    name: Annotated[str, Field(pattern=NAME_PATTERN)] = "sweep"
    """Name of the run and of the MLflow experiment. Default: the file's name."""
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**63)] = 0
    """Of everything random: splits, permutations, initial weights, data order."""
    scenario: ScenarioConfig
    network: NetworkConfig
    head: HeadConfig = HeadConfig()
    training: TrainingConfig = TrainingConfig()
    search: SearchConfig = SearchConfig()
    forgetting: ForgettingConfig = ForgettingConfig()
    capacity: CapacityConfig = CapacityConfig()
    resources: ResourcesConfig = ResourcesConfig()
    storage: Text = "runs/"
    """Folder or URI under which run folders are made."""
    tracking: TrackingConfig = TrackingConfig()

    def architecture(self, in_features: int) -> Architecture:
        """The network for samples of `in_features` values."""
        from clnp_search.clnp.state import Architecture

        return Architecture(in_features, self.network.hidden, self.network.activation, self.head.kind, self.head.bias)

    def layer_alphas(self, alpha: float | tuple[float, ...]) -> tuple[float, ...]:
        """An alpha of the grid as one value for each hidden layer and the head."""
        return alpha if isinstance(alpha, tuple) else (alpha,) * (len(self.network.hidden) + 1)

    def to_yaml(self) -> str:
        """The resolved sweep, every default written out."""
        stream = io.StringIO()
        writer = YAML()
        writer.default_flow_style = None
        writer.dump(json.loads(self.model_dump_json()), stream)
        return stream.getvalue()

    def differences(self, other: Sweep) -> list[str]:
        """The settings that decide results and differ from another sweep's, one `key: mine, other's` each."""
        return [f"{key}: {mine} here, {others} there" for key, (mine, others) in self.differing([other]).items()]

    def differing(self, others: Sequence[Sweep]) -> dict[str, list[Any]]:
        """The settings that decide results and are not the same in all: values by key, this sweep's own first."""
        flats = []
        for sweep in (self, *others):
            dump = sweep.model_dump(mode="json", exclude={"name", "storage", "tracking", "resources"})
            dump["scenario"].pop("root")
            flats.append(dict(_flatten(dump)))
        values = {key: [flat.get(key) for flat in flats] for key in flats[0]}
        return {key: each for key, each in values.items() if any(value != each[0] for value in each)}


def load_sweep(path: Path, overrides: list[str] | None = None) -> Sweep:
    """The sweep in a YAML file, with `key=value` overrides applied.

    Raises:
        InputError: The file cannot be read or has faults; names each with its key, its value and what is allowed.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    raw = _parse_yaml(text, str(path))
    if not isinstance(raw, dict):
        raise InputError(f"{path}: a sweep file holds keys such as scenario and network; this one holds {raw!r:.80}")
    for override in overrides or []:
        _apply_override(raw, override)
    raw.setdefault("name", path.stem)
    return parse_sweep(raw, str(path))


def parse_sweep(raw: dict[str, Any], source: str) -> Sweep:
    """The sweep that plain data describe.

    Raises:
        InputError: As `load_sweep`.
    """
    faults: list[str] = []
    sweep = None
    try:
        sweep = Sweep.model_validate(raw)
    except ValidationError as error:
        details = error.errors()
        # A list whose items are all faulty counts as empty too; its items say more.
        lists = {detail["loc"][:-1] for detail in details}
        faults.extend(
            _explain(detail) for detail in details if detail["type"] != "too_short" or detail["loc"] not in lists
        )
    faults.extend(_faults_between_sections(raw))
    if sweep is not None:
        faults.extend(_equal_points(sweep))
    if faults or sweep is None:
        listed = "\n".join(f"  {fault}" for fault in dict.fromkeys(faults))
        raise InputError(f"{source}: {len(dict.fromkeys(faults))} fault(s)\n{listed}")
    return sweep


def sweep_of(folder: RunFolder) -> Sweep:
    """The resolved sweep of a run.

    Raises:
        InputError: This is no run folder, or its sweep is of another version.
    """
    source = f"{folder.uri}/sweep.yaml"
    raw = _parse_yaml(folder.read_sweep(), source)
    return parse_sweep(raw if isinstance(raw, dict) else {}, source)


def _parse_yaml(text: str, source: str) -> Any:
    if "&" in text and "*" in text and text.count("*") > 1000:
        raise InputError(f"{source}: too many YAML aliases")
    try:
        return YAML(typ="safe", pure=True).load(text)
    except (YAMLError, RecursionError, ValueError) as error:
        raise InputError(f"{source}: not a YAML file: {error}") from error


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key.strip():
        raise InputError(f"--set {override}: write key=value, for example --set training.epochs=3")
    *sections, last = key.strip().split(".")
    place: Any = raw
    for section in sections:
        place = place.setdefault(section, {}) if isinstance(place, dict) else place
    if not isinstance(place, dict):
        raise InputError(f"--set {override}: {'.'.join(sections)} is no section")
    place[last] = _parse_yaml(value, f"--set {override}")


def _faults_between_sections(raw: dict[str, Any]) -> Iterator[str]:
    """Faults that need two keys to see; skipped where the keys that they lean on are faulty themselves."""
    search, scenario = raw.get("search"), raw.get("scenario")
    try:
        wanted = len(NetworkConfig.model_validate(raw.get("network")).hidden) + 1
    except ValidationError:
        wanted = 0
    alphas = search.get("alpha") if isinstance(search, dict) else None
    for index, alpha in enumerate(alphas if wanted and isinstance(alphas, list) else []):
        if isinstance(alpha, list) and len(alpha) != wanted:
            yield (
                f"search.alpha[{index}]: {alpha} has {len(alpha)} values; allowed: one number, or {wanted} "
                f"(one for each of the {wanted - 1} hidden layers, the head last)"
            )
    if isinstance(scenario, dict) and scenario.get("name") in SCENARIOS:
        allowed, tasks = SCENARIOS[scenario["name"]].allowed_tasks, scenario.get("tasks")
        if allowed and isinstance(tasks, int) and tasks not in allowed:
            listed = ", ".join(map(str, allowed))
            yield f"scenario.tasks: {tasks} tasks cannot share the classes of {scenario['name']}; allowed: {listed}"


def _equal_points(sweep: Sweep) -> Iterator[str]:
    """Values of the grid that would train the same point twice."""
    grids = {"alpha": [sweep.layer_alphas(alpha) for alpha in sweep.search.alpha]}
    grids |= {"learning_rate": [(rate,) for rate in sweep.search.learning_rate]}
    for key, values in grids.items():
        for index, value in enumerate(values):
            if (first := values.index(value)) < index:
                same, shown = getattr(sweep.search, key)[first], getattr(sweep.search, key)[index]
                yield f"search.{key}[{index}]: {shown} is search.{key}[{first}], {same}, again; allowed: each once"


def _explain(detail: Any) -> str:
    """One pydantic error as `key: value: what is allowed`."""
    location = [part for part in detail["loc"] if not _is_branch(part)]
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")
    if detail["type"] == "extra_forbidden":
        section: Any = Sweep
        for part in location[:-1]:
            section = section.model_fields[part].annotation
        known = list(section.model_fields)
        close = difflib.get_close_matches(str(location[-1]), known, 1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}? " if close else ""
        return f"{key}: unknown key; {hint}Known here: {', '.join(known)}"
    if detail["type"] == "missing":
        return f"{key}: missing; it has no default"
    message = detail["msg"].removeprefix("Value error, ")
    return f"{key}: {detail['input']!r:.80}: {message[:1].lower() + message[1:]}"


def _is_branch(part: str | int) -> bool:
    """Whether an entry of a pydantic location names a branch of a union instead of a key."""
    return isinstance(part, str) and (any(mark in part for mark in "[(") or part == "constrained-int")


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
