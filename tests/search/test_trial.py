"""What a worker does with a pack: records, checkpoints, damage, and too little memory. In this process, without Ray."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import make_inputs

from clnp_search.clnp.pack import Features, Pack
from clnp_search.clnp.scan import Candidate
from clnp_search.clnp.state import State
from clnp_search.records import PointRecord
from clnp_search.search import cluster, trial
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


def test_points_that_are_packed_apart_from_finished_ones_go_on_from_their_own_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make_inputs(tmp_path)
    run_all(inputs)
    for record in records(inputs)[1:]:
        RunFolder(inputs.run.folder).delete_point(0, record)
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("points/*")}
    interrupt(inputs, monkeypatch, 3)
    assert len(list(trial.run_pack(inputs, inputs.plan.points))) == 1  # of four epochs, the last
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert [record.notes for record in records(inputs)[1:]] == [("packed apart from 1 points that were finished",)] * 3
    assert not list(tmp_path.rglob("packs/*"))


def test_what_is_packed_apart_from_taken_over_points_stays_so_while_its_records_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make_inputs(tmp_path)
    run_all(inputs)
    folder, (first, *rest) = RunFolder(inputs.run.folder), records(inputs)
    parameters = folder.read_trained(0, first)
    for record in (first, *rest):
        folder.delete_point(0, record)
    folder.write_point(0, replace(first, origin="elsewhere"), parameters)
    interrupt(inputs, monkeypatch, 4)  # the other three are trained, and no record of them is written
    folder.write_point(0, rest[0], parameters)  # but for one
    assert list(trial.run_pack(inputs, inputs.plan.points)) == []  # no epoch is run
    assert len(records(inputs)) == 4
    assert not list(tmp_path.rglob("packs/*"))


def with_pack(monkeypatch: pytest.MonkeyPatch, before: Callable[[list[tuple[float, ...]]], object]) -> None:
    """Has something done with the alphas of each pack before it is made."""

    class OtherPack(Pack):
        def __init__(self, state: State, num_classes: int, alphas: list[tuple[float, ...]], *rest: Any) -> None:
            before(alphas)
            super().__init__(state, num_classes, alphas, *rest)

    monkeypatch.setattr(trial, "Pack", OtherPack)


def test_a_fault_of_one_point_is_its_own_and_the_others_are_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make_inputs(tmp_path, alphas=4)
    wrong = inputs.plan.points[2].alpha
    with_pack(monkeypatch, lambda alphas: 1 / (wrong not in alphas))
    run_all(inputs)
    failed = [record for record in records(inputs) if record.status == "failed"]
    assert [record.point.alpha for record in failed] == [wrong, wrong]
    assert {record.reason for record in failed} == {"ZeroDivisionError: division by zero"}
    assert len(records(inputs)) == 8


def test_a_fault_of_a_point_is_not_believed_where_the_process_may_be_to_blame(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make_inputs(tmp_path)
    with_pack(monkeypatch, lambda alphas: 1 / 0)
    with pytest.raises(trial.PointFault, match="ZeroDivisionError"):
        list(trial.run_pack(inputs, inputs.plan.points, believed=False))
    with_pack(monkeypatch, lambda alphas: torch.empty(2**45) if len(alphas) > 2 else 1 / 0)
    with pytest.raises(trial.PointFault, match="ZeroDivisionError"):
        list(trial.run_pack(inputs, inputs.plan.points))
    assert records(inputs) == []


def test_a_pack_that_runs_out_of_memory_is_split_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_pack(monkeypatch, lambda alphas: torch.empty(2**45 if len(alphas) > 2 else 1))
    inputs = make_inputs(tmp_path)
    run_all(inputs)
    assert [record.status for record in records(inputs)] == ["done"] * 4
    assert all("4 points ran out of memory and was split" in record.notes[0] for record in records(inputs))


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "GET was unable to find an engine to execute this computation",
    ],
)
def test_memory_that_a_library_lacks_splits_a_pack_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    def out_of_memory(alphas: list[tuple[float, ...]]) -> None:
        if len(alphas) > 2:
            raise RuntimeError(words)

    with_pack(monkeypatch, out_of_memory)
    inputs = make_inputs(tmp_path)
    run_all(inputs)
    assert all("4 points ran out of memory and was split" in record.notes[0] for record in records(inputs))


def test_a_trial_keeps_frozen_outputs_as_its_plan_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed, initialise = set(), Features.__init__

    def seen(self: Features, *arguments: Any, **options: Any) -> None:
        allowed.add(arguments[3])
        initialise(self, *arguments, **options)

    monkeypatch.setattr(Features, "__init__", seen)
    inputs = make_inputs(tmp_path)
    inputs = replace(inputs, plan=replace(inputs.plan, cache_bytes=1234))
    run_all(inputs)
    trial.scan_point(inputs, inputs.plan.points[0], 0, "global")
    assert allowed == {1234}


def test_a_scan_says_now_and_then_how_many_models_it_has_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(tmp_path)
    run_all(inputs)
    point, limit = inputs.plan.points[0], len(inputs.data().validation) + 1  # which no model reaches
    monkeypatch.setattr(cluster, "SCAN_REPORT_S", 0.0)
    begun: list[Candidate] = []
    expected = trial.scan_point(inputs, point, limit, "global", begun.append)
    assert 0 < begun[0].tried <= sum(inputs.state.graph.groups.values())
    *models, found = cluster._scan_task(inputs.run, (inputs.plan, inputs.state, None), point, limit, "global")
    assert found == replace(expected, seconds=found.seconds)
    assert models == sorted(models)
    assert set(models) <= set(range(begun[0].tried + 1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_trial_that_needs_more_than_its_share_of_a_gpu_is_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, share = make_inputs(tmp_path), 0.01
    present = torch.cuda.get_device_properties(0).total_memory
    with_pack(monkeypatch, lambda alphas: torch.empty(present // 50 if len(alphas) > 2 else 1, device="cuda").byte())
    plan = replace(inputs.plan, environment=replace(inputs.plan.environment, device="cuda"))
    try:
        run_all(replace(inputs, plan=plan, run=replace(inputs.run, gpu=share)))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert all("4 points ran out of memory and was split" in record.notes[0] for record in records(inputs))


def no_memory(alphas: object) -> object:
    return torch.empty(2**45)


def no_space(alphas: object) -> object:
    return Path("/dev/full").write_text("full")


@pytest.mark.parametrize("fault", [no_memory, no_space])
def test_a_fault_of_the_machine_is_no_result_of_a_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[[object], object]
) -> None:
    inputs = make_inputs(tmp_path)
    with_pack(monkeypatch, fault)
    with pytest.raises((RuntimeError, OSError)):
        run_all(inputs)
    assert records(inputs) == []


def test_a_gpu_that_is_not_there_is_no_result_of_a_point(tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path)
    plan = replace(inputs.plan, environment=replace(inputs.plan.environment, device="cuda:99"))
    with pytest.raises((RuntimeError, AssertionError)):
        run_all(replace(inputs, plan=plan))
    assert records(inputs) == []
