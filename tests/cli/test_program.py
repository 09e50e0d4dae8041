"""What all commands share: statuses, messages, the program's own options, and storage that cannot be used."""

from __future__ import annotations

import signal
from importlib.metadata import version

import pytest
from command_line import Cli

from clnp_search.lease import Lease
from clnp_search.storage import RunFolder


def test_the_version_is_printed(cli: Cli) -> None:
    assert cli("--version").stdout == f"clnp-search {version('clnp-search')}\n"


def test_a_traceback_is_shown_where_it_is_asked_for(cli: Cli) -> None:
    plain, debug = cli("status", "absent", status=2), cli("--debug", "status", "absent", status=2)
    assert "Traceback" not in plain.stderr
    assert "Traceback" in debug.stderr
    assert debug.stderr.endswith(plain.stderr)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_of_any_command_is_said_and_has_status_3(
    cli: Cli, copy: RunFolder, number: signal.Signals
) -> None:
    copy.delete("tasks/001/result.json")
    copy.delete("summary.json")
    with Lease(copy, lambda: None):  # so that the run is watched without end
        process = cli.start("status", copy.uri, "--watch")
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (3, "interrupted\n")


def test_a_message_is_one_line_in_a_pipe(cli: Cli) -> None:
    name = "x" * 300
    answer = cli("status", name, status=2)
    assert answer.stderr == f"{name}: no run of that name under runs/, and no run folder\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "run"], "Missing option '--task'.\nSee `clnp-search export --help`\n"),
        (["no-such"], "No such command 'no-such'.\nSee `clnp-search --help`\n"),
        (["status", "run", "--no-such"], "No such option: --no-such\nSee `clnp-search status --help`\n"),
    ],
)
def test_a_command_line_that_cannot_be_read_is_refused_in_a_sentence(
    cli: Cli, arguments: list[str], message: str
) -> None:
    assert cli(*arguments, status=2).stderr == message


@pytest.mark.parametrize("name", ["", "a; rm"])
@pytest.mark.parametrize("command", [["run"], ["plan"], ["submit", "--address", "http://127.0.0.1:1"]], ids="-".join)
def test_a_name_that_no_run_may_have_is_refused(cli: Cli, command: list[str], name: str) -> None:
    answer = cli(*command, "sweep.yaml", "--name", name, status=2)
    assert answer.stderr.startswith(f"name {name!r}: allowed: up to 100 letters")


@pytest.mark.parametrize("option", ["--storage", "--tracking-uri"])
def test_an_empty_place_is_refused(cli: Cli, option: str) -> None:
    assert cli("run", "sweep.yaml", option, "", status=2).stderr.startswith(f"{option} is empty")


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "sweep.yaml", "--storage", "s3://KEY:hidden@bucket"],
        ["submit", "sweep.yaml", "--address", "http://127.0.0.1:1", "--tracking-uri", "http://user:hidden@host"],
        ["ui", "--tracking-uri", "http://user:hidden@host"],
        ["status", "s3://KEY:hidden@bucket/run"],
        ["status", "run", "--storage", "s3://KEY:hidden@bucket"],
        ["runs", "--storage", "s3://KEY:hidden@bucket"],
    ],
)
def test_a_password_in_a_place_is_refused_and_not_said(cli: Cli, arguments: list[str]) -> None:
    said = cli(*arguments, status=2).stderr
    assert "a password would be recorded; leave it out, and set AWS_ACCESS_KEY_ID" in said
    assert ":***@" in said
    assert "hidden" not in said


@pytest.mark.parametrize("command", ["run", "plan"])
@pytest.mark.parametrize("storage", ["file", "file/below"])
def test_storage_that_is_a_file_or_below_one_is_refused_in_a_sentence(cli: Cli, command: str, storage: str) -> None:
    (cli.folder / "file").write_text("")
    answer = cli(command, "sweep.yaml", "--storage", storage, status=2)
    assert answer.stderr == f"storage {cli.folder / storage / 'sweep'}: {cli.folder / 'file'} is no folder\n"


def test_a_run_under_storage_that_is_a_file_is_not_found(cli: Cli) -> None:
    (cli.folder / "file").write_text("")
    assert cli("status", "x", "--storage", "file", status=2).stderr.startswith("x: no run of that name under file")


def test_storage_that_cannot_be_written_is_refused_in_a_sentence(cli: Cli) -> None:
    # The kernel's own read-only file system: permissions would not stop the superuser.
    answer = cli("run", "sweep.yaml", "--storage", "/sys/kernel/runs", status=2)
    assert answer.stderr.startswith("storage /sys/kernel/runs/sweep: ")
    assert answer.stderr.count("\n") == 1
