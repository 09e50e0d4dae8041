"""Frozen values that cross folders: points, plans, trained points, curves, selections, task results.

Plain data only: no tensors, no files, no live objects. Everything here can be written as JSON and read back. What
could not have come about is refused where it is made, so that nothing has to expect it: `ValueError`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

# Of a run folder's files. Raised when an older version could not go on with what this one writes, or this one with what
# an older one has written.
SCHEMA = 1
# What no text here needs: a terminal may obey it, a file may not hold it.
UNWRITABLE = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff\ud800-\udfff]")
PointStatus = Literal["done", "failed"]
RunStatus = Literal["running", "complete", "depleted", "failed"]


@dataclass(frozen=True)
class Point:
    """One (alpha, learning rate) of a task's grid.

    Args:
        index: Position in the grid's order, from 0.
        alpha: L1 coefficient of each hidden layer, then of the head; of a baseline, its strength alone.
        learning_rate: Initial step size.
    """

    index: int
    alpha: tuple[float, ...]
    learning_rate: float

    @property
    def name(self) -> str:
        """The point's name in files and tables."""
        return point_name(self.index)

    def name_in(self, round: int) -> str:
        """Its name in the files of a fine-tune round; in round 0, the search itself, its own."""
        return f"{self.name}-round{round}" if round else self.name


def point_name(index: int) -> str:
    """The name of a task's point in files and tables, for example `p003`."""
    return f"p{index:03d}"


@dataclass(frozen=True)
class Environment:
    """What the bits of a result depend on besides the settings."""

    device: str
    threads: int
    precision: str
    torch: str
    clnp_search: str


