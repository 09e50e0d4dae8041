"""MLflow as a projection of the run folder: one experiment for each sweep; in it sequence > task > grid point.

The run folder is the truth, and what MLflow has already is asked of MLflow: every run carries a key of its own as a
tag, a metric is logged where its run has no value at that step, and a task's run has one model. So a sync can be cut
short anywhere, and the next one, of the same process or of a later one, goes on. MLflow is imported when it is first
needed.
"""

from __future__ import annotations

import json
import logging
import math
import os
import statistics
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clnp_search.clnp.subnetwork import Subnetwork
from clnp_search.config import Sweep, sweep_at
from clnp_search.records import Point, PointRecord, ScanRecord, Selection, Summary, TaskPlan, TaskResult, summarise
from clnp_search.storage import RunFolder
from clnp_search.tracking.models import export_tasks, save_model
from clnp_search.tracking.probe import missing_packages
from clnp_search.tracking.views import missing_views

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel

# Defaults; what the user's environment says comes first. No blind retries: a request that MLflow's client repeats
# after a lost answer could create a run twice, while `sync` looks before it writes.
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
}
PROBE_TIMEOUT_S = 5.0
BATCH = 900  # metrics of a request; the server takes 1000 entries, params and tags included
STATUS = {"running": "RUNNING", "complete": "FINISHED", "depleted": "FINISHED", "failed": "FAILED"}
MODEL_METRICS = ("test/accuracy", "prune/val_accuracy", "prune/unit_sparsity")  # shown beside a model
MODEL_VERSIONS = "mlflow.modelVersions"

Metrics = list[tuple[str, float, int]]  # key, value, step


class TrackingUnavailable(Exception):  # noqa: N818 - it says what is the case, not who erred
    """MLflow cannot be read or written now. Nothing is lost: the next `sync` goes on from the run folder."""


@dataclass(frozen=True)
class RegisteredModel:
    """A committed task's model in MLflow's registry."""

    task: int
    name: str
    alias: str
    version: int
    model_id: str

    @property
    def uri(self) -> str:
        """As MLflow's commands and `load_model` take it."""
        return f"models:/{self.name}@{self.alias}"


