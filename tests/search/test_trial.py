"""What a worker does with a pack: records, checkpoints, damage, and too little memory. In this process, without Ray."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import make_inputs

from clnp_search.clnp.pack import Pack
from clnp_search.clnp.state import State
from clnp_search.records import PointRecord
from clnp_search.search import trial
from clnp_search.search.points import pack_name
from clnp_search.storage import RunFolder


def records(inputs: trial.TaskInputs) -> list[PointRecord]:
    folder = RunFolder(inputs.run.folder)
    found = [folder.read_point(0, point.name) for point in inputs.plan.points]
    return [record for record in found if record is not None]


def trained_bytes(inputs: trial.TaskInputs) -> list[bytes]:
    return [
        (Path(inputs.run.folder) / f"tasks/000/points/{point.name}.safetensors").read_bytes()
        for point in inputs.plan.points
    ]


def run_all(inputs: trial.TaskInputs) -> None:
    for _ in trial.run_pack(inputs, inputs.plan.points):
        pass


def interrupt(inputs: trial.TaskInputs, monkeypatch: pytest.MonkeyPatch, epochs: int) -> str:
    """Stops a pack after some epochs, each of which left a checkpoint; gives the checkpoint's name."""
    monkeypatch.setattr(trial, "CHECKPOINT_EVERY_S", 0.0)
    monkeypatch.setattr(trial, "REPORT_EVERY_S", 0.0)
    running = trial.run_pack(inputs, inputs.plan.points)
    for _ in range(epochs):
        next(running)
    running.close()  # type: ignore[attr-defined]
    return pack_name(inputs.plan.keys)


def test_a_pack_gives_every_point_a_record_and_leaves_no_checkpoint(tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path)
    run_all(inputs)
    assert [record.status for record in records(inputs)] == ["done"] * 4
    assert [record.key for record in records(inputs)] == list(inputs.plan.keys)
    assert not list(tmp_path.rglob("packs/*"))


def test_a_pack_goes_on_from_its_checkpoint_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed, disturbed = make_inputs(tmp_path / "a"), make_inputs(tmp_path / "b")
    run_all(undisturbed)
    interrupt(disturbed, monkeypatch, 2)
    assert records(disturbed) == []
    run_all(disturbed)
    assert trained_bytes(disturbed) == trained_bytes(undisturbed)
    assert [record.epochs for record in records(disturbed)] == [record.epochs for record in records(undisturbed)]


def test_a_pack_that_ended_before_all_records_were_written_trains_nothing_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make_inputs(tmp_path)
    interrupt(inputs, monkeypatch, 4)  # the last epoch's checkpoint stands, no record does
    running = trial.run_pack(inputs, inputs.plan.points)
    assert list(running) == []  # no epoch is run
    assert len(records(inputs)) == 4


def test_a_damaged_checkpoint_means_training_from_the_start_and_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed, damaged = make_inputs(tmp_path / "a"), make_inputs(tmp_path / "b")
    run_all(undisturbed)
    name = interrupt(damaged, monkeypatch, 2)
    RunFolder(damaged.run.folder).write_checkpoint(0, name, b"damaged")
    run_all(damaged)
    assert trained_bytes(damaged) == trained_bytes(undisturbed)
    assert all("damaged" in record.notes[0] for record in records(damaged))


def test_finished_points_are_not_written_again(tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path)
    run_all(inputs)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("points/*")}
    run_all(inputs)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("points/*")} == before


def test_an_error_in_training_is_recorded_with_its_reason(tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path)
    broken = replace(inputs, run=replace(inputs.run, scenario=replace(inputs.run.scenario, validation=10**6)))
    run_all(broken)
    assert {record.status for record in records(broken)} == {"failed"}
    assert "scenario.validation" in records(broken)[0].reason


@pytest.mark.parametrize(("fitting", "status"), [(2, "done"), (0, "failed")])
def test_a_pack_that_runs_out_of_memory_is_split_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fitting: int, status: str
) -> None:
    class LargePack(Pack):
        """A pack that asks for more memory than there is, really, when it has more points than fit."""

        def __init__(self, state: State, num_classes: int, alphas: list[tuple[float, ...]], *rest: Any) -> None:
            if len(alphas) > fitting:
                torch.empty(2**45)
            super().__init__(state, num_classes, alphas, *rest)

    monkeypatch.setattr(trial, "Pack", LargePack)
    inputs = make_inputs(tmp_path)
    run_all(inputs)
    assert [record.status for record in records(inputs)] == [status] * 4
    if status == "done":
        assert all("4 points ran out of memory and was split" in record.notes[0] for record in records(inputs))
    else:
        assert all("memory" in record.reason for record in records(inputs))
