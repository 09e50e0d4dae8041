"""What runs inside a Ray worker: the training of a pack, and the threshold scan of a candidate."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from clnp_search.clnp.pack import Features, Pack
from clnp_search.clnp.scan import Candidate, scan
from clnp_search.clnp.state import State
from clnp_search.clnp.training import Training, TrainingSettings
from clnp_search.records import Epoch, Point, PointRecord, ScanRecord, TaskPlan
from clnp_search.search.points import pack_name
from clnp_search.storage import RunFolder
from clnp_search.tasks import RawData, Task, TaskData

CHECKPOINT_EVERY_S = 20.0
REPORT_EVERY_S = 0.5

Progress = dict[int, Epoch]  # the last epoch of each point that trains


@dataclass(frozen=True)
class RunInputs:
    """What the trials and scans of all tasks read; travels once, through Ray's object store."""

    folder: str
    raw: RawData
    tasks: tuple[Task, ...]
    validation: int
    scaling: str
    settings: TrainingSettings
    seed: int


@dataclass(frozen=True)
class TaskInputs:
    """All that a trial or a scan of one task reads; the plan and the state travel once a task, likewise."""

    run: RunInputs
    plan: TaskPlan
    state: State

    def data(self) -> TaskData:
        """The task's samples."""
        run = self.run
        return run.tasks[self.plan.task].data(run.raw, run.validation, run.scaling, run.seed)


def run_pack(inputs: TaskInputs, points: Sequence[Point]) -> Iterator[Progress]:
    """Gives every point of a pack its record: trained, or failed with the reason; shows the training as it goes.

    Raises:
        OSError: The run folder cannot be read or written; worth another try, as is the death of this process.
    """
    planned = inputs.plan.environment.torch
    notes: tuple[str, ...] = ()
    if planned != torch.__version__:
        notes = (f"planned with torch {planned}, trained with torch {torch.__version__}",)
    try:
        yield from train_pack(inputs, points, notes)
    except OSError:
        raise
    except Exception as error:
        folder, plan = RunFolder(inputs.run.folder), inputs.plan
        for point in points:
            if folder.read_point(plan.task, point.name) is None:
                reason = f"{type(error).__name__}: {error}"
                folder.write_point(
                    plan.task, PointRecord(plan.keys[point.index], point, "failed", 0, 0, reason=reason), None
                )


def train_pack(inputs: TaskInputs, points: Sequence[Point], notes: tuple[str, ...] = ()) -> Iterator[Progress]:
    """Trains a pack's points and writes each one's record and parameters to the run folder.

    Goes on from the pack's checkpoint if there is one; points that are recorded already are not written again. If
    the device runs out of memory the pack is trained in two halves, and the records say so.
    """
    try:
        yield from _train(inputs, points, notes)
    except (MemoryError, RuntimeError) as error:
        if len(points) == 1 or not _out_of_memory(error):
            raise
        note = f"a pack of {len(points)} points ran out of memory and was split"
    else:
        return
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    middle = len(points) // 2
    for half in (points[:middle], points[middle:]):
        yield from train_pack(inputs, half, (*notes, note))


def _train(inputs: TaskInputs, points: Sequence[Point], notes: tuple[str, ...]) -> Iterator[Progress]:
    folder, task, keys = RunFolder(inputs.run.folder), inputs.plan.task, inputs.plan.keys
    missing = [point for point in points if folder.read_point(task, point.name) is None]
    if not missing:
        return
    name = pack_name([keys[point.index] for point in points])
    checkpoint = folder.read_checkpoint(task, name)
    if len(missing) < len(points) and checkpoint is None:
        points, notes = missing, (*notes, f"packed apart from {len(points) - len(missing)} points that were finished")
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
        training.run_epoch()
        if training.finished or time.perf_counter() - saved > CHECKPOINT_EVERY_S:
            folder.write_checkpoint(task, name, training.to_bytes())
            saved = time.perf_counter()
        if training.finished or time.perf_counter() - reported > REPORT_EVERY_S:
            yield {point.index: last for point, last in zip(points, training.history[-1], strict=True)}
            reported = time.perf_counter()
    activities, correct = pack.activities(train), pack.num_correct(training.validation)
    finite = pack.finite(activities)
    seconds = (time.perf_counter() - started) / len(points)
    for position, point in enumerate(points):
        if point not in missing:
            continue
        record = PointRecord(
            key=keys[point.index],
            point=point,
            status="done",
            val_correct=correct[position],
            val_total=len(training.validation),
            epochs=tuple(epoch[position] for epoch in training.history),
            seconds=seconds,
            notes=notes,
            started=began,
            ended=time.time(),
        )
        if finite[position]:
            folder.write_point(task, record, pack.point(position, activities))
        else:
            reason = "diverged: a parameter or an activity is not finite"
            folder.write_point(task, replace(record, status="failed", val_correct=0, reason=reason), None)
    folder.delete_checkpoint(task, name)


def _begin(inputs: TaskInputs, points: Sequence[Point]) -> tuple[Pack, Training, Features]:
    """A pack before its first epoch, its training, and the training split."""
    settings, seed = inputs.run.settings, inputs.run.seed
    device = _prepare(inputs.plan, settings)
    data = inputs.data()
    alphas, rates = [point.alpha for point in points], [point.learning_rate for point in points]
    pack = Pack(inputs.state, data.info.num_classes, alphas, seed, device, settings.dtype)
    train, validation = (
        pack.features(data.info.transform(split.inputs.to(device)), split.labels)
        for split in (data.train, data.validation)
    )
    return pack, Training(pack, rates, train, validation, settings, seed, inputs.plan.task), train


def scan_point(inputs: TaskInputs, point: Point, min_correct: int, rule: str) -> ScanRecord:
    """The threshold scan of a finished point."""
    device = _prepare(inputs.plan, inputs.run.settings)
    data = inputs.data()
    trained = RunFolder(inputs.run.folder).read_trained(inputs.plan.task, point.name)
    values = data.info.transform(data.validation.inputs.to(device))
    candidate = Candidate(inputs.state, trained, values, data.validation.labels.to(device))
    return scan(candidate, point.index, min_correct, rule)


def _prepare(plan: TaskPlan, settings: TrainingSettings) -> torch.device:
    """Sets up this process, which may have trained another pack before, as the plan says."""
    torch.set_num_threads(plan.environment.threads)
    torch.set_flush_denormal(True)
    torch.set_float32_matmul_precision("high" if settings.precision == "tf32" else "highest")
    torch.manual_seed(0)
    return torch.device(plan.environment.device)


def _out_of_memory(error: BaseException) -> bool:
    message = str(error)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in message