class MlflowTracker:
    """Keeps MLflow in step with a run folder."""

    def __init__(self, folder: RunFolder, sweep: Sweep) -> None:
        self._folder, self._sweep = folder, sweep
        self._store: _Store | None = None
        self._exported: dict[int, bytes] = {}

    def sync(self, summary: Summary | None = None, superseded: Callable[[], bool] = lambda: False) -> None:
        """Logs what the run folder has and MLflow has not.

        Args:
            summary: How far to go, if not as far as the folder: a task is closed in MLflow with the figures that are
                there, so draw those of the summary's tasks first.
            superseded: Whether a later sync waits; what it raises ends this one. Points of a task that has not chosen
                are then left to the later one, which may log training and choice at once; and so is what comes after
                the next task.

        Raises:
            TrackingUnavailable: MLflow cannot be reached, or refuses; the message says why.
        """
        connected = self._store is not None
        try:
            self._project(summary or self._folder.read_summary(), superseded)
        except BaseException as error:
            self._store = None  # whether the last request arrived is unknown: ask again what is there
            if not (connected and isinstance(error, TrackingUnavailable)):
                raise
            self.sync(summary, superseded)

    def register(self, name: str) -> list[RegisteredModel]:
        """Makes every committed task's model a version of one registered model, under an alias for the task.

        What is not in MLflow yet is logged first. A version that is there already stays.

        Args:
            name: Of the registered model, which is made if it is not there.

        Raises:
            TrackingUnavailable: MLflow cannot be reached, or refuses; the message says why.
            ValueError: A network cannot be exported.
        """
        self.sync()
        assert self._store is not None
        registered = []
        for result in self._folder.read_results():
            model = self._log_model(self._store, result.index)
            alias = f"task-{result.index}"
            version = self._store.register(self._store.task(result.index), model, name, alias)
            registered.append(RegisteredModel(result.index, name, alias, int(version), model.model_id))
        return registered

    def _project(self, summary: Summary | None, superseded: Callable[[], bool]) -> None:
        folder = self._folder
        entries = folder.read_tracking()
        if "key" not in entries:
            entries = {"key": uuid.uuid4().hex}
            folder.write_tracking(entries)
        store = self._store = self._store or _Store(self._sweep.tracking.uri, self._sweep.name, entries["key"])
        state, results = (summary.status, summary.tasks) if summary else ("running", ())
        first = folder.read_plan(0)
        sequence = store.run("sequence", folder.name, self._tags("sequence"), started=first.started if first else 0.0)
        if not sequence.params:
            store.upload(sequence, {"sweep.yaml": folder.read_sweep().encode()})
            store.log(sequence, [], _settings(self._sweep))
        for index in range(len(results) + 1):
            if self._project_task(store, sequence, index, results, state == "failed", superseded) and superseded():
                return
        if state != "running" and sequence.status != STATUS[state] and self._sweep.tracking.models:
            self._log_models(store, 0 if missing_packages() else len(results), superseded)
        # A step is logged in order, so that it is complete with its last metric.
        steps = [index for index in range(len(results)) if store.missing(sequence, [(f"test/task{index}", 0.0, index)])]
        if sequence.status != STATUS[state] or steps:
            store.upload(sequence, self._artifacts())
            for index in steps:
                store.log(sequence, _sequence_metrics(results[: index + 1]), at=results[index].ended)
            store.log(sequence, [], tags={"clnp.status": state, "clnp.tasks": str(len(results))})
            store.set_status(sequence, STATUS[state], results[-1].ended if results and state != "failed" else 0.0)
        written = {"key": entries["key"], "experiment_id": store.experiment_id, "runs": store.run_ids}
        if written != entries:
            folder.write_tracking(written)

    def _project_task(
        self,
        store: _Store,
        sequence: _Run,
        index: int,
        results: Sequence[TaskResult],
        failed: bool,
        superseded: Callable[[], bool],
    ) -> bool:
        """Logs what is new of a task; gives whether it is closed now, and was not before."""
        name, folder = f"{index:03d}", self._folder
        known = store.find(name)
        plan = None if known and known.status == "FINISHED" else folder.read_plan(index)
        if plan is None:
            return False
        result = results[index] if index < len(results) else None
        run = store.run(name, f"task {index}: {plan.name}", self._tags("task", index), sequence, plan.started)
        selection = folder.read_selection(index) if result else None
        for point in plan.points:
            if superseded() and selection is None:
                break
            self._project_point(store, run, plan, point, selection, tuple(result.units) if result else ())
        if result is None or selection is None:
            store.set_status(run, "FAILED" if failed else "RUNNING")
            return False
        subnetwork = Subnetwork(folder.read_state(index), index).to_bytes(".safetensors")
        store.upload(run, self._artifacts(index) | {"subnetwork.safetensors": subnetwork})
        selected = result.selected
        params = {"point": selected.point} | _params(selected.alpha, selected.learning_rate)
        values = _swept(selected.alpha, selected.learning_rate) + _theta(selected.theta, tuple(result.units))
        values += _task_metrics(results[: index + 1])
        metrics = [(key, value, index) for key, value, _ in values]
        note = "\n".join(f"- {reason}" for reason in selection.reasons)
        store.log(run, metrics, params, {"clnp.digest": result.digest, "mlflow.note.content": note}, result.ended)
        store.set_status(run, "FINISHED", result.ended)
        return True

    def _log_models(self, store: _Store, num_tasks: int, superseded: Callable[[], bool]) -> None:
        """Logs the models of committed tasks that are not there; of one that cannot be exported, its run says why."""
        for index in range(num_tasks):
            superseded()  # which raises where the sequence is left
            try:
                self._log_model(store, index)
            except ValueError as error:
                store.log(store.task(index), [], tags={"clnp.model": f"not exported: {error}"})

    def _log_model(self, store: _Store, index: int) -> LoggedModel:
        """A committed task's model, which is logged if it is not there.

        Raises:
            ValueError: The network cannot be exported.
        """
        run = store.task(index)
        model = store.model(run)
        if model is None or model.status != "READY":
            if index not in self._exported:  # one process exports all tasks that wait
                self._exported = export_tasks(self._folder, range(index, len(self._folder.read_results())))
            network = Subnetwork(self._folder.read_state(index), index)
            model = store.log_model(run, f"{self._folder.name}, task {index}", self._exported.pop(index), network)
        return model

    def _project_point(
        self,
        store: _Store,
        task: _Run,
        plan: TaskPlan,
        point: Point,
        selection: Selection | None,
        groups: Sequence[str],
    ) -> None:
        """Logs a point in two steps: its training once it is recorded, its scan once the task has chosen."""
        name, folder = f"{plan.task:03d}/{point.name}", self._folder
        known = store.find(name)
        trained = known is not None and known.status == "FINISHED"  # a failed one may have been trained again
        if known and trained and (selection is None or "selected" in known.tags):
            return
        record = folder.read_point(plan.task, point.name)
        if record is None:
            return
        params = _params(point.alpha, point.learning_rate)
        metrics = [] if trained else _swept(point.alpha, point.learning_rate) + _training_metrics(record)
        tags = {"clnp.reason": record.reason, "mlflow.note.content": "\n".join(record.notes)}
        tags = {key: text for key, text in tags.items() if text or (known and key in known.tags)}
        if selection is not None:
            tags["selected"] = str(point.index == selection.chosen).lower()
            asked = sweep_at(folder, self._sweep, plan).forgetting.rule, selection.min_correct
            scan = folder.read_scan(plan.task, point.index, *asked) if point.index in selection.candidates else None
            metrics += _scan_metrics(scan) if scan else []
            metrics += _theta(scan.theta, groups) if scan and scan.theta else []
        title = f"{point.name} alpha={_compact(point.alpha, 'g')} lr={point.learning_rate:g}"
        # A run that is new gets its tags with its creation, a request less: it counts from its end on.
        run = store.run(name, title, self._tags("point", plan.task) | tags, task, record.started or plan.started)
        store.log(run, metrics, params, tags, record.ended or plan.started)
        store.set_status(run, "FINISHED" if record.status == "done" else "FAILED", record.ended)

    def _tags(self, level: str, task: int | None = None) -> dict[str, str]:
        tags = {"clnp.level": level, "clnp.sequence": self._folder.name}
        return tags if task is None else tags | {"clnp.task": str(task)}

    def _artifacts(self, task: int | None = None) -> dict[str, bytes]:
        return {name: self._folder.read(path) for name, path in self._folder.artifacts(task).items()}


