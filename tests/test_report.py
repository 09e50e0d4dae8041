"""The report over runs: what stands on the page and in its tables, and how the page fits a browser's window."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from browser import page
from builders import make_result, make_sweep, write_run
from command_line import Cli

from clnp_search.errors import InputError
from clnp_search.records import Fork, summarise
from clnp_search.report.comparison import spread_rows
from clnp_search.report.page import Report, report
from clnp_search.storage import RunFolder, run_folder


def make_run(storage: Path, name: str, num_tasks: int = 2) -> RunFolder:
    folder = run_folder(str(storage), name)
    for _ in write_run(folder, make_sweep(), num_tasks):
        pass
    return folder


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """A report over two runs, one of which has a name that is no HTML."""
    storage = tmp_path_factory.mktemp("runs")
    return report([make_run(storage, "first"), make_run(storage, "second")])


def rows(written: Report, table: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(written.tables[table].decode())))


def test_the_page_has_every_run_choice_reason_and_digest(both: Report) -> None:
    text = " ".join(re.sub(r"<[^>]*>", " ", both.html).split())
    assert "2 of 2 90.50 0.00" in text
    assert text.count("1: task-1 p002 0.001 0.01 0.6 98.00 96.52 91.00 91.00") == 2
    assert "p002 has the highest sparsity (units): 0.3750 at 96.5200%." in text
    assert text.count("equal") == 4
    assert "DIFFERENT" not in text
    assert "clnp-search run sweep.yaml --name second-again" in text


def test_a_fork_is_reproduced_from_its_origin(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "forked")
    folder.write_fork(Fork("runs/origin", 0))
    html = report([folder]).html
    assert "clnp-search fork runs/origin --after-task 0 --name forked-again\nclnp-search verify forked-again" in html
    assert "clnp-search run" not in html


def test_runs_that_differ_in_their_seed_alone_have_a_mean_and_a_deviation(tmp_path: Path) -> None:
    folders = []
    for name, sweep in make_sweep(repetitions=2, margins=["1%", "2%"]).members("runs").items():
        folders.append(run_folder(str(tmp_path), name))
        list(write_run(folders[-1], sweep))
        summary = folders[-1].read_summary()
        assert summary is not None
        accuracy = summary.average_test_accuracy + 0.02 * sweep.seed
        folders[-1].write_summary(replace(summary, average_test_accuracy=accuracy))
    written = report(folders)
    text = " ".join(re.sub(r"<[^>]*>", " ", written.html).split())
    assert "mean ± deviation of 2 seeds 1% 0, 1 91.50 ± 1.41 0.00" in text
    assert [row["margin"] for row in rows(written, "spread")] == ["0.01", "0.02"]


def test_means_are_over_seeds_of_runs_that_are_equally_far() -> None:
    summaries, sweeps = {}, {}
    for name, seed, tasks in (("a", 0, 2), ("again", 0, 2), ("b", 1, 2), ("begun", 2, 1)):
        results = tuple(make_result(index, (0.9,) * (index + 1), {}) for index in range(tasks))
        summaries[name] = summarise(name, "complete", seed, "state", results)
        sweeps[name] = make_sweep(seed=seed)
    assert [row["runs"] for row in spread_rows(sweeps, summaries)] == [["a", "b"], ["begun"]]


def test_the_page_has_its_figures_inside_and_needs_no_other_file(both: Report) -> None:
    assert both.html.count("<svg") == 1 + 2 * (2 + 2 * 2)
    assert not re.findall(r"""(?:src|href)=["'](?!#|data:)""", both.html)
    assert "url(http" not in both.html
    ids = Counter(re.findall(r'\bid="([^"]*)"', both.html))
    assert max(ids.values()) == 1
    assert set(re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', both.html)) <= {(each, "") for each in ids} | {
        ("", each) for each in ids
    }


def test_the_tables_hold_the_same_as_csv(both: Report) -> None:
    assert [(row["run"], row["average_test_accuracy"], row["margin"]) for row in rows(both, "runs")] == [
        ("first", "0.905", "0.0005"),
        ("second", "0.905", "0.0005"),
    ]
    assert [row["point"] for row in rows(both, "tasks")] == ["p002"] * 4
    accuracies = [tuple(row.values()) for row in rows(both, "accuracies")][:3]
    assert accuracies == [("first", "0", "0", "0.9"), ("first", "1", "0", "0.9"), ("first", "1", "1", "0.91")]
    assert rows(both, "units")[0].keys() == {"run", "after_task", "group", "total", "active", "new", "free"}


def test_lists_are_json_in_every_table(both: Report) -> None:
    [spread] = rows(both, "spread")
    assert (json.loads(spread["runs"]), json.loads(spread["seeds"])) == (["first"], [0])
    assert json.loads(rows(both, "tasks")[0]["theta"]) == [0.6, 0.6]
    assert json.loads(rows(both, "pareto")[0]["theta"]) == [1.5, 1.5]


def test_runs_of_one_name_are_told_apart_by_where_they_are(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / place, "run", 1) for place in ("here", "there")]
    written = report(folders)
    assert [row["run"] for row in rows(written, "runs")] == [folder.uri for folder in folders]
    assert written.html.count("--name run") == 2


def test_a_subnetwork_that_changed_is_said_to_be_different(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "run")
    summary = folder.read_summary()
    assert summary is not None
    first, second = summary.tasks
    folder.write_summary(replace(summary, tasks=(replace(first, digest="0" * 64), second)))
    assert report([folder]).html.count("DIFFERENT") == 1


def test_a_run_without_a_committed_task_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no task is committed yet"):
        report([make_run(tmp_path, "empty", 0)])


def test_the_command_names_what_it_has_written(tmp_path: Path) -> None:
    make_run(tmp_path / "runs", "run", 1)
    cli = Cli(tmp_path)
    written = cli.json("report", "run", "--out", "page.html")
    assert written["page"] == "page.html"
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    assert (tmp_path / written["tables"]["units"]).read_text().startswith("run,after_task,group")
    assert "is named more than once" in cli("report", "run", "runs/run", status=2).stderr
    assert "no/page.html" in cli("report", "run", "--out", "no/page.html", status=2).stderr


@pytest.mark.parametrize("width", [1280, 500])
def test_the_page_is_no_wider_than_the_window(both: Report, tmp_path: Path, width: int) -> None:
    (tmp_path / "report.html").write_text(
        both.html + "<script>document.title = document.documentElement.scrollWidth + ' of ' + innerWidth</script>"
    )
    html = page((tmp_path / "report.html").as_uri(), tmp_path / "browser", width)
    found = re.search(r"<title>(\d+) of (\d+)</title>", html)
    assert found is not None
    assert int(found[1]) <= int(found[2])
