"""What `status`, `runs` and `compare` say of runs that are complete, cut short, failed, damaged or being worked on."""

from __future__ import annotations

import csv
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from builders import make_sweep, write_run
from command_line import Cli

from clnp_search.cli.console import duration
from clnp_search.cli.options import located
from clnp_search.lease import this_process
from clnp_search.progress import costs_of, is_running, progress_of
from clnp_search.storage import RunFolder


def written(cli: Cli, name: str, until: str = "", **sections: Any) -> RunFolder:
    """A run by hand, as far as a step of `write_run`: by default to its end."""
    folder = RunFolder(str(cli.folder / "runs" / name))
    for step in write_run(folder, make_sweep(name=name, **sections)):
        if step == until:
            break
    return folder


# Where a run stands


def test_a_run_that_nobody_drives_is_interrupted(cli: Cli) -> None:
    written(cli, "cut", until="trained 1 p001")
    status = cli.json("status", "cut")
    assert (status["status"], status["num_tasks"], len(status["tasks"])) == ("interrupted", 2, 1)
    assert status["current"] == {"task": 1, "points_done": 2, "points": 4}
    lines = cli("status", "cut").stdout.splitlines()
    assert "interrupted: 1 of 2 tasks committed" in lines
    assert lines[0].strip() == "cut: interrupted"
    assert "task 1: 2 of 4 points trained" in lines
    assert lines[-1] == "go on with `clnp-search resume cut`"


def test_a_run_is_driven_by_a_process_that_is_alive(cli: Cli) -> None:
    folder = written(cli, "run", until="trained 0 p001")
    assert not is_running(folder)
    folder.write_lease(this_process())
    assert progress_of(folder).status == "running"
    folder.write_lease(replace(this_process(), started=1))  # another process had its number
    assert not is_running(folder)


def test_a_run_is_driven_by_another_machines_process_that_renews_its_lease_whatever_the_clock_says(cli: Cli) -> None:
    folder = written(cli, "run", until="trained 0 p001")
    folder.write_lease(replace(this_process(), machine="another"))  # of a container, it may have this host's name
    lease = cli.folder / "runs" / "run" / "lease.json"
    for behind_s, running in ((0, True), (60, True), (3600, False)):
        os.utime(lease, (0, time.time() - behind_s))
        assert is_running(folder) is running


def test_the_cost_is_what_trials_were_busy_for_and_not_what_was_taken_over(cli: Cli) -> None:
    folder = written(cli, "cost")
    before = costs_of(folder)
    assert [cost.task for cost in before] == [0, 1]
    records = [record for record in folder.read_points(0) if record.status == "done"]
    assert before[0].training_s == pytest.approx(sum(record.seconds for record in folder.read_points(0)))
    folder.write_point(0, replace(records[0], seconds=100.0), folder.read_trained(0, records[0]))
    assert costs_of(folder)[0].training_s == pytest.approx(before[0].training_s - records[0].seconds + 100)
    total = sum(cost.training_s + cost.scans_s for cost in costs_of(folder))
    assert f"cost: trials of 1 CPU were busy for {duration(total)}, " in cli("status", "cost").stdout
    taken = replace(records[0], seconds=100.0, origin="runs/another")
    folder.write_point(0, taken, folder.read_trained(0, records[0]))
    assert costs_of(folder)[0].training_s == pytest.approx(before[0].training_s - records[0].seconds)


def test_places_under_the_home_folder_are_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    sweep = located(
        make_sweep(scenario={"name": "permuted_digits", "root": "~/data"}, storage="~/runs", modules=["~"]),
        None,
        "sqlite:///~/m.db",
    )
    assert (sweep.scenario.root, sweep.storage, sweep.modules, sweep.tracking.uri) == (
        "/home/someone/data",
        "/home/someone/runs",
        ("/home/someone",),
        "sqlite:////home/someone/m.db",
    )


def test_watching_ends_with_the_run(cli: Cli) -> None:
    folder = written(cli, "watched", until="trained 0 p001")
    folder.write_lease(this_process())
    watching = cli.start("status", "watched", "--watch")
    assert watching.stdout is not None
    while "running: 0 of 2" not in watching.stdout.readline():
        assert watching.poll() is None
    folder.delete_lease()
    assert "interrupted: 0 of 2" in watching.communicate(timeout=60)[0]
    assert watching.returncode == 0
    assert "allowed: one of the two" in cli("status", "watched", "--watch", "--json", status=2).stderr


def test_a_run_of_a_process_that_has_died_is_interrupted(cli: Cli) -> None:
    folder = written(cli, "run", until="trained 0 p001")
    process = cli.start("--version")
    process.communicate()
    folder.write_lease(replace(this_process(), pid=process.pid))
    assert progress_of(folder).status == "interrupted"


def test_a_failed_run_says_why_until_it_is_driven_again(cli: Cli) -> None:
    folder = written(cli, "failed", until="trained 0 p003")
    summary = folder.read_summary()
    assert summary is not None
    folder.write_summary(replace(summary, status="failed", reason="task 0: no point is usable"))
    lines = cli("status", "failed").stdout.splitlines()
    assert lines[:2] == ["failed: 0 of 2 tasks committed", "task 0: no point is usable"]
    folder.write_lease(this_process())
    assert progress_of(folder).status == "running"


