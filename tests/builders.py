"""Hand-made objects that several tests start from: states, trained points, data, sweeps and records."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clnp_search.clnp.graph import INPUT, Builder, Graph, conv, mlp
from clnp_search.clnp.initial import draw
from clnp_search.clnp.ops import (
    Activation,
    AdaptivePool,
    Add,
    Affine,
    AvgPool,
    BatchNorm,
    Concat,
    Conv,
    Depthwise,
    Dropout,
    Flatten,
    GroupedConv,
    Identity,
    InstanceNorm,
    LargestPosition,
    Linear,
    MaxPool,
    MeanPositions,
    Multiply,
    Op,
    Pad,
    PRelu,
    Subtract,
    ToMap,
)
from clnp_search.clnp.pack import Pack
from clnp_search.clnp.state import Architecture, FreeParameters, InputTransform, State, TaskInfo, commit
from clnp_search.clnp.subnetwork import Subnetwork
from clnp_search.clnp.training import Training, TrainingSettings
from clnp_search.config import Sweep, parse_sweep
from clnp_search.records import (
    CurveStep,
    Environment,
    Epoch,
    Point,
    PointRecord,
    RunStatus,
    ScanRecord,
    Selected,
    TaskPlan,
    TaskResult,
    Units,
    summarise,
)
from clnp_search.search.points import pack_points
from clnp_search.search.proposals import first_points
from clnp_search.search.trial import RunInputs, TaskInputs
from clnp_search.selection import candidates, choose
from clnp_search.sequence import TaskSequence, count_units
from clnp_search.storage import RunFolder
from clnp_search.tasks import RawData

# Every head that a network can have: its kind and its bias rule.
HEADS = [("multi", "frozen"), ("single", "frozen"), ("single", "per_task"), ("single", "none")]


def make_network(
    hidden: tuple[int, ...] = (5, 6),
    activation: str = "relu",
    in_features: int = 3,
    head: str = "multi",
    head_bias: str = "frozen",
) -> Architecture:
    """A multilayer perceptron."""
    return Architecture(mlp(in_features, hidden, activation), head, head_bias)


def residual(input_shape: tuple[int, ...] = (2, 6, 6)) -> Graph:
    """Two residual stages, the second with a depthwise convolution and a gate, both read by a last convolution.

    Groups: `stem` (a residual stage), `one` (inside it), `two` (depthwise and gated, the second stage), `squeeze`
    (of the gate) and `last`.
    """
    build = Builder(input_shape)

    def normalised(name: str, layer: str, active: bool = True) -> str:
        norm = build.add(f"{name}.norm", BatchNorm(), layer)
        return build.add(f"{name}.relu", Activation(), norm) if active else norm

    same, strided, point = {"padding": (1, 1), "bias": False}, (2, 2), (1, 1)
    stem = normalised("stem", build.layer("stem", Conv(**same), INPUT, 4))
    one = normalised("one", build.layer("one", Conv(**same), stem, 3))
    back = normalised("back", build.layer("back", Conv(kernel=point, bias=False), one, 4), active=False)
    first = build.add("first.relu", Activation(), build.add("first", Add(), stem, back))
    two = normalised("two", build.layer("two", Conv(kernel=point, stride=strided, bias=False), first, 5))
    deep = normalised("deep", build.add("deep", Depthwise(**same), two))
    mean = build.add("gate.mean", MeanPositions(), deep)
    squeeze = build.add("squeeze.relu", Activation(), build.layer("squeeze", Linear(), mean, 3))
    gate = build.add("gate.sigmoid", Activation("sigmoid"), build.layer("gate", Linear(), squeeze, 5))
    gated = build.add("gated", Multiply(), deep, build.add("gate.map", ToMap(), gate))
    down = build.layer("down", Conv(kernel=point, stride=strided), first, 5)
    second = build.add("second.relu", Activation(), build.add("second", Add(), gated, down))
    joined = build.add("joined", Concat(), second, build.add("pooled", AvgPool(), first))
    last = build.add("last.relu", Activation(), build.layer("last", Conv(kernel=point), joined, 4))
    build.layer("head", Linear(), build.add("mean", MeanPositions(), last), 0, head=True)
    return build.build()


def twofold(input_shape: tuple[int, ...] = (2, 5, 5)) -> Graph:
    """A map to which one of a single position is added, and a concatenation in which each unit is there twice."""
    build = Builder(input_shape)
    map_ = build.layer("map", Conv(padding=(1, 1)), INPUT, 4)
    context = build.layer("context", Conv(kernel=(1, 1)), build.add("pooled", AdaptivePool(), map_), 4)
    both = build.add("both", Add(), context, map_)
    signs = [
        build.add("plus", Activation(), both),
        build.add("minus", Activation(), build.add("negative", Affine(-1.0), both)),
    ]
    last = build.add("last.relu", Activation(), build.layer("last", Conv(), build.add("signs", Concat(), *signs), 3))
    build.layer("head", Linear(), build.add("flat", Flatten(), last), 0, head=True)
    return build.build()


def using(op: Op) -> Graph:
    """A small network of maps in which an op stands between a convolution and the head."""
    build = Builder((2, 6, 6))
    last = build.layer("first", Conv(padding=(1, 1)), INPUT, 4)
    flat = build.add("mean", MeanPositions(), last)
    if isinstance(op, Conv):
        last = build.layer("op", op, last, 3)
    elif isinstance(op, Linear):
        last = build.layer("op", op, flat, 3)
    elif isinstance(op, Add | Multiply | Concat):
        last = build.add("op", op, last, build.add("relu", Activation(), last))
    elif isinstance(op, ToMap):
        last = build.add("gated", Multiply(), last, build.add("op", op, flat))
    else:
        last = build.add("op", op, last)
    if build.node(last).positions:
        last = build.add("flat", Flatten(), last)
    build.layer("head", Linear(), last, 0, head=True)
    return build.build()


# Every op, in the ways in which it differs from itself.
OPS_USED: list[Op] = [
    *(Activation(name) for name in ("relu", "gelu", "hardswish", "silu", "leaky_relu")),
    AdaptivePool((2, 3)),
    AdaptivePool((1, 1), maximum=True),
    Add(),
    Affine(1 / 6, 0.5),
    AvgPool(),
    AvgPool((3, 3), (2, 2), (1, 1), count_padding=False),
    BatchNorm(),
    BatchNorm(affine=False),
    Concat(),
    Conv(),
    Conv(kernel=(3, 2), stride=(2, 1), padding=(1, 0), dilation=(2, 1), bias=False),
    Depthwise(padding=(1, 1)),
    Depthwise(bias=False, stride=(2, 2)),
    Dropout(),
    Flatten(),
    GroupedConv(padding=(1, 1), blocks=2, rows=2, columns=2),
    Identity(),
    LargestPosition(),
    InstanceNorm(),
    InstanceNorm(affine=False),
    Linear(),
    MaxPool(),
    MaxPool((3, 3), (2, 2), (1, 1)),
    MeanPositions(),
    Multiply(),
    Pad(),
    Pad((0, 1, -1, 2)),
    PRelu(),
    Subtract(),
    ToMap(),
]


# Small networks of every structure: dense, of maps, normalised, and with all ways in which values meet.
GRAPHS = {
    "mlp": mlp(3, (5, 6)),
    "conv": conv((2, 6, 6), [4, "pool", 5], [6]),
    "conv_norm": conv((2, 6, 6), [4, "pool", 5], [6], activation="tanh", batch_norm=True),
    "residual": residual(),
    "twofold": twofold(),
}


def make_info(
    name: str = "task", num_classes: int = 2, shape: int | tuple[int, ...] = 3, permuted: bool = False
) -> TaskInfo:
    """A task whose inputs are its raw values, reversed if permuted."""
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    permutation = torch.arange(math.prod(shape)).flip(0) if permuted else None
    return TaskInfo(name, num_classes, shape, InputTransform((0.0,), (1.0,), shape, permutation))


def make_trained(
    state: State, num_classes: int = 2, seed: int = 0, exact: bool = False, samples: Tensor | None = None
) -> FreeParameters:
    """Random parameters for a new task on `state`; activities are below 1, one of each group above 0.9.

    Args:
        exact: Small multiples of 1/4, which sum without rounding in any order, and activities with ties and zeros.
        samples: Over which the means of what pruning takes away are taken.
    """
    generator = torch.Generator().manual_seed(seed)

    def drawn(name: str, shape: tuple[int, ...]) -> Tensor:
        if name == "variance":
            return torch.rand(shape, generator=generator) + 0.5
        if exact:
            return torch.randint(-4, 5, shape, generator=generator) / 4
        return torch.randn(shape, generator=generator)

    graph = state.graph
    initial = {
        node.name: {name: drawn(name, shape) for name, shape in graph.shapes(node, num_classes).items()}
        for node in graph.nodes
        if graph.shapes(node, num_classes)
    }
    activities = {}
    for group in graph.groups:
        activity = torch.rand(len(state.free[group]), generator=generator, dtype=torch.float64)
        if exact:
            activity.copy_((4 * activity).floor() / 4)
        if len(activity):  # so that each task grows a unit in each group
            activity[activity.argmax()] = 1.0 - activity.max() / 16
        activities[group] = activity
    pack = Pack(state, num_classes, [(0.0,) * len(graph.layers)], initial)
    if samples is None:
        return pack.point(0, activities)
    features = pack.features(samples, torch.zeros(len(samples), dtype=torch.int64))
    return pack.point(0, activities, pack.means(features)[0])


def commit_at(state: State, trained: FreeParameters, theta: float = 0.6, **info: Any) -> State:
    """The state after one more task with one theta for all groups; `info` as for `make_info`."""
    info = {"name": f"task-{state.num_tasks}", "shape": state.graph.input_shape} | info
    return commit(state, make_info(**info), trained, dict.fromkeys(state.graph.groups, theta))


def make_state(
    architecture: Architecture, num_tasks: int, theta: float = 0.6, num_classes: int = 2, exact: bool = False
) -> State:
    """A state with committed tasks of random parameters; about 40% of the free units join at each, at least one."""
    state = State.empty(architecture)
    for task in range(num_tasks):
        trained = make_trained(state, num_classes, seed=task, exact=exact)
        state = commit_at(state, trained, theta, num_classes=num_classes, permuted=task == 1)
    return state


def fill_group(state: State, group: str) -> State:
    """The same state, in which the first task owns all units of a group."""
    return replace(state, born={**state.born, group: torch.zeros_like(state.born[group])})


def make_samples(
    num: int, shape: int | tuple[int, ...] = 3, num_classes: int = 2, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Inputs [N, *shape] around one centre for each class, and labels [N]."""
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (num,), generator=generator)
    centres = 1.5 * torch.randn(num_classes, *shape, generator=torch.Generator().manual_seed(1000))
    return centres[labels] + torch.randn(num, *shape, generator=generator), labels