def log_spread(sweep: Sweep, name: str, rows: Sequence[Mapping[str, Any]], key: str = "") -> None:
    """Logs means and standard deviations over seeds, a run of level `family` for each set of seeds.

    Args:
        sweep: That all are of.
        name: What the names of its runs begin with.
        rows: As `spread_rows` gives them; a row of a single seed is left out.
        key: Tells these sequences from others by the same name.

    Raises:
        TrackingUnavailable: MLflow cannot be reached, or refuses.
    """
    store = _Store(sweep.tracking.uri, sweep.name, f"family-{name}-{key}")
    margins = Counter(row["margin"] for row in rows)
    for row in rows:
        seeds = row["seeds"]
        if len(seeds) < 2:
            continue
        rule = f"margin {row['margin']}" if row["method"] == "clnp" else row["method"]
        if margins[row["margin"]] > 1:  # some seeds were depleted earlier
            rule = f"{rule}, {row['tasks']} tasks"
        run = store.run(rule, f"{name}: {rule}", {"clnp.level": "family", "clnp.sequence": name})
        figures = {
            f"{key}{suffix}": row[f"{figure}_{kind}"]
            for figure, key in (("average_test_accuracy", "test/average_accuracy"), ("free_units", "capacity/free"))
            for kind, suffix in (("mean", ""), ("deviation", "_deviation"))
        }
        # By the tasks of all seeds, so that more of either later on are a point more.
        metrics = [(key, value, len(seeds) * row["tasks"]) for key, value in figures.items()]
        params = {"method": row["method"], "forgetting.margin": str(row["margin"])}
        store.log(run, metrics, params, {"clnp.seeds": ", ".join(map(str, seeds))})
        store.set_status(run, "FINISHED")


# Records as MLflow shows them


def _settings(sweep: Sweep) -> dict[str, str]:
    """The settings that tell sweeps apart, under their names in the sweep file."""
    left_out = {"name", "repetitions", "margins", "storage", "tracking", "resources", "modules"}
    dump = sweep.model_dump(mode="json", exclude=left_out)
    del dump["scenario"]["root"], dump["scenario"]["tasks"]  # a run may be given more tasks, a param stays as it is
    flat = {key: dump.pop(key) for key in ("seed", "method")}
    flat |= {f"{section}.{key}": value for section, values in dump.items() for key, value in values.items()}
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in flat.items()}


def _params(alpha: tuple[float, ...], learning_rate: float) -> dict[str, str]:
    return {"alpha": _compact(alpha), "learning_rate": str(learning_rate)}