def test_failed_points_of_all_tasks_are_counted_and_named_with_their_reasons(cli: Cli) -> None:
    written(cli, "run")
    failed = [{"task": task, "point": "p003", "reason": "diverged"} for task in (0, 1)]
    assert cli.json("status", "run")["failed_points"] == failed
    assert cli("status", "run").stdout.endswith(
        "2 points failed:\n  task 0: p003 failed: diverged\n  task 1: p003 failed: diverged\n"
    )


@pytest.mark.parametrize(("until", "status", "tasks"), [("", "complete", 2), ("committed 0", "interrupted", 1)])
def test_results_speak_where_the_summary_is_missing(cli: Cli, until: str, status: str, tasks: int) -> None:
    folder = written(cli, "run", until)
    before = folder.read_summary()
    (cli.folder / "runs" / "run" / "summary.json").unlink()
    progress = progress_of(folder)
    assert (progress.status, len(progress.summary.tasks)) == (status, tasks)
    assert progress.summary == before


# Runs beside one another


def test_runs_lists_every_run_with_its_figures(cli: Cli) -> None:
    written(cli, "a", forgetting={"margin": "1%"})
    written(cli, "b", until="began", seed=7)
    (cli.folder / "runs" / "stray").mkdir()
    first, second = cli.json("runs")
    assert (first["name"], first["status"], first["margin"], first["seed"]) == ("a", "complete", 0.01, 0)
    assert (first["tasks"], first["num_tasks"], first["average_test_accuracy"]) == (2, 2, pytest.approx(0.905))
    assert 0 <= first["free_units"] < first["units"] == 8
    assert (second["name"], second["status"], second["seed"], second["tasks"]) == ("b", "interrupted", 7, 0)
    assert (second["average_test_accuracy"], second["free_units"]) == (None, None)
    text = cli("runs").stdout
    assert "90.50%" in text
    assert "interrupted" in text


def test_a_run_that_cannot_be_read_does_not_hide_the_others(cli: Cli) -> None:
    written(cli, "good")
    written(cli, "bad")
    (cli.folder / "runs" / "bad" / "tasks" / "000" / "result.json").write_text("{")
    (cli.folder / "runs" / "elsewhere").mkdir()
    (cli.folder / "runs" / "elsewhere" / "sweep.yaml").symlink_to(cli.folder / "sweep.yaml")  # which is not looked at
    statuses = {"bad": "unreadable", "elsewhere": "unreadable", "good": "complete"}
    assert {row["name"]: row["status"] for row in cli.json("runs")} == statuses
    assert "unreadable" in cli("runs").stdout
    collected = cli("gc", "--all")
    assert "left as it is" in collected.stderr


def test_what_a_run_folder_says_is_shown_as_it_is_and_moves_no_cursor(cli: Cli) -> None:
    written(cli, "y", until="trained 0 p003")
    folder = RunFolder(str((cli.folder / "runs" / "y").rename(cli.folder / "runs" / "y[b]]\x1b[2J")))
    summary = folder.read_summary()
    assert summary is not None
    folder.write_summary(replace(summary, status="failed", reason="\x1b]0;title\x07\x9b1A and [bold]"))
    assert "y[b]]\ufffd[2J" in cli("runs").stdout
    lines = cli("status", folder.uri).stdout.splitlines()
    assert lines[1] == "\ufffd]0;title\ufffd\ufffd1A and [bold]"
    assert lines[-1].endswith("y[b]]\ufffd[2J`")


def test_an_empty_storage_has_no_runs(cli: Cli) -> None:
    assert cli.json("runs") == []
    assert cli("runs", "--storage", "elsewhere").stdout == "no runs under elsewhere\n"


def test_compare_shows_tasks_settings_that_differ_and_writes_a_table(cli: Cli) -> None:
    written(cli, "a")
    written(cli, "b", until="committed 0", forgetting={"margin": "1%"})
    text = cli("compare", "a", "b", "--csv", "both.csv").stdout
    assert "forgetting.margin: 0.0005, 0.01" in text
    assert "task 1, test accuracy now" in text
    with (cli.folder / "both.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["run"], row["task"]) for row in rows] == [("a", "0"), ("a", "1"), ("b", "0")]
    assert float(rows[1]["test_accuracy"]) == 0.91
    document = cli.json("compare", "a", "b")
    assert [run["name"] for run in document["runs"]] == ["a", "b"]
    assert [row["free_units"] for row in document["tasks"]] == [int(row["free_units"]) for row in rows]


@pytest.mark.parametrize(("suffix", "magic"), [(".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_the_figure_is_of_the_kind_that_its_name_says(cli: Cli, suffix: str, magic: bytes) -> None:
    written(cli, "a")
    cli("compare", "a", "--figure", f"one{suffix}")
    assert Path(cli.folder / f"one{suffix}").read_bytes().startswith(magic)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "absent"], "absent: no run of that name"),
        (["a", "runs/a"], "RUN...: "),
        (["a", "empty"], "compare: no task of empty is committed yet"),
        (["a", "--figure", "a.gif"], "--figure a.gif: the name must end in one of .png, .svg"),
        (["a", "--csv", "no/folder.csv"], "--csv no/folder.csv: "),
    ],
)
def test_what_cannot_be_compared_is_refused_in_a_sentence(cli: Cli, arguments: list[str], message: str) -> None:
    written(cli, "a")
    written(cli, "empty", until="began")
    answer = cli("compare", *arguments, status=2)
    assert answer.stderr.startswith(message)
