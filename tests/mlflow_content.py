"""What an MLflow experiment holds, for tests that compare."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mlflow import MlflowClient

from clnp_search.config import Sweep

Snapshot = dict[str, dict[str, Any]]


def runs_of(sweep: Sweep) -> dict[str, Any]:
    """The experiment's runs by title, with the task's before a point's."""
    client = MlflowClient(sweep.tracking.uri)
    experiment = client.get_experiment_by_name(sweep.name)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    titles = {run.info.run_id: run.info.run_name for run in runs}
    named = {}
    for run in runs:
        path = [run.info.run_name]
        if run.data.tags["clnp.level"] == "point":
            path.insert(0, titles[run.data.tags["mlflow.parentRunId"]])
        named["/".join(path)] = run
    assert len(named) == len(runs), "a run is there twice"
    return named


def snapshot(sweep: Sweep) -> Snapshot:
    """All that the experiment holds, but for ids and times."""
    client, named = MlflowClient(sweep.tracking.uri), runs_of(sweep)
    titles = {run.info.run_id: title for title, run in named.items()}
    seen = {}
    for title, run in named.items():
        tags = {key: text for key, text in run.data.tags.items() if key not in ("clnp.key", "mlflow.parentRunId")}
        seen[title] = {
            "parent": titles.get(run.data.tags.get("mlflow.parentRunId", "")),
            "status": run.info.status,
            "params": run.data.params,
            "tags": tags,
            "metrics": {key: history(client, run, key) for key in run.data.metrics},
            "artifacts": sorted(artifacts(client, run.info.run_id)),
        }
    return seen


def history(client: MlflowClient, run: Any, key: str) -> list[tuple[int, float]]:
    return sorted((metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, key))


def artifacts(client: MlflowClient, run_id: str, folder: str = "") -> Iterator[str]:
    for entry in client.list_artifacts(run_id, folder):
        if entry.is_dir:
            yield from artifacts(client, run_id, entry.path)
        else:
            yield entry.path
