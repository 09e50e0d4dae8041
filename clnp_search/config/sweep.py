"""A whole sweep: its sections, and the tasks, the network and the grid that they give."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field
from ruamel.yaml import YAML

from clnp_search.config.faults import alpha_faults
from clnp_search.config.sections import (
    STRENGTHS,
    CapacityConfig,
    ForgettingConfig,
    HeadConfig,
    ModuleConfig,
    NetworkConfig,
    ResourcesConfig,
    ScenarioConfig,
    SearchConfig,
    TrackingConfig,
    TrainingConfig,
)
from clnp_search.config.text import quoted
from clnp_search.config.values import (
    AlphaValue,
    Margin,
    Place,
    PositiveCount,
    Range,
    Section,
    Text,
    alpha_parts,
    list_or_one,
    or_empty,
    parts_of,
    require_different,
)
from clnp_search.errors import InputError
from clnp_search.records import margin_text
from clnp_search.storage import NAME_PATTERN
from clnp_search.tasks import Scenario, Wanted, kind_of

if TYPE_CHECKING:
    from torch import Tensor

    from clnp_search.clnp.baselines import Baseline
    from clnp_search.clnp.graph import Graph
    from clnp_search.clnp.state import Architecture
    from clnp_search.clnp.trace import Traced

# Of `search`, what decides a task's points; the rest says how they are trained.
SEARCHED = ("tasks", "alpha", "learning_rate")
SEARCHED_BY = {
    "grid": (),
    "random": ("algorithm", "points"),
    "optuna": ("algorithm", "points", "batch", "sampler", "objectives"),
}
# What `Sweep.settings` leaves out where it says nothing: it is as by default then.
UNRECORDED: dict[str, dict[str, Any]] = {
    "search": {
        name: SearchConfig.model_fields[name].default for name in sorted({*itertools.chain(*SEARCHED_BY.values())})
    },
    "forgetting": {"auto_limit": ForgettingConfig.model_fields["auto_limit"].default},
}


class Sweep(Section):
    """A sweep file: one task sequence, and the search for the cheapest model of each task."""

    name: Annotated[str, Field(pattern=NAME_PATTERN)] = "sweep"
    """Name of the run and of the MLflow experiment. Default: the file's name."""
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**63)] = 0
    """Of everything random: splits, permutations, initial weights, data order."""
    repetitions: PositiveCount = 1
    """A sequence for each of so many seeds, from `seed` on; see also `margins`."""
    margins: Annotated[tuple[Margin, ...], AfterValidator(require_different), list_or_one(Margin, least=0)] = ()
    """A sequence for each of these margins, instead of the one of `forgetting`; what they share is trained once."""
    method: Literal["clnp", "single_task", "finetune", "joint", "ewc", "si", "packnet"] = "clnp"
    """How the network goes from task to task: clnp; or one to compare it with, on the same networks, tasks and seeds.
    Of those, `search.alpha`, `forgetting` and what prunes or penalises by L1 say nothing."""
    scenario: ScenarioConfig
    network: NetworkConfig
    head: Annotated[HeadConfig, or_empty(HeadConfig)] = HeadConfig()
    training: Annotated[TrainingConfig, or_empty(TrainingConfig)] = TrainingConfig()
    search: Annotated[SearchConfig, or_empty(SearchConfig)] = SearchConfig()
    forgetting: Annotated[ForgettingConfig, or_empty(ForgettingConfig)] = ForgettingConfig()
    capacity: Annotated[CapacityConfig, or_empty(CapacityConfig)] = CapacityConfig()
    resources: Annotated[ResourcesConfig, or_empty(ResourcesConfig)] = ResourcesConfig()
    storage: Place = "runs/"
    """Folder or URI under which run folders are made."""
    tracking: Annotated[TrackingConfig, or_empty(TrackingConfig)] = TrackingConfig()
    modules: Annotated[tuple[Text, ...], list_or_one(Text)] = (".",)
    """Folders where your own modules lie, if they are not installed. Default: the sweep file's, and the current one."""

    def members(self, name: str) -> dict[str, Sweep]:
        """The sequences that this sweep asks for, by the names of their runs; itself if it asks for one.

        Args:
            name: What the names begin with: `NAME-s0-m1` is of seed 0 and margin 1%.
        """
        found = {}
        for seed in range(self.seed, self.seed + self.repetitions):
            of_seed = f"-s{seed}" if self.repetitions > 1 else ""
            member = self.model_copy(update={"seed": seed, "repetitions": 1, "margins": ()})
            if not self.margins:
                found[name + of_seed] = member
            for margin in self.margins:
                forgetting = self.forgetting.model_copy(update={"margin": margin})
                of_both = f"{name}{of_seed}-m{margin_text(margin).removesuffix('%')}"
                found[of_both] = member.model_copy(update={"forgetting": forgetting})
        return found

    def load_scenario(self) -> Scenario:
        """The tasks and their data.

        Raises:
            InputError: The data cannot be loaded or have faults, or do not fit the other settings.
        """
        config = self.scenario
        kind = kind_of(config.name)
        assert kind is not None
        sets, tasks = kind.load(
            Wanted(
                name=config.name,
                tasks=config.tasks,
                root=Path(config.root),
                classes=config.classes,
                size=config.size,
                arguments=config.arguments,
                modules=self.module_folders,
            )
        )
        scenario = Scenario(sets, tasks, config.validation, config.scaling, self.seed, self.network.flatten)
        counts = {scenario.num_classes(index) for index in range(len(scenario))}
        if self.head.kind == "single" and len(counts) > 1:
            raise InputError(
                f"head.kind: single: the tasks have {', '.join(map(str, sorted(counts)))} classes; "
                "one output layer needs the same number in all; allowed: multi"
            )
        if config.augment.crop or config.augment.flip:
            side = min(scenario.input_shape[-2:])
            if len(scenario.input_shape) == 1:
                raise InputError("scenario.augment: the network sees flat samples; allowed: images")
            if config.augment.crop >= side:
                raise InputError(f"scenario.augment.crop: {config.augment.crop}; allowed: 0 to {side - 1}")
        return scenario

    @property
    def module_folders(self) -> tuple[Path, ...]:
        """Where your own modules may lie."""
        return tuple(Path(folder) for folder in self.modules)

    def graph(self, input_shape: tuple[int, ...]) -> Graph:
        """The network for samples of a shape: (values,) or (C, H, W).

        Raises:
            InputError: There is none, or it does not take such samples.
            NetworkRefused: A module cannot be trained here; has every reason.
        """
        if isinstance(self.network, ModuleConfig):
            return self._traced(input_shape).graph
        try:
            return self.network.graph(input_shape, self.has_head_bias)
        except (ValueError, RuntimeError) as error:
            raise InputError(f"network: does not take samples of shape {input_shape}: {error}") from error

    def draw(self, input_shape: tuple[int, ...], seed: int) -> dict[str, dict[str, Tensor]] | None:
        """All parameters as a module's own constructor draws them under a seed; nothing for networks of ours.

        Raises:
            InputError: As `graph`.
            NetworkRefused: As `graph`.
        """
        if not isinstance(self.network, ModuleConfig):
            return None
        return self._traced(input_shape).tensors(self.network.make(self.module_folders, seed))

    def _traced(self, input_shape: tuple[int, ...]) -> Traced:
        from clnp_search.clnp.trace import trace

        assert isinstance(self.network, ModuleConfig)
        traced = trace(self.network.make(self.module_folders, self.seed), input_shape)
        return traced if self.has_head_bias else traced.without_head_bias()

    @property
    def has_head_bias(self) -> bool:
        """Whether the output layer may have a bias."""
        return self.head.kind == "multi" or self.head.bias != "none"

    def architecture(self, input_shape: tuple[int, ...]) -> Architecture:
        """The network and its head for samples of a shape: (values,) or (C, H, W).

        Raises:
            InputError: There is none, with every reason.
        """
        from clnp_search.clnp.state import Architecture
        from clnp_search.clnp.trace import NetworkRefused

        shared = self.method != "clnp" and self.head.kind == "single"
        try:
            graph = self.graph(input_shape)
            if self.method == "packnet" and graph.has_batch_statistics:
                raise InputError("method: packnet: a batch normalisation's statistics are of all tasks; allowed: none")
            return Architecture(graph, "shared" if shared else self.head.kind, self.head.bias)
        except NetworkRefused as error:
            listed = "\n".join(f"  {each.module}: {each.reason}" for each in error.refused)
            raise InputError(f"network.module: refused for {len(error.refused)} reason(s)\n{listed}") from error

    @property
    def baseline(self) -> Baseline | None:
        """The method, if it is not clnp."""
        if self.method == "clnp":
            return None
        from clnp_search.clnp.baselines import BASELINES

        return BASELINES[self.method]

    @property
    def strengths(self) -> tuple[float, ...]:
        """The strengths of a baseline that are tried; of one that has none, and of clnp, a zero."""
        return self.search.strength or STRENGTHS.get(self.method, (0.0,))

    @property
    def num_points(self) -> int:
        """How many points a searched task tries."""
        if self.method == "clnp":
            return self.search.num_points
        return len(self.strengths) * len(self.search.learning_rate)

    def layer_alphas(self, alpha: AlphaValue, layers: Sequence[str]) -> tuple[float, ...]:
        """An alpha of the grid as one value for each of the network's layers.

        Raises:
            InputError: An alpha of the grid does not fit the layers; names each that does not.
        """
        faults = [fault for index, each in enumerate(self.search.alpha) for fault in alpha_faults(index, each, layers)]
        if faults:
            raise InputError("\n".join(faults))
        parts = parts_of(alpha)
        values = [parts[name] for name in alpha_parts(alpha, layers)]
        assert not any(isinstance(each, Range) for each in values), "every range is drawn"
        return tuple(float(each) for each in values if not isinstance(each, Range))

    def to_yaml(self) -> str:
        """The resolved sweep, every default written out."""
        stream = io.StringIO()
        writer = YAML()
        writer.default_flow_style = None
        writer.dump(quoted(self.model_dump(mode="json")), stream)
        return stream.getvalue()

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the results and the choice of each task, by key; the number of tasks only if it changes them."""
        kind = kind_of(self.scenario.name)
        left_out = {"root", "tasks"} if kind is not None and kind.extensible else {"root"}
        dump: dict[str, Any] = {
            "seed": self.seed,
            "scenario": self.scenario.model_dump(mode="json", exclude=left_out),
            "network": self.network.model_dump(mode="json"),
            "head": self.head.model_dump(mode="json"),
            "training": self.training.model_dump(mode="json"),
            "search": self.search.model_dump(mode="json", include={*SEARCHED, *SEARCHED_BY[self.search.algorithm]}),
            "forgetting": self.forgetting.model_dump(mode="json"),
        }
        if self.forgetting.margin != "auto" or self.forgetting.auto_limit == UNRECORDED["forgetting"]["auto_limit"]:
            del dump["forgetting"]["auto_limit"]
        if self.capacity.widens:
            dump["capacity"] = self.capacity.model_dump(mode="json")
        if self.method != "clnp":
            del dump["forgetting"], dump["search"]["alpha"]
            dump["search"]["strength"] = list(self.strengths)
            dump["method"] = self.method
        return dict(_flatten(dump))

    def differences(self, recorded: Sweep) -> list[str]:
        """Why this sweep cannot go on with a run of another one: `key: here, there` for each setting that keeps it.

        More tasks than the run has are none, where those that it has stay as they are.
        """
        found = [
            f"{key}: {mine} here, {theirs} there"
            for key, (mine, theirs) in self.differing([recorded]).items()
            if key != "scenario.tasks"
        ]
        here, there = self.scenario.tasks, recorded.scenario.tasks
        if here != there and "scenario.tasks" in self.settings:
            found.append(f"scenario.tasks: {here} here, {there} there (the tasks so far would be others)")
        elif here is not None and there is not None and here < there:
            found.append(f"scenario.tasks: {here} here, {there} there (a run can be given more tasks, not fewer)")
        return found

    def differing(self, others: Sequence[Sweep]) -> dict[str, list[Any]]:
        """The settings that decide results and are not the same in all: values by key, this sweep's own first."""
        flats = []
        for sweep in (self, *others):
            rest = sweep.model_dump(mode="json", include={"scenario": {"tasks"}, "search": True, "capacity": True})
            del rest["search"]["max_failures"]
            flats.append(sweep.settings | dict(_flatten(rest)))
        keys = dict.fromkeys(key for flat in flats for key in flat)
        values = {key: [flat.get(key) for flat in flats] for key in keys}
        # As text: the order of an alpha's patterns counts, and a switch is no number.
        return {key: each for key, each in values.items() if len({json.dumps(value) for value in each}) > 1}


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
