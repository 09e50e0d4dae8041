"""Committed tasks as MLflow models: logged once, registered on request, loaded without a pickle, served."""

from __future__ import annotations

import json
import shutil
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Grid, page
from command_line import Cli
from in_process import SWEEP
from mlflow import MlflowClient
from mlflow_store import Killed, answering, at, free_port, kill_at, server

from clnp_search.clnp.subnetwork import Subnetwork
from clnp_search.config import Sweep
from clnp_search.sequence import TaskSequence
from clnp_search.storage import RunFolder
from clnp_search.tracking import mlflow as tracking
from clnp_search.tracking.mlflow import MlflowTracker
from clnp_search.tracking.models import export_tasks
from clnp_search.tracking.views import SEQUENCES

pytestmark = pytest.mark.filterwarnings(
    "ignore:The ``noload`` loader strategy",  # MLflow 3.17 on SQLAlchemy 2.1
)


@pytest.fixture
def sweep(database: str, request: pytest.FixtureRequest) -> Sweep:
    return at(SWEEP.model_copy(update={"name": request.node.name}), database, models=True)


@pytest.fixture(scope="module")
def networks(whole: RunFolder) -> dict[int, bytes]:
    return export_tasks(whole, range(2))


@pytest.fixture
def run(copy: RunFolder, networks: dict[int, bytes], monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A finished run of two tasks; its networks are exported already, which takes seconds."""
    monkeypatch.setattr(tracking, "export_tasks", lambda folder, tasks: {task: networks[task] for task in tasks})
    return copy


def models_of(sweep: Sweep) -> dict[str, Any]:
    """All that the experiment has of models, but for ids and times."""
    client = MlflowClient(sweep.tracking.uri)
    experiment = client.get_experiment_by_name(sweep.name)
    assert experiment is not None
    seen: dict[str, Any] = {}
    for model in client.search_logged_models([experiment.experiment_id]):
        assert model.name not in seen, "a model is there twice"
        run = client.get_run(model.source_run_id)
        assert [output.model_id for output in run.outputs.model_outputs] == [model.model_id]
        seen[model.name] = {
            "status": model.status,
            "run": run.info.run_name,
            "digest": model.tags["clnp.digest"],
            "metrics": sorted((metric.key, metric.value) for metric in model.metrics),
            "values of its run": {
                key: len(client.get_metric_history(run.info.run_id, key)) for key in run.data.metrics
            },
            "files": sorted(file.path for file in client.list_logged_model_artifacts(model.model_id)),
        }
    return seen


def test_a_committed_tasks_network_is_a_model_of_its_run(run: RunFolder, sweep: Sweep) -> None:
    MlflowTracker(run, sweep).sync()
    seen = models_of(sweep)
    results = run.read_results()
    assert sorted(seen) == ["whole-task-0", "whole-task-1"]
    model, result = seen["whole-task-1"], results[1]
    assert (model["run"], model["digest"]) == (f"task 1: {result.name}", result.digest)
    assert dict(model["metrics"])["test/accuracy"] == pytest.approx(result.test_accuracy, abs=1e-7)
    assert set(model["values of its run"].values()) == {1}
    assert model["files"] == [
        "MLmodel",
        "conda.yaml",
        "input_example.json",
        "model.onnx",
        "python_env.yaml",
        "requirements.txt",
        "serving_input_example.json",
    ]


def test_models_are_logged_and_registered_once_wherever_the_process_is_killed(
    run: RunFolder, sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    MlflowTracker(run, at(sweep, sweep.tracking.uri)).sync()
    assert models_of(sweep) == {}
    kills = 0
    while True:
        assert kills < 30, "no headway"
        with monkeypatch.context() as patch:
            kill_at(patch, 1 + kills % 6)
            try:
                registered = MlflowTracker(run, sweep).register(sweep.name)
                break
            except Killed:
                kills += 1
    assert kills > 5
    assert [(each.task, each.version, each.alias) for each in registered] == [(0, 1, "task-0"), (1, 2, "task-1")]
    assert MlflowTracker(run, sweep).register(sweep.name) == registered
    client = MlflowClient(sweep.tracking.uri)
    assert client.get_registered_model(sweep.name).aliases == {"task-0": 1, "task-1": 2}
    assert [json.loads(client.get_logged_model(each.model_id).tags["mlflow.modelVersions"]) for each in registered] == [
        [{"name": sweep.name, "version": str(each.version)}] for each in registered
    ]
    undisturbed = sweep.model_copy(update={"name": f"{sweep.name}-undisturbed"})
    MlflowTracker(run, undisturbed).sync()
    assert models_of(sweep) == models_of(undisturbed)


def test_without_the_onnx_extra_all_else_is_logged(
    run: RunFolder, sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    MlflowTracker(run, sweep).sync()
    assert models_of(sweep) == {}
    experiment = MlflowClient(sweep.tracking.uri).get_experiment_by_name(sweep.name)
    assert experiment is not None
    runs = MlflowClient(sweep.tracking.uri).search_runs([experiment.experiment_id])
    assert {each.info.status for each in runs} == {"FINISHED"}


@pytest.mark.slow
def test_a_network_that_cannot_be_exported_is_said_on_its_run_and_holds_nothing_up(
    copy: RunFolder, sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "onnxscript.py").write_text("raise MemoryError('too little memory')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    MlflowTracker(copy, sweep).sync()
    assert models_of(sweep) == {}
    client = MlflowClient(sweep.tracking.uri)
    experiment = client.get_experiment_by_name(sweep.name)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], "tags.`clnp.level` = 'task'")
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert {run.data.tags["clnp.model"] for run in runs} == {"not exported: MemoryError: too little memory"}


def test_the_models_that_are_loaded_and_served_give_the_stated_accuracy_on_raw_samples(
    run: RunFolder, sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    with server(f"sqlite:///{tmp_path}/mlflow.db", tmp_path, free_port()) as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        registered = MlflowTracker(run, at(sweep, uri, models=True)).register("digits")
        import mlflow.onnx

        assert [each.uri for each in registered] == ["models:/digits@task-0", "models:/digits@task-1"]
        for each, result in zip(registered, run.read_results(), strict=True):
            test = TaskSequence(sweep).data(each.task).test
            raw, labels = test.inputs.numpy().astype(np.float32), test.labels.numpy()
            loaded = mlflow.pyfunc.load_model(each.uri)
            assert loaded.metadata.signature.inputs.input_types() == [np.dtype(np.float32)]
            logits = loaded.predict(raw)["logits"]
            assert np.mean(logits.argmax(1) == labels) == pytest.approx(result.test_accuracy, abs=1e-9)
        assert mlflow.onnx.load_model(registered[1].uri).graph.input[0].name == "raw"
        example = mlflow.pyfunc.load_model(registered[1].uri).input_example
        options = ("models", "serve", "--model-uri", registered[1].uri, "--env-manager", "local")
        with answering(tmp_path, free_port(), *options) as served:
            answers = [invoke(served, inputs) for inputs in (test.inputs[:3].tolist(), example.tolist())]
    expected = Subnetwork(run.read_state(1), 1)(test.inputs[:3])
    np.testing.assert_allclose(answers[0], expected.numpy(), rtol=1e-4, atol=1e-4)
    assert np.shape(answers[1]) == (1, 10)


@pytest.mark.slow
def test_pages_show_two_margins_side_by_side_and_of_a_model_its_form_its_version_and_its_alias(
    run: RunFolder, sweep: Sweep, database: str, tmp_path: Path
) -> None:
    [model, _] = MlflowTracker(run, sweep).register("shown")
    assert run.local_path is not None
    shutil.copytree(run.local_path, tmp_path / "looser")
    looser = RunFolder(str(tmp_path / "looser"))
    looser.write_tracking({})
    forgetting = sweep.forgetting.model_copy(update={"margin": 0.08})
    MlflowTracker(looser, at(sweep.model_copy(update={"forgetting": forgetting}), database)).sync()
    experiment = MlflowClient(database).get_experiment_by_name(sweep.name)
    assert experiment is not None
    with server(database, tmp_path, free_port()) as uri:
        pages = f"{uri}/#/experiments/{experiment.experiment_id}"
        view = f"{pages}/runs?workflowType=machine_learning&viewStateShareKey={SEQUENCES}"
        rows = Grid(page(view, tmp_path / "browser")).rows
        own = page(f"{pages}/models/{model.model_id}", tmp_path / "browser")
        version = page(f"{uri}/#/models/shown/versions/{model.version}", tmp_path / "browser")
    assert {row["params.`forgetting.margin`"] for row in rows} == {"0.03", "0.08"}
    assert len([row["metrics.`capacity/free`"] for row in rows]) == 2
    about = "raw samples, float32 [N, 8, 8], in; logits, float32 [N, 10], out"
    assert all(text in own for text in ("whole-task-0", about, "test/accuracy", "shown"))
    assert all(text in version for text in (about, "task-0", "Inputs (1)", "Outputs (1)"))


def invoke(served: str, inputs: list[Any]) -> Any:
    """The logits that a served model answers with."""
    body = json.dumps({"inputs": inputs}).encode()
    request = urllib.request.Request(f"{served}/invocations", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["predictions"]["logits"]


@pytest.fixture
def cli(copy: RunFolder) -> Iterator[Cli]:
    """The command line in a folder with the run `whole`, which was not logged."""
    assert copy.local_path is not None
    cli = Cli(copy.local_path.parent)
    yield cli
    cli.end()


@pytest.mark.slow
def test_register_makes_up_for_what_was_not_logged_and_says_where_models_are(cli: Cli) -> None:
    where = ("--storage", ".", "--tracking-uri", f"sqlite:///{cli.folder}/mlflow.db")
    assert cli("register", "whole", *where, "--name", "digits").stdout == (
        "task 0: models:/digits@task-0, version 1\ntask 1: models:/digits@task-1, version 2\n"
    )


@pytest.mark.parametrize(
    ("uri", "reason"),
    [("none", "nothing is logged to MLflow"), ("http://127.0.0.1:9", "nothing answers at 127.0.0.1:9")],
)
def test_register_without_a_store_is_refused_in_a_sentence(cli: Cli, uri: str, reason: str) -> None:
    answer = cli("register", "whole", "--storage", ".", "--tracking-uri", uri, status=2)
    assert reason in answer.stderr
    assert answer.stderr.count("\n") == 1
