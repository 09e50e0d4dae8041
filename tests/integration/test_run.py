"""The main path: from a sweep file to chosen, pruned, exported models, and what the run folder says about them."""

from __future__ import annotations

import csv
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import torch
from command_line import Cli

import clnp_search
from clnp_search.tasks.data import load_digits


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open() as stream:
        return list(csv.DictReader(stream))


def summary_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())  # type: ignore[no-any-return]


def test_summary_holds_what_the_contract_promises(finished: Path) -> None:
    summary = summary_of(finished)
    assert (summary["schema"], summary["name"], summary["status"], summary["seed"]) == (1, "undisturbed", "complete", 0)
    assert len(summary["state_digest"]) == 64
    task = summary["tasks"][1]
    assert {"index", "name", "best_val_accuracy", "margin", "selected", "test_accuracy", "test_accuracies"} <= set(task)
    assert {"units", "points", "digest", "seconds"} <= set(task)
    assert {"point", "alpha", "learning_rate", "theta", "val_accuracy", "unit_sparsity"} == set(task["selected"])
    assert len(task["selected"]["alpha"]) == 3
    assert set(task["units"]["hidden0"]) == {"total", "active", "new", "free"}


def test_forgetting_is_exactly_zero(finished: Path) -> None:
    summary = summary_of(finished)
    assert summary["max_forgetting"] == 0.0
    first = [task["test_accuracies"][0] for task in summary["tasks"]]
    assert len(first) == 3
    assert len(set(first)) == 1


def test_an_independent_reader_can_redo_every_choice(finished: Path) -> None:
    for task in summary_of(finished)["tasks"]:
        folder = finished / "tasks" / f"{task['index']:03d}"
        rows = read_csv(folder / "points.csv")
        assert len(rows) == task["points"] == 4
        total = 300
        allowed = math.floor(task["margin"] * total + 1e-9)
        limit = max(round(float(row["val_accuracy"]) * total) for row in rows) - allowed
        best: tuple[float, ...] | None = None
        winner = ""
        for index, row in enumerate(rows):
            inside = round(float(row["val_accuracy"]) * total) >= limit
            assert (row["in_margin"] == "True") == inside
            if not inside:
                continue
            curve = read_csv(folder / "curves" / f"{row['point']}.csv")
            thetas = [float(step["theta"]) for step in curve]
            assert thetas == sorted(thetas, reverse=True)
            passing = [step for step in curve if round(float(step["val_accuracy"]) * total) >= limit]
            theta = json.loads(row["theta"])[0]
            assert float(passing[0]["theta"]) == theta  # no higher theta on the curve passes
            active = sum(int(passing[0][layer]) for layer in ("hidden0", "hidden1"))
            assert float(row["unit_sparsity"]) == pytest.approx(1 - active / 80)
            rank = (
                active,
                -round(float(row["pruned_val_accuracy"]) * total),
                sum(json.loads(row["alpha"])),
                float(row["learning_rate"]),
                index,
            )
            if best is None or rank < best:
                best, winner = rank, row["point"]
        assert winner == task["selected"]["point"]
        assert [row["point"] for row in rows if row["selected"] == "True"] == [winner]


