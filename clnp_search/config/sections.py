"""The sections of a sweep file, each with its settings, their defaults, and what they are for."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Discriminator, Field, StrictBool, Tag, model_validator

from clnp_search.config.values import (
    Alpha,
    AlphaValue,
    ClassNames,
    ConvLayer,
    Count,
    Growth,
    Margin,
    NonNegative,
    Objective,
    Place,
    Positive,
    PositiveCount,
    Range,
    Rate,
    ScenarioName,
    Section,
    Spent,
    Text,
    Validation,
    list_or_one,
    parts_of,
    require_different,
)
from clnp_search.errors import InputError
from clnp_search.importing import IMPORT_PATH, described, imported
from clnp_search.tasks import kind_of

if TYPE_CHECKING:
    from torch import nn

    from clnp_search.clnp.graph import Graph
    from clnp_search.clnp.training import TrainingSettings


class AugmentConfig(Section):
    """Random changes of training images, in training batches only, the same for all points of a pack."""

    crop: Count = 0
    """Move each image by up to so many pixels in each direction; zeros move in."""
    flip: StrictBool = False
    """Mirror half of the images, left to right."""

    @property
    def settings(self) -> dict[str, Any]:
        """Of `clnp.augment.augment`; empty if nothing is changed."""
        return self.model_dump() if self.crop or self.flip else {}


class ScenarioConfig(Section):
    """The sequence of tasks."""

    name: ScenarioName
    """Which scenario: permuted_digits, permuted_mnist, split_digits, split_mnist;
    split_cifar (CIFAR-10, then CIFAR-100 ten classes at a time);
    class_folders (images in train/CLASS/ and test/CLASS/ of a folder or zip);
    torchvision:NAME (a torchvision classification data set with a training and a test part, its classes split into
    tasks);
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
    arguments: dict[str, Any] = Field(default_factory=dict)
    """What your own function, or torchvision's data set, is called with, by name."""
    augment: AugmentConfig = AugmentConfig()
    """Random crops and flips of training images."""

    @model_validator(mode="before")
    @classmethod
    def _scenario_defaults(cls, values: Any) -> Any:
        if isinstance(values, dict) and (kind := kind_of(str(values.get("name")))):
            classes = values.get("classes")
            tasks = len(classes) if isinstance(classes, list | tuple) and classes else kind.tasks
            given = {key: value for key, value in values.items() if value is not None or key not in cls.model_fields}
            return {"tasks": tasks, "validation": kind.validation, **given}
        return values


class MlpConfig(Section):
    """A multilayer perceptron."""

    flatten: ClassVar[bool] = True
    name: Literal["mlp"] = "mlp"
    """mlp: a multilayer perceptron."""
    hidden: Annotated[tuple[PositiveCount, ...], Field(min_length=1), list_or_one(PositiveCount)]
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


class ConvConfig(Section):
    """A convolutional network."""

    flatten: ClassVar[bool] = False
    name: Literal["conv"]
    """conv: 3 x 3 convolutions and maximum pools, then dense layers."""
    layers: Annotated[tuple[ConvLayer, ...], Field(min_length=1), list_or_one(ConvLayer)]
    """Channels of each convolution (padding 1), `valid N` for N channels without padding, or `pool` (2 x 2)."""
    dense: tuple[PositiveCount, ...] = ()
    """Units of the dense layers after them."""
    activation: Literal["relu", "sigmoid", "tanh"] = "relu"
    """Activation of the hidden layers."""
    dropout: Annotated[float, Field(strict=True, ge=0, lt=1)] = 0.0
    """After each pool; twice as much, at most a half, after each dense layer."""
    batch_norm: StrictBool = False
    """Whether each convolution is normalised; it then has no bias."""

    @model_validator(mode="after")
    def _has_units(self) -> ConvConfig:
        if len(self.layer_names) == 1:
            raise ValueError("layers: pools alone have no unit that could be pruned; give channels, or a dense layer")
        return self

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


class ZenkeConfig(Section):
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


@contextmanager
def _drawing(seed: int) -> Iterator[None]:
    """Inside, torch, numpy and Python draw under a seed; outside, they go on as if nothing had been drawn."""
    import numpy as np
    import torch

    states = random.getstate(), np.random.get_state()  # noqa: NPY002 - what others draw from
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002


