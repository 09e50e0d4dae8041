"""What `plan` says of a run before it, beside one that is partly done, and of a network that fits no machine."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
from builders import fill_group, make_sweep, write_run
from command_line import Cli

from clnp_search import planning
from clnp_search.config import Sweep
from clnp_search.storage import RunFolder


def begun(cli: Cli, tasks_done: int, **sections: object) -> Sweep:
    """A run named `sweep` in which some tasks are committed, beside the file that it was made from."""
    sweep = make_sweep(**sections)
    (cli.folder / "sweep.yaml").write_text(sweep.to_yaml())
    steps: Iterator[str] = write_run(RunFolder(str(cli.folder / "runs" / "sweep")), sweep)
    for step in steps:
        if step == f"committed {tasks_done - 1}":
            break
    return sweep


def test_a_run_with_other_settings_is_not_planned_on_and_they_are_named(cli: Cli) -> None:
    begun(cli, 1)
    answer = cli("plan", "sweep.yaml", "--set", "training.epochs=3", "--set", "forgetting.margin=1%", status=2)
    assert "training.epochs: 3 here, 12 there" in answer.stderr
    assert "forgetting.margin: 0.01 here, 0.0005 there" in answer.stderr


def test_the_heading_is_the_runs_own_name(cli: Cli) -> None:
    first = cli("plan", "sweep.yaml", "--name", "other").stdout.splitlines()[0]
    assert first == f"other: 3 tasks of permuted_digits, run folder {cli.folder / 'runs' / 'other'}"


def test_nothing_is_written(cli: Cli) -> None:
    cli("plan", "sweep.yaml")
    assert [path.name for path in cli.folder.iterdir()] == ["sweep.yaml"]


def test_a_network_larger_than_the_machine_is_planned_on_shapes_alone(cli: Cli) -> None:
    size = ["--set", "network.hidden=[200000, 200000]", "--set", "search.alpha=1e-6"]
    plan = cli.json("plan", "sweep.yaml", *size)
    assert plan["memory_per_trial_bytes"] > 4 * 200000**2 > plan["memory_present_per_trial_bytes"]
    assert "present: it does not fit" in cli("plan", "sweep.yaml", *size).stdout
    refused = cli("plan", "sweep.yaml", *size, "--measure", status=2)
    assert refused.stderr.startswith("--measure: a trial needs ")


def test_every_task_has_a_time_that_says_where_it_is_from(cli: Cli) -> None:
    plan = cli.json("plan", "sweep.yaml")
    assert len(plan["seconds_per_task"]) == 3
    assert min(plan["seconds_per_task"]) > 0
    assert plan["seconds_left"] == pytest.approx(sum(plan["seconds_per_task"]))
    assert plan["seconds_from"].startswith("assumed: 75% of this machine's ")


def test_scans_that_are_more_work_than_training_are_said(cli: Cli) -> None:
    deep = ["--set", "network.hidden=[200, 200, 200]", "--set", "training.epochs=1", "--set", "search.alpha=1e-4"]
    said, few = cli("plan", "sweep.yaml", *deep), cli("plan", "sweep.yaml", *deep, "--set", "forgetting.theta_steps=64")
    assert "through 600 thresholds" in said.stderr
    assert "forgetting.theta_steps: 64 tries 64 of them" in said.stderr
    assert "thresholds" not in few.stderr + cli("plan", "sweep.yaml").stderr


def test_a_few_steps_can_be_trained_for_the_time(cli: Cli) -> None:
    plan = cli.json("plan", "sweep.yaml", "--measure", "--set", "search.tasks=first")
    assert plan["seconds_from"].startswith("measured: ")
    first, *later = plan["seconds_per_task"]
    assert all(each < first for each in later)  # one point instead of four


def test_beside_a_task_that_is_done_its_own_time_is_the_pace(cli: Cli) -> None:
    begun(cli, 1)
    plan = cli.json("plan", "sweep.yaml")
    assert (plan["tasks_done"], plan["seconds_done"]) == (1, 60.0)
    assert plan["seconds_from"] == "at the pace of task 0, which took 60 s"
    assert 0 < plan["seconds_left"] < 60  # units are frozen by now


def test_a_task_that_took_its_trials_longer_than_its_last_session_sets_the_pace_by_them(cli: Cli) -> None:
    begun(cli, 1)
    folder = RunFolder(str(cli.folder / "runs" / "sweep"))
    for record in folder.read_points(0):
        folder.write_point(0, replace(record, seconds=1000.0), None)
    all_cores = len(os.sched_getaffinity(0))
    plan = cli.json("plan", "sweep.yaml", "--set", f"resources.cpu={all_cores}")
    seconds = 1000 * len(folder.read_points(0)) + sum(scan.seconds for scan in folder.read_scans(0))
    assert plan["seconds_from"] == f"at the pace of task 0, which took {seconds:.0f} s"


def test_a_pace_without_operations_is_of_steps_alone() -> None:
    idle, busy = (SimpleNamespace(step_flop=flop) for flop in (0, 100))
    assert planning._pace(idle, 0.5, 2.0, "") == planning.Pace(math.inf, 0.5, 2.0, "")  # type: ignore[arg-type]
    assert planning._pace(busy, 0.5, 2.0, "") == planning.Pace(200.0, 0.0, 2.0, "")  # type: ignore[arg-type]


@pytest.mark.parametrize(("on_depletion", "tasks_left"), [("continue", 2), ("stop", 0)])
def test_a_network_without_a_free_unit_is_planned_on_or_ends(cli: Cli, on_depletion: str, tasks_left: int) -> None:
    fill = {"network": {"hidden": [2, 2]}, "scenario": {"name": "permuted_digits", "tasks": 3}}
    begun(cli, 1, **fill, head={"kind": "single"}, capacity={"on_depletion": on_depletion})
    folder = RunFolder(str(cli.folder / "runs" / "sweep"))
    (first,), state = folder.read_results(), folder.read_state(0)
    for group in state.graph.groups:
        state = fill_group(state, group)
    units = {name: replace(each, active=each.total, new=each.total, free=0) for name, each in first.units.items()}
    digest = folder.write_state(0, state)
    folder.write_result(replace(first, units=units, state_sha256=digest, state_digest=state.digest))
    plan = cli.json("plan", "sweep.yaml")
    assert (plan["tasks_done"], len(plan["seconds_per_task"])) == (1, tasks_left)


def test_a_finished_run_has_nothing_left(cli: Cli) -> None:
    begun(cli, 2)
    plan = cli.json("plan", "sweep.yaml")
    assert (plan["tasks_done"], plan["points_in_all"], plan["seconds_per_task"]) == (2, 8, [])
    assert "2 tasks done" in cli("plan", "sweep.yaml").stdout


def test_one_is_singular(cli: Cli) -> None:
    one = ["scenario.tasks=1", "search.alpha=0", "search.learning_rate=0.1"]
    lines = cli("plan", "sweep.yaml", *(f"--set={each}" for each in one)).stdout.splitlines()
    assert lines[0].startswith("sweep: 1 task of")
    assert lines[1] == "0 tasks done; 1 grid point a searched task, 1 in all"
    assert lines[2].endswith("; 1 trial at a time")
