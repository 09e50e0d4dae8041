"""What `evaluate` and `export` say of a committed task, and what they refuse."""

from __future__ import annotations

from dataclasses import replace

import pytest
from command_line import Cli

from clnp_search.storage import RunFolder


def test_a_task_is_not_evaluated_on_other_data_than_it_was_planned_with(cli: Cli, copy: RunFolder) -> None:
    plan = copy.read_plan(1)
    assert plan is not None
    copy.write_plan(replace(plan, data_digest="0" * 64))
    refused = cli("evaluate", copy.uri, "--task", "1", status=2).stderr
    assert refused.startswith(f"{copy.uri}: task 1 was planned on another data set: its digest was 000000000000, is ")
    assert cli.json("evaluate", copy.uri, "--task", "0")["samples"] > 0


@pytest.mark.parametrize(
    ("out_file", "reason"),
    [
        ("taken.pt2", "is a folder; name a file"),
        ("absent/task.pt2", "there is no folder absent"),
        (f"{'x' * 245}.pt2", "File name too long"),  # with what it is called until it is whole
    ],
)
def test_an_export_to_where_no_file_can_be_is_refused_and_leaves_nothing(
    cli: Cli, copy: RunFolder, out_file: str, reason: str
) -> None:
    (cli.folder / "taken.pt2").mkdir()
    before = sorted(cli.folder.iterdir())
    refused = cli("export", copy.uri, "--task", "0", "--out", out_file, status=2)
    assert refused.stderr == f"--out {out_file}: {reason}\n"
    assert sorted(cli.folder.iterdir()) == before
