"""MLflow as a projection of the run folder: a real SQLite store, and a real server on this machine."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import urllib.request
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from browser import Grid, page
from builders import make_sweep, write_run
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow_content import runs_of, snapshot
from mlflow_store import WRITES, Killed, at, free_port, kill_at, server, unexpected

from clnp_search.cli.publisher import Publisher
from clnp_search.clnp.subnetwork import Subnetwork
from clnp_search.config import Sweep
from clnp_search.records import summarise
from clnp_search.report.figures import draw_run
from clnp_search.storage import RunFolder, run_folder
from clnp_search.tracking import mlflow as tracking
from clnp_search.tracking import views
from clnp_search.tracking.mlflow import MlflowTracker, TrackingUnavailable, log_spread

VIEWS = (views.SEQUENCES, views.CHOSEN, views.POINTS, views.FAMILIES)
SPREAD = {
    "method": "clnp",
    "margin": 0.01,
    "seeds": [0, 1],
    "tasks": 2,
    "average_test_accuracy_mean": 0.905,
    "average_test_accuracy_deviation": 0.002,
    "free_units_mean": 12.5,
    "free_units_deviation": 0.5,
}

pytestmark = pytest.mark.filterwarnings(
    "ignore:The ``noload`` loader strategy",  # MLflow 3.17 on SQLAlchemy 2.1
)


@pytest.fixture
def sweep(database: str, request: pytest.FixtureRequest) -> Sweep:
    return at(make_sweep(name=request.node.name[:90].rstrip("]").replace("[", "-")), database)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return run_folder(str(tmp_path), "run")


@pytest.fixture
def finished(folder: RunFolder, sweep: Sweep) -> RunFolder:
    """A finished run of two tasks, with its figures."""
    for _ in write_run(folder, sweep):
        pass
    summary = folder.read_summary()
    assert summary is not None
    draw_run(folder, summary)
    return folder


def test_three_levels_hang_together_by_parent_tags(finished: RunFolder, sweep: Sweep) -> None:
    MlflowTracker(finished, sweep).sync()
    seen = snapshot(sweep)
    assert len(seen) == 1 + 2 + 2 * 4
    levels = {
        title: (run["tags"]["clnp.level"], run["tags"].get("clnp.task"), run["parent"]) for title, run in seen.items()
    }
    assert levels["run"] == ("sequence", None, None)
    assert levels["task 1: task-1"] == ("task", "1", "run")
    assert levels["task 1: task-1/p002 alpha=0.001 lr=0.01"] == ("point", "1", "task 1: task-1")
    assert all(run["tags"]["clnp.sequence"] == "run" for run in seen.values())


def test_swept_values_are_params_and_metrics_and_nothing_twice(finished: RunFolder, sweep: Sweep) -> None:
    MlflowTracker(finished, sweep).sync()
    point = snapshot(sweep)["task 0: task-0/p002 alpha=0.001 lr=0.01"]
    assert point["params"] == {"alpha": "0.001", "learning_rate": "0.01"}
    swept = {key: values for key, values in point["metrics"].items() if key.startswith("hp/")}
    assert swept == {"hp/alpha": [(0, 0.001)], "hp/learning_rate": [(0, 0.01)]}


def test_an_alpha_for_each_layer_is_a_list_and_its_mean(folder: RunFolder, sweep: Sweep) -> None:
    sweep = at(
        make_sweep(name=sweep.name, search={"alpha": [[0.1, 0.2, 0.6]], "learning_rate": [0.01, 0.02, 0.03]}),
        sweep.tracking.uri,
    )
    for _ in write_run(folder, sweep, num_tasks=1):
        pass
    MlflowTracker(folder, sweep).sync()
    point = snapshot(sweep)["task 0: task-0/p001 alpha=[0.1, 0.2, 0.6] lr=0.02"]
    assert point["params"]["alpha"] == "[0.1, 0.2, 0.6]"
    assert point["metrics"]["hp/alpha"] == [(0, 0.3)]


def test_curves_are_complete(finished: RunFolder, sweep: Sweep) -> None:
    MlflowTracker(finished, sweep).sync()
    seen = snapshot(sweep)
    point = seen["task 0: task-0/p001 alpha=0 lr=0.02"]["metrics"]
    assert point["train/loss"] == [(0, 2.0), (1, 1.0), (2, 0.0)]
    assert point["val/accuracy"] == [(0, 0.5), (1, 0.6), (2, 0.7)]
    assert point["val/unpruned_accuracy"] == [(0, 0.9701)]
    assert point["theta/value"] == [(0, 1.5), (1, 0.6), (2, 0.0)]
    assert point["theta/active"] == [(0, 2), (1, 4), (2, 6)]
    assert point["prune/theta"] == [(0, 0.6)]
    sequence = seen["run"]["metrics"]
    assert sequence["test/task0"] == [(0, 0.9), (1, 0.9)]
    assert sequence["test/task1"] == [(1, 0.91)]
    assert sequence["test/backward_transfer"] == [(0, 0.0), (1, 0.0)]
    free = [[units.free for units in result.units.values()] for result in finished.read_results()]
    assert sequence["capacity/free.hidden1"] == [(index, left[1]) for index, left in enumerate(free)]
    assert sequence["capacity/free"] == [(index, sum(left)) for index, left in enumerate(free)]
    assert sequence["capacity/scarcest"] == [(index, min(left) / 4) for index, left in enumerate(free)]


def test_times_are_those_of_the_work_however_late_it_is_logged(finished: RunFolder, sweep: Sweep) -> None:
    MlflowTracker(finished, sweep).sync()
    times = {title: (run.info.start_time, run.info.end_time) for title, run in runs_of(sweep).items()}
    assert times["run"] == (1_000_000, 1_160_000)
    assert times["task 1: task-1"] == (1_100_000, 1_160_000)
    assert times["task 1: task-1/p002 alpha=0.001 lr=0.01"] == (1_105_000, 1_115_000)


def test_a_tasks_metrics_are_at_its_own_step(finished: RunFolder, sweep: Sweep) -> None:
    MlflowTracker(finished, sweep).sync()
    metrics = snapshot(sweep)["task 1: task-1"]["metrics"]
    assert {step for values in metrics.values() for step, _ in values} == {1}


def test_the_choice_is_tagged_and_explained(finished: RunFolder, sweep: Sweep) -> None:
    MlflowTracker(finished, sweep).sync()
    seen = snapshot(sweep)
    result = finished.read_results()[0]
    chosen = {title for title, run in seen.items() if run["tags"].get("selected") == "true"}
    assert chosen == {f"task {task}: task-{task}/p002 alpha=0.001 lr=0.01" for task in (0, 1)}
    assert sum(run["tags"].get("selected") == "false" for run in seen.values()) == 6
    task = seen["task 0: task-0"]
    assert task["params"]["point"] == "p002"
    assert task["tags"]["clnp.digest"] == result.digest
    assert "p002 has the highest sparsity" in task["tags"]["mlflow.note.content"]
    assert task["metrics"]["prune/unit_sparsity"] == [(0, result.selected.unit_sparsity)]


def test_a_failed_point_is_a_failed_run_with_its_reason(finished: RunFolder, sweep: Sweep) -> None:
    MlflowTracker(finished, sweep).sync()
    point = snapshot(sweep)["task 0: task-0/p003 alpha=0.001 lr=0.02"]
    assert point["status"] == "FAILED"
    assert point["tags"]["clnp.reason"] == "diverged"
    assert "val/unpruned_accuracy" not in point["metrics"]


def test_a_failed_point_that_is_trained_again_is_logged_as_if_it_had_never_failed(
    folder: RunFolder, sweep: Sweep
) -> None:
    steps = write_run(folder, sweep, num_tasks=1)
    assert "trained 0 p003" in iter(steps)
    tracker = MlflowTracker(folder, sweep)
    tracker.sync()
    record = folder.read_point(0, "p003")
    assert record is not None
    assert runs_of(sweep)["task 0: task-0/p003 alpha=0.001 lr=0.02"].info.status == "FAILED"
    folder.delete_point(0, record)
    tracker.sync()
    folder.write_point(0, replace(record, status="done", val_correct=9000, val_total=10000, reason=""), None)
    tracker.sync()
    run = runs_of(sweep)["task 0: task-0/p003 alpha=0.001 lr=0.02"]
    assert run.info.status == "FINISHED"
    assert run.data.metrics["val/unpruned_accuracy"] == 0.9
    assert run.data.tags["clnp.reason"] == ""


def test_artifacts_of_the_sequence_and_of_its_tasks(finished: RunFolder, sweep: Sweep, tmp_path: Path) -> None:
    MlflowTracker(finished, sweep).sync()
    seen = snapshot(sweep)
    assert seen["run"]["artifacts"] == [
        "figures/accuracy.png",
        "figures/accuracy.svg",
        "figures/units.png",
        "figures/units.svg",
        "state.safetensors",
        "summary.json",
        "sweep.yaml",
    ]
    curves = ["curves/p001.csv", "curves/p002.csv"]
    figures = [f"figures/{name}.{kind}" for name in ("sparsity", "thresholds") for kind in ("png", "svg")]
    assert seen["task 1: task-1"]["artifacts"] == [
        *curves,
        *figures,
        "points.csv",
        "selection.json",
        "subnetwork.safetensors",
    ]
    task = runs_of(sweep)["task 0: task-0"]
    path = MlflowClient(sweep.tracking.uri).download_artifacts(
        task.info.run_id, "subnetwork.safetensors", str(tmp_path)
    )
    assert Path(path).read_bytes() == Subnetwork(finished.read_state(1), 0).to_bytes(".safetensors")


def test_a_second_sync_changes_nothing(finished: RunFolder, sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = MlflowTracker(finished, sweep)
    tracker.sync()
    seen, entries = snapshot(sweep), finished.read_tracking()
    for method in WRITES:
        monkeypatch.setattr(MlflowClient, method, unexpected)
    tracker.sync()
    MlflowTracker(finished, sweep).sync()
    assert snapshot(sweep) == seen
    assert finished.read_tracking() == entries


def test_syncing_at_every_step_ends_like_syncing_once(folder: RunFolder, sweep: Sweep, tmp_path: Path) -> None:
    tracker = MlflowTracker(folder, sweep)
    statuses = []
    for step in write_run(folder, sweep):
        tracker.sync()
        if step.startswith("chosen"):
            statuses.append({title: run.info.status for title, run in runs_of(sweep).items()})
    once = sweep.model_copy(update={"name": f"{sweep.name}-once"})
    other = run_folder(str(tmp_path / "other"), "run")
    for _ in write_run(other, sweep):
        pass
    MlflowTracker(other, once).sync()
    assert snapshot(sweep) == snapshot(once)
    assert statuses[1]["run"] == "RUNNING"
    assert statuses[1]["task 0: task-0"] == "FINISHED"
    assert statuses[1]["task 1: task-1"] == "RUNNING"


def test_a_lost_map_of_runs_duplicates_nothing(finished: RunFolder, sweep: Sweep) -> None:
    MlflowTracker(finished, sweep).sync()
    seen, entries = snapshot(sweep), finished.read_tracking()
    finished.write_tracking({"key": entries["key"]})
    MlflowTracker(finished, sweep).sync()
    assert snapshot(sweep) == seen
    assert finished.read_tracking() == entries


def test_another_store_gets_everything(finished: RunFolder, sweep: Sweep) -> None:
    MlflowTracker(finished, sweep).sync()
    other = sweep.model_copy(update={"name": f"{sweep.name}-other"})
    MlflowTracker(finished, other).sync()
    assert snapshot(other) == snapshot(sweep)


def test_every_metric_is_logged_once_wherever_the_process_is_killed(
    finished: RunFolder, sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    kills = 0
    while True:
        assert kills < 50, "no headway"
        with monkeypatch.context() as patch:
            kill_at(patch, 2 + kills % 2)
            try:
                MlflowTracker(finished, sweep).sync()
                break
            except Killed:
                kills += 1
    undisturbed = sweep.model_copy(update={"name": f"{sweep.name}-undisturbed"})
    MlflowTracker(finished, undisturbed).sync()
    assert snapshot(sweep) == snapshot(undisturbed)
    assert kills > 15


def test_a_batch_that_arrives_after_it_was_sent_again_is_stored_once(
    finished: RunFolder, sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    send, late = MlflowClient.log_batch, list[tuple[Any, ...]]()

    def slow(*batch: Any) -> None:
        if not late:
            late.append(batch)
            raise MlflowException("timed out")
        send(*batch)
        send(*late.pop())

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", slow)
        for _ in range(50):
            with suppress(TrackingUnavailable):
                MlflowTracker(finished, sweep).sync()
                break
    undisturbed = sweep.model_copy(update={"name": f"{sweep.name}-undisturbed"})
    MlflowTracker(finished, undisturbed).sync()
    assert snapshot(sweep) == snapshot(undisturbed)


def test_more_metrics_than_a_request_takes_are_logged_once(
    finished: RunFolder, sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    MlflowTracker(finished, sweep).sync()
    seen = snapshot(sweep)
    monkeypatch.setattr(tracking, "BATCH", 4)
    cut = sweep.model_copy(update={"name": f"{sweep.name}-cut"})
    with monkeypatch.context() as patch:
        kill_at(patch, 12)
        with pytest.raises(Killed):
            MlflowTracker(finished, cut).sync()
    MlflowTracker(finished, cut).sync()
    assert snapshot(cut) == seen


def test_infinities_are_left_out_and_nan_is_kept(folder: RunFolder, sweep: Sweep) -> None:
    for step in write_run(folder, sweep):
        if step == "trained 0 p001":
            break
    record = folder.read_point(0, "p001")
    assert record is not None
    first, *rest = record.epochs
    losses = [replace(epoch, train_loss=loss) for epoch, loss in zip(rest, (float("inf"), float("nan")), strict=True)]
    folder.write_point(0, replace(record, epochs=(first, *losses)), None)
    MlflowTracker(folder, sweep).sync()
    point_run = runs_of(sweep)["task 0: task-0/p001 alpha=0 lr=0.02"]
    first, last = MlflowClient(sweep.tracking.uri).get_metric_history(point_run.info.run_id, "train/loss")
    assert (first.step, first.value) == (0, 2.0)
    assert last.step == 2
    assert last.value != last.value


def test_a_failed_sequence_is_failed_until_it_is_resumed(folder: RunFolder, sweep: Sweep) -> None:
    for step in write_run(folder, sweep):
        if step == "chosen 1":
            break
    summary = folder.read_summary()
    assert summary is not None
    tracker = MlflowTracker(folder, sweep)
    seen = []
    for status in ("failed", "running"):
        folder.write_summary(summarise("run", status, 0, "", summary.tasks))
        tracker.sync()
        seen.append({title: run.info.status for title, run in runs_of(sweep).items() if "/" not in title})
    assert seen == [
        {"run": "FAILED", "task 0: task-0": "FINISHED", "task 1: task-1": "FAILED"},
        {"run": "RUNNING", "task 0: task-0": "FINISHED", "task 1: task-1": "RUNNING"},
    ]


def test_a_sync_goes_as_far_as_the_summary_that_it_is_given(folder: RunFolder, sweep: Sweep) -> None:
    steps = write_run(folder, sweep)
    next(step for step in steps if step == "chosen 0")
    summary = folder.read_summary()
    assert next(steps) == "committed 0"
    tracker = MlflowTracker(folder, sweep)
    tracker.sync(summary)
    assert runs_of(sweep)["task 0: task-0"].info.status == "RUNNING"
    tracker.sync()
    assert runs_of(sweep)["task 0: task-0"].info.status == "FINISHED"


def test_a_sync_that_is_superseded_leaves_the_points_of_an_open_task_to_the_next_one(
    folder: RunFolder, sweep: Sweep
) -> None:
    for step in write_run(folder, sweep):
        if step == "chosen 1":
            break
    tracker = MlflowTracker(folder, sweep)
    tracker.sync(superseded=lambda: True)
    assert {title.partition("/")[0] for title in runs_of(sweep)} == {"run", "task 0: task-0"}
    tracker.sync(superseded=lambda: True)
    points = [title.partition("/")[0] for title in runs_of(sweep) if "/" in title]
    assert points == ["task 0: task-0"] * 4
    assert runs_of(sweep)["task 1: task-1"].info.status == "RUNNING"
    tracker.sync()
    assert len([title for title in runs_of(sweep) if "/" in title]) == 8


def test_a_server_that_is_not_there_is_reported_and_replayed_when_it_is(
    finished: RunFolder, sweep: Sweep, database: str, tmp_path: Path
) -> None:
    MlflowTracker(finished, sweep).sync()
    port = free_port()
    served = at(sweep.model_copy(update={"name": f"{sweep.name}-served"}), f"http://127.0.0.1:{port}")
    tracker = MlflowTracker(finished, served)
    with pytest.raises(TrackingUnavailable, match=str(port)):
        tracker.sync()
    with server(database, tmp_path, port) as uri:
        tracker.sync()
        assert snapshot(served) == snapshot(sweep)
        # The UI, on the store that a run without a server has filled, shows its artifacts too.
        run = runs_of(sweep)["run"]
        shown = urllib.request.urlopen(f"{uri}/get-artifact?path=sweep.yaml&run_uuid={run.info.run_id}")
        assert shown.read().decode() == finished.read_sweep()
    finished.write_summary(summarise("run", "failed", 0, "", finished.read_results()))
    with pytest.raises(TrackingUnavailable):
        tracker.sync()


def test_saved_views_show_sequences_choices_and_points_in_a_browser(
    finished: RunFolder, sweep: Sweep, database: str, tmp_path: Path
) -> None:
    MlflowTracker(finished, sweep).sync()
    log_spread(sweep, "family", [SPREAD])
    experiment = MlflowClient(sweep.tracking.uri).get_experiment_by_name(sweep.name)
    assert experiment is not None
    with server(database, tmp_path, free_port()) as uri:
        runs = f"{uri}/#/experiments/{experiment.experiment_id}/runs?workflowType=machine_learning"
        seen = {view: Grid(page(f"{runs}&viewStateShareKey={view}", tmp_path / "browser")).rows for view in VIEWS}
    [sequence] = seen[views.SEQUENCES]
    assert sequence["attributes.`Run Name`"].endswith("run")  # the colour of its curves comes first
    assert sequence["params.`forgetting.margin`"] == "0.0005"
    assert sequence["metrics.`test/average_accuracy`"] == "0.905"
    assert sequence["metrics.`test/forgetting`"] == "0"
    assert sequence["metrics.`capacity/free`"] == str(
        sum(units.free for units in finished.read_results()[-1].units.values())
    )
    chosen = seen[views.CHOSEN]
    assert [row["attributes.`Run Name`"].partition("task")[2] for row in chosen] == [" 0: task-0", " 1: task-1"]
    assert [row["metrics.`test/accuracy`"] for row in chosen] == ["0.9", "0.91"]
    assert [row["params.`alpha`"] for row in chosen] == ["0.001", "0.001"]
    points = seen[views.POINTS]
    assert len(points) == 4
    assert points[0]["tags.`selected`"] == "true"
    assert points[0]["metrics.`val/unpruned_accuracy`"] == "0.9702"
    assert points[0]["metrics.`prune/unit_sparsity`"] == "0.375"
    [family] = seen[views.FAMILIES]
    assert family["params.`forgetting.margin`"] == "0.01"
    assert family["metrics.`test/average_accuracy`"] == "0.905"
    assert family["metrics.`test/average_accuracy_deviation`"] == "0.002"
    assert family["tags.`clnp.seeds`"] == "0, 1"


def test_means_over_seeds_are_one_run_that_grows_with_them_and_with_their_tasks(
    finished: RunFolder, sweep: Sweep
) -> None:
    one = SPREAD | {"margin": 0.02, "seeds": [0]}
    further = SPREAD | {"tasks": 3, "average_test_accuracy_mean": 0.902}
    more = further | {"seeds": [0, 1, 2], "average_test_accuracy_mean": 0.9}
    for rows in ([SPREAD, one], [SPREAD, one], [further], [more]):
        log_spread(sweep, "family", rows)
    client = MlflowClient(sweep.tracking.uri)
    [run] = [each for each in runs_of(sweep).values() if each.data.tags["clnp.level"] == "family"]
    history = client.get_metric_history(run.info.run_id, "test/average_accuracy")
    assert [(each.step, each.value) for each in history] == [(4, 0.905), (6, 0.902), (9, 0.9)]
    assert run.data.tags["clnp.seeds"] == "0, 1, 2"
    assert run.info.status == "FINISHED"


def test_means_of_other_sequences_by_the_same_name_and_of_seeds_that_end_earlier_are_other_runs(
    finished: RunFolder, sweep: Sweep
) -> None:
    longer = SPREAD | {"tasks": 4, "seeds": [2, 3]}
    log_spread(sweep, "family", [SPREAD, longer], "one")
    log_spread(sweep, "family", [SPREAD | {"average_test_accuracy_mean": 0.95}], "another")
    client = MlflowClient(sweep.tracking.uri)
    experiment = client.get_experiment_by_name(sweep.name)
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id], "tags.`clnp.level` = 'family'")
    assert sorted((each.data.tags["clnp.seeds"], each.data.metrics["test/average_accuracy"]) for each in found) == [
        ("0, 1", 0.905),
        ("0, 1", 0.95),
        ("2, 3", 0.905),
    ]


def test_a_view_that_its_users_changed_stays_as_it_is(finished: RunFolder, sweep: Sweep) -> None:
    MlflowTracker(finished, sweep).sync()
    client = MlflowClient(sweep.tracking.uri)
    experiment = client.get_experiment_by_name(sweep.name)
    assert experiment is not None
    client.set_experiment_tag(experiment.experiment_id, f"{views.TAG}{views.POINTS}", "changed")
    MlflowTracker(finished, sweep).sync()
    tags = client.get_experiment(experiment.experiment_id).tags
    assert tags[f"{views.TAG}{views.POINTS}"] == "changed"
    assert {f"{views.TAG}{view}" for view in VIEWS} <= tags.keys()


def test_the_publisher_says_how_mlflow_is_doing(finished: RunFolder, sweep: Sweep) -> None:
    def state(uri: str) -> str:
        with Publisher(finished, at(sweep, uri)) as publisher:
            publisher.points_finished([])
        return publisher.state()

    assert state(f"http://127.0.0.1:{free_port()}").startswith("MLflow is behind: TrackingUnavailable: ")
    assert state(sweep.tracking.uri) == "MLflow is up to date"
    assert state("none") == ""


def test_runs_are_logged_where_their_figures_cannot_be_drawn(finished: RunFolder, sweep: Sweep) -> None:
    def refuse(*_: Any) -> None:
        raise ValueError("no picture")

    with Publisher(finished, sweep) as publisher:
        publisher.beside = refuse
        publisher.points_finished([])
    assert publisher.state() == "figures are behind: ValueError: no picture"
    assert len(runs_of(sweep)) == 1 + 2 + 8  # the sequence, its tasks, their points


def test_a_store_that_is_away_when_the_summary_is_read_stops_no_search(
    finished: RunFolder, sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away() -> None:
        raise OSError("the store is away")

    with monkeypatch.context() as patch, Publisher(finished, sweep) as publisher:
        patch.setattr(finished, "read_summary", away)
        publisher.points_finished([])
    assert publisher.state() == "what is shown is behind: OSError: the store is away"
    with Publisher(finished, sweep) as publisher:
        publisher.points_finished([])
    assert publisher.state() == "MLflow is up to date"


def test_an_interrupt_ends_the_publishers_thread(finished: RunFolder, sweep: Sweep) -> None:
    begun, left = threading.Event(), threading.Event()

    def draw(*_: Any) -> None:
        begun.set()
        left.wait()

    def interrupted() -> None:
        with publisher:
            publisher.points_finished([])
            begun.wait()
            publisher.points_finished([])
            raise KeyboardInterrupt

    publisher = Publisher(finished, sweep)
    publisher.beside = draw
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    left.set()
    publisher._thread.join()
    assert publisher.behind == "MLflow is behind: InterruptedError: the sequence was interrupted"
    assert sorted(run.data.tags["clnp.level"] for run in runs_of(sweep).values()) == ["sequence", "task"]


def test_a_server_that_never_answers_is_given_up(
    finished: RunFolder, sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "PROBE_TIMEOUT_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(TrackingUnavailable, match="timed out"):
            MlflowTracker(finished, at(sweep, uri)).sync()


def test_a_store_that_is_no_database_is_reported(finished: RunFolder, sweep: Sweep, tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("no database, and not about to become one\n" * 100)
    with pytest.raises(TrackingUnavailable, match="not a database"):
        MlflowTracker(finished, at(sweep, f"sqlite:///{tmp_path}/mlflow.db")).sync()


def test_the_module_is_light_until_it_is_used() -> None:
    code = "import sys, clnp_search.tracking.mlflow; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
