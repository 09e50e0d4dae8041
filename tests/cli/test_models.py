"""What `evaluate` and `export` say of a committed task, and what they refuse."""

from __future__ import annotations

from dataclasses import replace

from command_line import Cli

from clnp_search.storage import RunFolder


def test_a_task_is_not_evaluated_on_other_data_than_it_was_planned_with(cli: Cli, copy: RunFolder) -> None:
    plan = copy.read_plan(1)
    assert plan is not None
    copy.write_plan(replace(plan, data_digest="0" * 64))
    refused = cli("evaluate", copy.uri, "--task", "1", status=2).stderr
    assert refused.startswith(f"{copy.uri}: task 1 was planned on another data set: its digest was 000000000000, is ")
    assert cli.json("evaluate", copy.uri, "--task", "0")["samples"] > 0
