"""What `verify` finds: one flipped bit anywhere, and files that are whole but do not follow from one another."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from in_process import SWEEP, InProcess, make, run_in_process

from clnp_search.errors import InputError
from clnp_search.records import TaskResult, summarise
from clnp_search.storage import RunFolder, run_folder
from clnp_search.verification import Check, verify


def failed(folder: RunFolder) -> list[Check]:
    return [check for check in verify(folder) if not check.passed]


def names(folder: RunFolder) -> set[str]:
    return {check.name for check in failed(folder)}


def records_of(folder: RunFolder) -> list[Path]:
    """All that `verify` reads, but for the sweep, which is a person's file."""
    assert folder.local_path is not None
    return sorted(
        path
        for path in folder.local_path.rglob("*")
        if path.suffix in (".json", ".safetensors") and path.name != "mlflow.json"
    )


def test_a_whole_run_passes(whole: RunFolder) -> None:
    checks = verify(whole)
    assert [check for check in checks if not check.passed] == []
    assert {check.task for check in checks} == {None, 0, 1}


def test_a_run_whose_biases_make_up_for_what_is_pruned_passes(whole: RunFolder, tmp_path: Path) -> None:
    folder = run_folder(str(tmp_path), "compensated")
    summary = run_in_process(make(training={"compensate": True}), folder)
    assert failed(folder) == []
    kept = folder.read_point(0, summary.tasks[0].selected.point)
    assert kept is not None
    assert folder.read_trained(0, kept).means.keys() == {"hidden1", "head"}
    assert summary.state_digest != whole.read_results()[-1].state_digest


def test_a_run_that_failed_after_a_group_was_widened_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"network": {"hidden": [8, 1]}, "search": {"alpha": [0.0], "learning_rate": 0.01}}
    sweep = make(**sizes, forgetting={"margin": "0%"}, capacity={"on_depletion": "expand"})
    share = InProcess.share

    def out_of_space(self: InProcess, inputs: Any) -> Any:
        if isinstance(inputs, tuple) and inputs[0].task == 1:
            raise OSError("no space is left")
        return share(self, inputs)

    monkeypatch.setattr(InProcess, "share", out_of_space)
    folder = run_folder(str(tmp_path), "run")
    with pytest.raises(OSError, match="no space"):
        run_in_process(sweep, folder)
    summary = folder.read_summary()
    assert summary is not None
    assert (summary.status, summary.tasks[0].units["hidden1"].free) == ("failed", 0)
    assert failed(folder) == []


def test_verify_changes_no_file(whole: RunFolder) -> None:
    before = {path: path.stat().st_mtime_ns for path in records_of(whole)}
    verify(whole)
    assert {path: path.stat().st_mtime_ns for path in records_of(whole)} == before


def test_one_flipped_bit_in_any_file_is_found(copy: RunFolder) -> None:
    chance = random.Random(0)
    paths = records_of(copy)
    kinds = {path.parent.name if path.parent.name in ("points", "scans") else path.name for path in paths}
    assert kinds == {
        "plan.json",
        "points",
        "scans",
        "selection.json",
        "state.safetensors",
        "result.json",
        "summary.json",
    }
    for flip in range(200):
        path = paths[flip % len(paths)]
        data = path.read_bytes()
        damaged = bytearray(data)
        position, bit = chance.randrange(len(data)), chance.randrange(8)
        damaged[position] ^= 1 << bit
        path.write_bytes(damaged)
        assert failed(copy), f"{path}: byte {position}, bit {bit}"
        path.write_bytes(data)
    assert failed(copy) == []


@pytest.mark.parametrize("data", [b"", b"\n", b"{}", b"\xff\xfe", b'{"a": 1}'])
def test_a_file_of_something_else_is_found(copy: RunFolder, data: bytes) -> None:
    for path in records_of(copy):
        whole = path.read_bytes()
        path.write_bytes(data)
        assert failed(copy), path
        path.write_bytes(whole)


def test_a_missing_file_is_found(copy: RunFolder) -> None:
    for path in records_of(copy):
        data = path.read_bytes()
        path.unlink()
        assert failed(copy), path
        path.write_bytes(data)