def _swept(alpha: tuple[float, ...], learning_rate: float) -> Metrics:
    """Swept values once more as metrics, because params sort as text; alpha as the mean over the layers."""
    return [("hp/alpha", statistics.fmean(alpha), 0), ("hp/learning_rate", learning_rate, 0)]


def _theta(theta: tuple[float, ...], groups: Sequence[str]) -> Metrics:
    """One threshold if all are equal, else each group's; none of a baseline."""
    if not theta:
        return []
    if len(set(theta)) == 1:
        return [("prune/theta", theta[0], 0)]
    return [(f"prune/theta.{group}", value, 0) for group, value in zip(groups, theta, strict=True)]


def _training_metrics(record: PointRecord) -> Metrics:
    metrics: Metrics = [("val/unpruned_accuracy", record.val_accuracy, 0)] if record.status == "done" else []
    for each in record.epochs:
        values = {"train/loss": each.train_loss, "train/learning_rate": each.learning_rate}
        values["val/accuracy"] = each.val_accuracy
        metrics += [(key, value, each.epoch) for key, value in values.items()]
    return metrics


def _scan_metrics(scan: ScanRecord) -> Metrics:
    metrics: Metrics = []
    for position, step in enumerate(scan.curve):
        values = {"value": step.theta[0], "val_accuracy": step.val_accuracy, "active": float(sum(step.active))}
        metrics += [(f"theta/{key}", value, position) for key, value in values.items()]
    if scan.theta is not None:
        metrics += [("prune/val_accuracy", scan.val_accuracy, 0), ("prune/unit_sparsity", scan.unit_sparsity, 0)]
        metrics.append(("prune/weight_sparsity", scan.weight_sparsity, 0))
    return metrics


def _task_metrics(results: Sequence[TaskResult]) -> Metrics:
    """Of the last of these tasks, at any step."""
    last = results[-1]
    values = _so_far(results) | {
        "val/best_accuracy": last.best_val_accuracy,
        "prune/val_accuracy": last.selected.val_accuracy,
        "prune/unit_sparsity": last.selected.unit_sparsity,
        "test/accuracy": last.test_accuracy,
    }
    return [(key, value, 0) for key, value in values.items()]


def _sequence_metrics(results: Sequence[TaskResult]) -> Metrics:
    """What the last of these tasks adds to the sequence's curves."""
    last = results[-1]
    values = _so_far(results) | {f"test/task{task}": value for task, value in enumerate(last.test_accuracies)}
    return [(key, value, last.index) for key, value in values.items()]


def _so_far(results: Sequence[TaskResult]) -> dict[str, float]:
    summary = summarise("", "running", 0, "", tuple(results))
    values = {"test/average_accuracy": summary.average_test_accuracy, "test/forgetting": summary.max_forgetting}
    values["test/backward_transfer"] = summary.backward_transfer
    if summary.forward_transfer is not None:
        values["test/forward_transfer"] = summary.forward_transfer
    groups = results[-1].units
    values["capacity/free"] = sum(units.free for units in groups.values())
    values["capacity/new"] = sum(units.new for units in groups.values())
    values["capacity/scarcest"] = min(units.free / units.total for units in groups.values())
    for group, units in groups.items():
        values |= {f"capacity/new.{group}": units.new, f"capacity/free.{group}": units.free}
    return values


def _compact(values: tuple[float, ...], spec: str = "") -> str:
    """One number if all are equal, else the list."""
    texts = [format(value, spec) for value in values]
    return texts[0] if len(set(values)) == 1 else f"[{', '.join(texts)}]"


# MLflow


@dataclass
class _Run:
    """A run in MLflow, as far as it was seen there or written from here.

    Args:
        unread: Metrics that it had when it was found, of which the steps were not asked yet.
        logged: Metrics that it has, with their steps.
        models: Ids of the models that it has brought forth.
    """

    id: str
    status: str
    tags: dict[str, str]
    params: set[str]
    unread: set[str] = field(default_factory=set)
    logged: set[tuple[str, int]] = field(default_factory=set)
    models: set[str] = field(default_factory=set)


