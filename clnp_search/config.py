"""A sweep file as frozen, validated objects. Every fault is named at once, before any work.

Torch is imported where it is needed, so that a faulty file is refused at once and Ray starts without waiting for it.
"""

from __future__ import annotations

import difflib
import io
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    FiniteFloat,
    StrictBool,
    Tag,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from ruamel.yaml import YAML
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from clnp_search.errors import InputError
from clnp_search.importing import IMPORT_PATH, described, imported
from clnp_search.records import margin_text
from clnp_search.storage import MAX_SWEEP_BYTES, NAME_PATTERN, VERSION, RunFolder, join_uri
from clnp_search.tasks import SCENARIOS, Kind, Scenario, Wanted, kind_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from clnp_search.clnp.baselines import Baseline
    from clnp_search.clnp.graph import Graph
    from clnp_search.clnp.state import Architecture, State
    from clnp_search.clnp.trace import Traced
    from clnp_search.clnp.training import TrainingSettings
    from clnp_search.records import TaskPlan


def _parse_share(value: Any) -> Any:
    """A percentage as the fraction that it is; all else stays."""
    if isinstance(value, str) and value.strip().endswith("%"):
        try:
            return float(value.strip().removesuffix("%")) / 100
        except ValueError:
            raise ValueError("write a percentage such as 0.05%, or a fraction such as 0.0005") from None
    return value


def _parse_margin(value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool) and value >= 0.5:
        raise ValueError(
            f"a bare number is a fraction of 1, so {value} would allow a loss of {value:.0%} of accuracy; "
            f"write '{value}%' if you mean percentage points"
        )
    if isinstance(value, str) and not value.strip().endswith("%"):
        raise ValueError("write a percentage such as 0.05%, or a fraction such as 0.0005")
    return _parse_share(value)


def _check_spent(value: Any) -> Any:
    if value == "auto":
        return value
    value = _parse_margin(value) if not isinstance(value, str) or value.strip().endswith("%") else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ValueError("write a percentage such as 0.05%, a fraction such as 0.0005, or auto")
    return value


def _check_alpha(value: Any) -> Any:
    if isinstance(value, Mapping) and not _is_range(value) and value:
        return {str(pattern): _check_part(each) for pattern, each in value.items()}
    if isinstance(value, list | tuple) and value:
        return tuple(_check_part(each) for each in value)
    return _check_part(value)


