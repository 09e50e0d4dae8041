"""The search in this process: what Ray does for a run, one after the other. For tests of the sequence's own logic."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from builders import make_sweep

from clnp_search.baseline import runner_of
from clnp_search.clnp.state import State
from clnp_search.config import Sweep
from clnp_search.listener import Listener
from clnp_search.records import PackProgress, Point, ScanRecord, Summary, TaskPlan
from clnp_search.search.capacity import Capacity
from clnp_search.search.trial import RunInputs, TaskInputs, run_pack, scan_point
from clnp_search.sequence import TaskSequence
from clnp_search.storage import RunFolder

SECTIONS: dict[str, Any] = {
    "scenario": {"name": "permuted_digits", "tasks": 2},
    "network": {"hidden": [12, 8]},
    "training": {"epochs": 3, "batch_size": 64},
    "search": {"alpha": [1e-5, 1e-3], "learning_rate": 0.02},
    "forgetting": {"margin": "3%"},
}


def make(**sections: Any) -> Sweep:
    """The sweep of these tests, with some sections changed in part."""
    return make_sweep(**(SECTIONS | {name: SECTIONS.get(name, {}) | values for name, values in sections.items()}))


SWEEP = make()


class InProcess:
    """Trains packs and scans candidates where it stands. Shared inputs are the objects themselves."""

    device = "cpu"
    slot_bytes = 1 << 30
    capacity = Capacity(num_slots=1, slot_bytes=slot_bytes, cpus=1, gpus=0)

    def share(self, inputs: Any) -> Any:
        return inputs

    def train(
        self, program: Any, shared: RunInputs, ray_folder: Any, retries: int, listen: Callable[[PackProgress], None]
    ) -> Any:
        while True:
            try:
                packs = next(program)
            except StopIteration as end:
                return end.value
            inputs = TaskInputs(shared, *packs.inputs)
            plan = inputs.plan
            for pack in packs.indices:
                for _ in run_pack(inputs, [plan.points[index] for index in plan.packs[pack]]):
                    pass

    def scan(
        self,
        shared: RunInputs,
        of_task: tuple[TaskPlan, State, Any],
        points: Sequence[Point],
        min_correct: int,
        rule: str,
        retries: int,
        listen: Callable[[int], None],
    ) -> Iterator[ScanRecord]:
        return (scan_point(TaskInputs(shared, *of_task), point, min_correct, rule) for point in points)


def run_in_process(sweep: Sweep, folder: RunFolder, listeners: Sequence[Listener] = ()) -> Summary:
    """A run to its end, or on to it."""
    if not folder.exists("sweep.yaml"):
        folder.write_sweep(sweep.to_yaml())
    return runner_of(TaskSequence(sweep), folder, InProcess(), listeners).run()  # type: ignore[arg-type]
