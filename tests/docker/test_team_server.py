"""MLflow as a team runs it: on PostgreSQL and an object store, with passwords, for named hosts only."""

from __future__ import annotations

import importlib
import tempfile
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import requests
from command_line import Cli
from mlflow import MlflowClient
from mlflow_store import answering, free_port

from clnp_search.config import sweep_of
from clnp_search.sequence import TaskSequence
from clnp_search.storage import RunFolder

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning:botocore.*")]

DOCKER = Path(__file__).resolve().parents[2] / "docker"
ADMIN, ADA = ("admin", "the-first-password"), ("ada", "another-long-password")
AUTH = """
[mlflow]
default_permission = READ
database_uri = {database}
admin_username = admin
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
auth_cache_ttl_seconds = 60
"""
SMALL = ("--set", "scenario.tasks=2", "--set", "training.epochs=2", "--set", "tracking.models=true")


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """docker/local.py, which starts such servers."""
    monkeypatch.syspath_prepend(DOCKER)
    return importlib.import_module("local")


@pytest.fixture
def team_server(local: ModuleType) -> Iterator[str]:
    """The address of a server that knows its admin alone; its folder is a short one that other users may pass."""
    try:
        programs = local.find_programs()
    except SystemExit:
        pytest.skip("PostgreSQL's programs are not there")
    with tempfile.TemporaryDirectory(prefix="clnp-") as name:
        folder = Path(name)
        folder.chmod(0o711)
        local.make_secrets(folder / "secrets")
        servers = local.Servers(folder)
        try:
            objects = local.start_objects(servers, folder, programs)
            database = local.start_postgres(servers, folder, programs)
            port = free_port()
            stores = ("--backend-store-uri", database, "--artifacts-destination", "s3://mlflow", "--workers", 1)
            guarded = ("--app-name", "basic-auth", "--allowed-hosts", f"127.0.0.1:{port}")
            (folder / "auth.ini").write_text(AUTH.format(database=database))
            secrets = {
                "MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"),
                "PGPASSWORD": (folder / "secrets" / "postgres_password").read_text(),
                "MLFLOW_AUTH_ADMIN_PASSWORD": ADMIN[1],
                "MLFLOW_FLASK_SERVER_SECRET_KEY": "for the forms of its pages",
            }
            with answering(folder, port, "server", *stores, *guarded, **objects, **secrets) as uri:
                ada = {"username": ADA[0], "password": ADA[1]}
                requests.post(f"{uri}/api/2.0/mlflow/users/create", json=ada, auth=ADMIN, timeout=60).raise_for_status()
                yield uri
        finally:
            servers.end()


def sign_in(monkeypatch: pytest.MonkeyPatch, user: tuple[str, str]) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", user[0])
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", user[1])


def logged(uri: str) -> tuple[dict[str, str], list[tuple[int, float]], list[tuple[str, str]]]:
    """Status of each run by title, a metric by step, and status of each model; in few requests, which are slow."""
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("sweep")
    assert experiment is not None
    assert experiment.artifact_location.startswith("mlflow-artifacts:")
    runs = client.search_runs([experiment.experiment_id])
    titles = {run.info.run_id: run.info.run_name for run in runs}
    above = {run.info.run_id: titles.get(run.data.tags.get("mlflow.parentRunId", ""), "") for run in runs}
    statuses = {f"{above[run.info.run_id]}/{run.info.run_name}": run.info.status for run in runs}
    assert len(statuses) == len(runs), "a run is there twice"
    [sequence] = [number for number, title in titles.items() if title == "sweep"]
    values = client.get_metric_history(sequence, "test/average_accuracy")
    models = client.search_logged_models([experiment.experiment_id])
    return (
        statuses,
        [(value.step, value.value) for value in values],
        sorted((model.name, str(model.status)) for model in models),
    )


def test_a_run_is_complete_with_the_right_password_and_waits_with_a_wrong_one(
    cli: Cli, team_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ("run", "sweep.yaml", "--tracking-uri", team_server, *SMALL)
    sign_in(monkeypatch, (ADA[0], "not hers"))
    answer = cli(*run)
    assert "MLflow is behind: " in answer.stderr
    assert "MLFLOW_TRACKING_USERNAME" in answer.stderr
    assert "Traceback" not in answer.stderr
    answer = cli("register", "sweep", status=1)
    assert "MLFLOW_TRACKING_USERNAME" in answer.stderr

    sign_in(monkeypatch, ADA)
    assert cli.json("resume", "sweep")["status"] == "complete"
    seen = statuses, values, models = logged(team_server)
    assert len(statuses) == 1 + 2 + 2 * 4
    assert set(statuses.values()) == {"FINISHED"}
    assert [step for step, _ in values] == [0, 1]
    assert models == [("sweep-task-0", "READY"), ("sweep-task-1", "READY")]
    cli("resume", "sweep")
    assert logged(team_server) == seen

    registered = cli.json("register", "sweep")
    assert cli.json("register", "sweep") == registered
    assert [each["uri"] for each in registered] == ["models:/sweep@task-0", "models:/sweep@task-1"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", team_server)
    folder = RunFolder(str(cli.folder / "runs" / "sweep"))
    test = TaskSequence(sweep_of(folder)).data(1).test
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # what MLflow says of itself at its import
        import mlflow.pyfunc

    logits = mlflow.pyfunc.load_model(registered[1]["uri"]).predict(test.inputs.numpy().astype(np.float32))["logits"]
    accuracy = np.mean(logits.argmax(1) == test.labels.numpy())
    assert accuracy == pytest.approx(folder.read_results()[1].test_accuracy, abs=1e-9)

    elsewhere = urllib.request.Request(f"{team_server}/api/2.0/mlflow/experiments/search", headers={"Host": "evil:80"})
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(elsewhere, timeout=30)