def make_pack(
    state: State,
    alphas: Sequence[tuple[float, ...]] | int,
    device: torch.device | str = "cpu",
    num_classes: int = 2,
    seed: int = 0,
    **settings: Any,
) -> Pack:
    """A pack that starts from what the seed draws.

    Args:
        alphas: One tuple for each point, or how many points without a penalty.
    """
    if isinstance(alphas, int):
        alphas = [(0.0,) * len(state.graph.layers)] * alphas
    return Pack(state, num_classes, alphas, draw(state, num_classes, seed, state.num_tasks), device, **settings)


def make_training(
    state: State,
    alphas: list[tuple[float, ...]],
    rates: list[float],
    settings: TrainingSettings,
    device: torch.device | str = "cpu",
    cache_bytes: int = 4 << 30,
    num_classes: int = 2,
    together: int | None = None,
) -> tuple[Pack, Training]:
    """A pack and its training on 50 random samples, 20 of them for validation."""
    options: dict[str, Any] = {"dtype": settings.dtype, "l1": settings.penalty, "together": together}
    pack = make_pack(state, alphas, device, num_classes, **options)
    inputs, labels = make_samples(50, state.graph.input_shape, num_classes, seed=state.num_tasks)
    train = pack.features(inputs[:30], labels[:30], cache_bytes)
    validation = pack.features(inputs[30:], labels[30:], cache_bytes)
    return pack, Training(pack, rates, train, validation, settings, 0, state.num_tasks)


