"""What runs inside a Ray worker: the training of a pack, and the threshold scan of a candidate."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from clnp_search.clnp.augment import augment
from clnp_search.clnp.baselines import BASELINES, Baseline
from clnp_search.clnp.graph import Graph
from clnp_search.clnp.initial import draw, overlaid
from clnp_search.clnp.pack import Features, Pack
from clnp_search.clnp.scan import Candidate, scan
from clnp_search.clnp.state import FreeParameters, Parameters, State, TaskInfo
from clnp_search.clnp.subnetwork import Subnetwork
from clnp_search.clnp.training import Training, TrainingSettings, set_precision
from clnp_search.records import Epoch, Point, PointRecord, ScanRecord, TaskPlan
from clnp_search.search.points import pack_name
from clnp_search.storage import RunFolder
from clnp_search.tasks import Scenario, Split, TaskData

CHECKPOINT_EVERY_S = 20.0
REPORT_EVERY_S = 0.5
# How oneDNN, CUDA, cuBLAS and cuDNN say that memory ran out, where torch does not say it for them.
OUT_OF_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "ALLOC_FAILED", "unable to find an engine")
# What computing raises for the same point on any machine. RuntimeError is not among them: torch raises it for what a
# machine lacks too. Such an error stops the run, which says why and can be resumed.
POINT_FAULTS = (ArithmeticError, AssertionError, AttributeError, LookupError, NameError, TypeError, ValueError)


# What travels once a task: its plan, the state before it, and what a module's own constructor draws for it.
OfTask = tuple[TaskPlan, State, Parameters | None]


class PointFault(Exception):  # noqa: N818 - a result, not an error
    """What a point itself did, its network's module and its data included: another try would end the same."""


Progress = dict[int, Epoch]  # the last epoch of each point that trains


@dataclass(frozen=True)
class RunInputs:
    """What the trials and scans of all tasks read; travels once, through Ray's object store.

    Args:
        graph: The network as the first task begins with it.
        finetune_l1: What multiplies alpha in fine-tune rounds.
        augment: Settings of `clnp.augment.augment`; empty for none.
        method: clnp, or a key of `BASELINES`.
        gpu: GPUs of each trial, or its share of one; 0 for none.
    """

    folder: str
    scenario: Scenario
    settings: TrainingSettings
    finetune_epochs: int
    seed: int
    graph: Graph
    finetune_l1: float = 1.0
    augment: dict[str, Any] = field(default_factory=dict)
    method: str = "clnp"
    gpu: float = 0.0

    @property
    def baseline(self) -> Baseline | None:
        """The method, if it is not clnp."""
        return BASELINES.get(self.method)


@dataclass(frozen=True)
class TaskInputs:
    """All that a trial or a scan of one task reads; all but `run` travels once a task, likewise.

    Args:
        state: Before the task; of clnp as one task would have left it, which tells nothing else of the tasks before.
        drawn: What a module's own constructor draws for the task.
    """

    run: RunInputs
    plan: TaskPlan
    state: State
    drawn: Parameters | None = None

    def initial(self, num_classes: int) -> Parameters:
        """What the task's free parameters start from, at full size, with a head of so many classes."""
        graph = self.state.graph
        initial = draw(self.state, num_classes, self.run.seed, self.plan.task)
        return initial if self.drawn is None else overlaid(initial, graph, self.drawn, self.run.graph)

    def pruned(self, point: Point) -> FreeParameters:
        """What a fine-tune round starts from: the parameters of the round before that its threshold has left."""
        folder, task, plan = RunFolder(self.run.folder), self.plan.task, self.plan
        record = folder.read_point(task, point.name_in(plan.round - 1))
        assert record is not None, "a round comes after the one before"
        theta = dict(zip(self.state.graph.groups, plan.cuts[point.index], strict=True))
        return folder.read_trained(task, record).pruned(self.state.graph, theta)

    @property
    def settings(self) -> TrainingSettings:
        """Of the search, or of a fine-tune round."""
        settings = self.run.settings
        return replace(settings, epochs=self.run.finetune_epochs) if self.plan.round else settings

    def data(self) -> TaskData:
        """The task's samples."""
        return self.run.scenario.data(self.plan.task)

    def trained_on(self) -> list[TaskData]:
        """The samples that the task is trained on: its own, or those of all tasks so far."""
        joint = self.run.baseline is not None and self.run.baseline.JOINT
        return [self.run.scenario.data(task) for task in range(0 if joint else self.plan.task, self.plan.task + 1)]


