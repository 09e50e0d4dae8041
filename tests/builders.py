"""Hand-made objects that several tests start from: states, trained points, data, sweeps and records."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
from clnp_search.search.points import grid, pack_points
from clnp_search.search.trial import RunInputs, TaskInputs
from clnp_search.selection import candidates, choose
from clnp_search.sequence import TaskSequence
from clnp_search.storage import RunFolder

# Every head that a network can have: its kind and its bias rule.
HEADS = [("multi", "frozen"), ("single", "frozen"), ("single", "per_task"), ("single", "none")]


def make_info(name: str = "task", num_classes: int = 2, in_features: int = 3, permuted: bool = False) -> TaskInfo:
    """A task whose inputs are its raw values, reversed if permuted."""
    permutation = torch.arange(in_features).flip(0) if permuted else None
    return TaskInfo(name, num_classes, (in_features,), InputTransform(0.0, 1.0, permutation))


def make_trained(state: State, num_classes: int = 2, seed: int = 0, exact: bool = False) -> FreeParameters:
    """Random parameters for a new task on `state`; activities are below 1, one of each layer above 0.9.

    Args:
        exact: Small multiples of 1/4, which sum without rounding in any order, and activities with ties and zeros.
    """
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        if exact:
            return torch.randint(-4, 5, shape, generator=generator) / 4
        return torch.randn(shape, generator=generator)

    architecture, task = state.architecture, state.num_tasks
    free = [len(layer.free) for layer in state.layers]
    frozen = [len(layer.active(task)) for layer in state.layers]
    inputs = [architecture.in_features, *(a + f for a, f in zip(frozen, free, strict=True))]
    head_inputs = free[-1] if architecture.head == "single" else inputs[-1]
    activities = [torch.rand(units, generator=generator, dtype=torch.float64) for units in free]
    for activity in activities:
        if exact:
            activity.copy_((4 * activity).floor() / 4)
        if len(activity):  # so that each task grows a unit in each layer
            activity[activity.argmax()] = 1.0 - activity.max() / 16
    head_bias = None if architecture.head == "single" and architecture.head_bias == "none" else drawn(num_classes)
    if architecture.head == "single" and architecture.head_bias == "frozen" and task:
        head_bias = state.heads[0].bias
    return FreeParameters(
        weights=tuple(drawn(units, width) for units, width in zip(free, inputs, strict=False)),
        biases=tuple(drawn(units) for units in free),
        head_weight=drawn(num_classes, head_inputs),
        head_bias=head_bias,
        activities=tuple(activities),
    )


def make_state(
    architecture: Architecture, num_tasks: int, theta: float = 0.6, num_classes: int = 2, exact: bool = False
) -> State:
    """A state with committed tasks of random parameters; about 40% of the free units join at each, at least one."""
    state = State.empty(architecture)
    for task in range(num_tasks):
        info = make_info(f"task-{task}", num_classes, architecture.in_features, permuted=task == 1)
        trained = make_trained(state, num_classes, seed=task, exact=exact)
        state = commit(state, info, trained, (theta,) * len(architecture.hidden))
    return state


def make_samples(num: int, in_features: int = 3, num_classes: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs [N, in_features] around one centre for each class, and labels [N]."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (num,), generator=generator)
    centres = 1.5 * torch.randn(num_classes, in_features, generator=torch.Generator().manual_seed(1000))
    return centres[labels] + torch.randn(num, in_features, generator=generator), labels


def make_training(
    state: State,
    alphas: list[tuple[float, ...]],
    rates: list[float],
    settings: TrainingSettings,
    device: torch.device | str = "cpu",
    cache_bytes: int = 4 << 30,
    num_classes: int = 2,
) -> tuple[Pack, Training]:
    """A pack and its training on 50 random samples, 20 of them for validation."""
    pack = Pack(state, num_classes, alphas, 0, device, settings.dtype)
    inputs, labels = make_samples(50, state.architecture.in_features, num_classes, seed=state.num_tasks)
    train = pack.features(inputs[:30], labels[:30], cache_bytes)
    validation = pack.features(inputs[30:], labels[30:], cache_bytes)
    return pack, Training(pack, rates, train, validation, settings, 0, state.num_tasks)


def run_all(training: Training) -> None:
    """Trains to the last epoch."""
    while not training.finished:
        training.run_epoch()


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
    state, points = sequence.empty_state(), grid(sweep, None)
    keys = tuple(sequence.key(state, 0, point) for point in points)
    environment = Environment("cpu", 1, "float32", torch.__version__, "test")
    plan = TaskPlan(0, "first", state.digest, points, keys, pack_points(points, len(points)), environment)
    run = RunInputs(
        folder=str(folder),
        raw=sequence.raw,
        tasks=(sequence.task(0),),
        validation=300,
        scaling="standard",
        settings=sweep.training.settings,
        seed=0,
    )
    return TaskInputs(run, plan, state)


def write_run(folder: RunFolder, sweep: Sweep, num_tasks: int = 2) -> Iterator[str]:
    """Writes a run as the sequence does, from objects made by hand; stops after each step and names it.

    The last point of a task has failed, the first is outside the margin, and of the rest the last is chosen.
    """
    folder.write_sweep(sweep.to_yaml())
    state = State.empty(sweep.architecture(3))
    layers = state.architecture.layer_names
    points = grid(sweep, None)
    results: tuple[TaskResult, ...] = ()
    folder.write_summary(summarise(folder.name, "running", sweep.seed, state.digest, results))
    yield "began"
    for task in range(num_tasks):
        keys = tuple(f"{task}-{point.name}" for point in points)
        environment = Environment("cpu", 1, "float32", "2.15", "0.1")
        folder.write_plan(
            TaskPlan(task, f"task-{task}", state.digest, points, keys, pack_points(points, 4), environment)
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
                record = PointRecord(keys[point.index], point, "done", correct, 10000, epochs, 2.5)
            folder.write_point(task, record, trained)
            records.append(record)
            yield f"trained {task} {point.name}"
        limit, inside = candidates(records, 0.01)
        scans = []
        for record in inside:
            index = record.point.index
            curve = make_curve((1.5, 0.6, 0.0), (0.1, 0.965, 0.97))
            active = (3, 4 - index)
            scan = make_scan(index, 9650 + index, active, theta=(0.6, 0.6), curve=curve)
            folder.write_scan(task, scan, f"{sweep.forgetting.theta}-{limit}")
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
        folder.write_points_table(task, rows)
        for scan in scans:
            folder.write_curve(task, points[scan.point].name, scan.curve, layers)
        yield f"chosen {task}"
        info = make_info(f"task-{task}")
        state = commit(state, info, folder.read_trained(task, points[choice.chosen].name), (0.6, 0.6))
        folder.write_state(task, state)
        totals = [len(layer.born) for layer in state.layers]
        grown = [int((layer.born == task).sum()) for layer in state.layers]
        free = [len(layer.free) for layer in state.layers]
        units = {
            name: Units(total, total - left, new, left)
            for name, total, new, left in zip(layers, totals, grown, free, strict=True)
        }
        chosen = next(scan for scan in scans if scan.point == choice.chosen)
        point = points[choice.chosen]
        assert chosen.theta is not None
        selected = Selected(
            point.name, point.alpha, point.learning_rate, chosen.theta, chosen.val_accuracy, chosen.unit_sparsity
        )
        result = make_result(
            task,
            tuple(0.9 + each / 100 for each in range(task + 1)),
            units,
            name=f"task-{task}",
            selected=selected,
            digest=Subnetwork(state, task).digest,
            state_digest=state.digest,
        )
        folder.write_result(result)
        results = (*results, result)
        status: RunStatus = "running" if task + 1 < num_tasks else "complete"
        folder.write_summary(summarise(folder.name, status, sweep.seed, state.digest, results))
        yield f"committed {task}"
