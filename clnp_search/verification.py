"""The zero-forgetting proof: every digest recomputed, every cut weight checked, every accuracy evaluated again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from clnp_search.clnp.state import State
from clnp_search.clnp.subnetwork import Subnetwork
from clnp_search.errors import InputError
from clnp_search.sequence import TaskSequence
from clnp_search.storage import RunFolder


@dataclass(frozen=True)
class Check:
    """One thing that was verified.

    Args:
        detail: What was found.
    """

    task: int
    name: str
    passed: bool
    detail: str


def verify(folder: RunFolder, sequence: TaskSequence) -> list[Check]:
    """All checks of a run's committed tasks.

    Equal digests are a proof on any hardware: a task's function is its subnetwork. Evaluating again, and comparing
    the logits from the latest state with those from the task's own state, shows the same on this machine.

    Raises:
        InputError: Nothing is committed yet.
    """
    results = folder.read_results()
    if not results:
        raise InputError(f"{folder.uri}: no task is committed yet")
    checks: list[Check] = []
    states: list[State | None] = []
    for result in results:
        state, found = _read(folder, result.index)
        states.append(state)
        checks.append(found)
        if state is None:
            continue
        digest = state.digest
        checks.append(_equal(result.index, "state digest", digest, result.state_digest))
        before = states[result.index - 1] if result.index else sequence.empty_state()
        if before is not None:
            checks.append(_equal(result.index, "parent digest", state.parent, before.digest))
        faults = state.faults()
        checks.append(
            Check(result.index, "cut weights are zero, all is finite", not faults, "; ".join(faults) or "yes")
        )
    latest = states[-1]
    if latest is not None:
        for result in results:
            checks.extend(_subnetwork_checks(result.index, latest, states[result.index], sequence, folder))
    return checks


def _subnetwork_checks(
    task: int, latest: State, own: State | None, sequence: TaskSequence, folder: RunFolder
) -> Iterator[Check]:
    result = folder.read_results()[task]
    try:
        network = Subnetwork(latest, task)
    except (IndexError, RuntimeError) as error:
        yield Check(task, "subnetwork in the latest state", False, str(error))
        return
    yield _equal(task, "subnetwork digest in the latest state", network.digest, result.digest)
    test = sequence.data(task).test
    accuracy = network.accuracy(test.inputs, test.labels)
    yield _equal(task, "test accuracy in the latest state", f"{accuracy:.6f}", f"{result.test_accuracy:.6f}")
    if own is not None and task < own.num_tasks:
        sample = test.inputs[:256]
        same = torch.equal(network(sample), Subnetwork(own, task)(sample))
        yield Check(task, "logits as right after the task, bit for bit", same, "equal" if same else "they differ")


def _read(folder: RunFolder, task: int) -> tuple[State | None, Check]:
    try:
        return folder.read_state(task), Check(task, "state is readable", True, "yes")
    except (ValueError, InputError) as error:
        return None, Check(task, "state is readable", False, str(error))


def _equal(task: int, name: str, found: str, expected: str) -> Check:
    detail = found[:16] if found == expected else f"{found[:16]} instead of {expected[:16]}"
    return Check(task, name, found == expected, detail)