def each_point(pack: Pack) -> list[list[Tensor]]:
    """For each point, its trainable tensors [1, ...], with their gradients."""
    return [tensors for _, tensors in pack.parts(range(pack.num_points))]  # as if each had a rate of its own


def run_all(training: Training) -> None:
    """Trains to the last epoch."""
    while not training.finished:
        training.run_epoch()


def make_raw(num_train: int = 60, num_test: int = 20) -> RawData:
    """2 x 2 samples that are all different, of ten classes in turn; training samples come first."""
    values = np.arange(num_train + num_test, dtype=np.uint8)
    inputs = np.stack([values, values + 1, values * 2, values * 0 + 7], axis=1).reshape(-1, 2, 2)
    labels = np.arange(num_train + num_test, dtype=np.int64) % 10
    return RawData(inputs[:num_train], labels[:num_train], inputs[num_train:], labels[num_train:], 10)


def make_sweep(**sections: Any) -> Sweep:
    """A small sweep of two permuted tasks; `sections` replace whole entries of the file."""
    raw: dict[str, Any] = {
        "scenario": {"name": "permuted_digits", "tasks": 2},
        "network": {"hidden": [4, 4]},
        "search": {"alpha": [0.0, 0.001], "learning_rate": [0.01, 0.02]},
    }
    return parse_sweep(raw | sections, "test")


