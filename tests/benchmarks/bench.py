"""What this project's speed is measured by: `python tests/benchmarks/bench.py [NAME...] --root DATA`; see README.md.

Every figure is a ratio (or a difference) of things measured in one run on one machine. Nothing else may run on it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from threading import Barrier
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from clnp_search.clnp.graph import Graph, mlp, zenke
from clnp_search.clnp.initial import draw
from clnp_search.clnp.pack import Features, Pack
from clnp_search.clnp.rates import matrix_rate
from clnp_search.clnp.replay import Replay
from clnp_search.clnp.scan import Candidate, scan
from clnp_search.clnp.state import Architecture, InputTransform, State, TaskInfo, commit
from clnp_search.clnp.subnetwork import cuts
from clnp_search.clnp.training import Training, TrainingSettings, set_precision
from clnp_search.config import sweep_of
from clnp_search.records import Environment, Point, TaskPlan
from clnp_search.search.points import estimate_memory, pack_name
from clnp_search.search.trial import RunInputs, TaskInputs, run_pack
from clnp_search.selection import min_correct
from clnp_search.sequence import TaskSequence, active_units, test_accuracies
from clnp_search.storage import RunFolder
from clnp_search.tasks import RawData, Scenario, Task, TaskData
from clnp_search.tasks.cifar import load_cifar
from clnp_search.tasks.data import load_mnist

HERE = Path(__file__).parent
CORES = len(os.sched_getaffinity(0))
FEATURES, CLASSES, BATCH = 784, 10, 256
ALPHAS = (1e-6, 1e-5, 1e-4, 1e-3)
LEARNING_RATES = (0.0005, 0.001, 0.002)
WIDE, NARROW = (2000, 2000), (100, 100)


@dataclass(frozen=True)
class Row:
    """One figure and its bar: from `low` (if any) to `high` (if any)."""

    figure: str
    measured: float
    low: float | None = None
    high: float | None = None
    detail: str = ""

    @property
    def bar(self) -> str:
        limits = [f"{sign} {limit:.3g}" for sign, limit in (("≥", self.low), ("≤", self.high)) if limit is not None]
        return ", ".join(limits)

    @property
    def passed(self) -> bool | None:
        """None where there is no bar."""
        if self.low is None and self.high is None:
            return None
        return (self.low is None or self.measured >= self.low) and (self.high is None or self.measured <= self.high)


@dataclass(frozen=True)
class Options:
    """What the command line asked for."""

    root: Path
    quick: bool = False
    full: bool = False

    @property
    def repeats(self) -> int:
        """How often a thing is timed; the best, or the median, counts."""
        return 1 if self.quick else 5

    def batches(self, num: int) -> int:
        """Steps of an epoch on random data."""
        return 2 if self.quick else num

    def raw(self) -> RawData:
        """MNIST, or a few samples of it."""
        raw = _mnist(self.root)
        num = 700 if self.quick else len(raw.train_labels)
        return replace(raw, train_inputs=raw.train_inputs[:num], train_labels=raw.train_labels[:num])

    @property
    def validation(self) -> int:
        return 200 if self.quick else 10_000

    def data(self, seed: int = 0) -> TaskData:
        """The first task of permuted MNIST."""
        return self.scenario(seed).data(0)

    def scenario(self, seed: int = 0) -> Scenario:
        """One task of permuted MNIST."""
        return Scenario((self.raw(),), (Task(0, "permutation-0", permuted=True),), self.validation, seed=seed)


@cache
def _mnist(root: Path) -> RawData:
    return load_mnist(root)


def prepare(threads: int, precision: str = "float32") -> None:
    """Sets up this process as a trial does."""
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    set_precision(precision)


def timed(action: Callable[[], object]) -> float:
    """Seconds that one call takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def peak_rate(dtype: torch.dtype = torch.float32) -> float:
    """The best FLOP/s of a matrix product on the threads that torch has now."""
    return matrix_rate("cpu", dtype, size=2048)


