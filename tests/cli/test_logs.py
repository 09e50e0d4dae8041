"""Standard error as JSON, an object a line."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from command_line import Cli
from in_process import SWEEP, run_in_process

from clnp_search.cli.logs import EventLog, JsonFormatter
from clnp_search.records import PackProgress
from clnp_search.storage import RunFolder


def test_a_record_has_its_time_level_message_and_extra_fields() -> None:
    record = logging.makeLogRecord({"levelname": "WARNING", "name": "here", "msg": "pack %d", "args": (3,), "pack": 3})
    fields = json.loads(JsonFormatter().format(record))
    assert fields.pop("time").endswith("+00:00")
    assert fields == {"level": "warning", "logger": "here", "message": "pack 3", "pack": 3}


def test_events_carry_the_run_and_the_task_and_the_figures(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.handler.setFormatter(JsonFormatter())
    caplog.set_level(logging.INFO, "clnp_search")
    with EventLog(SWEEP, "mine", ()) as events:
        summary = run_in_process(SWEEP, RunFolder(str(tmp_path / "mine")), [events])
        logging.getLogger("clnp_search.anywhere").warning("a fault; trying again")
    logged = [json.loads(line) for line in caplog.text.splitlines()]
    assert {line["run"] for line in logged} == {"mine"}
    task = ["task planned", "points finished", "thresholds scanned", "task committed"]
    assert [line["message"] for line in logged] == ["run started", *task, *task, "a fault; trying again", "run ended"]
    assert [line.get("task") for line in logged] == [None, *[0] * 4, *[1] * 4, 1, 1]
    assert (logged[1]["points"], logged[1]["points_done"], logged[2]["points_done"]) == (2, 0, 2)
    last = logged[-3]
    assert (last["test_accuracy"], last["state_digest"]) == (summary.tasks[1].test_accuracy, summary.state_digest)


def test_points_are_logged_as_they_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "clnp_search")
    run_in_process(SWEEP, folder := RunFolder(str(tmp_path / "run")))
    plan = folder.read_plan(0)
    assert plan is not None
    events = EventLog(SWEEP, "run", ())
    events.task_planned(plan, ())
    for ended in ((), (1,), (1,), (1, 0)):
        events.training(PackProgress({0: 3, 1: 3}, (1, 0.5), ended=ended))
    done = [record for record in caplog.records if record.message == "points done"]
    assert [vars(record)["points_done"] for record in done] == [1, 2]


def test_a_refusal_is_an_object_too(cli: Cli) -> None:
    fields = json.loads(cli("--log-format", "json", "status", "absent", status=2).stderr)
    assert (fields["level"], fields["exit_status"]) == ("error", 2)