def run_pack(inputs: TaskInputs, points: Sequence[Point], believed: bool = True) -> Iterator[Progress]:
    """Gives every point of a pack its record: trained, or failed by its own fault; shows the training as it goes.

    Args:
        believed: Whether an error that is a point's own is recorded as its result. A process that ran out of memory
            raises any error in any place, so that one is believed once it comes a second time, in another process.

    Raises:
        PointFault: A point's own error, which is not believed.
        Exception: What the machine did: no space, no memory for a single point, no GPU, a run folder that cannot be
            read or written. It is worth another try, as is the death of this process; points have no record of it.
    """
    planned = inputs.plan.environment.torch
    notes: tuple[str, ...] = ()
    if planned != torch.__version__:
        notes = (f"planned with torch {planned}, trained with torch {torch.__version__}",)
    yield from train_pack(inputs, points, notes, believed)
    _release()


def train_pack(
    inputs: TaskInputs, points: Sequence[Point], notes: tuple[str, ...] = (), believed: bool = True
) -> Iterator[Progress]:
    """Trains a pack's points and writes each one's record and parameters to the run folder.

    Goes on from the pack's checkpoint if there is one; points that are recorded already are not written again. If
    the device runs out of memory, or one of several points has a fault, the pack is trained in two halves, and the
    records say so.
    """
    try:
        yield from _train(inputs, points, notes)
        return
    except PointFault as fault:
        if not believed:
            raise
        if len(points) == 1:
            plan, (point,) = inputs.plan, points
            record = PointRecord(plan.keys[point.index], point, "failed", 0, 0, reason=str(fault), round=plan.round)
            RunFolder(inputs.run.folder).write_point(plan.task, replace(record, notes=notes), None)
            return
        note = f"a pack of {len(points)} points was split: {fault}"
    except (MemoryError, RuntimeError) as error:
        if len(points) == 1 or not _out_of_memory(error):
            raise
        note = f"a pack of {len(points)} points ran out of memory and was split"
        believed = False
    gc.collect()
    _release()
    middle = len(points) // 2
    for half in (points[:middle], points[middle:]):
        yield from train_pack(inputs, half, (*notes, note), believed)


def _train(inputs: TaskInputs, points: Sequence[Point], notes: tuple[str, ...]) -> Iterator[Progress]:
    folder, task, keys = RunFolder(inputs.run.folder), inputs.plan.task, inputs.plan.keys
    number = inputs.plan.round
    records = [folder.read_point(task, point.name_in(number)) for point in points]
    missing = [point for point, record in zip(points, records, strict=True) if record is None]
    if not missing:
        return
    ours = [point for point, record in zip(points, records, strict=True) if record is None or not record.origin]
    for packed in (points, ours, missing):  # an earlier session may have packed them apart from those of another run
        name = pack_name([keys[point.index] for point in packed])
        if (checkpoint := folder.read_checkpoint(task, name)) is not None:
            break
    if len(packed) < len(points):
        notes = (*notes, f"packed apart from {len(points) - len(packed)} points that were finished")
    points = packed
    started, began = time.perf_counter(), time.time()
    pack, training, train = _begin(inputs, points)
    if checkpoint is not None:
        try:
            training.restore(checkpoint)
        except ValueError:
            notes = (*notes, "its checkpoint was damaged: trained from the start")
            pack, training, train = _begin(inputs, points)
    saved = reported = time.perf_counter()
    while not training.finished:
        with _computing():
            training.run_epoch()
        if training.finished or time.perf_counter() - saved > CHECKPOINT_EVERY_S:
            folder.write_checkpoint(task, name, training.to_bytes())
            saved = time.perf_counter()
        if training.finished or time.perf_counter() - reported > REPORT_EVERY_S:
            yield {point.index: last for point, last in zip(points, training.history[-1], strict=True)}
            reported = time.perf_counter()
    with _computing():
        activities = pack.activities(train)
        finite = pack.finite(activities)
        means = pack.means(train) if inputs.run.settings.compensate else [{}] * len(points)
        trained = [pack.point(position, *each) for position, each in enumerate(zip(activities, means, strict=True))]
        if (baseline := inputs.run.baseline) is not None:
            own = inputs.data()
            trained = [
                baseline.finished(pack, position, each, own.info, own.train.inputs) if finite[position] else each
                for position, each in enumerate(trained)
            ]
        # As the scan counts, in float32 whatever the training's precision, so that both are held to one limit.
        set_precision("float32")
        counts = [
            _validate(inputs, each, pack.device) if usable else [(0, len(training.validation))]
            for each, usable in zip(trained, finite, strict=True)
        ]
    seconds = (time.perf_counter() - started) / len(points)
    for position, point in enumerate(points):
        if folder.read_point(task, point.name_in(number)) is not None:
            continue  # it was finished before, or meanwhile for another driver
        record = PointRecord(
            key=keys[point.index],
            point=point,
            status="done",
            val_correct=sum(correct for correct, _ in counts[position]),
            val_total=sum(total for _, total in counts[position]),
            epochs=tuple(epoch[position] for epoch in training.history),
            seconds=seconds,
            notes=notes,
            started=began,
            ended=time.time(),
            round=number,
            val_accuracies=tuple(correct / total for correct, total in counts[position] if inputs.run.baseline),
        )
        if finite[position]:
            folder.write_point(task, record, trained[position])
        else:
            reason = "diverged: a parameter or an activity is not finite"
            folder.write_point(task, replace(record, status="failed", val_correct=0, reason=reason), None)
    folder.delete_checkpoint(task, name)