def make_points(num: int, layers: int = 3) -> list[Point]:
    """Points of 4 alphas x 3 rates, over and over; equal rates together, as `search.points.pack_points` orders them."""
    grid = [(ALPHAS[index % 4], LEARNING_RATES[index // 4 % 3]) for index in range(num)]
    return [
        Point(index, (alpha,) * layers, rate) for index, (alpha, rate) in enumerate(sorted(grid, key=lambda at: at[1]))
    ]


def make_state(network: tuple[int, ...] | Graph, frozen: float = 0.0) -> State:
    """A state whose first task, made by hand, has committed a fraction of each group's units; none if it is 0.

    Args:
        network: A graph, or the widths of a multilayer perceptron.
    """
    graph = network if isinstance(network, Graph) else mlp(FEATURES, network)
    state = State.empty(Architecture(graph))
    if not frozen:
        return state
    activities = {group: (torch.arange(units) < frozen * units).double() for group, units in graph.groups.items()}
    pack = Pack(state, CLASSES, [(0.0,) * len(graph.layers)], draw(state, CLASSES, 1, state.num_tasks))
    shape = graph.input_shape
    info = TaskInfo("by hand", CLASSES, shape, InputTransform((0.0,), (1.0,), shape))
    return commit(state, info, pack.point(0, activities), dict.fromkeys(graph.groups, 0.5))


@dataclass
class Bench:
    """A pack in training, built as `search.trial` does.

    Args:
        prepared_s: Seconds that the frozen units' outputs took, once for the whole task.
    """

    pack: Pack
    training: Training
    train: Features
    prepared_s: float

    def best_epoch(self, repeats: int) -> float:
        """Seconds of the fastest epoch after a first one that is not counted."""
        self.training.run_epoch()
        return min(timed(self.training.run_epoch) for _ in range(repeats))

    def unrecorded_epoch(self, repeats: int) -> float:
        """The same where every kernel is launched by itself."""
        with patch.object(Replay, "__call__", lambda self, key, work: work()):
            return self.best_epoch(repeats)

    def flops(self, seconds: float) -> float:
        """FLOP/s of the training arithmetic, if an epoch took these seconds."""
        return self.pack.training_flop * len(self.train) / seconds


def on_random(
    state: State,
    num_points: int,
    num_batches: int,
    precision: str = "float32",
    device: str = "cpu",
    together: int | None = None,
) -> Bench:
    """A pack on random data; its validation split is one sample, so that an epoch is its steps."""
    shape, points = state.graph.input_shape, make_points(num_points, len(state.graph.layers))
    train, validation = (random_samples(num, shape) for num in (num_batches * BATCH, 1))
    return _bench(state, points, train, validation, settings(99, precision), device=device, together=together)


def on_mnist(state: State, points: list[Point], data: TaskData, how: TrainingSettings, seed: int = 0) -> Bench:
    """A pack on real data."""
    transform = data.info.transform
    train, validation = ((transform(split.inputs), split.labels) for split in (data.train, data.validation))
    return _bench(state, points, train, validation, how, seed)


def _bench(
    state: State,
    points: list[Point],
    train: Any,
    validation: Any,
    how: TrainingSettings,
    seed: int = 0,
    device: str = "cpu",
    together: int | None = None,
) -> Bench:
    initial, alphas = draw(state, CLASSES, seed, state.num_tasks), [point.alpha for point in points]
    pack = Pack(state, CLASSES, alphas, initial, device, how.dtype, how.penalty, together)
    started = time.perf_counter()
    features = pack.features(*train)
    prepared_s = time.perf_counter() - started
    rates = [point.learning_rate for point in points]
    training = Training(pack, rates, features, pack.features(*validation), how, seed, state.num_tasks)
    return Bench(pack, training, features, prepared_s)


def random_samples(num: int, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs [N, *shape] and labels [N]."""
    return torch.randn(num, *shape), torch.randint(CLASSES, (num,))


def settings(epochs: int, precision: str = "float32") -> TrainingSettings:
    return TrainingSettings(epochs=epochs, batch_size=BATCH, schedule="constant", precision=precision)


def peers(options: Options) -> Iterator[Row]:
    """Whole commands: 12 points of 2 x 100, 3 epochs, by plain Ray Tune and by this project."""
    epochs, num_points = (1, 2) if options.quick else (3, 12)
    root = str(options.root.absolute())
    smoke = ["--samples", "600"] if options.quick else []
    sizes = ["--root", root, "--epochs", str(epochs), "--points", str(num_points), *smoke]
    walls, best = {}, {}
    several = options.repeats // 2 + 1
    # The DataLoader peer takes minutes, so it runs once: what noise can do to it is small beside the bar.
    for name, repeats, arguments in (
        ("peer_nothing", several, []),
        ("peer_tensor", several, sizes),
        ("peer_dataloader", 1, sizes),
    ):
        command = [sys.executable, str(HERE / f"{name}.py"), *arguments]
        outputs, walls[name] = _run_all([command] * repeats)
        best[name] = max(json.loads(outputs[-1].splitlines()[-1])["val_accuracy"].values())
    with tempfile.TemporaryDirectory() as folder:
        sweep = {
            "scenario": {"name": "permuted_mnist", "tasks": 1, "validation": 10_000, "root": root},
            "network": {"hidden": NARROW},
            "training": {"epochs": epochs, "batch_size": BATCH, "schedule": "constant"},
            "search": {"alpha": ALPHAS[: max(1, num_points // 3)], "learning_rate": LEARNING_RATES[-num_points:]},
            "resources": {"cpu": CORES},
            "storage": folder,
            "tracking": {"uri": f"sqlite:///{folder}/mlflow.db", "models": False},
        }
        path = Path(folder, "sweep.yaml")
        path.write_text(json.dumps(sweep))  # JSON is YAML
        names = [f"run-{index}" for index in range(several)]
        base = [sys.executable, "-m", "clnp_search", "run", str(path), "--json", "--name"]
        _, walls["ours"] = _run_all([[*base, name] for name in names])
        trained = [_longest_pack(RunFolder(f"{folder}/{name}")) for name in names]
        best["ours"] = json.loads(Path(folder, names[-1], "summary.json").read_text())["tasks"][0]["best_val_accuracy"]
    ours, nothing = statistics.median(walls["ours"]), statistics.median(walls["peer_nothing"])
    prepare(CORES)
    bench = on_random(make_state(NARROW), num_points, 1)
    samples = epochs * (len(options.raw().train_labels) - options.validation)
    floor = nothing + bench.pack.training_flop * samples / peak_rate()
    yield Row("plain Ray Tune with one trial that does nothing [s]", nothing)
    for name, bar in (("peer_dataloader", 15.0), ("peer_tensor", 6.0)):
        theirs = statistics.median(walls[name])
        detail = (
            f"{theirs:.1f} s / {ours:.1f} s; best validation accuracy {best[name]:.2%} / {best['ours']:.2%}; "
            f"Ray's start and the arithmetic at the matrix rate would take {floor:.1f} s: {theirs / floor:.1f} times"
        )
        yield Row(f"{name} over clnp-search, wall time", theirs / ours, low=bar, detail=detail)
    overhead, seconds = sorted((wall - pack, pack) for wall, pack in zip(walls["ours"], trained, strict=True))[
        len(trained) // 2
    ]
    detail = f"command {overhead + seconds:.1f} s, its longest pack {seconds:.1f} s"
    yield Row("orchestration overhead [s]", overhead, high=10 + 0.1 * seconds, detail=detail)


def _run_all(commands: list[list[str]]) -> tuple[list[str], list[float]]:
    """Each command's standard output, and its seconds from start to exit."""
    # Python keeps what it has compiled, as it does for every user who has not told it otherwise.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    outputs, walls = [], []
    for command in commands:
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        walls.append(time.perf_counter() - started)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
        outputs.append(done.stdout)
    return outputs, walls


def _longest_pack(folder: RunFolder) -> float:
    """Seconds that the pack which took longest was trained."""
    plan = folder.read_plan(0)
    assert plan is not None
    records = {point.index: folder.read_point(0, point.name) for point in plan.points}
    return max(sum(record.seconds for index in pack if (record := records[index])) for pack in plan.packs)


def rate(options: Options) -> Iterator[Row]:
    """Training arithmetic of a pack over the machine's float32 matrix rate."""
    prepare(CORES)
    peak = peak_rate()
    found = {}
    for hidden, points, bar in ((WIDE, 1, 0.8), (WIDE, 2, 0.8), (NARROW, 12, 0.7)):
        bench = on_random(make_state(hidden), points, options.batches(40))
        name = f"2 x {hidden[0]}, {points} point(s), {CORES} threads"
        found[name] = (bench.flops(bench.best_epoch(options.repeats)), bar)
    # As `clnp-search run` trains it: a process of one thread for each core, all at the same time.
    context = get_context("spawn")
    each = 12 // CORES or 1
    with context.Manager() as manager, ProcessPoolExecutor(CORES, mp_context=context) as pool:
        work = partial(_rate_beside_others, manager.Barrier(CORES), each, options.batches(40), options.repeats)
        found[f"2 x 100, {CORES} processes x {each} points"] = (sum(pool.map(work, range(CORES))), 0.7)
    peak = max(peak, peak_rate())
    for name, (measured, bar) in found.items():
        detail = f"{measured / 1e9:.0f} of {peak / 1e9:.0f} GFLOP/s"
        yield Row(f"training arithmetic over matrix rate: {name}", measured / peak, low=bar, detail=detail)


def _rate_beside_others(barrier: Barrier, points: int, num_batches: int, repeats: int, index: int) -> float:
    """FLOP/s of the narrow pack on one thread, while the other processes do the same."""
    prepare(1)
    bench = on_random(make_state(NARROW), points, num_batches)
    bench.training.run_epoch()
    barrier.wait()
    # The mean, not the best: all processes run all the time, so that the rates may be added.
    return bench.flops(statistics.mean(timed(bench.training.run_epoch) for _ in range(2 * repeats)))


def frozen(options: Options) -> Iterator[Row]:
    """A task's training time when half of all units are frozen, over the first task's."""
    prepare(CORES)
    epochs, found = TrainingSettings().epochs, []
    for fraction in (0.0, 0.5):
        bench = on_random(make_state(WIDE, fraction), 8, options.batches(10))
        found.append((bench.prepared_s, bench.best_epoch(1 if options.quick else 3)))
        del bench
    (_, first_epoch), (prepared_s, epoch) = found
    detail = f"epoch {epoch:.2f} s / {first_epoch:.2f} s = {epoch / first_epoch:.2f}; frozen outputs {prepared_s:.2f} s"
    measured = (prepared_s + epochs * epoch) / (epochs * first_epoch)
    yield Row(f"2 x 2000, 8 points, half frozen over first task, {epochs} epochs", measured, high=0.55, detail=detail)


def bf16(options: Options) -> Iterator[Row]:
    """Mixed precision against float32 on real data, accuracies side by side."""
    prepare(CORES)
    seconds: dict[str, list[float]] = {"float32": [], "bf16": []}
    accuracies: dict[str, list[float]] = {"float32": [], "bf16": []}
    for seed in range(3 if options.full else 1):
        data = options.data(seed)
        for precision in seconds:
            bench = on_mnist(make_state(WIDE), make_points(1), data, settings(2, precision), seed)
            seconds[precision].extend(timed(bench.training.run_epoch) for _ in range(2))
            accuracies[precision].append(bench.training.history[-1][0].val_accuracy)
    best = {precision: min(values) for precision, values in seconds.items()}
    faster = peak_rate(torch.bfloat16) / peak_rate()
    detail = f"{best['float32']:.1f} s / {best['bf16']:.1f} s; a matrix product is {faster:.1f} times faster"
    yield Row("float32 over bf16, 2 x 2000, epoch time", best["float32"] / best["bf16"], low=1.5, detail=detail)
    spread = max(accuracies["float32"]) - min(accuracies["float32"]) if options.full else None
    lost = statistics.mean(accuracies["float32"]) - statistics.mean(accuracies["bf16"])
    listed = "; ".join(f"{name} {' '.join(f'{value:.2%}' for value in seen)}" for name, seen in accuracies.items())
    yield Row("accuracy lost by bf16 (bar: spread of seeds)", lost, high=spread, detail=listed)


def threshold_scan(options: Options) -> Iterator[Row]:
    """The exact threshold scan over one training epoch of the same network."""
    prepare(CORES)
    data, point, state = options.data(), Point(0, (1e-5,) * 3, 0.001), make_state((200, 200) if options.quick else WIDE)
    bench = on_mnist(state, [point], data, settings(2))
    epoch = min(timed(bench.training.run_epoch) for _ in range(2))
    [correct] = bench.pack.num_correct(bench.training.validation)
    trained = bench.pack.point(0, *bench.pack.activities(bench.train))
    inputs, total = data.info.transform(data.validation.inputs), len(data.validation)
    for margin in (0.0005, 0.01):
        limit = min_correct(correct, total, margin)
        started = time.perf_counter()
        record = scan(Candidate(state, trained, inputs, data.validation.labels), 0, limit)
        seconds = time.perf_counter() - started
        detail = f"{seconds:.2f} s / {epoch:.2f} s; {record.active[0]} + {record.active[1]} units stay"
        yield Row(f"threshold scan over an epoch, margin {margin:.2%}", seconds / epoch, high=1.0, detail=detail)


def networks(options: Options) -> Iterator[Row]:
    """Packs of convolutional networks against plain PyTorch, one point at a time, with the same L1 penalty."""
    prepare(CORES)
    for name, points, bar in (("zenke", 4, 0.9), ("resnet18", 2, 1.0)):
        graph, module = _network(name)
        num_batches = 1 if options.quick else 3
        samples = random_samples(num_batches * BATCH, graph.input_shape)
        for precision in ("float32", "bf16") if name == "zenke" else ("float32",):
            plain = _plain_epoch(module, samples, precision)
            plain()
            bench = on_random(make_state(graph), points, num_batches, precision)
            bench.training.run_epoch()
            # In turns, so that what else the machine does hits both.
            pairs = [(timed(bench.training.run_epoch), timed(plain)) for _ in range(options.repeats)]
            ours, theirs = (min(times) / num_batches for times in zip(*pairs, strict=True))
            rate = bench.pack.training_flop * BATCH / ours
            detail = (
                f"{1e3 * ours / points:.0f} ms / {1e3 * theirs:.0f} ms a point and step; {rate / 1e9:.0f} GFLOP/s of "
                f"{peak_rate(settings(1, precision).dtype) / 1e9:.0f}"
            )
            figure = f"{name}, {points} points over plain PyTorch, {precision}"
            yield Row(figure, ours / points / theirs, high=bar, detail=detail)


def network_frozen(options: Options) -> Iterator[Row]:
    """A task's training time when half of all channels are frozen, over the first task's."""
    prepare(CORES)
    graph, num_batches = _network("zenke")[0], options.batches(4)
    benches = [on_random(make_state(graph, fraction), 4, num_batches) for fraction in (0.0, 0.5)]
    for bench in benches:
        bench.training.run_epoch()
    pairs = [[timed(bench.training.run_epoch) for bench in benches] for _ in range(options.repeats)]
    first, later = (min(times) for times in zip(*pairs, strict=True))
    detail = f"epoch {later:.2f} s / {first:.2f} s; frozen outputs {benches[1].prepared_s:.2f} s, once a task"
    yield Row("zenke, 4 points, half frozen over first task", later / first, high=0.55, detail=detail)


def own_parts(options: Options) -> Iterator[Row]:
    """What each point of a pack convolves by itself: as groups of one convolution, over one convolution a point."""
    prepare(CORES)
    points, convolve = 4, partial(torch.nn.functional.conv2d, padding=1)

    def grouped(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return convolve(inputs, weight, groups=points)

    def looped(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.cat(list(map(convolve, inputs.chunk(points, 1), weight.chunk(points))), 1)

    for dtype in (torch.float32, torch.bfloat16):
        for channels, side, batch in ((32, 32, BATCH), (64, 16, BATCH), (256, 8, 64)):
            shapes = (batch, points * channels, side, side), (points * channels, channels, 3, 3)
            inputs, weight = (
                torch.randn(shape, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
                for shape in shapes
            )

            def step(form: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
                form(inputs, weight).sum().backward()  # noqa: B023

            step(grouped), step(looped)
            pairs = [[timed(partial(step, form)) for form in (grouped, looped)] for _ in range(options.repeats)]
            ours, other = (min(times) for times in zip(*pairs, strict=True))
            detail = f"{1e3 * ours:.0f} ms / {1e3 * other:.0f} ms forward and back"
            yield Row(f"{points} x {channels} channels of {side} x {side}, {dtype}", ours / other, detail=detail)


def network_scan(options: Options) -> Iterator[Row]:
    """The exact scan of zenke's network on 5,000 images over one training epoch of 45,000."""
    prepare(CORES)
    graph, split = _network("zenke")[0], (2 if options.quick else 40) * BATCH
    raw = load_cifar("CIFAR10", options.root, CLASSES)
    order = torch.randperm(len(raw.train_labels), generator=torch.Generator().manual_seed(0))[: split + 5000]
    inputs, labels = ((torch.as_tensor(part)[order]) for part in (raw.train_inputs, raw.train_labels))
    inputs = (inputs.float() - 120) / 64
    train, validation = (inputs[:split], labels[:split]), (inputs[split:], labels[split:])
    state, point = make_state(graph), Point(0, (1e-5,) * len(graph.layers), 0.001)
    bench = _bench(state, [point], train, validation, settings(6))
    for _ in range(1 if options.quick else 5):
        bench.training.run_epoch()
    epoch = timed(bench.training.run_epoch) * 45_000 / split
    trained = bench.pack.point(0, *bench.pack.activities(bench.train))
    for margin in (0.01, 0.04):
        candidate = Candidate(state, trained, *validation)
        limit = min_correct(candidate.num_correct(), len(validation[1]), margin)
        seconds = timed(lambda: scan(candidate, 0, limit))  # noqa: B023
        detail = f"{seconds:.1f} s / {epoch:.1f} s; {candidate.num_correct() / len(validation[1]):.1%} right"
        yield Row(f"zenke, scan over an epoch, margin {margin:.0%}", seconds / epoch, high=1.0, detail=detail)


def _network(name: str) -> tuple[Graph, torch.nn.Module]:
    """A network for 32 x 32 colour images, as a graph and as an ordinary module."""
    nn = torch.nn
    if name == "zenke":
        convolutions = []
        for inputs, units in ((3, 32), (32, 64)):
            convolutions += [nn.Conv2d(inputs, units, 3, padding=1), nn.ReLU(), nn.Conv2d(units, units, 3), nn.ReLU()]
            convolutions += [nn.MaxPool2d(2), nn.Dropout(0.25)]
        dense = [nn.Flatten(), nn.Linear(2304, 512), nn.ReLU(), nn.Dropout(0.5), nn.Linear(512, CLASSES)]
        return zenke((3, 32, 32)), nn.Sequential(*convolutions, *dense)
    from torchvision.models import resnet18

    from clnp_search.clnp.trace import trace

    module = resnet18(num_classes=CLASSES)
    module.conv1, module.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return trace(module, (3, 32, 32)).graph, module


def _plain_epoch(
    module: torch.nn.Module, samples: tuple[torch.Tensor, torch.Tensor], precision: str, device: str = "cpu"
) -> Callable[[], None]:
    """An epoch as one would write it: channels-last, fused Adam, the data as one tensor, bf16 by autocast."""
    module = module.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.001, fused=True)
    weights = [parameter for parameter in module.parameters() if parameter.ndim > 1]
    inputs, labels = samples[0].to(device, memory_format=torch.channels_last), samples[1].to(device)

    def epoch() -> None:
        for index in torch.randperm(len(labels)).to(device).split(BATCH):
            optimizer.zero_grad()
            with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
                logits = module(inputs[index])
            loss = torch.nn.functional.cross_entropy(logits.float(), labels[index])
            (loss + 1e-5 * sum(weight.abs().sum() for weight in weights)).backward()
            optimizer.step()
        loss.item()  # waits for the device

    return epoch


def gpu(options: Options) -> Iterator[Row]:
    """Packs on a GPU: narrow ones of many points, shares of the matrix rate, networks against plain PyTorch."""
    if not torch.cuda.is_available():
        return
    for precision in ("float32", "tf32", "bf16"):
        prepare(CORES, precision)
        dtype, num_batches = settings(1, precision).dtype, options.batches(100)
        peak = matrix_rate("cuda", dtype, size=8192)
        steps = {}
        for points in (1, 64):
            bench = on_random(make_state(NARROW), points, num_batches, precision, "cuda")
            steps[points] = [each(options.repeats) / num_batches for each in (bench.best_epoch, bench.unrecorded_epoch)]
        ours, apart = ([f"{1e6 * steps[points][way]:.0f} us" for points in (64, 1)] for way in (0, 1))
        detail = f"a step {' / '.join(ours)}; kernels launched one by one {' / '.join(apart)}"
        yield Row(f"64 points over one, 2 x 100, {precision}", steps[64][0] / steps[1][0], high=2.0, detail=detail)
        for points in (1, 8):
            bench = on_random(make_state(WIDE), points, num_batches, precision, "cuda")
            rate = bench.flops(bench.best_epoch(options.repeats))
            detail = f"{rate / 1e12:.0f} of {peak / 1e12:.0f} TFLOP/s"
            yield Row(
                f"arithmetic over matrix rate, 2 x 2000, {points} points, {precision}", rate / peak, detail=detail
            )
    graph, module = _network("zenke")
    num_batches = options.batches(20)
    plain = _plain_epoch(module, random_samples(num_batches * BATCH, graph.input_shape), precision, "cuda")
    plain()
    theirs = min(timed(plain) for _ in range(options.repeats)) / num_batches
    for points, together in ((4, 1), (4, 4), (16, 1), (16, 16)):
        bench = on_random(make_state(graph), points, num_batches, precision, "cuda", together)
        ours = bench.best_epoch(options.repeats) / num_batches
        detail = f"{1e3 * ours / points:.2f} ms / {1e3 * theirs:.2f} ms a point and step; "
        detail += f"{bench.pack.training_flop * BATCH / ours / 1e12:.0f} of {peak / 1e12:.0f} TFLOP/s"
        figure = f"zenke, {points} points, {together} at a time, over plain PyTorch, {precision}"
        yield Row(figure, ours / points / theirs, detail=detail)


def marginal(options: Options) -> Iterator[Row]:
    """One more point in a narrow pack, over a pack of one."""
    for threads in sorted({1, CORES}):
        prepare(threads)
        seconds = {}
        for points in (1, 12):
            bench = on_random(make_state(NARROW), points, options.batches(60))
            seconds[points] = bench.best_epoch(2 * options.repeats)
        slope = (seconds[12] - seconds[1]) / 11
        detail = f"epoch of 1 point {seconds[1]:.3f} s, of 12 {seconds[12]:.3f} s"
        yield Row(
            f"one more point over a single one, 2 x 100, {threads} thread(s)", slope / seconds[1], None, 0.7, detail
        )


def memory(options: Options) -> Iterator[Row]:
    """A trial's peak memory over what the plan expected."""
    for name, points in (("2 x 100", 12), ("2 x 2000", 1), ("zenke", 4), ("resnet18", 2)):
        with tempfile.TemporaryDirectory() as folder:
            inputs = _task_inputs(options, name, points, folder)
            command = [sys.executable, str(Path(__file__)), "--root", str(options.root), *["--quick"] * options.quick]
            [output], _ = _run_all([[*command, "--pack", name, str(points), folder]])
        data = inputs.data()
        estimate = estimate_memory(
            inputs.state.architecture,
            active_units(inputs.state),
            CLASSES,
            len(data.train),
            len(data.validation),
            settings(1),
        )
        before, peak = map(int, output.split())
        planned = estimate.total(points)
        detail = f"{peak / 2**20:.0f} MiB / {planned / 2**20:.0f} MiB; before any data {before / 2**20:.0f} MiB"
        yield Row(f"peak memory over estimate: {name}, {points} point(s)", peak / planned, 0.75, 1.25, detail)


def _task_inputs(options: Options, name: str, num_points: int, folder: str) -> TaskInputs:
    """The first task of permuted MNIST, or, for networks of maps, a few images of CIFAR-10's size."""
    if name.startswith("2 x "):
        state, scenario = make_state((int(name.removeprefix("2 x ")),) * 2), options.scenario()
    else:
        state, num = make_state(_network(name)[0]), 500 if options.quick or name == "resnet18" else 20_000
        inputs, labels = random_samples(num, state.graph.input_shape)
        images = (100 + 50 * inputs).clamp(0, 255).byte().numpy()
        raw = RawData(images, labels.numpy(), images[:10], labels[:10].numpy(), CLASSES)
        scenario = Scenario((raw,), (Task(0, "random"),), num // 4, flatten=False)
    points = make_points(num_points, len(state.graph.layers))
    keys = tuple(pack_name([point.name]) for point in points)
    here = Environment("cpu", 1, "float32", torch.__version__, version("clnp-search"))
    plan = TaskPlan(0, scenario.tasks[0].name, state.digest, tuple(points), keys, (tuple(range(len(points))),), here)
    run = RunInputs(f"{folder}/run", scenario, settings(1), 0, 0, state.graph)
    return TaskInputs(run, plan, state)


def train_pack_alone(options: Options, name: str, num_points: int, folder: str) -> None:
    """What a trial's process does for one pack; prints its resident bytes before any data, and at the peak."""
    import clnp_search.search.cluster  # noqa: F401  (as a worker does, to find the function; with it, Ray)

    before = _resident("VmRSS")
    inputs = _task_inputs(options, name, num_points, folder)
    for _ in run_pack(inputs, inputs.plan.points):
        pass
    records = [RunFolder(inputs.run.folder).read_point(0, point.name) for point in inputs.plan.points]
    assert all(record is not None and record.status == "done" for record in records), records
    # Not getrusage: its peak also counts the process that started this one, from before exec.
    print(before, _resident("VmHWM"))


def _resident(field: str, process: int | str = "self") -> int:
    """Bytes of a field of a process's status (Linux)."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return int(status[field].split()[0]) << 10


def many_points(options: Options) -> Iterator[Row]:
    """One task of very many points: what a point costs beside its training and its scan, and the driver's memory."""
    found, few, many = {}, 10, 50 if options.quick else 1000
    with tempfile.TemporaryDirectory() as folder:
        for num in (few, many):
            sweep = _tiny(folder, 1) | {
                "search": {
                    "algorithm": "random",
                    "points": num,
                    "alpha": {"low": 1e-6, "high": 1e-3},
                    "learning_rate": {"low": 2e-3, "high": 2e-2},
                }
            }
            found[num] = _watched(sweep, f"{num}-points", folder)
        run = RunFolder(f"{folder}/{many}-points")
        records, scans = run.read_points(0), run.read_scans(0)
        [(logged,)] = _database(folder, "select count(*) from tags where key = 'selected'")
    missing = 2 * many + few - len(records) - logged
    yield Row("points without a record or a run in MLflow", missing, high=0, detail=f"{len(scans)} of {many} scanned")
    busy = (sum(each.seconds for each in records) + sum(each.seconds for each in scans)) / CORES
    wall = found[many].seconds - found[few].seconds
    detail = f"{wall:.0f} s more than {few} points, of which trials computed {busy:.0f} s on {CORES} cores"
    yield Row("overhead a point [ms]", 1e3 * (wall - busy) / (many - few), high=50, detail=detail)
    cpu = 1e3 * (found[many].cpu - found[few].cpu) / (many - few)
    yield Row("CPU of the driver a point [ms]", cpu, high=50, detail="the same where nothing else runs")
    most, least = (max(found[num].resident) for num in (many, few))
    detail = f"{most / 2**20:.0f} MiB / {least / 2**20:.0f} MiB at most"
    yield Row(f"the driver's memory, over that with {few} points", most / least, high=1.25, detail=detail)


def many_tasks(options: Options) -> Iterator[Row]:
    """A long sequence: the time of late tasks over that of early ones, from commit to commit."""
    num = 12 if options.quick else 100
    with tempfile.TemporaryDirectory() as folder:
        sweep = _tiny(folder, num) | {"search": {"alpha": [1e-3], "learning_rate": [0.005, 0.01]}}
        watched = _watched(sweep, "tasks", folder)
        run = RunFolder(f"{folder}/tasks")
        ended = [result.ended for result in run.read_results()]
        sequence, again = TaskSequence(sweep_of(run)), []
        for index in range(num):  # what every commit does with all tasks so far
            state, started = run.read_state(index), time.perf_counter()
            list(test_accuracies(sequence, cuts(state)))
            again.append(time.perf_counter() - started)
    seconds = [after - before for before, after in itertools.pairwise(ended)]
    starts = min(9, num - 11), num - 11
    early, late = (sum(seconds[start : start + 10]) for start in starts)
    yield Row("the last ten tasks over tasks 10 to 19", late / early, high=1.5, detail=f"{late:.1f} s / {early:.1f} s")
    few, all_ = (sum(again[start + 1 : start + 11]) for start in starts)
    detail = f"which takes {all_:.1f} s / {few:.1f} s"
    yield Row("the same without evaluating earlier tasks again", (late - all_) / (early - few), high=1.5, detail=detail)
    behind = watched.ended - ended[-1]
    yield Row("from the last commit to the end of the command [s]", behind, detail="the rest of figures and MLflow")


def many_sequences(options: Options) -> Iterator[Row]:
    """Sequences at once: a sweep's seeds, as many at a time as there are cores, over one of them alone."""
    seconds, num = {}, 3 if options.quick else 20
    with tempfile.TemporaryDirectory() as folder:
        for repetitions in (1, num):
            sweep = _tiny(folder, 2) | {"search": {"alpha": [1e-4], "learning_rate": [0.01]}}
            seconds[repetitions] = _watched(sweep | {"repetitions": repetitions}, f"of-{repetitions}", folder).seconds
        rows = _database(folder, "select status from runs where name like 'of-%-s%'")
    finished = sum(status == "FINISHED" for (status,) in rows)
    yield Row("sequences that did not finish in MLflow", num - finished, high=0)
    detail = f"{num} in {seconds[num]:.0f} s, one in {seconds[1]:.0f} s"
    yield Row(f"{num} sequences over {num} times one", seconds[num] / (num * seconds[1]), high=1.0, detail=detail)


@dataclass(frozen=True)
class Watched:
    """A whole command: its seconds, when it ended, its seconds of CPU, and its resident bytes, some a second."""

    seconds: float
    ended: float
    cpu: float
    resident: list[int]


def _tiny(folder: str, tasks: int) -> dict[str, Any]:
    """A sweep whose tasks train for as short as can be, so that what is around them shows."""
    return {
        "scenario": {"name": "permuted_digits", "tasks": tasks},
        "network": {"hidden": [100, 100]},
        "training": {"epochs": 1},
        "forgetting": {"margin": "1%", "theta": "global"},
        "storage": folder,
        "tracking": {"uri": f"sqlite:///{folder}/mlflow.db", "models": False},
    }


def _watched(sweep: dict[str, Any], name: str, folder: str) -> Watched:
    path = Path(folder, f"{name}.yaml")
    path.write_text(json.dumps(sweep))
    started, resident, cpu = time.perf_counter(), [], 0.0
    command = [sys.executable, "-m", "clnp_search", "run", str(path), "--name", name, "--json"]
    with Path(folder, "said").open("w+") as said:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
        while process.poll() is None:
            with suppress(OSError, KeyError, IndexError):  # it ends meanwhile
                resident.append(_resident("VmRSS", process.pid))
                fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
                cpu = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
            time.sleep(0.25)
        if process.returncode:
            said.seek(0)
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{said.read()[-2000:]}")
    return Watched(time.perf_counter() - started, time.time(), cpu, resident)


def _database(folder: str, query: str) -> list[Any]:
    """Rows of MLflow's database."""
    with closing(sqlite3.connect(f"{folder}/mlflow.db")) as database:
        return database.execute(query).fetchall()


def curves(options: Options) -> Iterator[Row]:
    """Cost of a step against number of points, width and task index; drawn to cost.png."""
    prepare(CORES)
    panels = {
        "points of a pack (2 x 100)": [
            (points, make_state(NARROW), points)
            for points in ([1, 4] if options.quick else [1, 2, 4, 8, 12, 16, 24, 32])
        ],
        "units of each layer (1 point)": [
            (width, make_state((width, width)), 1)
            for width in ([100, 200] if options.quick else [100, 200, 400, 700, 1000, 1400, 2000])
        ],
        "frozen units [%] (2 x 1000, 4 points)": [
            (round(100 * fraction), make_state((100 if options.quick else 1000,) * 2, fraction), 4)
            for fraction in (0.0, 0.25, 0.5, 0.75)
        ],
    }
    peak = peak_rate()
    drawn: dict[str, list[tuple[int, float, float]]] = {}
    for title, cases in panels.items():
        drawn[title] = []
        for x, state, points in cases:
            num_batches = options.batches(20)
            bench = on_random(state, points, num_batches)
            step_ms = 1e3 * bench.best_epoch(options.repeats) / num_batches
            floor_ms = 1e3 * bench.pack.training_flop * BATCH / peak
            drawn[title].append((x, step_ms, floor_ms))
            yield Row(f"step [ms], {title}: {x}", step_ms, detail=f"at the matrix rate {floor_ms:.2f} ms")
    if not options.quick:
        _draw(drawn, HERE / "cost.png")


def _draw(panels: dict[str, list[tuple[int, float, float]]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3), layout="constrained")
    for axes, (title, values) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        x, measured, floor = zip(*values, strict=True)
        axes.plot(x, measured, "o-", markersize=4, label="measured")
        axes.plot(x, floor, "--", color="gray", label="arithmetic at the matrix rate")
        axes.set(xlabel=title, ylim=(0, None))
    figure.axes[0].set_ylabel(f"ms for a step of {BATCH} samples")
    figure.axes[1].legend(frameon=False)
    figure.savefig(path, dpi=110)


BENCHMARKS: dict[str, Callable[[Options], Iterator[Row]]] = {
    "peers": peers,
    "rate": rate,
    "frozen": frozen,
    "bf16": bf16,
    "scan": threshold_scan,
    "networks": networks,
    "network_frozen": network_frozen,
    "own_parts": own_parts,
    "network_scan": network_scan,
    "gpu": gpu,
    "marginal": marginal,
    "memory": memory,
    "curves": curves,
    "many_points": many_points,
    "many_tasks": many_tasks,
    "many_sequences": many_sequences,
}


def machine() -> dict[str, Any]:
    """What the figures depend on besides the code."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    model = next((line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")), "")
    instructions = [name for name in ("avx512f", "avx512_bf16", "amx_bf16") if f" {name}" in text]
    load = os.getloadavg()[0]
    return {
        "cpu": model or platform.processor(),
        "cores": CORES,
        "instructions": instructions,
        "torch": torch.__version__,
        "load": load,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; default: all")
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder that contains MNIST/raw")
    parser.add_argument("--quick", action="store_true", help="only see that it runs: the figures mean nothing")
    parser.add_argument("--full", action="store_true", help="three seeds where seeds matter (bf16)")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of a table")
    parser.add_argument("--pack", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.pack:
        name, points, folder = args.pack
        train_pack_alone(Options(args.root, args.quick, args.full), name, int(points), folder)
        return
    if unknown := set(args.names) - set(BENCHMARKS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(BENCHMARKS)}")
    options, log, here = Options(args.root, args.quick, args.full), Console(stderr=True), machine()
    rows, status = [], 0
    for name in args.names or BENCHMARKS:
        started = time.perf_counter()
        try:
            for row in BENCHMARKS[name](options):
                rows.append((name, row))
                log.print(f"{row.figure}: {row.measured:.3g} {row.detail}", highlight=False, markup=False)
        except Exception:  # the others' figures are not lost by it
            log.print_exception()
            status = 1
        log.print(f"{name}: {time.perf_counter() - started:.0f} s", highlight=False)
    if args.json:
        figures = [{"benchmark": name, **asdict(row), "passed": row.passed} for name, row in rows]
        print(json.dumps({"machine": here, "quick": args.quick, "rows": figures}, indent=1))
        sys.exit(status)
    title = ", ".join(f"{key}: {' '.join(value) if isinstance(value, list) else value}" for key, value in here.items())
    table = Table("benchmark", "figure", "measured", "bar", "", "detail", title=title, header_style="bold")
    marks = {None: "", True: "[green]met[/]", False: "[red]missed[/]"}
    for name, row in rows:
        table.add_row(name, escape(row.figure), f"{row.measured:.3g}", row.bar, marks[row.passed], row.detail)
    Console().print(table)
    sys.exit(status)


if __name__ == "__main__":
    main()