def _check_part(value: Any) -> Any:
    if isinstance(value, Range) or _is_range(value):
        return Range.model_validate(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise ValueError(
            "write a number of 0 or more, a list with one for each layer and the head last, or one for each pattern "
            'of layer names, such as {"layer1.*": 1e-6, "*": 1e-5}; or, for each of them, {low: 1e-7, high: 1e-3}'
        )
    return float(value)


def _check_rate(value: Any) -> Any:
    if isinstance(value, Range) or _is_range(value):
        return Range.model_validate(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ValueError("write a number above 0; or, for random and optuna, {low: 1e-4, high: 1e-2}")
    return float(value)


def _is_range(value: Any) -> bool:
    return isinstance(value, Mapping) and set(value) == {"low", "high"}


def _check_conv_layer(value: Any) -> Any:
    units = value.removeprefix("valid ").strip() if isinstance(value, str) and value.startswith("valid ") else value
    units = int(units) if isinstance(units, str) and units.isdecimal() and value != units else units
    if value != "pool" and (isinstance(units, bool) or not isinstance(units, int) or units < 1):
        raise ValueError("write a number of channels, `valid N` for N channels without padding, or `pool`")
    return f"valid {units}" if isinstance(value, str) and value != "pool" else value


def _parse_validation(value: Any) -> Any:
    value = _parse_share(value)
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if not whole and not (isinstance(value, float) and 0 < value < 1):
        raise ValueError("write a number of samples, 1 or more, or a share of them such as 10% or 0.1")
    return value


def _check_scenario(name: str) -> str:
    if kind_of(name) is None:
        close = difflib.get_close_matches(name, SCENARIOS, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"allowed: {', '.join(SCENARIOS)}, torchvision:NAME, package.module:function{hint}")
    return name


def _require_different(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len({margin_text(each) if isinstance(each, float) else each for each in values}) < len(values):
        raise ValueError("a value is there twice")
    return values


def _list_or_one(item: Any, least: int = 1) -> BeforeValidator:
    """Takes a single value for a list of one; a list has so many at least."""

    def as_list(value: Any) -> Any:
        return value if isinstance(value, list | tuple) else [value]

    return BeforeValidator(as_list, json_schema_input_type=item | Annotated[tuple[item, ...], Field(min_length=least)])


def _or_empty(section: Any) -> BeforeValidator:
    """Takes the name of a section with nothing below it for one that is all defaults."""
    return BeforeValidator(lambda value: {} if value is None else value, json_schema_input_type=section | None)


# Strict: YAML has numbers of its own, and `true` is none of them. What a validator takes before it is parsed is said by
# its `json_schema_input_type`, so that the schema for editors takes the same.
Count = Annotated[int, Field(strict=True, ge=0)]
PositiveCount = Annotated[int, Field(strict=True, ge=1)]
NonNegative = Annotated[FiniteFloat, Field(strict=True, ge=0)]
Positive = Annotated[FiniteFloat, Field(strict=True, gt=0)]
Text = Annotated[str, Field(min_length=1)]
_Percentage = Annotated[str, Field(pattern=r"^\s*\d+(\.\d*)?([eE][+-]?\d+)?\s*%\s*$")]
Margin = Annotated[
    float,
    Field(strict=True, ge=0, lt=1),
    BeforeValidator(_parse_margin, json_schema_input_type=Annotated[float, Field(ge=0, lt=0.5)] | _Percentage),
]
Spent = Annotated[
    float | Literal["auto"], BeforeValidator(_check_spent, json_schema_input_type=Margin | Literal["auto"])
]
Growth = Annotated[
    float,
    Field(strict=True, gt=0, le=10),
    BeforeValidator(_parse_share, json_schema_input_type=Annotated[float, Field(gt=0, le=10)] | _Percentage),
]
Validation = Annotated[
    int | float,
    BeforeValidator(
        _parse_validation,
        json_schema_input_type=PositiveCount | Annotated[float, Field(gt=0, lt=1)] | _Percentage,
    ),
]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Range(_Section):
    """Values to draw from, on a logarithmic scale."""

    low: Positive
    """The smallest."""
    high: Positive
    """The largest."""

    @model_validator(mode="after")
    def _is_not_empty(self) -> Range:
        if self.low >= self.high:
            raise ValueError(f"low: {self.low:g} is not below high: {self.high:g}")
        return self

    def rounded(self, value: float) -> float:
        """A value of it with four digits, which is what people want to read and type."""
        return min(self.high, max(self.low, float(f"{value:.4g}")))


Objective = Literal["accuracy", "sparsity"]
AlphaPart = float | Range
AlphaValue = AlphaPart | tuple[AlphaPart, ...] | dict[str, AlphaPart]
_AlphaInput = (
    NonNegative
    | Range
    | Annotated[tuple[NonNegative | Range, ...], Field(min_length=1)]
    | Annotated[dict[str, NonNegative | Range], Field(min_length=1)]
)
Alpha = Annotated[AlphaValue, BeforeValidator(_check_alpha, json_schema_input_type=_AlphaInput)]
Rate = Annotated[float | Range, BeforeValidator(_check_rate, json_schema_input_type=Positive | Range)]
ConvLayer = Annotated[
    PositiveCount | str,
    BeforeValidator(
        _check_conv_layer,
        json_schema_input_type=PositiveCount | Annotated[str, Field(pattern=r"^(pool|valid [1-9]\d*)$")],
    ),
]
ScenarioName = Annotated[
    str,
    AfterValidator(_check_scenario),
    WithJsonSchema({"anyOf": [{"enum": list(SCENARIOS)}, {"type": "string", "pattern": f"^{IMPORT_PATH}$"}]}),
]
ClassName = Annotated[str, BeforeValidator(str, json_schema_input_type=str | int)]
ClassNames = Annotated[tuple[ClassName, ...], Field(min_length=1)]


class AugmentConfig(_Section):
    """Random changes of training images, in training batches only, the same for all points of a pack."""

    crop: Count = 0
    """Move each image by up to so many pixels in each direction; zeros move in."""
    flip: StrictBool = False
    """Mirror half of the images, left to right."""

    @property
    def settings(self) -> dict[str, Any]:
        """Of `clnp.augment.augment`; empty if nothing is changed."""
        return self.model_dump() if self.crop or self.flip else {}


class ScenarioConfig(_Section):
    """The sequence of tasks."""

    name: ScenarioName
    """Which scenario: permuted_digits, permuted_mnist, split_digits, split_mnist;
    split_cifar (CIFAR-10, then CIFAR-100 ten classes at a time);
    class_folders (images in train/CLASS/ and test/CLASS/ of a folder or zip);
    torchvision:NAME (any of torchvision's classification data sets, its classes split into tasks);
    or package.module:function, your own, which returns the tasks (see `clnp_search.tasks.OwnTask`)."""
    tasks: PositiveCount | None = None
    """Number of tasks; the classes are shared out evenly, in order. Default: 10 for permuted_mnist, 6 for split_cifar,
    as many as there are lists of classes, all of your own, else 5."""
    validation: Validation = 300
    """Samples held out of each task's training set to choose by, or a share of it: '10%' or 0.1.
    Default: by scenario (10000 for permuted_mnist, 10% for images)."""
    scaling: Literal["standard", "unit"] = "standard"
    """Of the inputs: each channel's mean 0 and deviation 1 over the first task's training split (no validation sample
    and no later task is looked at), or raw values divided by their maximum."""
    root: Text = "data/"
    """Folder of the data sets, as torchvision lays it out; downloads go here. For split_cifar also of cifar10.zip and
    cifar100.zip (class folders). For class_folders the folder or zip itself."""
    classes: Annotated[tuple[ClassNames, ...], Field(min_length=1)] | None = None
    """One list of class names for each task, instead of equal shares (class_folders, torchvision)."""
    size: tuple[PositiveCount, PositiveCount] | None = None
    """[height, width] that every image is resized to (class_folders, torchvision)."""
    arguments: dict[str, Any] = {}
    """What your own function, or torchvision's data set, is called with, by name."""
    augment: AugmentConfig = AugmentConfig()
    """Random crops and flips of training images."""

    @model_validator(mode="before")
    @classmethod
    def _scenario_defaults(cls, values: Any) -> Any:
        if isinstance(values, dict) and (kind := kind_of(str(values.get("name")))):
            classes = values.get("classes")
            tasks = len(classes) if isinstance(classes, list | tuple) and classes else kind.tasks
            given = {key: value for key, value in values.items() if value is not None}
            return {"tasks": tasks, "validation": kind.validation, **given}
        return values


class MlpConfig(_Section):
    """A multilayer perceptron."""

    flatten: ClassVar[bool] = True
    name: Literal["mlp"] = "mlp"
    """mlp: a multilayer perceptron."""
    hidden: Annotated[tuple[PositiveCount, ...], Field(min_length=1), _list_or_one(PositiveCount)]
    """Units of each hidden layer."""
    activation: Literal["relu", "sigmoid", "tanh"] = "relu"
    """Activation of the hidden layers."""

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Its layers, the head last."""
        return (*(f"hidden{index}" for index in range(len(self.hidden))), "head")

    def graph(self, input_shape: tuple[int, ...], head_bias: bool) -> Graph:
        """The network for samples of a shape: (values,)."""
        from clnp_search.clnp.graph import mlp

        return mlp(input_shape[0], self.hidden, self.activation, head_bias)


class ConvConfig(_Section):
    """A convolutional network."""

    flatten: ClassVar[bool] = False
    name: Literal["conv"]
    """conv: 3 x 3 convolutions and maximum pools, then dense layers."""
    layers: Annotated[tuple[ConvLayer, ...], Field(min_length=1), _list_or_one(ConvLayer)]
    """Channels of each convolution (padding 1), `valid N` for N channels without padding, or `pool` (2 x 2)."""
    dense: tuple[PositiveCount, ...] = ()
    """Units of the dense layers after them."""
    activation: Literal["relu", "sigmoid", "tanh"] = "relu"
    """Activation of the hidden layers."""
    dropout: Annotated[float, Field(strict=True, ge=0, lt=1)] = 0.0
    """After each pool; twice as much, at most a half, after each dense layer."""
    batch_norm: StrictBool = False
    """Whether each convolution is normalised; it then has no bias."""

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Its layers, the head last."""
        convolutions = range(sum(entry != "pool" for entry in self.layers))
        dense = range(len(self.dense))
        return (*(f"conv{index}" for index in convolutions), *(f"dense{index}" for index in dense), "head")

    def graph(self, input_shape: tuple[int, ...], head_bias: bool) -> Graph:
        """The network for samples of a shape: (C, H, W)."""
        from clnp_search.clnp.graph import conv

        settings = self.model_dump(exclude={"name"})
        return conv(input_shape, **settings, head_bias=head_bias)


class ZenkeConfig(_Section):
    """The convolutional network of Zenke, Poole and Ganguli (2017)."""

    flatten: ClassVar[bool] = False
    name: Literal["zenke"]
    """zenke: convolutions of 32, 32, 64 and 64 channels, two pools, 512 dense units, dropout."""
    width: Positive = 1.0
    """How many times as wide each layer is."""

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Its layers, the head last."""
        return ("conv0", "conv1", "conv2", "conv3", "dense0", "head")

    def graph(self, input_shape: tuple[int, ...], head_bias: bool) -> Graph:
        """The network for samples of a shape: (C, H, W)."""
        from clnp_search.clnp.graph import zenke

        return zenke(input_shape, self.width, head_bias)


class ModuleConfig(_Section):
    """A network of your own: an nn.Module that takes batches of samples and gives logits."""

    flatten: ClassVar[bool] = False
    layer_names: ClassVar[tuple[str, ...]] = ()  # known only when it is made
    module: Annotated[str, Field(pattern=f"^{IMPORT_PATH}$")]
    """Import path of its class, or of a function that returns one: package.module:name."""
    arguments: dict[str, Any] = {}
    """What that is called with, by name."""

    def make(self, folders: Sequence[Path], seed: int) -> nn.Module:
        """A new one, drawn under a seed.

        Args:
            folders: Where its Python module may lie, if it is not installed.

        Raises:
            InputError: There is none.
        """
        import torch

        where = f"network.module: {self.module!r}"
        with imported("network.module", self.module, folders) as make, torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                module = make(**self.arguments)
            except Exception as error:  # a user's constructor may raise anything
                raise InputError(f"{where}: called with {self.arguments}, it raised {described(error)}") from error
        if not isinstance(module, torch.nn.Module):
            raise InputError(f"{where}: gives a {type(module).__name__}; wanted is a torch.nn.Module")
        return module


NETWORKS: dict[str, type[_Section]] = {
    "(mlp)": MlpConfig,
    "(conv)": ConvConfig,
    "(zenke)": ZenkeConfig,
    "(module)": ModuleConfig,
}


def _network_kind(value: Any) -> str:
    """Which of `NETWORKS` describes a network."""
    if isinstance(value, _Section):
        return next(kind for kind, section in NETWORKS.items() if type(value) is section)
    if not isinstance(value, Mapping):
        return "none"
    return "(module)" if "module" in value else f"({value.get('name', 'mlp')})"


NetworkConfig = Annotated[
    Annotated[MlpConfig, Tag("(mlp)")]
    | Annotated[ConvConfig, Tag("(conv)")]
    | Annotated[ZenkeConfig, Tag("(zenke)")]
    | Annotated[ModuleConfig, Tag("(module)")],
    Discriminator(
        _network_kind,
        custom_error_type="network",
        custom_error_message="allowed: name: mlp, conv or zenke, or module: package.module:name of your own",
    ),
]


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
    l1: Literal["subgradient", "proximal"] = "subgradient"
    """How the L1 penalty acts: by its sub-gradient, as in the paper, or by soft thresholds after each step."""
    l1_scales: NonNegative = 1.0
    """L1 on the scales of normalisation layers, as a multiple of alpha: a normalised layer does not feel the size of
    its weights, so that L1 on them alone empties no unit."""
    compensate: StrictBool = False
    """Whether pruning folds what a pruned unit gives on average into the biases, still free, of what reads it."""
    precision: Literal["float32", "tf32", "bf16"] = "float32"
    """Of the matrix products; parameters and optimizer state stay float32. tf32 equals float32 on a CPU."""

    @property
    def settings(self) -> TrainingSettings:
        """The same for `clnp/`."""
        from clnp_search.clnp.training import TrainingSettings

        return TrainingSettings(**self.model_dump())


class SearchConfig(_Section):
    """The points of each task."""

    tasks: Literal["every", "first"] = "every"
    """Search on every task, or on the first only: later tasks reuse its choice."""
    alpha: Annotated[tuple[Alpha, ...], Field(min_length=1), _list_or_one(Alpha)] = (1e-6, 1e-5, 1e-4)
    """L1 coefficients to try: each a number; a list with one for each layer, the head last (`clnp-search network` shows
    their order); or one for each pattern of layer names, the first match wins: {"layer1.*": 1e-6, "*": 1e-5}. For
    random and optuna a single one, in which each number may be a range {low: 1e-7, high: 1e-3}."""
    learning_rate: Annotated[tuple[Rate, ...], Field(min_length=1), _list_or_one(Rate)] = (0.001, 0.002)
    """Learning rates to try; for random and optuna a single one, or a range."""
    strength: Annotated[tuple[NonNegative, ...], Field(min_length=1), _list_or_one(NonNegative)] | None = None
    """Of a baseline, instead of `alpha`: strengths of its penalty (ewc: lambda; si: c), or shares of each layer's
    free weights that a task prunes and gives back (packnet). Default: a few of each method's."""
    algorithm: Literal["grid", "random", "optuna"] = "grid"
    """grid: all values of alpha with all learning rates. random: `points` draws from ranges {low: , high: }. optuna:
    `points` draws, each batch of them on the results of those before."""
    points: PositiveCount | None = None
    """How many random and optuna try. Default: 24."""
    batch: PositiveCount | None = None
    """How many optuna asks for at a time, which are packed and trained side by side. Default: a quarter of them."""
    sampler: Literal["tpe", "gp", "nsga2"] = "tpe"
    """Of optuna: tree-structured Parzen estimator, Gaussian process, or a genetic algorithm."""
    objectives: Annotated[
        tuple[Objective, ...], Field(min_length=1), AfterValidator(_require_different), _list_or_one(Objective)
    ] = ("accuracy", "sparsity")
    """What optuna raises: validation accuracy before pruning; sparsity after its scan, of a point inside the margin."""
    points_per_trial: Literal["auto"] | PositiveCount = "auto"
    """Grid points that one Ray Tune trial trains together; auto keeps all devices busy that have enough to do for the
    start of a trial to pay, within their memory."""
    max_failures: Count = 2
    """How often a pack or a threshold scan is tried again after a fault of the machine, such as a dead process."""

    @property
    def num_points(self) -> int:
        """How many points a searched task tries."""
        if self.algorithm == "grid":
            return len(self.alpha) * len(self.learning_rate)
        return self.points or DRAWN_POINTS

    @property
    def batch_size(self) -> int:
        """How many points are decided at a time."""
        return min(self.num_points, self.batch or math.ceil(self.num_points / 4))

    @property
    def ranges(self) -> dict[str, Range]:
        """What is drawn, by name: `alpha`, or `alpha[LAYER]` by number or pattern, and `learning_rate`."""
        parts = _parts(self.alpha[0]) | {"learning_rate": self.learning_rate[0]}
        return {name: part for name, part in parts.items() if isinstance(part, Range)}

    @property
    def rates(self) -> list[float]:
        """The learning rates of a grid."""
        return [rate for rate in self.learning_rate if not isinstance(rate, Range)]

    @property
    def grid(self) -> list[tuple[AlphaValue, float]]:
        """Every alpha with every learning rate, in order."""
        return [(alpha, rate) for alpha in self.alpha for rate in self.rates]

    def at(self, drawn: Mapping[str, float]) -> tuple[AlphaValue, float]:
        """Alpha and learning rate with values in place of their ranges."""
        alpha, rate = self.alpha[0], drawn.get("learning_rate", self.learning_rate[0])
        values: list[Any] = [drawn.get(name, part) for name, part in _parts(alpha).items()]
        assert not isinstance(rate, Range), "every range is drawn"
        if isinstance(alpha, dict):
            return dict(zip(alpha, values, strict=True)), rate
        return tuple(values) if isinstance(alpha, tuple) else values[0], rate


class ForgettingConfig(_Section):
    """How much accuracy may be given up for capacity, and how units are pruned."""

    margin: Spent = 0.0005
    """Allowed loss of validation accuracy: '0.05%' or 0.0005. auto: for each task the least of 0, 0.05, 0.1, 0.2, 0.5,
    1, 2, 3, 5, 8, 12 and 20% with which the free units of every group last for all tasks if later ones take as many."""
    auto_limit: Margin = 0.05
    """The most that auto may spend on a task. Fine-tune rounds make up for much of a large margin."""
    theta: Literal["global", "per_layer"] = "global"
    """One activity threshold for all layers, or one for each."""
    theta_steps: Annotated[int, Field(strict=True, ge=2)] | None = None
    """Try only so many of the thresholds, evenly spaced, where a scan of all takes too long: the answer is inside the
    margin all the same, and may keep more units than needed. Default: all."""
    sparsity: Literal["units", "weights", "scarcest_layer"] = "units"
    """What the chosen model has most of: free units, free weights, or free units in its fullest layer."""
    finetune_rounds: Count = 0
    """Rounds of prune and retrain, for every candidate; each is held to the margin of the model before pruning."""
    finetune_epochs: Count = 0
    """Epochs of each round."""
    finetune_l1: NonNegative = 1.0
    """What multiplies alpha in these rounds: less lets what is left become more accurate, more empties it further."""

    @property
    def margins(self) -> tuple[float, ...]:
        """The margins that a task may spend, the least first."""
        if self.margin != "auto":
            return (self.margin,)
        return (*(margin for margin in AUTO_MARGINS if margin < self.auto_limit), self.auto_limit)

    @property
    def rule(self) -> str:
        """How a threshold is searched, as `clnp.scan.scan` takes it."""
        return f"{self.theta}-of-{self.theta_steps}" if self.theta_steps else self.theta

    @model_validator(mode="after")
    def _rounds_have_epochs(self) -> ForgettingConfig:
        if (self.finetune_rounds > 0) != (self.finetune_epochs > 0):
            raise ValueError(
                f"finetune_rounds: {self.finetune_rounds} and finetune_epochs: {self.finetune_epochs} go together; "
                "set both, or neither"
            )
        return self


class CapacityConfig(_Section):
    """What happens when a layer has no free unit left."""

    on_depletion: Literal["continue", "stop", "expand"] = "continue"
    """Go on (a full network still trains new heads on its features), end the sequence, or widen each full group before
    the next task."""
    expand_by: Growth = 0.25
    """By how much a full group is widened: '25%' or 0.25 of its units."""


class ResourcesConfig(_Section):
    """What each trial is given."""

    cpu: PositiveCount = 1
    """CPU cores, and threads, of each trial."""
    gpu: NonNegative = 0.0
    """GPUs of each trial; a fraction is a share of one, and of its memory."""

    @property
    def device(self) -> str:
        """Where trials compute."""
        return "cuda" if self.gpu else "cpu"

    @model_validator(mode="after")
    def _whole_or_fraction(self) -> ResourcesConfig:
        if self.gpu > 1 and self.gpu != int(self.gpu):
            raise ValueError(f"gpu: {self.gpu} is neither a fraction of one GPU nor a whole number")
        return self


class TrackingConfig(_Section):
    """Where MLflow records go."""

    uri: Text = "sqlite:///mlflow.db"
    """MLflow tracking URI; `none` switches tracking off."""
    models: StrictBool = True
    """Log the network of every task as an MLflow model when the sequence ends (extra `onnx`); else `clnp-search
    register` does it."""


class Sweep(_Section):
    """A sweep file: one task sequence, and the search for the cheapest model of each task."""

    name: Annotated[str, Field(pattern=NAME_PATTERN)] = "sweep"
    """Name of the run and of the MLflow experiment. Default: the file's name."""
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**63)] = 0
    """Of everything random: splits, permutations, initial weights, data order."""
    repetitions: PositiveCount = 1
    """A sequence for each of so many seeds, from `seed` on; see also `margins`."""
    margins: Annotated[tuple[Margin, ...], AfterValidator(_require_different), _list_or_one(Margin, least=0)] = ()
    """A sequence for each of these margins, instead of the one of `forgetting`; what they share is trained once."""
    method: Literal["clnp", "single_task", "finetune", "joint", "ewc", "si", "packnet"] = "clnp"
    """How the network goes from task to task: clnp; or one to compare it with, on the same networks, tasks and seeds.
    Of those, `search.alpha`, `forgetting` and what prunes or penalises by L1 say nothing."""
    scenario: ScenarioConfig
    network: NetworkConfig
    head: Annotated[HeadConfig, _or_empty(HeadConfig)] = HeadConfig()
    training: Annotated[TrainingConfig, _or_empty(TrainingConfig)] = TrainingConfig()
    search: Annotated[SearchConfig, _or_empty(SearchConfig)] = SearchConfig()
    forgetting: Annotated[ForgettingConfig, _or_empty(ForgettingConfig)] = ForgettingConfig()
    capacity: Annotated[CapacityConfig, _or_empty(CapacityConfig)] = CapacityConfig()
    resources: Annotated[ResourcesConfig, _or_empty(ResourcesConfig)] = ResourcesConfig()
    storage: Text = "runs/"
    """Folder or URI under which run folders are made."""
    tracking: Annotated[TrackingConfig, _or_empty(TrackingConfig)] = TrackingConfig()
    modules: Annotated[tuple[Text, ...], _list_or_one(Text)] = (".",)
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
        faults = [fault for index, each in enumerate(self.search.alpha) for fault in _alpha_faults(index, each, layers)]
        if faults:
            raise InputError("\n".join(faults))
        parts = _parts(alpha)
        values = [parts[name] for name in alpha_parts(alpha, layers)]
        assert not any(isinstance(each, Range) for each in values), "every range is drawn"
        return tuple(float(each) for each in values if not isinstance(each, Range))

    def to_yaml(self) -> str:
        """The resolved sweep, every default written out."""
        stream = io.StringIO()
        writer = YAML()
        writer.default_flow_style = None
        writer.dump(_quoted(self.model_dump(mode="json")), stream)
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
        if self.capacity.on_depletion == "expand":
            dump["capacity"] = self.capacity.model_dump(mode="json")
        if self.method != "clnp":
            del dump["forgetting"], dump["search"]["alpha"]
            dump["search"]["strength"] = list(self.strengths)
            dump["method"] = self.method
        return dict(_flatten(dump))

    def overridden(self, overrides: Sequence[str], source: str = "--set") -> Sweep:
        """This sweep with `key=value` overrides applied.

        Args:
            source: What faults are said to be of.

        Raises:
            InputError: As `load_sweep`.
        """
        raw = self.model_dump(mode="json")
        for override in overrides:
            _apply_override(raw, override)
        return parse_sweep(raw, source)

    def planned_with(self, settings: Mapping[str, Any]) -> Sweep:
        """This sweep with the settings of training, search and forgetting that a task was planned with.

        Args:
            settings: As `settings` gives them.

        Raises:
            InputError: They are none.
        """
        raw = self.model_dump(mode="json")
        for section, values in UNRECORDED.items():
            raw[section] |= values
        for key, value in settings.items():
            section, _, name = key.partition(".")
            if section in FORKED_SECTIONS:
                raw[section][name] = value
        return parse_sweep(raw, "a task's recorded settings")

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
        return {key: each for key, each in values.items() if any(value != each[0] for value in each)}


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
DRAWN_POINTS = 24
# Of a sweep file: values, keys and lists among them, and how deep these may be nested. So few aliases repeat a value at
# most 60,000 times, however they are nested.
MAX_VALUES, MAX_DEPTH, MAX_ALIASES = 100_000, 32, 30
WORD = re.compile(r"[A-Za-z_/][A-Za-z0-9_./-]*")
UNWRITABLE = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff\ud800-\udfff]")
ALIAS = re.compile(r"""(?:^|[\s\[{,:])\*[^\s\]},"']""")
AUTO_MARGINS = (0.0, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2)
# What is tried by default of the baselines that have a strength.
STRENGTHS = {"ewc": (100.0, 1000.0, 10000.0), "si": (0.1, 1.0, 10.0), "packnet": (0.5, 0.75)}
# What a fork may change: what was decided before its first own task stays as it was.
FORKED_SECTIONS = ("training", "search", "forgetting")