def test_exported_onnx_on_raw_images_gives_the_stated_accuracy(cli: Cli, finished: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    raw = load_digits(Path())
    for task in summary_of(finished)["tasks"]:
        index = task["index"]
        cli("export", str(finished), "--task", str(index), "--out", f"task{index}.onnx")
        session = onnxruntime.InferenceSession(str(cli.folder / f"task{index}.onnx"))
        name = session.get_inputs()[0].name
        logits = session.run(None, {name: raw.test_inputs.astype(np.float32)})[0]
        assert np.mean(logits.argmax(1) == raw.test_labels) == pytest.approx(task["test_accuracies"][-1], abs=1e-9)


def test_exports_hold_the_subnetwork_alone(cli: Cli, finished: Path) -> None:
    answer = cli.json("export", str(finished), "--task", "1", "--out", "task1.safetensors")
    tensors = safetensors.numpy.load_file(cli.folder / "task1.safetensors")
    units = summary_of(finished)["tasks"][1]["units"]
    assert tensors["network.hidden0.weight"].shape == (units["hidden0"]["active"], 64, 1)
    # A single head reads its own units alone.
    assert tensors["network.hidden1.weight"].shape[0] == units["hidden1"]["new"]
    assert answer["digest"] == summary_of(finished)["tasks"][1]["digest"]
    cli("export", str(finished), "--task", "1", "--out", "task1.pt2")
    assert (cli.folder / "task1.pt2").stat().st_size > 0
    cli("export", str(finished), "--task", "1", "--out", "task1.bin", status=2)
    cli("export", str(finished), "--task", "7", "--out", "task7.onnx", status=2)
    assert not (cli.folder / "task7.onnx").exists()


def test_evaluate_and_status_agree_with_the_summary(cli: Cli, finished: Path) -> None:
    summary = summary_of(finished)
    assert cli.json("evaluate", str(finished), "--task", "0")["accuracy"] == summary["tasks"][0]["test_accuracy"]
    status = cli.json("status", "undisturbed")
    assert status["status"] == "complete"
    assert status["state_digest"] == summary["state_digest"]


def test_verify_passes_and_finds_one_flipped_bit(cli: Cli, finished: Path) -> None:
    assert cli.json("verify", str(finished))["verified"] is True
    for task, name in ((2, "hidden0/weight"), (0, "hidden1/weight"), (2, "heads/weight")):
        copy = cli.folder / "flipped"
        shutil.copytree(finished, copy)
        path = copy / "tasks" / f"{task:03d}" / "state.safetensors"
        data = bytearray(path.read_bytes())
        header_length = int.from_bytes(data[:8], "little")
        start, stop = json.loads(data[8 : 8 + header_length])[name]["data_offsets"]
        weights = np.frombuffer(data, np.float32, (stop - start) // 4, 8 + header_length + start)
        position = 8 + header_length + start + 4 * int(np.flatnonzero(weights)[0])
        del weights
        data[position] ^= 1
        path.write_bytes(data)
        found = cli.json("verify", str(copy), status=4)
        assert not found["verified"]
        shutil.rmtree(copy)


def test_a_finished_run_trains_nothing_again(cli: Cli, finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.glob("tasks/*/points/*")}
    assert len(before) == 24
    answer = cli("run", "sweep.yaml", "--name", "undisturbed", "--address", "127.0.0.1:1")  # where no cluster is
    assert "undisturbed: complete" in answer.stdout
    assert "nothing is left to train" in answer.stderr
    assert {path: path.stat().st_mtime_ns for path in finished.glob("tasks/*/points/*")} == before


def test_a_finished_run_can_be_given_more_tasks(cli: Cli, finished: Path) -> None:
    longer = cli.folder / "runs" / "longer"
    shutil.copytree(finished, longer)
    (longer / "mlflow.json").unlink()
    before = {path: path.stat().st_mtime_ns for path in longer.glob("tasks/*/*.*")}
    summary = cli.json("run", "sweep.yaml", "--name", "longer", "--set", "scenario.tasks=4", "--tracking-uri", "none")
    assert (summary["status"], len(summary["tasks"])) == ("complete", 4)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert cli.json("status", "longer")["num_tasks"] == 4
    assert cli.json("verify", "longer")["verified"] is True
    answer = cli("run", "sweep.yaml", "--name", "longer", status=2)
    assert "scenario.tasks: 3 here, 4 there (a run can be given more tasks, not fewer)" in answer.stderr


def test_a_run_whose_sweep_was_changed_by_hand_is_refused_before_ray_starts(cli: Cli, finished: Path) -> None:
    changed = cli.folder / "runs" / "changed"
    shutil.copytree(finished, changed)
    path = changed / "sweep.yaml"
    text = path.read_text()
    path.write_text(text.replace("margin: 0.02", "margin: 0.01"))
    answer = cli("resume", "changed", status=2)
    assert "sweep.yaml was changed since task 0 was planned: forgetting.margin 0.02 -> 0.01" in answer.stderr
    path.unlink()
    answer = cli("run", "sweep.yaml", "--name", "changed", "--set", "search.learning_rate=[0.01]", status=2)
    assert "search.learning_rate [0.005, 0.01] -> [0.01]" in answer.stderr
    assert not path.exists()


def test_a_changed_weight_is_neither_evaluated_nor_exported(cli: Cli, finished: Path) -> None:
    tripled = cli.folder / "runs" / "tripled"
    shutil.copytree(finished, tripled)
    path = tripled / "tasks" / "002" / "state.safetensors"
    with safetensors.safe_open(path, "np") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    safetensors.numpy.save_file(tensors | {"hidden0/weight": 3 * tensors["hidden0/weight"]}, path, metadata)
    for command in (["evaluate", "tripled"], ["export", "tripled", "--out", "tripled.onnx"]):
        answer = cli(*command, "--task", "0", status=1)
        assert "tasks/002/state.safetensors: damaged, or not the file" in answer.stderr
    assert not (cli.folder / "tripled.onnx").exists()
    assert cli.json("verify", "tripled", status=4)["verified"] is False


def test_a_run_of_the_same_name_with_other_settings_is_refused(cli: Cli, finished: Path) -> None:
    answer = cli("run", "sweep.yaml", "--name", "undisturbed", "--set", "training.epochs=13", status=2)
    assert "training.epochs: 13 here, 12 there" in answer.stderr


def test_every_fault_of_a_sweep_is_named_and_nothing_is_written(cli: Cli) -> None:
    (cli.folder / "bad.yaml").write_text("scenario: {name: permuted_digit}\nnetwork: {hiden: [3]}\nseed: -1\n")
    answer = cli("run", "bad.yaml", status=2)
    for fault in ("scenario.name", "'permuted_digits'", "network.hidden: missing", "did you mean 'hidden'", "seed"):
        assert fault in answer.stderr
    assert not (cli.folder / "runs" / "bad").exists()
    cli("resume", "nowhere", status=2)


def test_a_refused_run_leaves_nothing(cli: Cli) -> None:
    wrong = ["--set", "scenario.validation=5000", "--storage", "refused", "--tracking-uri", "sqlite:///refused.db"]
    assert "scenario.validation" in cli("run", "sweep.yaml", *wrong, status=2).stderr
    assert not list(cli.folder.glob("refused*"))


def test_with_json_only_the_document_is_on_standard_output() -> None:
    code = """
import os, subprocess
from clnp_search.cli.console import print_json, reserve_output
reserve_output(True)
print("of this process")
os.write(1, b"of a library")
subprocess.run(["echo", "of a child"], check=True)
print_json({"the": "document"})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {"the": "document"}
    assert all(f"of {whom}" in done.stderr for whom in ("this process", "a library", "a child"))


def test_more_than_any_node_has_is_refused_before_training(cli: Cli) -> None:
    for setting in ("resources.cpu=512", "resources.gpu=64"):
        answer = cli("run", "sweep.yaml", "--name", "big", "--set", setting, status=2)
        assert setting.partition("=")[0] in answer.stderr


def test_plan_shows_points_packs_and_memory(cli: Cli) -> None:
    plan = cli.json("plan", "sweep.yaml", "--name", "planned")
    assert plan["points_per_searched_task"] == 4
    assert plan["points_in_all"] == 12
    assert sorted(name for pack in plan["packs"] for name in pack) == ["p000", "p001", "p002", "p003"]
    assert 0 < plan["memory_per_trial_bytes"] < plan["memory_present_per_trial_bytes"]


def test_schema_knows_every_section(cli: Cli) -> None:
    assert "forgetting" in json.loads(cli("schema").stdout)["properties"]


def test_a_diverging_point_is_recorded_and_the_search_goes_on(cli: Cli) -> None:
    settings = ["--set", "training.optimizer=sgd", "--set", "search.learning_rate=[0.05, 1e30]"]
    size = ["--set", "scenario.tasks=1", "--set", "head.kind=multi"]
    summary = cli.json("run", "sweep.yaml", "--name", "diverging", "--tracking-uri", "none", *settings, *size)
    rows = read_csv(cli.folder / "runs" / "diverging" / "tasks" / "000" / "points.csv")
    assert [row["status"] for row in rows] == ["done", "failed", "done", "failed"]
    assert summary["status"] == "complete"


def test_a_run_whose_points_all_diverge_says_what_would_not_end_the_same(cli: Cli) -> None:
    settings = ["--set", "training.optimizer=sgd", "--set", "search.learning_rate=1e30", "--set", "scenario.tasks=1"]
    errors = cli("run", "sweep.yaml", "--name", "lost", "--tracking-uri", "none", *settings, status=1).stderr
    said = "every grid point of this task failed: diverged: a parameter or an activity is not finite"
    *_, reason, advice = errors.splitlines()
    assert reason == said
    assert advice.startswith("`clnp-search resume RUN --retry-failed` trains them again; with other learning rates")
    shown = cli("status", "lost").stdout.splitlines()
    assert said in shown
    assert shown[-1] == "go on with `clnp-search resume lost --retry-failed`"


def test_a_depleted_network_is_reported_and_can_stop_the_sequence(cli: Cli) -> None:
    size = ["--set", "network.hidden=[8, 2]", "--set", "search.alpha=[0]", "--set", "forgetting.margin=0"]
    stop = ["--set", "capacity.on_depletion=stop", "--set", "search.learning_rate=0.01"]
    summary = cli.json("run", "sweep.yaml", "--name", "small", "--tracking-uri", "none", *size, *stop)
    assert summary["status"] == "depleted"
    assert summary["tasks"][-1]["units"]["hidden1"]["free"] == 0
    assert len(summary["tasks"]) < 3


def test_multi_head_searched_once_reuses_the_first_choice(cli: Cli) -> None:
    settings = ["--set", "head.kind=multi", "--set", "search.tasks=first", "--set", "forgetting.theta=per_layer"]
    summary = cli.json(
        "run", "sweep.yaml", "--name", "first", "--tracking-uri", "none", "--set", "scenario.tasks=2", *settings
    )
    first, second = summary["tasks"]
    assert (first["points"], second["points"]) == (4, 1)
    assert second["selected"]["alpha"] == first["selected"]["alpha"]
    curves = cli.folder / "runs" / "first" / "tasks" / "000" / "curves"
    assert (curves / f"{first['selected']['point']}.hidden0.csv").exists()  # of a theta that was raised by itself
    assert cli.json("verify", "first")["verified"] is True


def test_a_run_from_python_is_the_same_run_and_its_tables_are_those_of_its_files(cli: Cli, finished: Path) -> None:
    code = (
        "import json, clnp_search\n"
        "run = clnp_search.run('sweep.yaml', name='python', tracking_uri='http://127.0.0.1:9')\n"
        "print(json.dumps([run.status, run.summary.state_digest, int(run.points.selected.sum())]))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=cli.folder)
    assert json.loads(answer.stdout) == ["complete", summary_of(finished)["state_digest"], 3]
    # A tracking server that is down is said before the first task, and again at the end.
    first, *_, behind, _ = answer.stderr.splitlines()
    assert first.startswith("MLflow: nothing answers at 127.0.0.1:9: ")
    assert behind.startswith("MLflow is behind: ")
    run = clnp_search.load(finished)
    for task in (0, 1, 2):
        rows = read_csv(finished / "tasks" / f"{task:03d}" / "points.csv")
        assert run.points.loc[task, "val_accuracy"].tolist() == [float(row["val_accuracy"]) for row in rows]
        chosen = run.tasks.loc[task, "point"]
        curve = read_csv(finished / "tasks" / f"{task:03d}" / "curves" / f"{chosen}.csv")
        thetas = [float(step["theta"]) for step in curve]
        assert run.curves.loc[(task, chosen, ""), "theta"].tolist() == pytest.approx(thetas, rel=1e-15)
    raw = load_digits(Path())
    samples, labels = torch.from_numpy(raw.test_inputs), torch.from_numpy(raw.test_labels)
    assert run.subnetwork(0).accuracy(samples, labels) == run.accuracies.loc[2, 0]
