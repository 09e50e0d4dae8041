"""Runs from a script or a notebook: start one, and look at what it found as pandas frames and torch modules.

The same is at hand as `clnp_search.run`, `clnp_search.load` and so on, imported when it is first used.
"""

from __future__ import annotations

import io
import itertools
import json
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from clnp_search.config import Sweep, load_sweep, network_state, parse_sweep
from clnp_search.errors import Damaged, InputError
from clnp_search.progress import Progress, progress_of
from clnp_search.records import Summary
from clnp_search.storage import RunFolder, join_uri, open_run

if TYPE_CHECKING:
    from torch import Tensor

    from clnp_search.clnp.subnetwork import Subnetwork

# Columns of `points.csv` that a point has once its task is committed.
CHOICE = ["in_margin", "theta", "pruned_val_accuracy", "unit_sparsity", "selected"]


class Run:
    """A run as it stood when it was loaded.

    In its tables accuracies are fractions, and alphas and thetas are tuples with one value for each layer.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._progress: Progress = progress_of(folder)

    def __repr__(self) -> str:
        of_all = f" of {tasks}" if (tasks := self.sweep.scenario.tasks) else ""
        return f"<Run {self.name}: {self.status}, {len(self.summary.tasks)}{of_all} tasks, {self.uri}>"

    @property
    def name(self) -> str:
        """The run's name."""
        return self._folder.name

    @property
    def uri(self) -> str:
        """Its folder."""
        return self._folder.uri

    @property
    def status(self) -> str:
        """`running`, `interrupted`, `complete`, `depleted` or `failed`."""
        return self._progress.status

    @property
    def sweep(self) -> Sweep:
        """Its settings."""
        return self._progress.sweep

    @property
    def summary(self) -> Summary:
        """Its figures, as in `summary.json`."""
        return self._progress.summary

    @cached_property
    def tasks(self) -> pd.DataFrame:
        """A row for each committed task: its choice, accuracies, and units by group (`hidden0.free` and so on)."""
        rows = []
        for result in self.summary.tasks:
            chosen = result.selected
            row = {
                "task": result.index,
                "name": result.name,
                "point": chosen.point,
                "alpha": chosen.alpha,
                "learning_rate": chosen.learning_rate,
                "theta": chosen.theta,
                "best_val_accuracy": result.best_val_accuracy,
                "val_accuracy": chosen.val_accuracy,
                "test_accuracy": result.test_accuracy,
                "test_accuracy_now": self.summary.tasks[-1].test_accuracies[result.index],
                "unit_sparsity": chosen.unit_sparsity,
                "points": result.points,
                "seconds": result.seconds,
                "digest": result.digest,
            }
            for group, units in result.units.items():
                row |= {f"{group}.new": units.new, f"{group}.active": units.active, f"{group}.free": units.free}
            rows.append(row)
        return _frame(rows, "task")

    @cached_property
    def accuracies(self) -> pd.DataFrame:
        """Test accuracy of every task (columns) after every task (rows); NaN for tasks that were still to come."""
        rows = {result.index: dict(enumerate(result.test_accuracies)) for result in self.summary.tasks}
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis(index="after", columns="task")

    @cached_property
    def points(self) -> pd.DataFrame:
        """A row for each grid point that has a record, by task and point; of committed tasks also what became of it."""
        rows, choices = [], []
        for task, plan in self._plans():
            for point in plan.points:
                record = self._folder.read_point(task, point.name)
                if record is not None:
                    values = {"task": task, "point": point.name, "alpha": point.alpha}
                    values |= {"learning_rate": point.learning_rate, "status": record.status, "reason": record.reason}
                    values |= {"val_accuracy": record.val_accuracy if record.status == "done" else float("nan")}
                    rows.append(values | {"seconds": record.seconds})
            if path := self._folder.artifacts(task).get("points.csv"):
                table = self._table(path, usecols=["point", *CHOICE], converters={"theta": _theta})
                choices.append(table.assign(task=task)[["task", "point", *CHOICE]])
        points = _frame(rows, "task", "point")
        return points.join(pd.concat(choices).set_index(["task", "point"])) if choices else points

    @cached_property
    def epochs(self) -> pd.DataFrame:
        """A row for each epoch of each grid point: learning rate, training loss and validation accuracy."""
        rows = []
        for task, plan in self._plans():
            for point in plan.points:
                record = self._folder.read_point(task, point.name)
                for epoch in record.epochs if record else ():
                    rows.append({"task": task, "point": point.name, **vars(epoch)})
        return _frame(rows, "task", "point", "epoch")

    @cached_property
    def curves(self) -> pd.DataFrame:
        """Accuracy and active units of each layer against theta, of every candidate of every task.

        The column `raised` names the layer whose threshold alone was raised; it is empty for curves of one theta for
        all layers.
        """
        tables = []
        for task, _ in self._plans():
            for name, path in self._folder.artifacts(task).items():
                folder, _, file = name.partition("/")
                if folder == "curves":
                    point, _, raised = file.removesuffix(".csv").partition(".")
                    tables.append(self._table(path).assign(task=task, point=point, raised=raised))
        if not tables:
            return _frame([], "task", "point", "raised")
        return pd.concat(tables).set_index(["task", "point", "raised"])

    def subnetwork(self, task: int) -> Subnetwork:
        """A committed task's network, a torch module: takes raw samples [N, ...], gives logits [N, classes].

        Raises:
            InputError: The task is not committed.
        """
        from clnp_search.clnp.subnetwork import Subnetwork

        committed = len(self._folder.read_results())
        if task not in range(committed):
            allowed = f"0 to {committed - 1}" if committed else "none yet"
            raise InputError(f"task {task!r} is not committed; allowed: {allowed}")
        return Subnetwork(network_state(self._folder, self.sweep, task), task)

    def _table(self, path: str, **options: Any) -> pd.DataFrame:
        """A CSV file of the run, read with options of `pandas.read_csv`; one without a row has no column either.

        Raises:
            Damaged: It is none, or has no such columns.
        """
        data = self._folder.read(path)
        try:
            return (
                pd.read_csv(io.BytesIO(data), **options)
                if data.strip()
                else pd.DataFrame(columns=options.get("usecols"))
            )
        except (TypeError, ValueError) as error:
            raise Damaged(f"{join_uri(self._folder.uri, path)}: damaged, or changed by hand: {error}") from error

    def _plans(self) -> Iterator[tuple[int, Any]]:
        for task in itertools.count():
            if (plan := self._folder.read_plan(task)) is None:
                return
            yield task, plan