def test_a_sweep_that_cannot_be_read_is_a_failed_check(copy: RunFolder) -> None:
    copy.write("sweep.yaml", copy.read("sweep.yaml").replace(b"scenario", b"scen\x00rio"))
    assert names(copy) == {"sweep is readable"}


@pytest.mark.parametrize(
    ("old", "new"), [("margin: 0.03", "margin: 0.02"), ("validation: 300", "validation: 5000"), ("seed: 0", "seed: 1")]
)
def test_a_changed_setting_is_found(copy: RunFolder, old: str, new: str) -> None:
    text = copy.read_sweep()
    assert old in text
    copy.write_sweep(text.replace(old, new))
    assert "plan is of this sweep, these data and the state before" in names(copy)


def test_a_run_without_a_committed_task_is_refused(tmp_path: Path) -> None:
    folder = run_folder(str(tmp_path), "new")
    folder.write_sweep(SWEEP.to_yaml())
    with pytest.raises(InputError, match="no task is committed yet"):
        verify(folder)


# Files that are whole, written by the same code, but do not follow from one another


def rewrite_result(folder: RunFolder, change: Callable[[TaskResult], TaskResult]) -> None:
    folder.write_result(change(folder.read_results()[1]))


def other_choice(folder: RunFolder) -> None:
    choice = folder.read_selection(1)
    assert choice is not None
    folder.write_selection(1, replace(choice, chosen=1 - choice.chosen))


def other_scan(folder: RunFolder) -> None:
    for path in folder._list("tasks/001/scans"):
        point, rule, limit = path.rsplit("/", 1)[-1].removesuffix(".json").split("-")
        scan = folder.read_scan(1, int(point), rule, int(limit))
        assert scan is not None
        folder.write_scan(1, replace(scan, theta=(1e9, 1e9), active=(12, 8)))


def other_parameters(folder: RunFolder) -> None:
    first, second = (folder.read(f"tasks/001/points/p00{index}.safetensors") for index in (0, 1))
    folder.write("tasks/001/points/p000.safetensors", second)
    folder.write("tasks/001/points/p001.safetensors", first)


def other_accuracy(folder: RunFolder) -> None:
    rewrite_result(folder, lambda result: replace(result, test_accuracies=(0.5, result.test_accuracy)))


def other_units(folder: RunFolder) -> None:
    rewrite_result(
        folder,
        lambda result: replace(result, units={name: replace(units, free=0) for name, units in result.units.items()}),
    )


def other_point(folder: RunFolder) -> None:
    rewrite_result(folder, lambda result: replace(result, selected=replace(result.selected, learning_rate=0.5)))


def other_record(folder: RunFolder) -> None:
    record = folder.read_point(1, "p000")
    assert record is not None
    trained = folder.read_trained(1, record)
    folder.write_point(1, replace(record, val_correct=300), trained)


def other_state(folder: RunFolder) -> None:
    state = folder.read_state(1)
    first = state.tensors["hidden0"]
    tensors = state.tensors | {"hidden0": first | {"bias": 3 * first["bias"]}}
    sha256 = folder.write_state(1, replace(state, tensors=tensors))
    rewrite_result(folder, lambda result: replace(result, state_sha256=sha256))


def other_summary(folder: RunFolder) -> None:
    summary = folder.read_summary()
    assert summary is not None
    folder.write_summary(replace(summary, max_forgetting=0.5))


@pytest.mark.parametrize(
    ("change", "check"),
    [
        (other_choice, "choice follows from points and scans"),
        (other_scan, "choice follows from points and scans"),
        (other_parameters, "choice follows from points and scans"),
        (other_point, "choice follows from points and scans"),
        (other_record, "choice follows from points and scans"),
        (other_state, "state digest"),
        (other_state, "state follows from the choice"),
        (other_state, "subnetworks of all tasks so far"),
        (other_units, "state follows from the choice"),
        (other_accuracy, "test accuracy in the latest state"),
        (other_summary, "summary follows from the results"),
    ],
)
def test_what_does_not_follow_is_found(copy: RunFolder, change: Callable[[RunFolder], None], check: str) -> None:
    change(copy)
    assert check in names(copy)


def test_a_run_that_was_killed_before_its_summary_passes(copy: RunFolder) -> None:
    results = copy.read_results()[:1]
    copy.write_summary(summarise("whole", "running", 0, results[-1].state_digest, results))
    assert failed(copy) == []