@dataclass(frozen=True)
class TaskPlan:
    """How a task is searched; decided once, before its first point is trained. Points that Optuna proposes are added
    to it, before they are trained.

    Args:
        points: The grid, in order.
        keys: For each point, the hash of everything that its result depends on.
        packs: For each pack, the indices of its points.
        round: Of fine-tuning; 0 for the search itself. A round trains some of the points again, those in its packs.
        cuts: For each point of a round, the theta of each group above which its units are kept.
        settings: The sweep's settings that decide the task's results and choice (`Sweep.settings`).
        data_digest: SHA-256 of the task's data.
        numerics: The `NUMERICS` of the code that the points are trained with.
        drawn_digest: Of the initial weights of a user's module; empty for networks of ours.
        num_tasks: Of the sequence, as it was planned then.
        started: When that was, in seconds since 1970; 0 if it was not recorded.
        cache_bytes: What a trial may take to keep the frozen units' outputs; plans once left it to the code.
    """

    task: int
    name: str
    parent_digest: str
    points: tuple[Point, ...]
    keys: tuple[str, ...]
    packs: tuple[tuple[int, ...], ...]
    environment: Environment
    round: int = 0
    cuts: dict[int, tuple[float, ...]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    data_digest: str = ""
    numerics: int = 0
    drawn_digest: str = ""
    num_tasks: int = 0
    started: float = 0.0
    cache_bytes: int = 4 << 30

    def __post_init__(self) -> None:
        indices = [index for pack in self.packs for index in pack]
        _require(self.task >= 0 and self.round >= 0, "a task or a round below 0")
        _require([point.index for point in self.points] == [*range(len(self.points))], "points out of order")
        _require(len(self.keys) == len(self.points), "not a key for each point")
        _require(len({*indices}) == len(indices) and {*indices} <= {*range(len(self.points))}, "packs of other points")

    @property
    def trained(self) -> tuple[Point, ...]:
        """The points that are in a pack, in order."""
        return tuple(self.points[index] for index in sorted(index for pack in self.packs for index in pack))


@dataclass(frozen=True)
class Fork:
    """Where a run has branched off: its tasks up to `after_task` are those of another one.

    Args:
        origin: That run's folder, whose later points are taken over where they are the same.
    """

    origin: str
    after_task: int


@dataclass(frozen=True)
class Holder:
    """The process that drives a run.

    Args:
        token: Of this process and this run of it alone.
        beat: Grows as long as the process lives.
        machine: Equal for processes that see one another; empty where that cannot be known.
        started: When the process was started, in ticks of its machine.
        since: When it took the run, by the clock of its machine: for people only.
    """

    token: str
    beat: int
    host: str
    machine: str
    pid: int
    started: int
    since: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


@dataclass(frozen=True)
class PackProgress:
    """How far the packs in flight have come, as Tune's results say.

    Args:
        epochs_done: For each point that has reported, its finished epochs.
        best: The point that is ahead, by its last epoch, and its validation accuracy; None before the first report.
        failed: Points of finished packs that are recorded as failed.
        ended: All points of finished packs.
    """

    epochs_done: dict[int, int]
    best: tuple[int, float] | None = None
    failed: tuple[int, ...] = ()
    ended: tuple[int, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What became of a point, as far as it tells which ones to try next.

    Args:
        accuracy: Validation accuracy before pruning, as a fraction; None if the point failed.
        sparsity: After its scan; 0 outside the margin.
        outside: By how much accuracy, pruned as little as can be, is outside the margin; 0 or less inside.
    """

    accuracy: float | None
    sparsity: float = 0.0
    outside: float = 0.0


@dataclass(frozen=True)
class Epoch:
    """What was seen at the end of one epoch of one point."""

    epoch: int
    learning_rate: float
    train_loss: float
    val_accuracy: float


@dataclass(frozen=True)
class PointRecord:
    """A grid point that was trained, or the reason why it could not be.

    Args:
        val_correct: Validation samples that the unpruned network gets right, of `val_total`.
        seconds: The point's share of its pack's training time.
        parameters_sha256: Of the file of its parameters; empty if it failed.
        round: Of fine-tuning, of which this is the end; 0 for the search itself.
        started, ended: When its pack was trained, in seconds since 1970; 0 if it was not recorded.
        origin: The run folder that it was taken over from; empty if it was trained for this run.
        val_accuracies: Of a baseline, on each task that it is chosen by, whose samples `val_total` counts together.
    """

    key: str
    point: Point
    status: PointStatus
    val_correct: int
    val_total: int
    epochs: tuple[Epoch, ...] = ()
    seconds: float = 0.0
    reason: str = ""
    notes: tuple[str, ...] = ()
    parameters_sha256: str = ""
    started: float = 0.0
    ended: float = 0.0
    round: int = 0
    origin: str = ""
    val_accuracies: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        _require(0 <= self.val_correct <= self.val_total, "more right samples than there are")
        _require(self.point.index >= 0 and self.round >= 0, "a point or a round below 0")

    @property
    def val_accuracy(self) -> float:
        """Validation accuracy before pruning, as a fraction; of a baseline the mean over tasks."""
        if self.val_accuracies:
            return sum(self.val_accuracies) / len(self.val_accuracies)
        return self.val_correct / self.val_total if self.val_total else 0.0


@dataclass(frozen=True)
class CurveStep:
    """One threshold of a scan, evaluated on the whole validation split.

    Args:
        theta: Threshold of each hidden layer.
        active: Active units of each hidden layer, earlier tasks' included.
    """

    theta: tuple[float, ...]
    val_accuracy: float
    active: tuple[int, ...]


@dataclass(frozen=True)
class ScanRecord:
    """The highest threshold at which a candidate stays inside the margin.

    Args:
        theta: Threshold of each hidden layer; None if the candidate fails even at zero.
        active: Active units of each hidden layer after pruning at `theta`, earlier tasks' included.
        totals: Units of each hidden layer.
        curve: Accuracy against one threshold for all layers, from the highest theta down.
        layer_curves: For each hidden layer, accuracy while its threshold alone is raised
            (only with one theta for each layer).
        rule, min_correct: What the scan was asked: one theta or one a layer, and the limit in right samples.
        key, parameters_sha256: The point record's, whose parameters were scanned.
        round: Of fine-tuning, after which they were. After the last one nothing is pruned any more: theta is still what
            the round before pruned at, and the accuracy that of the retrained model.
    """

    point: int
    theta: tuple[float, ...] | None
    val_correct: int
    val_total: int
    active: tuple[int, ...]
    totals: tuple[int, ...]
    weight_sparsity: float
    curve: tuple[CurveStep, ...]
    layer_curves: tuple[tuple[CurveStep, ...], ...] = ()
    seconds: float = 0.0
    rule: str = ""
    min_correct: int = 0
    key: str = ""
    parameters_sha256: str = ""
    round: int = 0

    def __post_init__(self) -> None:
        _require(0 <= self.val_correct <= self.val_total and self.val_total > 0, "more right samples than there are")
        sizes = {len(self.active), len(self.totals), *([] if self.theta is None else [len(self.theta)])}
        _require(len(sizes) == 1 and bool(self.totals), "not a threshold and a number of units for each group")
        _require(
            all(0 <= active <= total and total for active, total in zip(self.active, self.totals, strict=True)),
            "more active units than there are",
        )

    def is_of(self, record: PointRecord, rule: str, min_correct: int) -> bool:
        """Whether this is the scan of that record's parameters, by that rule and limit."""
        asked = (record.point.index, rule, min_correct, record.key, record.parameters_sha256)
        return asked == (self.point, self.rule, self.min_correct, self.key, self.parameters_sha256)

    @property
    def val_accuracy(self) -> float:
        """Validation accuracy after pruning, as a fraction."""
        return self.val_correct / self.val_total

    @property
    def unit_sparsity(self) -> float:
        """Free units over all hidden units, after pruning."""
        return 1.0 - sum(self.active) / sum(self.totals)

    @property
    def scarcest_layer(self) -> float:
        """The smallest fraction of free units that any hidden layer has left."""
        return min(1.0 - active / total for active, total in zip(self.active, self.totals, strict=True))


@dataclass(frozen=True)
class Selection:
    """Which point of a task is kept, and why.

    Args:
        best_val_accuracy: Highest unpruned validation accuracy of all points, as a fraction.
        min_correct: Validation samples that a model inside the margin gets right, at least.
        candidates: Points inside the margin before pruning.
        chosen: The point that is committed.
        reasons: The choice in sentences.
    """

    best_val_accuracy: float
    margin: float
    min_correct: int
    candidates: tuple[int, ...]
    chosen: int
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Units:
    """Units of one hidden layer after a task: all, active, grown by this task, still free."""

    total: int
    active: int
    new: int
    free: int


@dataclass(frozen=True)
class Selected:
    """The point that a task committed."""

    point: str
    alpha: tuple[float, ...]
    learning_rate: float
    theta: tuple[float, ...]
    val_accuracy: float
    unit_sparsity: float


@dataclass(frozen=True)
class TaskResult:
    """A committed task, as `summary.json` shows it.

    Args:
        test_accuracies: Test accuracy of tasks 0..index, all evaluated again after this task.
        digest: SHA-256 of the task's subnetwork.
        state_digest: SHA-256 of the whole state after the task.
        state_sha256: SHA-256 of the file that holds it.
        ended: When it was committed, in seconds since 1970; 0 if it was not recorded.
        accuracy_before, accuracy_untrained: Test accuracies on it of the network before it, and of the network before
            any task; None where that has no head that the task could be read with.
    """

    index: int
    name: str
    best_val_accuracy: float
    margin: float
    selected: Selected
    test_accuracy: float
    test_accuracies: tuple[float, ...]
    units: dict[str, Units]
    points: int
    digest: str
    state_digest: str
    seconds: float
    state_sha256: str = ""
    ended: float = 0.0
    accuracy_before: float | None = None
    accuracy_untrained: float | None = None

    def __post_init__(self) -> None:
        _require(len(self.test_accuracies) == self.index + 1, "not a test accuracy for each task so far")


@dataclass(frozen=True)
class Summary:
    """`summary.json`: a sequence as far as it has come.

    Args:
        reason: Why it failed, if it did.
        forward_transfer: None where it is not defined: a task needs a head before it is trained.
    """

    schema: int
    name: str
    status: RunStatus
    seed: int
    average_test_accuracy: float
    average_forgetting: float
    max_forgetting: float
    backward_transfer: float
    state_digest: str
    tasks: tuple[TaskResult, ...]
    reason: str = ""
    forward_transfer: float | None = None

    def __post_init__(self) -> None:
        _require([task.index for task in self.tasks] == [*range(len(self.tasks))], "tasks out of order")


def margin_text(margin: float | str | None) -> str:
    """A margin as people write it, `0.05%` or `auto`; nothing of a method that has none."""
    return f"{100 * margin:g}%" if isinstance(margin, float) else margin or ""


def layer_values(values: Sequence[float], most: int, separator: str = ", ") -> str:
    """Values of the layers as people read them: one number if all are equal, a list of few, the range of more."""
    texts = [f"{value:.3g}" for value in values]
    if len(set(texts)) == 1:
        return texts[0]
    return separator.join(texts) if len(texts) <= most else f"{min(values):.3g} to {max(values):.3g}"


def summarise(name: str, status: RunStatus, seed: int, state_digest: str, tasks: tuple[TaskResult, ...]) -> Summary:
    """A sequence's figures from its tasks' results.

    Forgetting of a task is its best test accuracy at any time minus its last; backward transfer is its last minus
    the one right after it was learned; forward transfer is the one right before it minus that of the untrained network
    (Source: Lopez-Paz and Ranzato 2017; Chaudhry et al. 2018).
    """
    last = tasks[-1].test_accuracies if tasks else ()
    history = [[later.test_accuracies[task.index] for later in tasks[task.index :]] for task in tasks[:-1]]
    forgetting = [max(seen) - seen[-1] for seen in history]
    transfer = [seen[-1] - seen[0] for seen in history]
    ahead = [
        task.accuracy_before - task.accuracy_untrained
        for task in tasks[1:]
        if task.accuracy_before is not None and task.accuracy_untrained is not None
    ]
    return Summary(
        schema=SCHEMA,
        name=name,
        status=status,
        seed=seed,
        average_test_accuracy=sum(last) / len(last) if last else 0.0,
        average_forgetting=sum(forgetting) / len(forgetting) if forgetting else 0.0,
        max_forgetting=max(forgetting, default=0.0),
        backward_transfer=sum(transfer) / len(transfer) if transfer else 0.0,
        state_digest=state_digest,
        tasks=tasks,
        forward_transfer=sum(ahead) / len(ahead) if ahead else None,
    )


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)