def load_sweep(path: Path, overrides: list[str] | None = None) -> Sweep:
    """The sweep in a YAML file, with `key=value` overrides applied.

    Raises:
        InputError: The file cannot be read or has faults; names each with its key, its value and what is allowed.
    """
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_SWEEP_BYTES + 1)
        text = data.decode()
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    if len(data) > MAX_SWEEP_BYTES:
        raise InputError(f"{path}: a sweep file has at most {MAX_SWEEP_BYTES} bytes; this one has more")
    raw = _parse_yaml(text, str(path))
    if not isinstance(raw, dict):
        raise InputError(f"{path}: a sweep file holds keys such as scenario and network; this one holds {raw!r:.80}")
    for override in overrides or []:
        _apply_override(raw, override)
    raw.setdefault("name", path.stem)
    raw.setdefault("modules", list(dict.fromkeys([str(path.parent), "."])))
    return parse_sweep(raw, str(path))


def parse_sweep(raw: dict[str, Any], source: str) -> Sweep:
    """The sweep that plain data describe.

    Raises:
        InputError: As `load_sweep`.
    """
    raw, sweep = _plain(raw, source), None
    faults: list[str] = []
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
        faults.extend(_grid_faults(sweep))
        faults.extend(_method_faults(sweep))
    if faults or sweep is None:
        listed = "\n".join(f"  {fault}" for fault in dict.fromkeys(faults))
        raise InputError(f"{source}: {len(dict.fromkeys(faults))} fault(s)\n{listed}")
    return sweep


