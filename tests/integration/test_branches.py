"""Runs that share work with others, as commands: real Ray, real files."""

from __future__ import annotations

import csv
import os
import signal
from pathlib import Path

import pytest
from command_line import Cli, descendants, wait_until
from mlflow import MlflowClient
from servers import free_port

from clnp_search.branching import points_taken_over
from clnp_search.storage import RunFolder

SHORT = ("--set", "scenario.tasks=2", "--set", "training.epochs=3", "--set", "tracking.uri=none")


def test_a_fork_shares_a_task_and_trains_only_what_is_new(cli: Cli, finished: Path) -> None:
    found = cli.json("reselect", "undisturbed", "--task", "1", "--margin", "20%")
    assert [point["point"] for point in found["points"] if point["in_margin"]]
    changes = ("--set", "forgetting.margin=20%", "--set", "search.learning_rate=[0.005,0.02]")
    forked = cli.json("fork", "undisturbed", "--after-task", "0", "--name", "forked", *changes)
    shared, *own = forked["tasks"]
    assert shared["digest"] == cli.json("status", "undisturbed")["tasks"][0]["digest"]
    assert [task["margin"] for task in (shared, *own)] == [0.02, 0.2, 0.2]
    # Of task 1 half of the grid has been trained before; of task 2, after another choice, nothing.
    assert (forked["points_taken_over"], forked["points_trained"]) == (2, 6)
    assert cli.json("verify", "forked")["verified"]
    with (finished.parent / "forked" / "tasks" / "001" / "points.csv").open() as stream:
        assert len(list(csv.DictReader(stream))) == 4
    assert "already" in cli("fork", "undisturbed", "--after-task", "0", "--name", "forked", status=2).stderr


def test_a_fork_that_is_refused_can_be_given_again(cli: Cli, finished: Path) -> None:
    fork = ("fork", "undisturbed", "--after-task", "0", "--name", "put-right", "--set", "tracking.uri=none")
    for _ in range(2):
        assert "no Ray cluster can be reached" in cli(*fork, "--address", f"127.0.0.1:{free_port()}", status=2).stderr
    assert not (finished.parent / "put-right").exists()


def test_several_margins_train_the_first_grid_once(cli: Cli) -> None:
    shown = cli("run", "sweep.yaml", "--name", "family", *SHORT, "--set", "margins=[2%, 20%]").stdout
    assert "family-m20" in shown
    found = cli.json("compare", "family-m2", "family-m20")
    assert [row["margin"] for row in found["spread"]] == [0.02, 0.2]
    first, second = (RunFolder(run["run"]) for run in found["runs"])
    assert (points_taken_over(first), points_taken_over(second)) == ((0, 8), (4, 4))
    assert found["runs"][0]["free_units"] < found["runs"][1]["free_units"]
    assert cli.json("verify", "family-m20")["verified"]


def test_a_margin_that_leaves_no_candidate_keeps_no_other_from_its_end(cli: Cli) -> None:
    # Units that are silent for seven training samples are not so for all that validate.
    few = ("--set", "scenario.tasks=1", "--set", "scenario.validation=1390", "--set", "network.hidden=[64, 64]")
    changes = ("--set", "margins=[0, 40%]", "--set", "search={alpha: 1e-5, learning_rate: 0.02}")
    answer = cli("run", "sweep.yaml", "--name", "harsh", *SHORT, *few, *changes, status=1)
    assert "harsh-m0: no candidate keeps" in answer.stderr
    assert answer.stderr.splitlines()[-1].startswith("harsh-m0 ended early")
    assert cli.json("status", "harsh-m40")["status"] == "complete"


@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")  # MLflow 3.17 on SQLAlchemy 2.1
def test_seeds_run_side_by_side_and_each_ends_as_it_does_alone(cli: Cli, finished: Path) -> None:
    shown = cli.json("run", "sweep.yaml", "--name", "seeds", "--set", "repetitions=2")
    alone = cli.json("status", "undisturbed")
    assert [run["name"] for run in shown["runs"]] == ["seeds-s0", "seeds-s1"]
    assert shown["runs"][0]["state_digest"] == alone["state_digest"] != shown["runs"][1]["state_digest"]
    accuracies = [run["average_test_accuracy"] for run in shown["runs"]]
    client = MlflowClient(f"sqlite:///{cli.folder}/mlflow.db")
    experiment = client.get_experiment_by_name("sweep")
    assert experiment is not None
    [family] = client.search_runs([experiment.experiment_id], "tags.`clnp.level` = 'family'")
    assert family.data.metrics["test/average_accuracy"] == pytest.approx(sum(accuracies) / 2)
    sequences = client.search_runs([experiment.experiment_id], "tags.`clnp.level` = 'sequence'")
    ended = {run.info.run_name: run.info.status for run in sequences}
    assert ended["seeds-s0"] == ended["seeds-s1"] == "FINISHED"


def test_seeds_end_with_the_command_that_runs_them_whichever_signal_ends_it(cli: Cli) -> None:
    long = ["--set", "repetitions=2", "--set", "training.epochs=100000"]
    process = cli.start("run", "sweep.yaml", "--name", "ended", *long, "--tracking-uri", "none")
    leases = [cli.folder / "runs" / f"ended-s{seed}" / "lease.json" for seed in range(2)]
    assert wait_until(lambda: all(lease.exists() for lease in leases), process)
    seeds = [pid for pid, command in descendants(process.pid).items() if " run " in command]
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 3, errors
    assert errors.splitlines()[-1].startswith("interrupted; every finished point is kept")
    assert len(seeds) == 2
    assert not any(os.path.exists(f"/proc/{pid}") for pid in seeds)
    assert not any(lease.exists() for lease in leases)
