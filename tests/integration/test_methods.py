"""A baseline by commands: real Ray, a real MLflow store, real files."""

from __future__ import annotations

import json

import pytest
from command_line import Cli
from mlflow import MlflowClient

pytestmark = pytest.mark.filterwarnings(
    "ignore:The ``noload`` loader strategy",  # MLflow 3.17 on SQLAlchemy 2.1
)


def test_a_baseline_runs_from_the_same_sweep_file(cli: Cli) -> None:
    arguments = [
        "--name",
        "ewc",
        "--set",
        "method=ewc",
        "--set",
        "search.strength=[3, 30]",
        "--set",
        "scenario.tasks=2",
    ]
    summary = cli.json("run", "sweep.yaml", *arguments)
    assert summary["status"] == "complete"
    assert summary["forward_transfer"] is not None
    assert cli.json("plan", "sweep.yaml", *arguments)["tasks_done"] == 2
    assert cli.json("verify", "ewc")["verified"]
    last = summary["tasks"][-1]
    assert [cli.json("evaluate", "ewc", "--task", str(task))["accuracy"] for task in range(2)] == last[
        "test_accuracies"
    ]
    cli("report", "ewc")
    refused = cli("reselect", "ewc", "--task", "0", status=2)
    assert "method ewc prunes by no margin or threshold" in " ".join(refused.stderr.split())
    refused = cli("run", "sweep.yaml", "--name", "ewc", "--set", "method=si", "--set", "scenario.tasks=2", status=2)
    assert "method: si here, ewc there" in refused.stderr

    client = MlflowClient(f"sqlite:///{cli.folder}/mlflow.db")
    entries = json.loads((cli.folder / "runs" / "ewc" / "mlflow.json").read_text())
    sequence = client.get_run(entries["runs"]["sequence"])
    assert sequence.info.status == "FINISHED"
    assert sequence.data.params["method"] == "ewc"
    keys = {"average_accuracy": "average_test_accuracy"}
    for metric in ("average_accuracy", "backward_transfer", "forward_transfer"):
        assert sequence.data.metrics[f"test/{metric}"] == pytest.approx(summary[keys.get(metric, metric)], rel=1e-6)
    point = client.get_run(entries["runs"]["001/p003"])
    assert (point.info.status, point.data.params["alpha"], point.data.params["learning_rate"]) == (
        "FINISHED",
        "30.0",
        "0.01",
    )
