"""A task's Optuna study: made again from records, it proposes the same."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import optuna
import pytest
from builders import make_sweep
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from clnp_search.config import Sweep
from clnp_search.records import Outcome, Point
from clnp_search.search.proposals import as_points
from clnp_search.search.study import Study

LAYERS = ("hidden0", "head")
BATCH, BATCHES = 4, 5


def make(**search: Any) -> Sweep:
    ranges = {"alpha": {"low": 1e-6, "high": 1e-1}, "learning_rate": {"low": 1e-3, "high": 1e-1}}
    numbers = {"points": BATCH * BATCHES, "batch": BATCH}
    return make_sweep(network={"hidden": [4]}, search={"algorithm": "optuna"} | ranges | numbers | search)


def outcome(point: Point) -> Outcome:
    """Best at alpha 1e-3 and a learning rate of 1e-2; sparser with larger alphas; the margin is 20%."""
    away = abs(math.log10(point.alpha[0]) + 3) + abs(math.log10(point.learning_rate) + 2)
    accuracy = 1 - 0.1 * away
    inside = accuracy > 0.8
    return Outcome(accuracy, 1 + math.log10(point.alpha[0]) / 6 if inside else 0.0, 0.8 - accuracy)


def study_of(sweep: Sweep, points: tuple[Point, ...], task: int = 0) -> Study:
    study = Study(sweep.search, sweep.seed, task, LAYERS)
    for start in range(0, len(points), BATCH):
        batch = points[start : start + BATCH]
        study.tell(batch, [outcome(point) for point in batch])
    return study


def searched(sweep: Sweep, task: int = 0, batches: int = BATCHES) -> tuple[Point, ...]:
    points: tuple[Point, ...] = ()
    for _ in range(batches):
        points += as_points(sweep, LAYERS, study_of(sweep, points, task).propose(BATCH), len(points))
    return points


def opened(data: bytes, folder: Path) -> optuna.Study:
    (folder / "study.log").write_bytes(data)
    storage = JournalStorage(JournalFileBackend(str(folder / "study.log")))
    return optuna.load_study(study_name=None, storage=storage)


SAMPLERS = [
    ("tpe", ["accuracy", "sparsity"]),
    ("tpe", ["accuracy"]),
    ("tpe", ["sparsity"]),
    ("gp", ["accuracy"]),
    ("gp", ["accuracy", "sparsity"]),
    ("nsga2", ["accuracy", "sparsity"]),
]


@pytest.mark.parametrize(("sampler", "objectives"), SAMPLERS)
def test_a_study_made_again_from_the_same_records_proposes_the_same(sampler: str, objectives: list[str]) -> None:
    sweep, batches = make(sampler=sampler, objectives=objectives), 2 if sampler == "gp" else BATCHES
    points = searched(sweep, batches=batches)
    assert points == searched(sweep, batches=batches)
    assert len({point.alpha for point in points}) > BATCH
    assert study_of(sweep, points[:BATCH], task=1).propose(BATCH) != study_of(sweep, points[:BATCH]).propose(BATCH)


@pytest.mark.parametrize("objectives", [["accuracy", "sparsity"], ["accuracy"], ["sparsity"]])
def test_later_points_are_better_than_the_first(objectives: list[str]) -> None:
    def mean(points: tuple[Point, ...]) -> float:
        found = [outcome(point) for point in points]
        return sum(sum(getattr(each, name) for name in objectives) for each in found) / len(found)

    sweep = make(objectives=objectives)
    searches = [searched(sweep, task) for task in range(4)]
    last, first = (sum((points[part] for points in searches), ()) for part in (slice(-BATCH, None), slice(BATCH)))
    assert mean(last) > mean(first)


def test_what_is_kept_opens_in_optuna(tmp_path: Path) -> None:
    sweep = make()
    points = searched(sweep)[: 2 * BATCH]
    study = study_of(sweep, points)
    study.propose(BATCH)
    found = opened(study.to_bytes(), tmp_path)
    told, running = found.trials[: 2 * BATCH], found.trials[2 * BATCH :]
    assert [trial.params["alpha"] for trial in told] == [point.alpha[0] for point in points]
    assert [trial.params["learning_rate"] for trial in told] == [point.learning_rate for point in points]
    assert [trial.values for trial in told] == [[outcome(point).accuracy, outcome(point).sparsity] for point in points]
    assert [trial.user_attrs["point"] for trial in told] == [point.name for point in points]
    assert [trial.state for trial in running] == [TrialState.RUNNING] * BATCH


def test_points_outside_the_margin_are_not_among_the_best(tmp_path: Path) -> None:
    sweep = make(objectives=["sparsity"])
    inside, outside = as_points(sweep, LAYERS, [(1e-3, 1e-2), (1e-1, 1e-1)])
    study = Study(sweep.search, 0, 0, LAYERS)
    study.tell([inside, outside], [Outcome(0.9, 0.1, -0.1), Outcome(0.1, 0.9, 0.7)])
    assert opened(study.to_bytes(), tmp_path).best_trial.user_attrs["point"] == inside.name


def test_a_failed_point_is_a_failed_trial(tmp_path: Path) -> None:
    sweep = make()
    points = as_points(sweep, LAYERS, [(1e-3, 1e-2), (1e-1, 1e-1)])
    study = Study(sweep.search, 0, 0, LAYERS)
    study.tell(points, [Outcome(None), Outcome(0.5, 0.5)])
    assert [trial.state for trial in opened(study.to_bytes(), tmp_path).trials] == [
        TrialState.FAIL,
        TrialState.COMPLETE,
    ]
    assert len(study.propose(BATCH)) == BATCH


def test_alphas_of_layers_are_told_by_their_own_ranges(tmp_path: Path) -> None:
    wide = {"low": 1e-6, "high": 1e-1}
    for alpha, names in (([[wide, wide]], ("0", "1")), ({"hidden*": wide, "*": wide}, ("hidden*", "*"))):
        sweep = make(alpha=alpha)
        study = Study(sweep.search, 0, 0, LAYERS)
        study.tell([Point(0, (1e-5, 1e-2), 0.01)], [Outcome(0.5, 0.5)])
        params = opened(study.to_bytes(), tmp_path).trials[0].params
        assert params == {f"alpha[{names[0]}]": 1e-5, f"alpha[{names[1]}]": 1e-2, "learning_rate": 0.01}
