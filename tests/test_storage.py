"""The run folder: whole files or none, and records that read back as they were written."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import signal
import socket
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from builders import make_network, make_point, make_record, make_scan, make_state, make_trained

from clnp_search.errors import Damaged, InputError
from clnp_search.records import (
    CurveStep,
    Environment,
    Epoch,
    PointRecord,
    Selected,
    Selection,
    TaskPlan,
    TaskResult,
    Units,
    summarise,
)
from clnp_search.storage import RunFolder, join_uri, open_run, run_folder

SMALL = make_network((4, 4))
TRAINED = make_trained(make_state(SMALL, 0))


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return run_folder(str(tmp_path), "run")


def files(folder: RunFolder) -> list[str]:
    path = folder.local_path
    assert path is not None
    return sorted(str(each.relative_to(path)) for each in path.rglob("*") if each.is_file())


def path_of(folder: RunFolder, path: str) -> Path:
    assert folder.local_path is not None
    return folder.local_path / path


def make_plan(task: int = 0) -> TaskPlan:
    points = tuple(make_point(index, alpha=1e-6 * index) for index in range(3))
    environment = Environment("cpu", 1, "float32", "2.15", "0.1")
    return TaskPlan(task, "permutation-0", "parent", points, ("a", "b", "c"), ((0, 2), (1,)), environment)


def make_result(index: int, accuracies: tuple[float, ...]) -> TaskResult:
    return TaskResult(
        index=index,
        name=f"task-{index}",
        best_val_accuracy=0.99,
        margin=0.0005,
        selected=Selected("p001", (1e-6, 1e-6, 1e-6), 0.001, (0.1, 0.2), 0.985, 0.5),
        test_accuracy=accuracies[-1],
        test_accuracies=accuracies,
        units={"hidden0": Units(4, 2, 2, 2)},
        points=12,
        digest="d",
        state_digest="s",
        seconds=1.5,
    )


# Whole files


def test_points_that_failed_in_a_fine_tune_round_are_found_and_forgotten(folder: RunFolder) -> None:
    folder.write_plan(make_plan())
    folder.write_point(0, make_record(1, 90), TRAINED)
    folder.write_point(0, make_record(1, 0, status="failed", round=1), None)
    folder.write_point(0, make_record(0, 0, status="failed"), None)
    assert [(record.point.index, record.round) for record in folder.read_points(0)] == [(0, 0), (1, 0), (1, 1)]
    failed = folder.read_failed()
    assert [(task, record.point.name_in(record.round)) for task, record in failed] == [(0, "p000"), (0, "p001-round1")]
    for task, record in failed:
        folder.delete_point(task, record)
    assert folder.read_failed() == ()
    assert len(folder.read_points(0)) == 1


def test_a_file_reads_back_as_it_was_written(folder: RunFolder) -> None:
    folder.write("a/b/c.bin", b"\x00\xff")
    assert folder.read("a/b/c.bin") == b"\x00\xff"
    assert folder.exists("a/b/c.bin")


def test_a_write_leaves_no_temporary_file(folder: RunFolder) -> None:
    folder.write("a/file", b"1")
    folder.write("a/file", b"2")
    assert files(folder) == ["a/file"]
    assert folder.read("a/file") == b"2"


def test_a_write_that_fails_leaves_no_temporary_file(folder: RunFolder) -> None:
    path_of(folder, "a/file/blocked").mkdir(parents=True)
    with pytest.raises(OSError, match="file"):
        folder.write("a/file", b"1")
    assert files(folder) == []


def test_a_write_that_fails_leaves_the_old_file_whole(folder: RunFolder) -> None:
    folder.write("file", b"old")
    with pytest.raises(TypeError):
        folder.write("file", "no bytes")  # type: ignore[arg-type]
    assert folder.read("file") == b"old"
    assert files(folder) == ["file"]


def test_an_interrupt_while_an_object_is_put_leaves_it_whole() -> None:
    class Interrupted:
        """An object store at which an interrupt arrives just as an object is begun."""

        def __init__(self, store: Any) -> None:
            self._store = store

        def open_output_stream(self, path: str) -> Any:
            stream = self._store.open_output_stream(path)
            os.kill(os.getpid(), signal.SIGINT)
            return stream

    folder = RunFolder("mock:///run")
    store = folder._filesystem
    store.create_dir("run")
    folder._filesystem = Interrupted(store)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            folder.write("plan.json", b"whole")
    finally:
        signal.signal(signal.SIGINT, before)
    for thread in threading.enumerate():
        if thread.name.startswith("ThreadPoolExecutor"):  # that the interrupt may not have waited for
            thread.join()
    folder._filesystem = store
    assert folder.read("plan.json") == b"whole"


def test_a_file_that_is_not_there_raises_file_not_found(folder: RunFolder) -> None:
    with pytest.raises(FileNotFoundError):
        folder.read("absent")


def test_deleting_a_file_that_is_not_there_does_nothing(folder: RunFolder) -> None:
    folder.write("file", b"1")
    folder.delete("file")
    folder.delete("file")
    assert not folder.exists("file")


@pytest.mark.parametrize("name", ["with space", "per%20cent", "hash#mark?", "ü"])
def test_a_storage_may_have_any_name(tmp_path: Path, name: str) -> None:
    folder = run_folder(str(tmp_path / name), "run")
    folder.write("file", b"1")
    assert (tmp_path / name / "run" / "file").read_bytes() == b"1"
    assert folder.read("file") == b"1"


def test_a_file_uri_is_a_local_folder(tmp_path: Path) -> None:
    folder = run_folder(f"file://{tmp_path}", "run")
    assert folder.local_path == tmp_path / "run"
    assert folder.name == "run"


def test_a_relative_storage_is_under_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_folder("runs/", "a").local_path == tmp_path / "runs" / "a"


# Names


@pytest.mark.parametrize("name", ["..", "../up", "a/../../b", "/etc", "a/b", "", ".hidden", "-x", "a\nb", "a\n", "a b"])
def test_a_name_that_could_lead_out_of_the_storage_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="allowed: up to 100 letters, digits"):
        run_folder(str(tmp_path), name)


@pytest.mark.parametrize("name", ["a", "A1._-z", "0", "x" * 100, "a..b"])
def test_a_plain_name_is_a_folder_of_the_storage(tmp_path: Path, name: str) -> None:
    assert run_folder(str(tmp_path), name).local_path == tmp_path / name


def test_a_storage_of_an_unknown_kind_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="storage nowhere://bucket/run"):
        RunFolder("nowhere://bucket/run")


@pytest.mark.parametrize("storage", ["s3://bucket/runs", "s3://bucket/runs/", "s3://bucket/runs//"])
def test_a_name_is_joined_to_a_uri_by_one_slash(storage: str) -> None:
    assert join_uri(storage, "a") == "s3://bucket/runs/a"


def test_a_name_is_joined_before_a_uris_settings() -> None:
    uri = join_uri("s3://bucket/runs?endpoint_override=127.0.0.1:9&scheme=http&region=us-east-1", "a")
    assert uri == "s3://bucket/runs/a?endpoint_override=127.0.0.1:9&scheme=http&region=us-east-1"
    folder = RunFolder(uri)
    assert (folder.name, join_uri(folder.storage, "a")) == ("a", uri)


def test_a_storage_that_does_not_answer_is_said_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    uri = f"s3://bucket/runs?endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"
    with pytest.raises(InputError, match=r"^storage s3://bucket/runs.*connect"):
        open_run("run", uri)


def test_a_run_is_opened_by_name_path_or_uri(tmp_path: Path) -> None:
    run_folder(str(tmp_path), "run").write_sweep("seed: 1")
    for run in ("run", str(tmp_path / "run"), f"file://{tmp_path}/run"):
        assert open_run(run, str(tmp_path)).read_sweep() == "seed: 1"


def test_a_run_is_opened_by_its_name_in_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_folder(str(tmp_path), "run").write_sweep("seed: 1")
    monkeypatch.chdir(tmp_path)
    assert open_run("run", "elsewhere").local_path == tmp_path / "run"


@pytest.mark.parametrize("run", ["absent", "./absent", "", "../absent", "file:///absent"])
def test_a_run_that_is_not_there_is_refused_by_name(tmp_path: Path, run: str) -> None:
    with pytest.raises(InputError, match="no run of that name"):
        open_run(run, str(tmp_path))


def test_a_folder_without_a_sweep_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run folder"):
        run_folder(str(tmp_path), "run").read_sweep()


# Points


def test_a_point_reads_back_with_its_parameters(folder: RunFolder) -> None:
    record = make_record(3, 9848, epochs=(Epoch(0, 0.001, 0.5, 0.9),), notes=("a", "b"), seconds=1.25)
    folder.write_point(0, record, TRAINED)
    again = folder.read_point(0, "p003")
    assert again is not None
    assert replace(again, parameters_sha256="") == record
    assert folder.read_trained(0, again).to_bytes() == TRAINED.to_bytes()


def test_a_point_without_a_record_is_not_finished(folder: RunFolder) -> None:
    assert folder.read_point(0, "p000") is None
    folder.write("tasks/000/points/p000.safetensors", TRAINED.to_bytes())
    assert folder.read_point(0, "p000") is None


def test_a_point_has_no_record_if_its_parameters_cannot_be_written(folder: RunFolder) -> None:
    path_of(folder, "tasks/000/points/p000.safetensors/blocked").mkdir(parents=True)
    with pytest.raises(OSError, match="p000"):
        folder.write_point(0, make_record(0, 9848), TRAINED)
    assert folder.read_point(0, "p000") is None
    assert files(folder) == []


def test_a_failed_point_is_a_record_with_its_reason_and_no_parameters(folder: RunFolder) -> None:
    folder.write_point(0, make_record(0, 0, 0, status="failed", reason="diverged"), None)
    again = folder.read_point(0, "p000")
    assert again is not None
    assert (again.status, again.reason, again.val_accuracy) == ("failed", "diverged", 0.0)
    assert files(folder) == ["tasks/000/points/p000.json"]


def test_a_diverged_points_losses_read_back(folder: RunFolder) -> None:
    epochs = (Epoch(0, 1e30, math.nan, 0.1), Epoch(1, 1e30, math.inf, 0.1))
    folder.write_point(0, make_record(0, 0, status="failed", epochs=epochs), None)
    again = folder.read_point(0, "p000")
    assert again is not None
    assert math.isnan(again.epochs[0].train_loss)
    assert again.epochs[1].train_loss == math.inf


def test_a_tiny_number_reads_back_to_its_last_bit(folder: RunFolder) -> None:
    record = make_record(0, 1, point=make_point(0, alpha=0.1 + 0.2, learning_rate=5e-324))
    folder.write_point(0, record, None)
    assert folder.read_point(0, "p000") == record


def test_points_of_two_tasks_are_apart(folder: RunFolder) -> None:
    for task in (0, 1):
        folder.write_point(task, make_record(0, 10 + task), None)
    correct = [record.val_correct for task in (0, 1) if (record := folder.read_point(task, "p000"))]
    assert correct == [10, 11]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"key": 3}', '{"key": 3,\n "sha256": "0"\n}\n'])
def test_a_damaged_record_raises_with_its_path(folder: RunFolder, text: str) -> None:
    folder.write("tasks/000/points/p000.json", text.encode())
    with pytest.raises(Damaged, match=r"tasks/000/points/p000.json: damaged"):
        folder.read_point(0, "p000")


def test_a_record_changed_by_hand_is_refused(folder: RunFolder) -> None:
    folder.write_selection(0, Selection(0.9848, 0.0005, 9843, (0, 2), 2, ()))
    path = path_of(folder, "tasks/000/selection.json")
    path.write_text(path.read_text().replace('"chosen": 2', '"chosen": 0'))
    with pytest.raises(Damaged, match=r"selection.json: damaged, or changed by hand"):
        folder.read_selection(0)
    path.write_text(json.dumps(json.loads(path.read_text()), indent=1) + "\n")  # not the same file, whatever it says
    with pytest.raises(Damaged, match=r"selection.json: damaged, or changed by hand"):
        folder.read_selection(0)


def test_a_record_ends_with_the_sha256_of_all_before_it(folder: RunFolder) -> None:
    folder.write_point(0, make_record(0, 1), None)
    data = folder.read("tasks/000/points/p000.json")
    body = data.partition(b',\n "sha256"')[0]
    assert json.loads(data)["sha256"] == hashlib.sha256(body).hexdigest()


def test_damaged_missing_or_other_parameters_raise_with_their_path(folder: RunFolder) -> None:
    folder.write_point(0, make_record(0, 1), TRAINED)
    record = folder.read_point(0, "p000")
    assert record is not None
    for data in (TRAINED.to_bytes()[:-1], make_trained(make_state(SMALL, 0), seed=1).to_bytes()):
        folder.write("tasks/000/points/p000.safetensors", data)
        with pytest.raises(Damaged, match=r"tasks/000/points/p000.safetensors: damaged, or not the file"):
            folder.read_trained(0, record)
    folder.delete("tasks/000/points/p000.safetensors")
    with pytest.raises(Damaged, match=r"tasks/000/points/p000.safetensors: missing"):
        folder.read_trained(0, record)


def test_what_no_parser_takes_raises_with_its_path(folder: RunFolder) -> None:
    folder.write("tasks/000/points/p000.safetensors", b"nothing")
    record = make_record(0, 1, parameters_sha256=hashlib.sha256(b"nothing").hexdigest())
    with pytest.raises(
        InputError, match=r"tasks/000/points/p000.safetensors: written by another .*: not a trained point"
    ):
        folder.read_trained(0, record)


# Other records


def test_a_plan_reads_back(folder: RunFolder) -> None:
    assert folder.read_plan(0) is None
    folder.write_plan(make_plan())
    assert folder.read_plan(0) == make_plan()


def test_a_scan_reads_back_under_the_rule_that_it_followed(folder: RunFolder) -> None:
    curve = (CurveStep((0.5, 0.5), 0.9, (1, 2)), CurveStep((0.0, 0.0), 1.0, (4, 4)))
    asked = {"rule": "global", "min_correct": 9843}
    scan = make_scan(7, 9843, curve=curve, layer_curves=((), curve), **asked)
    folder.write_scan(0, scan)
    assert folder.read_scan(0, 7, "global", 9843) == scan
    assert folder.read_scan(0, 7, "global", 9844) is None
    assert folder.read_scan(0, 7, "per_layer", 9843) is None
    assert folder.read_scan(0, 7, "global", 9843, round=1) is None


def test_a_scan_without_a_theta_reads_back(folder: RunFolder) -> None:
    folder.write_scan(0, make_scan(7, 9000, theta=None, rule="global", min_correct=9843))
    again = folder.read_scan(0, 7, "global", 9843)
    assert again is not None
    assert again.theta is None


def test_a_selection_reads_back(folder: RunFolder) -> None:
    choice = Selection(0.9848, 0.0005, 9843, (0, 2), 2, ("One.", "Two: 50%."))
    assert folder.read_selection(0) is None
    folder.write_selection(0, choice)
    assert folder.read_selection(0) == choice


def test_results_read_back_in_order_as_far_as_they_go(folder: RunFolder) -> None:
    results = [make_result(index, (0.9,) * (index + 1)) for index in (0, 1, 3)]
    for result in results:
        folder.write_result(result)
    assert folder.read_results() == tuple(results[:2])


def test_a_summary_reads_back(folder: RunFolder) -> None:
    assert folder.read_summary() is None
    results = (make_result(0, (0.9,)), make_result(1, (0.85, 0.95)))
    summary = summarise("run", "running", 0, "s", results)
    folder.write_summary(summary)
    assert folder.read_summary() == summary


def test_a_state_reads_back(folder: RunFolder) -> None:
    state = make_state(SMALL, 2)
    folder.write_result(replace(make_result(1, (0.9, 0.9)), state_sha256=folder.write_state(1, state)))
    assert folder.read_state(1).digest == state.digest


def test_a_state_that_is_not_there_is_a_task_that_is_not_committed(folder: RunFolder) -> None:
    with pytest.raises(InputError, match="task 4 is not committed"):
        folder.read_state(4)


def test_a_damaged_missing_or_other_state_raises_with_its_path(folder: RunFolder) -> None:
    folder.write_result(replace(make_result(0, (0.9,)), state_sha256=folder.write_state(0, make_state(SMALL, 1))))
    folder.write_state(0, make_state(SMALL, 2))
    with pytest.raises(Damaged, match=r"tasks/000/state.safetensors: damaged, or not the file"):
        folder.read_state(0)
    folder.delete("tasks/000/state.safetensors")
    with pytest.raises(Damaged, match=r"tasks/000/state.safetensors: missing"):
        folder.read_state(0)


def test_a_state_without_a_result_is_not_committed(folder: RunFolder) -> None:
    folder.write_state(0, make_state(SMALL, 1))
    with pytest.raises(InputError, match="task 0 is not committed"):
        folder.read_state(0)


def test_a_checkpoint_is_replaced_and_removed(folder: RunFolder) -> None:
    assert folder.read_checkpoint(0, "pack") is None
    folder.write_checkpoint(0, "pack", b"1")
    folder.write_checkpoint(0, "pack", b"2")
    assert folder.read_checkpoint(0, "pack") == b"2"
    folder.delete_checkpoint(0, "pack")
    assert folder.read_checkpoint(0, "pack") is None


@pytest.mark.parametrize("position", [0, 5, -1])
def test_a_checkpoint_with_a_flipped_bit_reads_as_nothing(folder: RunFolder, position: int) -> None:
    folder.write_checkpoint(0, "pack", b"weights")
    data = bytearray(folder.read("tasks/000/packs/pack.safetensors"))
    data[position] ^= 1
    folder.write("tasks/000/packs/pack.safetensors", bytes(data))
    assert folder.read_checkpoint(0, "pack") == b""


def test_tracking_entries_are_empty_before_the_first(folder: RunFolder) -> None:
    assert folder.read_tracking() == {}
    folder.write_tracking({"a": [1, 2]})
    assert folder.read_tracking() == {"a": [1, 2]}


# Tables


def table(folder: RunFolder, path: str) -> list[dict[str, Any]]:
    return list(csv.DictReader(folder.read(path).decode().splitlines()))


def test_the_points_table_is_csv_with_lists_as_json(folder: RunFolder) -> None:
    row = {"point": "p000", "alpha": "[1e-06, 0.1]", "learning_rate": 0.001, "theta": "", "selected": True}
    folder.write_table(2, "points", [row, row | {"point": "p001"}])
    text = folder.read("tasks/002/points.csv").decode()
    assert text.splitlines()[0] == "point,alpha,learning_rate,theta,selected"
    again = table(folder, "tasks/002/points.csv")
    assert again[1] == {
        "point": "p001",
        "alpha": "[1e-06, 0.1]",
        "learning_rate": "0.001",
        "theta": "",
        "selected": "True",
    }


def test_a_curve_is_csv_with_the_active_units_of_each_layer(folder: RunFolder) -> None:
    curve = [CurveStep((0.5, 0.25), 0.9, (1, 2)), CurveStep((0.0, 0.25), 1.0, (4, 3))]
    folder.write_curve(0, "p001", curve, ["hidden0", "hidden1"])
    expected = "theta,val_accuracy,hidden0,hidden1\n0.5,0.9,1,2\n0.0,1.0,4,3\n"
    assert folder.read("tasks/000/curves/p001.csv").decode() == expected


def test_a_layers_curve_shows_that_layers_theta(folder: RunFolder) -> None:
    folder.write_curve(0, "p001.hidden1", [CurveStep((0.5, 0.25), 0.9, (1, 2))], ["hidden0", "hidden1"], layer=1)
    assert table(folder, "tasks/000/curves/p001.hidden1.csv")[0]["theta"] == "0.25"


def test_a_theta_in_a_table_reads_back_to_its_last_bit(folder: RunFolder) -> None:
    folder.write_curve(0, "p001", [CurveStep((0.1 + 0.2,), 1 / 3, (1,))], ["hidden0"])
    row = table(folder, "tasks/000/curves/p001.csv")[0]
    assert (float(row["theta"]), float(row["val_accuracy"])) == (0.1 + 0.2, 1 / 3)


# Records


def test_a_record_of_no_samples_has_accuracy_zero() -> None:
    assert PointRecord("key", make_point(), "failed", 0, 0).val_accuracy == 0.0


def test_a_scan_knows_its_sparsity_and_its_scarcest_layer() -> None:
    scan = make_scan(0, 9843, (1, 3))
    assert scan.unit_sparsity == 0.5
    assert scan.scarcest_layer == 0.25
    assert scan.val_accuracy == 0.9843


def test_a_summary_measures_forgetting_from_the_best_ever_and_transfer_from_the_first() -> None:
    results = (make_result(0, (0.8,)), make_result(1, (0.9, 0.7)), make_result(2, (0.85, 0.7, 0.6)))
    summary = summarise("run", "complete", 0, "s", results)
    assert summary.average_test_accuracy == pytest.approx((0.85 + 0.7 + 0.6) / 3)
    assert summary.max_forgetting == pytest.approx(0.05)
    assert summary.average_forgetting == pytest.approx(0.025)
    assert summary.backward_transfer == pytest.approx(0.025)


def test_a_summary_of_no_task_is_all_zeros() -> None:
    summary = summarise("run", "running", 3, "s", ())
    assert (summary.average_test_accuracy, summary.max_forgetting, summary.backward_transfer) == (0.0, 0.0, 0.0)