def measure_step(inputs: TaskInputs, points: Sequence[Point], num_steps: int) -> float:
    """Seconds of a step of a pack's training, from a few steps of real training, of which nothing is kept."""
    num_samples = num_steps * inputs.run.settings.batch_size
    few = [
        replace(data, train=data.train.first(num_samples), validation=data.validation.first(1))
        for data in inputs.trained_on()
    ]
    _, training, train = _begin(inputs, points, few)
    for _ in range(2):  # not counted: allocates and chooses kernels; records each of them, a GPU's
        training.run_epoch()
    started = time.perf_counter()
    training.run_epoch()
    return (time.perf_counter() - started) / math.ceil(len(train) / inputs.run.settings.batch_size)


def _begin(
    inputs: TaskInputs, points: Sequence[Point], datas: Sequence[TaskData] = ()
) -> tuple[Pack, Training, Features]:
    """A pack before its first epoch, its training, and the training split."""
    settings, seed, plan = inputs.settings, inputs.run.seed, inputs.plan
    device = _prepare(inputs)
    starts = [inputs.pruned(point) for point in points] if plan.round else None
    with _computing():
        datas = datas or inputs.trained_on()
        info, baseline = datas[-1].info, inputs.run.baseline
        factor = inputs.run.finetune_l1 if plan.round else 1.0
        alphas = [tuple(factor * alpha for alpha in point.alpha) for point in points]
        rates = [point.learning_rate for point in points]
        classes = [data.info.num_classes for data in datas]
        if baseline is None:
            start = starts or inputs.initial(info.num_classes)
            pack = Pack(inputs.state, info.num_classes, alphas, start, device, settings.dtype, settings.penalty)
        else:
            shared = inputs.state.architecture.head == "shared"
            drawn = inputs.initial(info.num_classes if shared else sum(classes))
            strengths = [point.alpha[0] for point in points]
            pack = baseline.pack(inputs.state, drawn, strengths, classes, device, settings.dtype)
        transform, augmentation = info.transform, inputs.run.augment

        def view(raw: torch.Tensor, random: torch.Generator | None) -> torch.Tensor:
            return transform(raw if random is None else augment(raw, random, **augmentation))

        # Where several tasks share a head, each class has its row for all of them; else rows one after another.
        first = [0] * len(datas) if pack.class_tasks is None else [sum(classes[:index]) for index in range(len(datas))]
        labels = [
            [data.train.labels + row, data.validation.labels + row] for data, row in zip(datas, first, strict=True)
        ]
        train_labels, validation_labels = (_joined(each) for each in zip(*labels, strict=True))
        if augmentation:
            train = pack.features(_joined([data.train.inputs for data in datas]), train_labels, view=view)
        else:
            samples = _inputs([(data.info, data.train) for data in datas], device)
            train = pack.features(samples, train_labels, plan.cache_bytes)
        samples = _inputs([(data.info, data.validation) for data in datas], device)
        validation = pack.features(samples, validation_labels, plan.cache_bytes)
        stream = f"{plan.task}-round{plan.round}" if plan.round else plan.task
        return pack, Training(pack, rates, train, validation, settings, seed, stream), train


