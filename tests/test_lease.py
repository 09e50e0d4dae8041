"""Who may drive a run: real processes and real files; another machine is one by name only."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread

import pytest

from clnp_search import lease
from clnp_search.errors import InputError
from clnp_search.lease import Lease
from clnp_search.records import Holder
from clnp_search.storage import RunFolder

DRIVE = """
import sys
from clnp_search.lease import Lease
from clnp_search.storage import RunFolder
with Lease(RunFolder(sys.argv[1]), lambda: None):
    print("driving", flush=True)
    sys.stdin.read()
"""


def unexpected() -> None:
    raise AssertionError("the lease was lost")


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(str(tmp_path / "run"))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beats and watches in tenths of the usual times."""
    for name in ("BEAT_S", "SETTLE_S", "STILL_S"):
        monkeypatch.setattr(lease, name, getattr(lease, name) / 10)


@contextmanager
def driver(folder: RunFolder) -> Iterator[subprocess.Popen[str]]:
    """Another process that drives the run until it is told to end."""
    with subprocess.Popen(
        [sys.executable, "-c", DRIVE, folder.uri], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "driving\n"
        yield process
        process.kill()


def holder_of(folder: RunFolder) -> Holder:
    holder = folder.read_lease()
    assert holder is not None
    return holder


def test_a_lease_is_given_back(folder: RunFolder) -> None:
    with Lease(folder, unexpected):
        assert folder.read_lease() is not None
    assert folder.read_lease() is None


def test_an_interrupt_while_it_is_taken_leaves_no_lease(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(seconds: float) -> None:
        assert folder.read_lease() is not None
        raise KeyboardInterrupt

    monkeypatch.setattr(lease.time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Lease(folder, unexpected).__enter__()
    assert folder.read_lease() is None


def test_a_second_process_is_refused_and_told_who_drives(folder: RunFolder) -> None:
    with driver(folder) as process:
        holder = holder_of(folder)
        with pytest.raises(
            InputError,
            match=f"is being run by process {process.pid} on {holder.host} since .+\nWait for it or stop it.$",
        ):
            Lease(folder, unexpected).__enter__()
        assert holder_of(folder).token == holder.token


def test_a_crashed_process_is_followed_at_once(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "STILL_S", float("inf"))  # nothing is watched
    with driver(folder) as process:
        process.kill()
        process.wait()
        with Lease(folder, unexpected):
            assert holder_of(folder).pid != process.pid


def test_another_process_with_the_number_of_a_crashed_one_is_not_taken_for_it(folder: RunFolder) -> None:
    with driver(folder):
        holder = holder_of(folder)
        folder.write_lease(replace(holder, started=holder.started - 1))
        with Lease(folder, unexpected):
            assert holder_of(folder).token != holder.token


def test_another_machines_process_that_beats_is_refused(folder: RunFolder, quick: None) -> None:
    with Lease(folder, unexpected) as far:
        far._mine = replace(far._mine, machine="another")
        folder.write_lease(far._mine)
        with pytest.raises(InputError, match="is being run by process"):
            Lease(folder, unexpected).__enter__()


def test_another_machines_process_that_stands_still_is_followed_whatever_its_clock_says(
    folder: RunFolder, quick: None
) -> None:
    with driver(folder):
        holder = replace(holder_of(folder), machine="another", token="theirs", since="2999-01-01T00:00:00+00:00")
    folder.write_lease(holder)
    with Lease(folder, unexpected):
        assert holder_of(folder).token != "theirs"


def test_who_loses_the_lease_is_told_and_leaves_the_other_in_peace(folder: RunFolder, quick: None) -> None:
    lost = Event()
    with Lease(folder, lost.set) as mine:
        other = replace(holder_of(folder), token="other", host="elsewhere")
        folder.write_lease(other)
        assert lost.wait(60)
        assert "taken over by process" in mine.lost
        assert "elsewhere" in mine.lost
    assert folder.read_lease() == other


def test_who_finds_no_lease_any_more_is_told_that_another_has_come_and_gone(folder: RunFolder, quick: None) -> None:
    lost = Event()
    with Lease(folder, lost.set) as mine:
        folder.delete_lease()
        assert lost.wait(60)
        assert "taken over by a process that has ended since" in mine.lost
    assert folder.read_lease() is None


def test_who_loses_the_lease_to_another_version_is_told_and_leaves_it_in_peace(folder: RunFolder, quick: None) -> None:
    lost = Event()
    with Lease(folder, lost.set) as mine:
        folder.write_lease({"bearer": "other"})  # type: ignore[arg-type]
        assert lost.wait(60)
        assert "taken over by a process of another version" in mine.lost
    with pytest.raises(InputError, match="written by another version"):
        folder.read_lease()


def test_of_many_that_start_at_once_one_drives(folder: RunFolder, quick: None) -> None:
    losers, drivers, decided = list[int](), list[int](), Event()

    def lose() -> None:
        losers.append(1)
        if len(losers) == 3:
            decided.set()

    def contend() -> None:
        mine = Lease(folder, lose)
        try:
            with mine:
                assert decided.wait(60)
                if not mine.lost:
                    drivers.append(1)
        except InputError:
            lose()

    threads = [Thread(target=contend) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(drivers), len(losers)) == (1, 3)


@pytest.mark.parametrize("damage", [b"", b"{", b'{"token": 1}'])
def test_a_lease_that_was_cut_short_by_a_crash_holds_nothing(folder: RunFolder, damage: bytes) -> None:
    folder.write("lease.json", damage)
    assert folder.read_lease() is None
    with Lease(folder, unexpected):
        assert holder_of(folder).beat == 0