def load(run: str | Path, storage: str = "runs/") -> Run:
    """A run that exists.

    Args:
        run: Its folder, a URI of it, or its name under `storage`.

    Raises:
        InputError: There is none.
    """
    return Run(open_run(str(run), storage))


def run(
    sweep: Sweep | Mapping[str, Any] | str | Path,
    name: str | None = None,
    storage: str | None = None,
    tracking_uri: str | None = None,
    address: str = "local",
) -> Run:
    """Runs a sweep to its end, as `clnp-search run` does, and gives what it found. A run that is partly done goes on.

    Args:
        sweep: A sweep file's path, the same as plain data, or a `Sweep`.
        name: Of the run folder; by default the sweep's name.
        storage: Where the run folder goes; by default the sweep's.
        tracking_uri: MLflow's store or server, or `none`; by default the sweep's.
        address: Ray's: `local`, `auto`, or `HOST:PORT`.

    Raises:
        InputError: What was asked for is wrong, or a run of that name has other settings.
        Interrupted: By Ctrl-C; it can be gone on with.
        MachineFault: What the run needs failed; it can be gone on with.
    """
    from clnp_search.cli import drive
    from clnp_search.cli.options import located, run_of

    if isinstance(sweep, str | Path):
        sweep = load_sweep(Path(sweep))
    elif isinstance(sweep, Mapping):
        sweep = parse_sweep(dict(sweep), "sweep")
    elif not isinstance(sweep, Sweep):
        raise InputError(f"sweep: {sweep!r}; allowed: a sweep file's path, the same as plain data, or a Sweep")
    if len(sweep.members("")) > 1:
        raise InputError(
            "margins and repetitions ask for several sequences: run each of `sweep.members(name)`, by its name"
        )
    ((name, sweep),) = sweep.members(sweep.name if name is None else name).items()
    sweep, folder = run_of(located(sweep, storage, tracking_uri), name)
    with _signals_handled():
        drive(sweep, folder, address)
    return Run(folder)


def load_export(path: str | Path) -> Callable[[Tensor], Tensor]:
    """What `clnp-search export` wrote as .pt2 or .onnx: takes raw samples [N, ...], gives logits [N, classes].

    Raises:
        InputError: The file cannot be read, or is of another kind.
    """
    import torch

    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    suffix = path.suffix.lower()
    try:
        if suffix == ".pt2":
            network = torch.export.load(path).module()
            return lambda raw: network(raw.to(torch.float32))
        if suffix == ".onnx":
            import onnxruntime

            session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
            return lambda raw: torch.from_numpy(session.run(None, {"raw": raw.to(torch.float32).numpy()})[0])
    except ImportError as error:
        raise InputError(f"{path}: needs the package onnxruntime: {error}") from error
    except Exception as error:  # of a file that is damaged, its reader raises many kinds
        raise InputError(f"{path}: cannot be read: {error}") from error
    raise InputError(
        f"{path}: only .pt2 and .onnx files hold a network that runs; .safetensors hold its tensors alone, "
        "which `safetensors.torch.load_file` reads"
    )


@contextmanager
def _signals_handled() -> Iterator[None]:
    """Inside, signals interrupt the run; afterwards they are the caller's again."""
    from clnp_search.cli import handle_signals

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    handle_signals()
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():  # only it may, and only there anything was changed
            for number, handler in before.items():
                signal.signal(number, handler)


def _frame(rows: list[dict[str, Any]], *index: str) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=None if rows else list(index)).set_index(list(index))


def _theta(text: str) -> tuple[float, ...] | None:
    """As `points.csv` has it; empty for a point that has none."""
    return tuple(json.loads(text)) if text else None
