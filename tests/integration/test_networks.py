"""Whole runs of every kind of network: fine-tuned and widened, convolutional on image files, a module of one's own."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import Cli, kill_everything, wait_until
from PIL import Image

from clnp_search.config import sweep_of
from clnp_search.storage import RunFolder

UNTRACKED = ("--tracking-uri", "none")

ROUNDS = """
scenario: {name: permuted_digits, tasks: 3}
network: {hidden: [16, 4]}
training: {epochs: 8, batch_size: 64}
search: {alpha: [1e-4, 1e-3], learning_rate: 0.02}
forgetting: {margin: 4%, finetune_rounds: 2, finetune_epochs: 3}
capacity: {on_depletion: expand, expand_by: 50%}
"""

IMAGES = """
scenario: {name: class_folders, root: ROOT, classes: [[across, along], [left, right]]}
training: {epochs: 6, batch_size: 32}
search: {alpha: [1e-4, 1e-3], learning_rate: 0.01}
forgetting: {margin: 5%}
"""

CONV = "network: {name: conv, layers: [6, pool, 8], dense: [8]}\nhead: {kind: multi}\n"

OWN = 'network: {module: "small_net:SmallNet", arguments: {width: 6}}\n'

MODULE = """
import torch
from torch import nn

class SmallNet(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.block = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classify = nn.Linear(width, 2)

    def forward(self, images):
        maps = torch.relu(self.norm(self.stem(images)))
        maps = torch.relu(maps + self.block(maps))
        return self.classify(torch.flatten(self.pool(maps), 1))
"""


def draw_images(root: Path) -> None:
    """Class folders of small colour images: stripes across or along, and a half of them brighter, left or right."""
    random = np.random.default_rng(0)
    for split, count in (("train", 60), ("test", 20)):
        for name in ("across", "along", "left", "right"):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 120, (12, 12, 3))
                first = int(random.integers(3))
                bright = {
                    "across": np.s_[first::3],
                    "along": np.s_[:, first::3],
                    "left": np.s_[:, : 5 + first],
                    "right": np.s_[:, 5 + first :],
                }
                pixels[bright[name]] += 100
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{number}.png")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Cli:
    """A folder with sweeps, images, and a module beside the sweep that names it."""
    folder = tmp_path_factory.mktemp("networks")
    draw_images(folder / "images")
    images = IMAGES.replace("ROOT", str(folder / "images"))
    (folder / "own").mkdir()
    (folder / "own" / "small_net.py").write_text(MODULE)
    (folder / "own" / "own.yaml").write_text(images + OWN)
    (folder / "conv.yaml").write_text(images + CONV)
    (folder / "rounds.yaml").write_text(ROUNDS)
    return Cli(folder)


@pytest.fixture(scope="module")
def rounds(work: Cli) -> dict[str, Any]:
    """The summary of a run with fine-tune rounds, whose second hidden layer is full after every task."""
    return work.json("run", "rounds.yaml", *UNTRACKED)  # type: ignore[no-any-return]


def test_onnx_gives_the_stated_accuracy_after_every_kind_of_run(work: Cli, rounds: dict[str, Any]) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    summaries = {"rounds": rounds}
    for sweep in ("conv.yaml", "own/own.yaml"):
        summary = work.json("run", sweep, *UNTRACKED)
        summaries[summary["name"]] = summary
    for name, summary in summaries.items():
        assert (summary["status"], summary["max_forgetting"]) == ("complete", 0.0)
        assert work.json("verify", name)["verified"] is True
        scenario = sweep_of(RunFolder(str(work.folder / "runs" / name))).load_scenario()
        work("export", name, "--task", "0", "--out", "task.onnx")
        session = onnxruntime.InferenceSession(str(work.folder / "task.onnx"))
        test = scenario.data(0).test
        [logits] = session.run(None, {session.get_inputs()[0].name: test.inputs.numpy().astype(np.float32)})
        found = np.mean(logits.argmax(1) == test.labels.numpy())
        assert found == pytest.approx(summary["tasks"][0]["test_accuracies"][0], abs=1e-9)
        assert found > 0.8


def test_a_full_group_is_wider_in_the_next_task(rounds: dict[str, Any]) -> None:
    before = None
    for task in rounds["tasks"]:
        units = task["units"]["hidden1"]
        if before is not None:
            assert units["total"] == (round(before["total"] * 1.5) if before["free"] == 0 else before["total"])
        before = units
    assert rounds["tasks"][1]["units"]["hidden1"]["total"] == 6
    assert rounds["tasks"][2]["units"]["hidden0"]["total"] == 16
    assert len({task["test_accuracies"][0] for task in rounds["tasks"]}) == 1


def test_each_round_stands_in_the_table_of_points(work: Cli, rounds: dict[str, Any]) -> None:
    for task in rounds["tasks"]:
        with (work.folder / "runs" / "rounds" / "tasks" / f"{task['index']:03d}" / "points.csv").open() as stream:
            [row] = [row for row in csv.DictReader(stream) if row["selected"] == "True"]
        steps = json.loads(row["rounds"])
        assert len(steps) == 3  # before the first round, and after each
        assert steps[-1]["val_accuracy"] == float(row["pruned_val_accuracy"])
        assert steps[-1]["theta"] == steps[-2]["theta"] == json.loads(row["theta"])
        assert steps[-1]["val_accuracy"] >= float(task["best_val_accuracy"]) - task["margin"] - 1e-9


def test_a_run_that_is_killed_within_a_round_resumes_to_the_same_digest(work: Cli, rounds: dict[str, Any]) -> None:
    process = work.start("run", "rounds.yaml", "--name", "killed", *UNTRACKED)
    points = work.folder / "runs" / "killed" / "tasks" / "000" / "points"
    assert wait_until(lambda: any(points.glob("*-round1.json")), process)
    kill_everything(process)
    process.communicate()
    assert not (work.folder / "runs" / "killed" / "tasks" / "002").exists()
    assert work.json("resume", "killed", *UNTRACKED)["state_digest"] == rounds["state_digest"]
