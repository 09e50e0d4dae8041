"""Who drives a run: one process at a time, on whatever machine and whatever storage.

The lease is a file in the run folder. Object stores have neither locks nor renames, and the clocks of machines differ.
So who wants the lease writes its token, and holds the lease if the token still stands a moment later; the holder keeps
counting in the file, and gives way if it finds another token, or none; and a process of another machine is taken for
dead once its count has stood still for a while by the clock of the one who watches. On one machine the process itself
is looked up, so that a crashed run can be resumed at once.
"""

from __future__ import annotations

import logging
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from clnp_search.errors import InputError
from clnp_search.records import Holder
from clnp_search.storage import RunFolder

BEAT_S = 5.0
SETTLE_S = 0.5
STILL_S = 30.0  # a lease that was not renewed for as long has no holder any more

logger = logging.getLogger(__name__)


class Lease:
    """The right to drive a run, for the length of a context.

    Args:
        on_lost: Is called, in another thread, when another process has taken the lease over.
    """

    def __init__(self, folder: RunFolder, on_lost: Callable[[], None]) -> None:
        self.lost = ""
        """Who has taken it over, in a sentence; empty while nobody has."""
        self._folder, self._on_lost = folder, on_lost
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._mine = this_process()

    def __enter__(self) -> Lease:
        """Takes the lease; watches another machine's holder first, for up to STILL_S.

        Raises:
            InputError: Another process holds it.
        """
        before = self._folder.read_lease()
        if before is not None:
            if holder := self._alive(before):
                raise self._refusal(holder)
            logger.warning("%s is taken over from %s, which has ended without giving it back", self._name, before)
        try:
            self._folder.write_lease(self._mine)
            time.sleep(SETTLE_S)
            now = self._folder.read_lease()
            if now is not None and now.token != self._mine.token:
                raise self._refusal(now)
            self._thread.start()
        except BaseException:  # an interrupt, too
            self._give_back()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        self._give_back()

    def _give_back(self) -> None:
        with suppress(OSError, RuntimeError):  # what cannot be given back is taken over
            if not self._successor():
                self._folder.delete_lease()

    @property
    def _name(self) -> str:
        return self._folder.uri

    def _refusal(self, holder: Holder) -> InputError:
        return InputError(f"{self._name} is being run by {holder}\nWait for it or stop it.")

    def _alive(self, holder: Holder) -> Holder | None:
        """Who holds the lease; None if nobody does any more."""
        if (alive := is_alive(holder)) is not None:
            return holder if alive else None
        logger.warning("%s was being run by %s; watching for %g s whether it still is", self._name, holder, STILL_S)
        end = time.monotonic() + STILL_S
        while time.monotonic() < end:
            time.sleep(1.0)
            now = self._folder.read_lease()
            if now is None or (now.token, now.beat) != (holder.token, holder.beat):
                return now
        return None

    def _successor(self) -> str:
        """Who has taken the lease over, in words; empty while nobody has."""
        try:
            now = self._folder.read_lease()
        except InputError:
            return "a process of another version of clnp-search"
        if now is None:
            return "a process that has ended since"
        return "" if now.token == self._mine.token else str(now)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S):
            try:
                if successor := self._successor():
                    self.lost = f"{self._name} was taken over by {successor}"
                    self._on_lost()
                    return
                self._mine = replace(self._mine, beat=self._mine.beat + 1)
                self._folder.write_lease(self._mine)
            except (OSError, RuntimeError):  # a storage that fails the run as well says so there
                logger.debug("the lease could not be renewed", exc_info=True)


def this_process() -> Holder:
    """This process as one that drives a run, under a token that no other has."""
    return Holder(
        token=uuid.uuid4().hex,
        beat=0,
        host=platform.node(),
        machine=_machine(),
        pid=os.getpid(),
        started=_start_of(os.getpid()),
        since=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def is_alive(holder: Holder) -> bool | None:
    """Whether a holder's process lives; None if that cannot be seen from here, as of another machine."""
    if not holder.machine or holder.machine != _machine():
        return None
    return holder.started > 0 and _start_of(holder.pid) == holder.started


def _machine() -> str:
    """This machine since it was started, as far as processes see one another; empty where that cannot be known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _start_of(pid: int) -> int:
    """When a process of this machine was started, in the kernel's ticks; 0 if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in "ZX" else int(fields[19])