@contextmanager
def _tracking() -> Iterator[None]:
    """Inside, MLflow's errors become `TrackingUnavailable`."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError) as error:
        if isinstance(error, MlflowException) and error.get_http_status_code() == HTTPStatus.UNAUTHORIZED:
            names = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
            raise TrackingUnavailable(
                f"the server does not take these credentials, or asks for some: {names}"
            ) from error
        raise TrackingUnavailable(str(error).strip().partition("\n")[0] or type(error).__name__) from error


class _Store:
    """An experiment in MLflow, and in it the runs of one sequence, by name: `sequence`, `000`, `000/p000`."""

    @_tracking()
    def __init__(self, uri: str, experiment: str, key: str) -> None:
        _check_reachable(uri)
        from mlflow import MlflowClient

        self._key, self._client = key, MlflowClient(tracking_uri=uri)
        found = self._client.get_experiment_by_name(experiment)
        location = _artifact_location(uri, experiment)
        self.experiment_id = found.experiment_id if found else self._client.create_experiment(experiment, location)
        for tag, view in missing_views(found.tags if found else {}, _milliseconds()).items():
            self._client.set_experiment_tag(self.experiment_id, tag, view)
        self._runs: dict[str, _Run] = {}
        token: str | None = ""
        while token is not None:
            ours = f"tags.`clnp.key` LIKE '{key}/%'"
            page = self._client.search_runs([self.experiment_id], ours, max_results=1000, page_token=token or None)
            for run in page:
                info, data = run.info, run.data
                models = {output.model_id for output in run.outputs.model_outputs} if run.outputs else set()
                seen = _Run(info.run_id, info.status, data.tags, {*data.params}, {*data.metrics}, models=models)
                self._runs[data.tags["clnp.key"].removeprefix(f"{key}/")] = seen
            token = page.token or None

    @property
    def run_ids(self) -> dict[str, str]:
        """MLflow's id of each run."""
        return {name: run.id for name, run in self._runs.items()}

    def find(self, name: str) -> _Run | None:
        """A run, if it is there."""
        return self._runs.get(name)

    def task(self, index: int) -> _Run:
        """The run of a committed task, which is there."""
        return self._runs[f"{index:03d}"]

    @_tracking()
    def run(
        self, name: str, title: str, tags: Mapping[str, str], parent: _Run | None = None, started: float = 0.0
    ) -> _Run:
        """A run, created if it is not there; its work started then, or now."""
        if name not in self._runs:
            own = {**tags, "clnp.key": f"{self._key}/{name}", **({"mlflow.parentRunId": parent.id} if parent else {})}
            start = _milliseconds(started)
            created = self._client.create_run(self.experiment_id, start_time=start, tags=own, run_name=title)
            self._runs[name] = _Run(created.info.run_id, created.info.status, own, set())
        return self._runs[name]

    @_tracking()
    def missing(self, run: _Run, metrics: Metrics) -> Metrics:
        """Those that the run has not. Infinities are left out: MLflow would show them as 1.8e308."""
        for key in run.unread & {key for key, _, _ in metrics}:
            run.logged |= {(key, metric.step) for metric in self._client.get_metric_history(run.id, key)}
            run.unread.discard(key)
        return [each for each in metrics if not math.isinf(each[1]) and (each[0], each[2]) not in run.logged]

    @_tracking()
    def log(
        self,
        run: _Run,
        metrics: Metrics,
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
        at: float = 0.0,
    ) -> None:
        """Logs what the run has not. Tags come last, also within MLflow's requests: they say that all else is there.

        Args:
            at: When the metrics came about, or now. MLflow drops what it has at the same time, so that a request that
                is repeated, and arrives twice after all, adds nothing if this was recorded.
        """
        from mlflow.entities import Metric, Param, RunTag

        new, time_ms = self.missing(run, metrics), _milliseconds(at)
        extra = [Param(key, value) for key, value in (params or {}).items() if key not in run.params]
        marks = [RunTag(key, value) for key, value in (tags or {}).items() if run.tags.get(key) != value]
        for start in range(0, len(new) or bool(extra or marks), BATCH):
            batch, last = new[start : start + BATCH], start + BATCH >= len(new)
            # No more digits than a float32 has: MLflow's tables show all that there are.
            values = [Metric(key, float(f"{value:.7g}"), time_ms, step) for key, value, step in batch]
            self._client.log_batch(run.id, values, extra if last else [], marks if last else [])
            run.logged |= {(key, step) for key, _, step in batch}
        run.params |= {param.key for param in extra}
        run.tags |= tags or {}

    @_tracking()
    def set_status(self, run: _Run, status: str, ended: float = 0.0) -> None:
        """Ends the run, whose work ended then, or now; or starts it again."""
        if run.status != status:
            if status == "RUNNING":
                self._client.update_run(run.id, status)
            else:
                self._client.set_terminated(run.id, status, _milliseconds(ended))
            run.status = status

    @_tracking()
    def upload(self, run: _Run, files: Mapping[str, bytes]) -> None:
        """Puts files among the run's artifacts; what is there under the same name is replaced."""
        with tempfile.TemporaryDirectory() as folder:
            for name, data in files.items():
                path = Path(folder, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
            self._client.log_artifacts(run.id, folder)

    @_tracking()
    def model(self, run: _Run) -> LoggedModel | None:
        """The run's model, if it is there; it is whole if its status is READY."""
        found = self._client.search_logged_models([self.experiment_id], f"source_run_id = '{run.id}'", max_results=1)
        return found[0] if found else None

    @_tracking()
    def log_model(self, run: _Run, title: str, data: bytes, network: Subnetwork) -> LoggedModel:
        """Logs the run's model, or what is still missing of it.

        Args:
            data: The network as an ONNX file.
        """
        from mlflow.entities import LoggedModelOutput, Metric

        model = self.model(run)
        if model is None:
            shape = "".join(f", {size}" for size in network.info.input_shape)
            form = f"raw samples, float32 [N{shape}], in; logits, float32 [N, {network.info.num_classes}], out"
            tags = {"clnp.digest": network.digest, "mlflow.note.content": f"{title} ({network.info.name}): {form}"}
            # Of what a run's name may have, a model's name may not have dots.
            name = title.replace(", task ", "-task-").replace(".", "-")
            model = self._client.create_logged_model(self.experiment_id, name, run.id, tags)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "model")
            save_model(data, network, path, model.model_id, model.artifact_location, run.id)
            self._client.log_model_artifacts(model.model_id, str(path))
        # A value that is logged again with its time is the run's own, and now the model's as well.
        histories = (self._client.get_metric_history(run.id, key) for key in MODEL_METRICS)
        values = [
            Metric(each.key, each.value, each.timestamp, each.step, model_id=model.model_id, run_id=run.id)
            for history in histories
            for each in history
        ]
        self._client.log_batch(run.id, values)
        if model.model_id not in run.models:
            self._client.log_outputs(run.id, [LoggedModelOutput(model.model_id, 0)])
            run.models.add(model.model_id)
        return self._client.finalize_logged_model(model.model_id, "READY")

    @_tracking()
    def register(self, run: _Run, model: LoggedModel, name: str, alias: str) -> str:
        """The version that a run's model is of a registered one, under an alias; made if it is not there."""
        from mlflow.exceptions import MlflowException

        client = self._client
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        for each in client.search_model_versions(f"run_id = '{run.id}'"):
            if (each.name, each.source) == (name, model.artifact_location):
                version = str(each.version)
                break
        else:
            source, about = model.artifact_location, model.tags.get("mlflow.note.content")
            made = client.create_model_version(name, source, run.id, description=about, model_id=model.model_id)
            version = str(made.version)
        # By this tag the model's own page knows its versions.
        known = json.loads(model.tags.get(MODEL_VERSIONS, "[]"))
        if (entry := {"name": name, "version": version}) not in known:
            client.set_logged_model_tags(model.model_id, {MODEL_VERSIONS: json.dumps([*known, entry])})
        client.set_registered_model_alias(name, alias, version)
        return version


def _milliseconds(seconds: float = 0.0) -> int:
    """A time as MLflow counts it; now, if it was not recorded."""
    return int((seconds or time.time()) * 1000)


def _check_reachable(uri: str) -> None:
    """Fails soon if nothing answers, where MLflow's own client would wait for minutes."""
    if uri.startswith(("http://", "https://")):
        import requests

        with suppress(requests.exceptions.SSLError):  # something answers; MLflow has settings for its certificate
            requests.head(f"{uri.rstrip('/')}/health", timeout=PROBE_TIMEOUT_S)
    else:
        import mlflow.store.db.utils

        mlflow.store.db.utils.MAX_RETRY_COUNT = 3  # ten, its default, are 102 seconds of sleep
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.ERROR)  # what the retries end with is said


def _artifact_location(uri: str, experiment: str) -> str | None:
    """Where artifacts go: beside an SQLite file, wherever the run was started from; else the server decides."""
    path = uri.removeprefix("sqlite:///").partition("?")[0]
    if path == uri or not path or path == ":memory:":
        return None
    return (Path(path).absolute().parent / "mlartifacts" / experiment).as_uri()
