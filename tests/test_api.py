"""Runs from Python: tables, networks, exports, and what is refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import make_sweep, write_run

import clnp_search
from clnp_search.errors import Damaged
from clnp_search.storage import RunFolder


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A complete run of two tasks, by hand."""
    folder = RunFolder(str(tmp_path / "runs" / "done"))
    list(write_run(folder, make_sweep(name="done")))
    return folder


@pytest.fixture
def run(folder: RunFolder) -> clnp_search.Run:
    """The same, loaded."""
    return clnp_search.load(folder.uri)


def test_a_run_says_what_it_is(run: clnp_search.Run, folder: RunFolder) -> None:
    assert (run.name, run.uri, run.status, run.sweep.name) == ("done", folder.uri, "complete", "done")
    assert run.summary == folder.read_summary()
    assert repr(run) == f"<Run done: complete, 2 of 2 tasks, {folder.uri}>"


def test_a_run_is_found_by_its_name(folder: RunFolder) -> None:
    assert clnp_search.load("done", folder.uri.removesuffix("/done")).uri == folder.uri
    with pytest.raises(clnp_search.InputError, match="absent: no run of that name"):
        clnp_search.load("absent")


def test_tasks_are_a_table_with_choices_accuracies_and_units(run: clnp_search.Run) -> None:
    assert list(run.tasks.index) == [0, 1]
    first, results = run.tasks.loc[0], run.summary.tasks
    assert first["alpha"] == results[0].selected.alpha
    assert first["hidden0.free"] == results[0].units["hidden0"].free
    assert list(run.tasks["test_accuracy_now"]) == list(results[1].test_accuracies)


def test_accuracies_are_the_lower_triangle(run: clnp_search.Run) -> None:
    assert run.accuracies.isna().to_numpy().tolist() == [[False, True], [False, False]]
    assert run.accuracies.loc[1, 0] == 0.9


def test_points_are_a_table_with_what_became_of_them(run: clnp_search.Run) -> None:
    assert run.points.shape[0] == 8
    failed, chosen = run.points.loc[(0, "p003")], run.points[run.points["selected"]]
    assert (failed["status"], failed["reason"]) == ("failed", "diverged")
    assert failed["val_accuracy"] != failed["val_accuracy"]
    assert list(chosen.index) == [(0, "p002"), (1, "p002")]
    assert chosen["theta"].iloc[0] == (0.6, 0.6)
    assert run.points.loc[(0, "p000"), "theta"] is None


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"a,b", "columns expected but not found: ["), (b"\xff", "'utf-8' codec"), (b'"', "EOF inside string")],
)
def test_a_table_that_is_damaged_is_named(folder: RunFolder, data: bytes, reason: str) -> None:
    folder.write("tasks/001/points.csv", data)
    with pytest.raises(Damaged, match=rf"tasks/001/points\.csv: damaged, or changed by hand: .*{re.escape(reason)}"):
        _ = clnp_search.load(folder.uri).points


def test_epochs_are_a_table(run: clnp_search.Run) -> None:
    assert run.epochs.loc[(1, "p000", 2), "val_accuracy"] == 0.7
    assert len(run.epochs) == 2 * (3 * 3 + 1)


def test_curves_are_one_table(run: clnp_search.Run) -> None:
    assert set(run.curves.columns) == {"theta", "val_accuracy", "hidden0", "hidden1"}
    assert run.curves.loc[(0, "p001", "")]["theta"].tolist() == [1.5, 0.6, 0.0]


def test_a_curve_without_a_step_has_no_row(folder: RunFolder) -> None:
    folder.write_curve(0, "p001", [], ["hidden0", "hidden1"])
    curves = clnp_search.load(folder.uri).curves
    assert (0, "p001") not in curves.index.droplevel("raised")
    assert (0, "p002") in curves.index.droplevel("raised")


def test_a_run_without_a_task_has_empty_tables(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "begun"))
    next(write_run(folder, make_sweep()))
    run = clnp_search.load(folder.uri)
    assert run.status == "interrupted"
    assert [len(table) for table in (run.tasks, run.points, run.epochs, run.curves)] == [0, 0, 0, 0]
    with pytest.raises(clnp_search.InputError, match="task 0 is not committed; allowed: none yet"):
        run.subnetwork(0)


