"""The zero-forgetting proof: every file held against what it follows from, every accuracy evaluated again.

A damaged file is something to find, not to fail of: whatever it does to what reads it becomes a failed check.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from clnp_search.agreement import Chosen, check_commit, recorded_best, recorded_choice
from clnp_search.baseline import accuracies_ahead, check_validation, networks_after
from clnp_search.baseline import selected as selected_by_baseline
from clnp_search.clnp.state import FreeParameters, State, commit
from clnp_search.clnp.subnetwork import Subnetwork
from clnp_search.config import sweep_at, sweep_of
from clnp_search.errors import InputError
from clnp_search.records import Selected, TaskPlan, TaskResult, summarise
from clnp_search.search.proposals import agree
from clnp_search.sequence import (
    TaskSequence,
    count_units,
    num_correct,
    reused_point,
    selected,
    test_accuracies,
)
from clnp_search.storage import RunFolder

T = TypeVar("T")
NUM_COMPARED = 256


@dataclass(frozen=True)
class Check:
    """One thing that was verified.

    Args:
        task: None for the run as a whole.
        detail: What was found.
    """

    task: int | None
    name: str
    passed: bool
    detail: str


def verify(folder: RunFolder) -> list[Check]:
    """All checks of a run's committed tasks.

    Equal digests are a proof on any hardware: a task's function is its subnetwork. Evaluating again, and comparing
    the logits from the latest state with those from the task's own state, shows the same on this machine.

    Raises:
        InputError: Nothing is committed yet, or the data set cannot be loaded.
    """
    checks = _Checks()
    sweep = checks.of(None, "sweep is readable", partial(sweep_of, folder))
    results = checks.of(None, "results are readable", folder.read_results)
    if sweep is not None and results is not None:
        proof = _Proof if sweep.method == "clnp" else _BaselineChecks
        proof(folder, TaskSequence(sweep), results, checks).check()
    if not results and all(check.passed for check in checks.made):
        raise InputError(f"{folder.uri}: no task is committed yet")
    return checks.made


class _Checks:
    """Checks as they are made."""

    def __init__(self) -> None:
        self.made: list[Check] = []

    def equal(self, task: int, name: str, found: str, expected: str) -> None:
        """Makes a check that two values are the same."""
        detail = found[:16] if found == expected else f"{found[:16]} instead of {expected[:16]}"
        self.made.append(Check(task, name, found == expected, detail))

    def of(self, task: int | None, name: str, find: Callable[[], T]) -> T | None:
        """Makes a check that passes if `find` raises nothing; gives what it found."""
        try:
            found = find()
        except Exception as error:  # a damaged file can break whatever reads it, in any way
            self.made.append(Check(task, name, False, str(error) or type(error).__name__))
            return None
        self.made.append(Check(task, name, True, "yes"))
        return found


class _Proof:
    """The checks of a run, task after task."""

    def __init__(
        self, folder: RunFolder, sequence: TaskSequence, results: tuple[TaskResult, ...], checks: _Checks
    ) -> None:
        self._folder, self._sequence, self._results, self._checks = folder, sequence, results, checks
        self._empty = sequence.empty_state()
        self._digests = (self._empty.digest, *(result.state_digest for result in results))
        self._logits: dict[int, Tensor] = {}

    def check(self) -> None:
        """Makes all checks."""
        state: State | None = self._empty
        for task in range(len(self._results)):
            state = self._check_task(task, state)
        if state is not None:
            for task in range(len(self._results)):
                self._check_latest(task, state)
        self._checks.of(None, "summary follows from the results", self._summary)

    def _check_task(self, task: int, before: State | None) -> State | None:
        """Checks that a task's files follow from one another and from the state before; gives the state after."""
        checks, parent = self._checks, self._digests[task]
        if before is not None:
            before = self._sequence.start_of(task, before)
            parent = before.digest
        find_plan = partial(self._plan, task, parent)
        plan = checks.of(task, "plan is of this sweep, these data and the state before", find_plan)
        kept = plan and checks.of(task, "choice follows from points and scans", partial(self._choice, plan))
        state = checks.of(task, "state is readable", partial(self._folder.read_state, task))
        if state is None:
            return None
        checks.equal(task, "state digest", state.digest, self._results[task].state_digest)
        checks.equal(task, "parent digest", state.parent, parent)
        checks.of(task, "cut weights are zero, all is finite", partial(self._faults, state))
        checks.of(task, "subnetworks of all tasks so far", partial(self._subnetworks, task, state))
        if kept and before:
            checks.of(task, "state follows from the choice", partial(self._commit, task, before, state, *kept))
        return state

    def _check_latest(self, task: int, latest: State) -> None:
        """Checks that a task's function is still what it was."""
        checks, result = self._checks, self._results[task]
        network = checks.of(task, "subnetwork is in the latest state", partial(Subnetwork, latest, task))
        if network is None:
            return
        checks.equal(task, "subnetwork digest in the latest state", network.digest, result.digest)
        checks.of(task, "test accuracy in the latest state", partial(self._accuracies, task, network))
        checks.of(task, "logits as right after the task, bit for bit", partial(self._same_logits, task, network))

    def _faults(self, state: State) -> None:
        if faults := state.faults():
            raise ValueError("; ".join(faults))

    def _plan(self, task: int, parent: str) -> TaskPlan:
        layers = self._empty.graph.layers
        plan = self._sequence.read_plan(self._folder, task, parent)
        if plan is None:
            raise ValueError("plan.json is missing")
        sweep = sweep_at(self._folder, self._sequence.sweep, plan)
        if not agree(sweep, task, reused_point(self._folder, sweep) if task else None, layers, plan.points):
            raise ValueError("its points are not those of the sweep")
        return plan

    def _choice(self, plan: TaskPlan) -> tuple[FreeParameters, Chosen]:
        """The parameters that a task kept, and how they were chosen."""
        result = self._results[plan.task]
        chosen = self._chosen(plan)
        records, choice = chosen.records, chosen.choice
        for record in records:
            if record.status == "done":
                self._folder.read_trained(plan.task, record)
        expected = replace(
            result,
            index=plan.task,
            name=plan.name,
            best_val_accuracy=choice.best_val_accuracy,
            margin=choice.margin,
            selected=self._selected(chosen),
            test_accuracy=result.test_accuracies[plan.task],
            points=len(records),
        )
        if result != expected or len(result.test_accuracies) != plan.task + 1:
            raise ValueError("result.json says something else")
        return self._folder.read_trained(plan.task, chosen.kept), chosen

    def _chosen(self, plan: TaskPlan) -> Chosen:
        rules = sweep_at(self._folder, self._sequence.sweep, plan).forgetting
        return recorded_choice(self._folder, plan, rules)

    def _selected(self, chosen: Chosen) -> Selected:
        return selected(chosen.kept.point, chosen.scan)

    def _subnetworks(self, task: int, state: State) -> None:
        for earlier in range(task + 1):
            network = Subnetwork(state, earlier)
            if network.digest != self._results[earlier].digest:
                raise ValueError(f"that of task {earlier} is not the one that was committed")
        self._logits[task] = network(self._sequence.data(task).test.inputs[:NUM_COMPARED])

    def _same_logits(self, task: int, network: Subnetwork) -> None:
        sample = self._sequence.data(task).test.inputs[:NUM_COMPARED]
        if task not in self._logits:
            raise ValueError("those right after the task are not known")
        if not torch.equal(network(sample), self._logits[task]):
            raise ValueError("they differ")

    def _accuracies(self, task: int, network: Subnetwork) -> None:
        # Equal subnetworks have equal accuracies: evaluated once, it must stand in the row of every task since.
        test = self._sequence.data(task).test
        accuracy = num_correct(network, test) / len(test)
        for result in self._results[task:]:
            if result.test_accuracies[task] != accuracy:
                raise ValueError(f"{accuracy:.6f}, but {result.test_accuracies[task]:.6f} after task {result.index}")

    def _commit(self, task: int, before: State, state: State, trained: FreeParameters, chosen: Chosen) -> None:
        data = self._sequence.data(task)
        if commit(before, data.info, trained, chosen.theta(before.graph.groups)).digest != state.digest:
            raise ValueError("the chosen parameters, pruned at the chosen theta, give another state")
        units = count_units(state)
        if units != self._results[task].units:
            raise ValueError(f"result.json counts other units: {self._results[task].units} instead of {units}")
        check_commit(units, num_correct(Subnetwork(state, task), data.validation), chosen.scan)

    def _summary(self) -> None:
        summary = self._folder.read_summary()
        if summary is None and not self._results:
            return
        if summary is None:
            raise ValueError("summary.json is missing")
        # A run that was killed between a task's result and its summary is one task behind, until a resume.
        shown = len(summary.tasks)
        if not shown <= len(self._results) <= shown + 1:
            raise ValueError(f"it has {shown} tasks, and {len(self._results)} are committed")
        seed = self._sequence.sweep.seed
        if replace(summary, reason="") != summarise(
            summary.name, summary.status, seed, self._digests[shown], self._results[:shown]
        ):
            raise ValueError("summary.json says something else")


