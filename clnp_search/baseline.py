"""A baseline's sequence: planned, trained, recorded and resumed as one of clnp, with nothing to scan or to prune."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from clnp_search.agreement import check_selection, chosen_by_mean
from clnp_search.clnp.initial import draw, overlaid
from clnp_search.clnp.state import State
from clnp_search.clnp.subnetwork import Cut, Subnetwork
from clnp_search.listener import Listener
from clnp_search.records import Point, PointRecord, Selected, TaskResult
from clnp_search.search.trial import validate
from clnp_search.selection import Step
from clnp_search.sequence import Runner, TaskSequence, num_correct
from clnp_search.storage import RunFolder

if TYPE_CHECKING:
    from clnp_search.search.cluster import Cluster
    from clnp_search.search.tuning import Program


def runner_of(
    sequence: TaskSequence, folder: RunFolder, cluster: Cluster, listeners: Sequence[Listener] = ()
) -> Runner:
    """What takes a run of the sweep's method to its end."""
    kind = Runner if sequence.sweep.method == "clnp" else BaselineRunner
    return kind(sequence, folder, cluster, listeners)


class BaselineRunner(Runner):
    """Takes a baseline's run to its end."""

    def _run_task(self, before: tuple[TaskResult, ...], state: State) -> Program[tuple[TaskResult, State]]:
        started, index = time.perf_counter(), len(before)
        sequence, folder, baseline = self._sequence, self._folder, self._sweep.baseline
        assert baseline is not None, "a run of clnp has another runner"
        plan = self._plan(index, state)
        inputs = self._cluster.share((plan, state, sequence.drawn(index)))
        records = yield from self._train(plan, inputs)
        chosen = chosen_by_mean(records)
        choice, kept = chosen.choice, chosen.kept
        check_selection(folder, index, choice)
        after = baseline.after(state, sequence.data(index).info, folder.read_trained(index, kept))
        check_validation(sequence, after, kept)
        folder.write_selection(index, choice)
        self._write_tables(index, chosen, [Step(records, [])], tuple(state.graph.groups))
        networks, digest = networks_after(sequence, folder, after), Subnetwork(after, index).digest
        ahead = accuracies_ahead(sequence, state, index)
        chosen_point = selected(kept.point, kept)
        return self._commit(plan, choice, chosen_point, networks, digest, after, started, **ahead), after


def networks_after(sequence: TaskSequence, folder: RunFolder, after: State) -> Iterator[Cut]:
    """The networks of all tasks so far, by the state after the last of them; or each by its own, if it has one."""
    last, baseline = after.num_tasks - 1, sequence.sweep.baseline
    for task in range(last + 1):
        alone = baseline is not None and baseline.ALONE and task < last
        yield Cut(folder.read_state(task) if alone else after, task)


def selected(point: Point, record: PointRecord) -> Selected:
    """A chosen point, as a task's result shows it: pruned by no threshold."""
    return Selected(point.name, point.alpha, point.learning_rate, (), record.val_accuracy, 0.0)


def check_validation(sequence: TaskSequence, after: State, record: PointRecord) -> None:
    """Holds a state against the record of the point that it was made of.

    Raises:
        RuntimeError: Its validation accuracies are others.
    """
    baseline = sequence.sweep.baseline
    assert baseline is not None, "of a baseline's run"
    found = validate(after, baseline, sequence.scenario, torch.device("cpu"))
    for (correct, total), accuracy in zip(found, record.val_accuracies, strict=True):
        # On another device or number of threads a sample may fall to the other side, as in `check_commit`.
        if abs(correct - accuracy * total) > max(1, total // 5000) + 0.5:
            raise RuntimeError(
                f"the network gets {correct} of {total} validation samples right, "
                f"the record of {record.point.name} says {accuracy:.4%}"
            )


def accuracies_ahead(sequence: TaskSequence, state: State, index: int) -> dict[str, Any]:
    """What the network before a task, and the one before any, make of its test samples; of a shared head alone."""
    sweep, data = sequence.sweep, sequence.data(index)
    baseline, graph, info = sweep.baseline, state.graph, data.info
    if baseline is None or baseline.ALONE or state.architecture.head != "shared" or not index:
        return {}
    before = replace(state, tasks=(*state.tasks, info), heads=(*state.heads, state.heads[-1]))
    empty = sequence.empty_state()
    initial, own = draw(empty, info.num_classes, sweep.seed, 0), sequence.drawn(0)
    start = initial if own is None else overlaid(initial, graph, own, graph)
    activities = {group: torch.zeros(units, dtype=torch.float64) for group, units in graph.groups.items()}
    untrained = baseline.after(empty, info, baseline.pack(empty, start, [0.0], [info.num_classes]).point(0, activities))
    networks = {"accuracy_before": Subnetwork(before, index), "accuracy_untrained": Subnetwork(untrained, 0)}
    return {name: num_correct(network, data.test) / len(data.test) for name, network in networks.items()}