def test_a_task_that_is_not_committed_yet_shows_its_points(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "cut"))
    for step in write_run(folder, make_sweep()):
        if step == "trained 1 p001":
            break
    points = clnp_search.load(folder.uri).points
    assert list(points.loc[1].index) == ["p000", "p001"]
    assert points.loc[1]["selected"].isna().all()


def test_a_subnetwork_is_a_module(run: clnp_search.Run) -> None:
    network = run.subnetwork(1)
    assert isinstance(network, torch.nn.Module)
    assert network.digest == run.tasks.loc[1, "digest"]
    assert network(torch.zeros(5, 3)).shape == (5, 2)
    with pytest.raises(clnp_search.InputError, match="task 2 is not committed; allowed: 0 to 1"):
        run.subnetwork(2)
    with pytest.raises(clnp_search.InputError, match="task 'a' is not committed; allowed: 0 to 1"):
        run.subnetwork("a")  # type: ignore[arg-type]


@pytest.mark.parametrize("suffix", [".pt2", ".ONNX"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_an_export_gives_the_networks_own_logits(run: clnp_search.Run, tmp_path: Path, suffix: str) -> None:
    if suffix == ".ONNX":
        pytest.importorskip("onnxruntime")
    network, raw = run.subnetwork(0), torch.rand(7, 3)
    path = tmp_path / f"task{suffix}"
    path.write_bytes(network.to_bytes(suffix.lower()))
    exported = clnp_search.load_export(path)
    torch.testing.assert_close(exported(raw), network(raw))
    assert exported(raw[:0]).shape == network(raw[:0]).shape == (0, 2)


def test_an_export_that_holds_no_program_is_refused(tmp_path: Path) -> None:
    (tmp_path / "task.safetensors").write_bytes(b"")
    with pytest.raises(clnp_search.InputError, match="hold its tensors alone"):
        clnp_search.load_export(tmp_path / "task.safetensors")
    with pytest.raises(clnp_search.InputError, match="no such file"):
        clnp_search.load_export(tmp_path / "absent.pt2")


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_an_export_that_is_damaged_is_refused(tmp_path: Path, suffix: str) -> None:
    if suffix == ".onnx":
        pytest.importorskip("onnxruntime")
    path = tmp_path / f"task{suffix}"
    path.write_bytes(b"damaged")
    with pytest.raises(clnp_search.InputError, match=f"{path.name}: cannot be read: "):
        clnp_search.load_export(path)


def test_a_sweep_that_cannot_be_run_is_refused_before_anything_starts(tmp_path: Path, folder: RunFolder) -> None:
    with pytest.raises(clnp_search.InputError, match="network: missing"):
        clnp_search.run({"scenario": {"name": "permuted_digits"}}, storage=str(tmp_path / "new"))
    with pytest.raises(clnp_search.InputError, match="seed: 1 here, 0 there"):
        clnp_search.run(make_sweep(name="done", seed=1), storage=folder.uri.removesuffix("/done"))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("sweep", [3, None, []])
def test_what_is_no_sweep_is_refused(sweep: Any) -> None:
    with pytest.raises(
        clnp_search.InputError, match="allowed: a sweep file's path, the same as plain data, or a Sweep"
    ):
        clnp_search.run(sweep)


def test_the_packages_names_are_those_it_documents() -> None:
    assert set(clnp_search.__all__) <= set(dir(clnp_search))
    assert all(getattr(clnp_search, name) for name in clnp_search.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        clnp_search.nothing  # noqa: B018


def test_a_table_needs_no_torch(folder: RunFolder) -> None:
    code = (
        "import sys, json, clnp_search\n"
        f"tasks = clnp_search.load({folder.uri!r}).tasks\n"
        "print(json.dumps([len(tasks), *sorted({'torch', 'ray', 'mlflow'} & set(sys.modules))]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [2]