def network_state(folder: RunFolder, sweep: Sweep, task: int) -> State:
    """The state that a committed task is computed from: the latest, or its own if it keeps a network of its own.

    Raises:
        InputError: It is not committed.
        Damaged: As `RunFolder.read_state`.
    """
    alone = sweep.baseline is not None and sweep.baseline.ALONE
    return folder.read_state(task if alone else len(folder.read_results()) - 1)


def sweep_of(folder: RunFolder) -> Sweep:
    """The resolved sweep of a run.

    Raises:
        InputError: This is no run folder, or its sweep is of another version.
    """
    source = join_uri(folder.uri, "sweep.yaml")
    raw = _parse_yaml(folder.read_sweep(), source)
    try:
        return parse_sweep(raw if isinstance(raw, dict) else {}, source)
    except InputError as error:
        if (writer := folder.written_by()) in ("", f"clnp-search {VERSION}"):
            raise
        raise InputError(f"{error}\nThe run was begun by {writer}; this is {VERSION}.") from error


def sweep_at(folder: RunFolder, sweep: Sweep, plan: TaskPlan) -> Sweep:
    """The settings of a task: the run's own, or those that a task which it shares with another run was planned with."""
    fork = folder.read_fork()
    return sweep if fork is None or plan.task > fork.after_task else sweep.planned_with(plan.settings)