@contextmanager
def _computing() -> Iterator[None]:
    """Inside, where no file is read or written, an error of the kinds that no machine is to blame for is a point's."""
    try:
        yield
    except POINT_FAULTS as error:
        raise PointFault(f"{type(error).__name__}: {error}") from error


def scan_point(
    inputs: TaskInputs,
    point: Point,
    min_correct: int,
    rule: str,
    begun: Callable[[Candidate], None] = lambda candidate: None,
) -> ScanRecord:
    """The threshold scan of a finished point, in float32 like the subnetwork that is cut at its threshold.

    Args:
        begun: Is given the candidate, which counts the models that are tried.
    """
    device = _prepare(inputs)
    set_precision("float32")
    folder, task, number = RunFolder(inputs.run.folder), inputs.plan.task, inputs.plan.round
    record = folder.read_point(task, point.name_in(number))
    if record is None:
        raise FileNotFoundError(f"{folder.uri}: task {task}: the record of {point.name_in(number)} is missing")
    candidate = _candidate(inputs, folder.read_trained(task, record), device)
    begun(candidate)
    found = scan(candidate, point.index, min_correct, rule)
    _release()
    of = replace(found, key=record.key, parameters_sha256=record.parameters_sha256, round=number)
    return replace(of, rule=rule, min_correct=min_correct)


def _inputs(splits: Sequence[tuple[TaskInfo, Split]], device: torch.device) -> torch.Tensor:
    """The samples of some tasks, as the network takes them."""
    return _joined([info.transform(split.inputs.to(device)) for info, split in splits])


def _joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Tensors one after another; a single one is not copied."""
    return torch.cat(list(tensors)) if len(tensors) > 1 else tensors[0]


def _candidate(inputs: TaskInputs, trained: FreeParameters, device: torch.device) -> Candidate:
    """A trained point, to be evaluated on the validation split."""
    data = inputs.data()
    samples, labels = data.info.transform(data.validation.inputs.to(device)), data.validation.labels.to(device)
    return Candidate(inputs.state, trained, samples, labels, inputs.plan.cache_bytes)


def _validate(inputs: TaskInputs, trained: FreeParameters, device: torch.device) -> list[tuple[int, int]]:
    """Right validation samples of a trained point, and of how many: of the task, or of each that a baseline is chosen
    by.
    """
    data, baseline = inputs.data(), inputs.run.baseline
    if baseline is None:
        return [(_candidate(inputs, trained, device).num_correct(), len(data.validation))]
    after = baseline.after(inputs.state, data.info, trained)
    return validate(after, baseline, inputs.run.scenario, device)


def validate(after: State, baseline: Baseline, scenario: Scenario, device: torch.device) -> list[tuple[int, int]]:
    """Right validation samples of each task that a baseline is chosen by, and of how many.

    Args:
        after: The state after the last of them.
    """
    last = after.num_tasks - 1
    counts = []
    for task in range(last if baseline.ALONE else 0, last + 1):
        split = scenario.data(task).validation
        network = Subnetwork(after, task).to(device)
        counts.append((network.num_correct(split.inputs.to(device), split.labels.to(device)), len(split)))
    return counts


def _prepare(inputs: TaskInputs) -> torch.device:
    """Sets up this process, which may have trained another pack before, as the plan says."""
    environment = inputs.plan.environment
    torch.set_num_threads(environment.threads)
    torch.set_flush_denormal(True)
    set_precision(inputs.run.settings.precision)
    torch.manual_seed(0)
    # Made here, where a device that is missing is no fault of a point.
    device = torch.empty(0, device=environment.device).device
    if device.type == "cuda":  # so that a pack that asks for more is split, and not another trial's
        torch.cuda.set_per_process_memory_fraction(min(1.0, inputs.run.gpu or 1.0), device)
    return device


def _release() -> None:
    """Gives back the memory of what has ended, so that other processes can have it: a GPU's is kept otherwise."""
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


def _out_of_memory(error: BaseException) -> bool:
    said = str(error)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(words in said for words in OUT_OF_MEMORY)