def make_point(index: int = 0, alpha: float = 1e-5, learning_rate: float = 1e-3) -> Point:
    """A grid point of a network with one hidden layer."""
    return Point(index, (alpha, alpha), learning_rate)


def make_record(index: int, correct: int, total: int = 10000, **fields: Any) -> PointRecord:
    """A trained point that gets `correct` of `total` validation samples right before pruning."""
    point = fields.pop("point", make_point(index))
    return PointRecord(f"key-{index}", point, fields.pop("status", "done"), correct, total, **fields)


def make_scan(index: int, correct: int, active: tuple[int, ...] = (2, 2), **fields: Any) -> ScanRecord:
    """A scan that ended at `active` of (4, 4) units with `correct` of 10000 validation samples right."""
    values: dict[str, Any] = {"theta": (0.5, 0.5), "totals": (4, 4), "weight_sparsity": 0.5, "curve": ()}
    return ScanRecord(index, val_correct=correct, val_total=10000, active=active, **(values | fields))


def make_curve(thetas: tuple[float, ...], accuracies: tuple[float, ...], depth: int = 2) -> tuple[CurveStep, ...]:
    """A scan's curve: one theta for all layers, and one unit more in each layer at each step."""
    steps = enumerate(zip(thetas, accuracies, strict=True))
    return tuple(CurveStep((theta,) * depth, accuracy, (1 + step,) * depth) for step, (theta, accuracy) in steps)


def make_result(index: int, accuracies: tuple[float, ...], units: dict[str, Units], **fields: Any) -> TaskResult:
    """A committed task after which tasks 0..index have these test accuracies."""
    values: dict[str, Any] = {
        "name": f"permutation-{index}",
        "best_val_accuracy": 0.98,
        "margin": 0.01,
        "selected": Selected("p000", (1e-5,) * (len(units) + 1), 0.001, (0.5,) * len(units), 0.97, 0.4),
        "points": 4,
        "digest": f"digest-{index}",
        "state_digest": f"state-{index}",
        "seconds": 1.5,
    }
    return TaskResult(
        index=index, test_accuracy=accuracies[-1], test_accuracies=accuracies, units=units, **(values | fields)
    )


def make_inputs(
    folder: Path, hidden: tuple[int, ...] = (12, 8), alphas: int = 2, epochs: int = 4, optimizer: str = "adam"
) -> TaskInputs:
    """The first task of permuted digits with a small network."""
    sweep = parse_sweep(
        {
            "scenario": {"name": "permuted_digits"},
            "network": {"hidden": list(hidden)},
            "training": {"epochs": epochs, "optimizer": optimizer, "momentum": 0.0},
            "search": {"alpha": [1e-6 * (index + 1) for index in range(alphas)], "learning_rate": [0.01, 0.02]},
        },
        "test",
    )
    sequence = TaskSequence(sweep)
    state = sequence.empty_state()
    points = first_points(sweep, 0, None, state.graph.layers)
    environment = Environment("cpu", 1, "float32", torch.__version__, "test")
    plan = TaskPlan(
        0, "first", state.digest, points, ("",) * len(points), pack_points(points, len(points)), environment
    )
    plan = replace(plan, keys=tuple(sequence.key(plan, point) for point in points))
    run = RunInputs(
        folder=str(folder),
        scenario=sequence.scenario,
        settings=sweep.training.settings,
        finetune_epochs=0,
        seed=0,
        graph=state.graph,
    )
    return TaskInputs(run, plan, state)