class ModuleConfig(Section):
    """A network of your own: an nn.Module that takes batches of samples and gives logits."""

    flatten: ClassVar[bool] = False
    layer_names: ClassVar[tuple[str, ...]] = ()  # known only when it is made
    module: Annotated[str, Field(pattern=f"^{IMPORT_PATH}$")]
    """Import path of its class, or of a function that returns one: package.module:name."""
    arguments: dict[str, Any] = Field(default_factory=dict)
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
        with imported("network.module", self.module, folders) as make, _drawing(seed):
            try:
                module = make(**self.arguments)
            except (Exception, SystemExit) as error:  # a user's constructor may raise anything
                raise InputError(f"{where}: called with {self.arguments}, it raised {described(error)}") from error
        if not isinstance(module, torch.nn.Module):
            raise InputError(f"{where}: gives a {type(module).__name__}; wanted is a torch.nn.Module")
        return module


NETWORKS: dict[str, type[Section]] = {
    "(mlp)": MlpConfig,
    "(conv)": ConvConfig,
    "(zenke)": ZenkeConfig,
    "(module)": ModuleConfig,
}


def network_kind(value: Any) -> str:
    """Which of `NETWORKS` describes a network."""
    if isinstance(value, Section):
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
        network_kind,
        custom_error_type="network",
        custom_error_message="allowed: name: mlp, conv or zenke, or module: package.module:name of your own",
    ),
]


class HeadConfig(Section):
    """The output layer."""

    kind: Literal["single", "multi"] = "multi"
    """One output layer for all tasks, or one for each."""
    bias: Literal["frozen", "per_task", "none"] = "frozen"
    """Of a single head: frozen after the first task, one for each task, or none."""


class TrainingConfig(Section):
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


DRAWN_POINTS = 24
# What is tried by default of the baselines that have a strength.
STRENGTHS = {"ewc": (100.0, 1000.0, 10000.0), "si": (0.1, 1.0, 10.0), "packnet": (0.5, 0.75)}


class SearchConfig(Section):
    """The points of each task."""

    tasks: Literal["every", "first"] = "every"
    """Search on every task, or on the first only: later tasks reuse its choice."""
    alpha: Annotated[tuple[Alpha, ...], Field(min_length=1), list_or_one(Alpha)] = (1e-6, 1e-5, 1e-4)
    """L1 coefficients to try: each a number; a list with one for each layer, the head last (`clnp-search network` shows
    their order); or one for each pattern of layer names, the first match wins: {"layer1.*": 1e-6, "*": 1e-5}. For
    random and optuna a single one, in which each number may be a range {low: 1e-7, high: 1e-3}."""
    learning_rate: Annotated[tuple[Rate, ...], Field(min_length=1), list_or_one(Rate)] = (0.001, 0.002)
    """Learning rates to try; for random and optuna a single one, or a range."""
    strength: Annotated[tuple[NonNegative, ...], Field(min_length=1), list_or_one(NonNegative)] | None = None
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
        tuple[Objective, ...], Field(min_length=1), AfterValidator(require_different), list_or_one(Objective)
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
        parts = parts_of(self.alpha[0]) | {"learning_rate": self.learning_rate[0]}
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
        values: list[Any] = [drawn.get(name, part) for name, part in parts_of(alpha).items()]
        assert not isinstance(rate, Range), "every range is drawn"
        if isinstance(alpha, dict):
            return dict(zip(alpha, values, strict=True)), rate
        return tuple(values) if isinstance(alpha, tuple) else values[0], rate


AUTO_MARGINS = (0.0, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2)


class ForgettingConfig(Section):
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


class CapacityConfig(Section):
    """What happens when a layer has no free unit left."""

    on_depletion: Literal["continue", "stop", "expand"] = "continue"
    """Go on (a full network still trains new heads on its features), end the sequence, or widen each full group before
    the next task."""
    expand_by: Growth = 0.25
    """By how much a full group is widened: '25%' or 0.25 of its units."""

    @property
    def widens(self) -> bool:
        """Whether full groups are widened."""
        return self.on_depletion == "expand"


class ResourcesConfig(Section):
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


class TrackingConfig(Section):
    """Where MLflow records go."""

    uri: Place = "sqlite:///mlflow.db"
    """MLflow tracking URI; `none` switches tracking off."""
    models: StrictBool = True
    """Log the network of every task as an MLflow model when the sequence ends (extra `onnx`); else `clnp-search
    register` does it."""