def _parse_yaml(text: str, source: str) -> Any:
    if "&" in text and len(ALIAS.findall(text)) > MAX_ALIASES:
        raise InputError(f"{source}: more than {MAX_ALIASES} YAML aliases")
    try:
        return YAML(typ="safe", pure=True).load(text)
    except Exception as error:  # of a text that is no YAML, the parser raises many kinds
        raise InputError(f"{source}: not a YAML file: {error}") from error


def _quoted(value: Any) -> Any:
    """The same with all text in quotes that is more than a word: the writer does not see all that needs them."""
    if isinstance(value, Mapping):
        return {_quoted(name): _quoted(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_quoted(each) for each in value]
    return DoubleQuotedScalarString(value) if isinstance(value, str) and not WORD.fullmatch(value) else value


def _plain(raw: Any, source: str) -> Any:
    """A copy of what a file or a script gave, of such values alone as JSON has too, and with text for keys.

    What YAML's aliases repeat is counted as often as it is repeated.

    Raises:
        InputError: There are other values in it, or too many.
    """
    left, faults = MAX_VALUES, list[str]()

    def plain(value: Any, key: str, depth: int) -> Any:
        nonlocal left
        left -= 1
        if left < 0 or depth > MAX_DEPTH:
            raise InputError(f"{source}: {key:.80}: more than {MAX_VALUES} values, or nested {MAX_DEPTH} deep")
        if isinstance(value, Mapping):
            below = f"{key}." if key else ""
            faults.extend(f"{key}: a key of it is {_not_plain(name)}" for name in value if _not_plain(name))
            names = {name: str(name) for name in value if not _not_plain(name)}
            return {name: plain(value[each], f"{below}{name}", depth + 1) for each, name in names.items()}
        if isinstance(value, list | tuple):
            return [plain(each, f"{key}[{index}]", depth + 1) for index, each in enumerate(value)]
        if what := _not_plain(value):
            faults.append(f"{key}: {what}")
        return value

    copy = plain(raw, "", 0)
    if faults:
        listed = "\n".join(f"  {fault}" for fault in faults)
        raise InputError(f"{source}: {len(faults)} fault(s)\n{listed}")
    return copy


def _not_plain(value: Any) -> str:
    """What a value is that JSON and YAML do not give back as it was written, and what is allowed; else nothing."""
    if isinstance(value, str):
        return f"{value!a:.80}: a character of it cannot be printed" if UNWRITABLE.search(value) else ""
    if isinstance(value, int):
        return "" if -(2**63) <= value < 2**64 else "a whole number; allowed: of up to 64 bits"
    if value is None or (isinstance(value, float) and math.isfinite(value)):
        return ""
    return f"{value!a:.80}: allowed: text, numbers, true, false, null, and lists and mappings of these"


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key.strip():
        raise InputError(f"--set {override}: write key=value, for example --set training.epochs=3")
    *sections, last = key.strip().split(".")
    place: Any = raw
    for section in sections:
        if isinstance(place, dict):
            place[section] = {} if place.get(section) is None else place[section]
            place = place[section]
    if not isinstance(place, dict):
        raise InputError(f"--set {override}: {'.'.join(sections)} is no section")
    place[last] = _parse_yaml(value, f"--set {override}")


def _faults_between_sections(raw: dict[str, Any]) -> Iterator[str]:
    """Faults that need two keys to see; skipped where the keys that they lean on are faulty themselves."""
    scenario = raw.get("scenario")
    if isinstance(scenario, dict) and (kind := kind_of(str(scenario.get("name")))):
        yield from _scenario_faults(scenario, kind, raw.get("network"))


def _parts(alpha: AlphaValue) -> dict[str, AlphaPart]:
    """The numbers and ranges of an alpha, by name."""
    if isinstance(alpha, dict):
        return {f"alpha[{pattern}]": part for pattern, part in alpha.items()}
    return (
        {f"alpha[{index}]": part for index, part in enumerate(alpha)} if isinstance(alpha, tuple) else {"alpha": alpha}
    )


def alpha_parts(alpha: AlphaValue, layers: Sequence[str]) -> list[str]:
    """For each layer, the name of the part of an alpha that is its own, as in `SearchConfig.ranges`."""
    if isinstance(alpha, dict):
        return [f"alpha[{next(each for each in alpha if fnmatchcase(layer, each))}]" for layer in layers]
    return [f"alpha[{index}]" if isinstance(alpha, tuple) else "alpha" for index in range(len(layers))]


def _search_faults(search: SearchConfig) -> Iterator[str]:
    """Settings of an algorithm that another one is asked for, and ranges that there is nothing to draw from."""
    drawn = search.algorithm != "grid"
    for key in ("alpha", "learning_rate"):
        values = getattr(search, key)
        if drawn and len(values) > 1:
            yield (
                f"search.{key}: {len(values)} values; allowed with algorithm: {search.algorithm}: one, "
                "which may be a range {low: , high: }"
            )
        for index, value in enumerate(values):
            parts = _parts(value).values()
            if not drawn and any(isinstance(part, Range) for part in parts):
                yield f"search.{key}[{index}]: a range; allowed with algorithm: random or optuna"
    if drawn and not search.ranges:
        yield f"search.alpha: no range to draw from; allowed with algorithm: {search.algorithm}: {{low: , high: }}"
    for key, allowed in (("points", ("random", "optuna")), ("batch", ("optuna",))):
        if getattr(search, key) is not None and search.algorithm not in allowed:
            yield (
                f"search.{key}: {getattr(search, key)}; allowed with algorithm: {' or '.join(allowed)}, "
                f"not with {search.algorithm}"
            )


def _alpha_faults(index: int, alpha: AlphaValue, layers: Sequence[str]) -> Iterator[str]:
    """How an alpha of the grid does not fit a network's layers."""
    key, names = f"search.alpha[{index}]", shorten(", ".join(layers), 200, placeholder="...")
    if isinstance(alpha, tuple) and len(alpha) != len(layers):
        yield (
            f"{key}: {list(alpha)} has {len(alpha)} values; allowed: one number, or {len(layers)}, one for each layer, "
            f"the head last: {names}"
        )
    if isinstance(alpha, dict):
        for pattern in alpha:
            if not any(fnmatchcase(layer, pattern) for layer in layers):
                yield f"{key}: {pattern!r} matches no layer; there are {names}"
        left = [layer for layer in layers if not any(fnmatchcase(layer, pattern) for pattern in alpha)]
        if left:
            left_out = shorten(", ".join(left), 200, placeholder="...")
            yield f"{key}: no pattern matches {left_out}; a last pattern '*' takes the rest"


def _scenario_faults(scenario: dict[str, Any], kind: Kind, network: Any) -> Iterator[str]:
    name, tasks, classes = (scenario.get(key) for key in ("name", "tasks", "classes"))
    if kind.allowed_tasks and isinstance(tasks, int) and tasks not in kind.allowed_tasks:
        listed = ", ".join(map(str, kind.allowed_tasks))
        yield f"scenario.tasks: {tasks} tasks cannot share the classes of {name}; allowed: {listed}"
    for key in ("classes", "size", "arguments"):
        if scenario.get(key) and key not in kind.keys:
            allowed = ", ".join(kind.keys) or "none of classes, size, arguments"
            yield f"scenario.{key}: {name} has no such setting; allowed: {allowed}"
    if isinstance(classes, list) and all(isinstance(each, list) for each in classes):
        if isinstance(tasks, int) and tasks > len(classes):
            yield f"scenario.tasks: {tasks}; scenario.classes has {len(classes)} lists"
        for index, each in enumerate(classes):
            if twice := sorted({str(one) for one in each if each.count(one) > 1}):
                yield f"scenario.classes[{index}]: {', '.join(twice)} more than once"
    augment = scenario.get("augment")
    if isinstance(augment, dict) and any(augment.values()):
        if kind.permuted:
            yield f"scenario.augment: the images of {name} are permuted, and cannot be moved or mirrored"
        elif _network_kind(network) == "(mlp)":
            yield "scenario.augment: an mlp sees flat samples; allowed: a network that sees images"


def _grid_faults(sweep: Sweep) -> Iterator[str]:
    """Alphas that do not fit the network, as far as its layers are known, or values that give a point twice."""
    misused = list(_search_faults(sweep.search))
    yield from misused
    layers, alphas = sweep.network.layer_names, sweep.search.alpha
    misfits = [fault for index, each in enumerate(alphas) for fault in _alpha_faults(index, each, layers) if layers]
    yield from misfits
    known = layers and not misfits and not misused and sweep.search.algorithm == "grid"
    grids: dict[str, list[Any]] = {
        "alpha": [sweep.layer_alphas(alpha, layers) for alpha in alphas] if known else [*alphas],
        "learning_rate": [*sweep.search.learning_rate],
    }
    for key, values in grids.items():
        for index, value in enumerate(values):
            if (first := values.index(value)) < index:
                same, shown = getattr(sweep.search, key)[first], getattr(sweep.search, key)[index]
                yield f"search.{key}[{index}]: {shown} is search.{key}[{first}], {same}, again; allowed: each once"


def _method_faults(sweep: Sweep) -> Iterator[str]:
    """What a method cannot do."""
    strengths, method = sweep.search.strength, sweep.method
    if strengths is not None:
        if method not in STRENGTHS:
            yield f"search.strength: {list(strengths)}: method {method} has none; allowed: of {', '.join(STRENGTHS)}"
        elif method == "packnet" and max(strengths) >= 1:
            yield f"search.strength: {list(strengths)}: a share of weights to prune; allowed: 0 or more, less than 1"
        if len(set(strengths)) < len(strengths):
            yield f"search.strength: {list(strengths)}: a value is there twice; allowed: each once"
    if method == "clnp":
        return
    if sweep.search.algorithm != "grid":
        yield f"search.algorithm: {sweep.search.algorithm}: method {method} tries all strengths; allowed: grid"
    if sweep.search.tasks == "first" and method in ("ewc", "si") and len(sweep.strengths) > 1:
        yield f"search.tasks: first: {method} holds to earlier tasks alone; allowed: every, or one search.strength"
    if sweep.margins:
        yield f"margins: method {method} prunes by no margin; allowed: none"
    if sweep.capacity.on_depletion != "continue":
        yield f"capacity.on_depletion: {sweep.capacity.on_depletion}: method {method} uses all units; allowed: continue"
    if sweep.head.kind == "single" and sweep.head.bias == "per_task":
        yield f"head.bias: per_task: method {method} shares a single head and its bias; allowed: frozen, none"


def _explain(detail: Any) -> str:
    """One pydantic error as `key: value: what is allowed`."""
    location = [part for part in detail["loc"] if not _is_branch(part)]
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")
    if detail["type"] == "extra_forbidden":
        known = _keys_at(detail["loc"][:-1])
        close = difflib.get_close_matches(str(location[-1]), known, 1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}? " if close else ""
        return f"{key}: unknown key; {hint}Known here: {', '.join(known)}"
    if detail["type"] == "network" and isinstance(detail["input"], dict):
        return f"{key}.name: {detail['input'].get('name')!r}: {detail['msg']}"
    if detail["type"] == "missing":
        return f"{key}: missing; it has no default"
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "model_type":
        message = f"allowed: a section, with some of {', '.join(_keys_at(detail['loc']))}"
    elif detail["type"] == "tuple_type":
        message = "allowed: a list"
    elif detail["type"] == "too_short":
        message = f"allowed: a list of {detail['ctx']['min_length']} or more"
    return f"{key}: {detail['input']!r:.80}: {message[:1].lower() + message[1:]}"


def _keys_at(location: Sequence[Any]) -> list[str]:
    """The keys of the section at a pydantic location."""
    section: Any = Sweep
    for part in location:
        section = NETWORKS[part] if part in NETWORKS else section.model_fields[part].annotation
    return list(section.model_fields)


def _is_branch(part: str | int) -> bool:
    """Whether an entry of a pydantic location names a branch of a union instead of a key."""
    return isinstance(part, str) and (any(mark in part for mark in "[(") or part == "constrained-int")


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