def write_run(folder: RunFolder, sweep: Sweep, num_tasks: int = 2) -> Iterator[str]:
    """Writes a run as the sequence does, from objects made by hand; stops after each step and names it.

    The last point of a task has failed, the first is outside the margin, and of the rest the last is chosen.
    """
    folder.write_sweep(sweep.to_yaml())
    state = State.empty(sweep.architecture((3,)))
    layers = tuple(state.graph.groups)
    points = first_points(sweep, 0, None, state.graph.layers)
    results: tuple[TaskResult, ...] = ()
    folder.write_summary(summarise(folder.name, "running", sweep.seed, state.digest, results))
    yield "began"
    for task in range(num_tasks):
        keys = tuple(f"{task}-{point.name}" for point in points)
        environment = Environment("cpu", 1, "float32", "2.15", "0.1")
        folder.write_plan(
            TaskPlan(
                task,
                f"task-{task}",
                state.digest,
                points,
                keys,
                pack_points(points, 4),
                environment,
                started=1000.0 + 100 * task,
                settings=sweep.settings,
            )
        )
        yield f"planned {task}"
        records = []
        for point in points:
            epochs = tuple(Epoch(epoch, 0.01 / (1 + epoch), 2.0 - epoch, 0.5 + epoch / 10) for epoch in range(3))
            trained: FreeParameters | None = make_trained(state, seed=10 * task + point.index)
            if point is points[-1]:
                record, trained = PointRecord(keys[-1], point, "failed", 0, 0, epochs[:1], 0.5, "diverged"), None
            else:
                correct = 5000 if point.index == 0 else 9700 + point.index
                started, ended = 1005.0 + 100 * task, 1015.0 + 100 * task
                times = {"seconds": 2.5, "started": started, "ended": ended}
                record = PointRecord(keys[point.index], point, "done", correct, 10000, epochs, **times)
            folder.write_point(task, record, trained)
            written = folder.read_point(task, point.name)
            assert written is not None
            records.append(written)
            yield f"trained {task} {point.name}"
        limit, inside = candidates(records, 0.01)
        scans = []
        for record in inside:
            index = record.point.index
            curve = make_curve((1.5, 0.6, 0.0), (0.1, 0.965, 0.97))
            active = (3, 4 - index)
            scan = make_scan(index, 9650 + index, active, theta=(0.6, 0.6), curve=curve)
            rule = sweep.forgetting.rule
            scan = replace(scan, key=record.key, parameters_sha256=record.parameters_sha256)
            folder.write_scan(task, replace(scan, rule=rule, min_correct=limit))
            scans.append(scan)
        choice = choose(records, scans, 0.01)
        folder.write_selection(task, choice)
        passing = {scan.point: scan for scan in scans}
        rows = []
        for record in records:
            row: dict[str, Any] = {"point": record.point.name, "status": record.status}
            found = passing.get(record.point.index)
            row |= {"in_margin": record in inside, "selected": record.point.index == choice.chosen}
            row |= {"theta": json.dumps(found.theta) if found else ""}
            row |= {"pruned_val_accuracy": found.val_accuracy if found else ""}
            rows.append(row | {"unit_sparsity": found.unit_sparsity if found else ""})
        folder.write_table(task, "points", rows)
        for scan in scans:
            folder.write_curve(task, points[scan.point].name, scan.curve, layers)
        yield f"chosen {task}"
        state = commit_at(state, folder.read_trained(task, records[choice.chosen]))
        state_sha256 = folder.write_state(task, state)
        chosen = next(scan for scan in scans if scan.point == choice.chosen)
        point = points[choice.chosen]
        assert chosen.theta is not None
        selected = Selected(
            point.name, point.alpha, point.learning_rate, chosen.theta, chosen.val_accuracy, chosen.unit_sparsity
        )
        result = make_result(
            task,
            tuple(0.9 + each / 100 for each in range(task + 1)),
            count_units(state),
            name=f"task-{task}",
            selected=selected,
            digest=Subnetwork(state, task).digest,
            state_digest=state.digest,
            state_sha256=state_sha256,
            seconds=60.0,
            ended=1060.0 + 100 * task,
        )
        folder.write_result(result)
        results = (*results, result)
        status: RunStatus = "running" if task + 1 < num_tasks else "complete"
        folder.write_summary(summarise(folder.name, status, sweep.seed, state.digest, results))
        yield f"committed {task}"