class _BaselineChecks(_Proof):
    """The checks of a baseline's run: that its files follow from one another and its accuracies from its networks.

    Of forgetting they prove nothing, except of PackNet, whose tasks keep their weights.
    """

    def check(self) -> None:
        method = self._sequence.sweep.method
        super().check()
        detail = {
            "packnet": "weights of earlier tasks stay; their digests are checked above",
            "single_task": "none by construction: each task has a network of its own",
        }.get(method, f"not claimed: {method} may forget, and its accuracies say how much")
        self._checks.made.append(Check(None, "zero forgetting", True, detail))

    def _check_latest(self, task: int, latest: State) -> None:
        if self._sequence.sweep.method == "packnet":
            super()._check_latest(task, latest)

    def _chosen(self, plan: TaskPlan) -> Chosen:
        return recorded_best(self._folder, plan)

    def _selected(self, chosen: Chosen) -> Selected:
        return selected_by_baseline(chosen.kept.point, chosen.kept)

    def _subnetworks(self, task: int, state: State) -> None:
        result, network = self._results[task], Subnetwork(state, task)
        if network.digest != result.digest:
            raise ValueError("that of the task is not the one that was committed")
        networks = networks_after(self._sequence, self._folder, state)
        for earlier, accuracy in enumerate(test_accuracies(self._sequence, networks)):
            if accuracy != result.test_accuracies[earlier]:
                raise ValueError(
                    f"task {earlier} has test accuracy {accuracy:.6f}, but {result.test_accuracies[earlier]:.6f} "
                    "in result.json"
                )
        self._logits[task] = network(self._sequence.data(task).test.inputs[:NUM_COMPARED])

    def _commit(self, task: int, before: State, state: State, trained: FreeParameters, chosen: Chosen) -> None:
        baseline = self._sequence.sweep.baseline
        assert baseline is not None, "of a baseline's run"
        if baseline.after(before, self._sequence.data(task).info, trained).digest != state.digest:
            raise ValueError("the chosen parameters give another state")
        if count_units(state) != self._results[task].units:
            raise ValueError("result.json counts other units")
        if replace(self._results[task], **accuracies_ahead(self._sequence, before, task)) != self._results[task]:
            raise ValueError("result.json says other accuracies of the networks before the task")
        check_validation(self._sequence, state, chosen.kept)
