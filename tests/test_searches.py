"""Random and Optuna searches as a sequence runs them: cut short anywhere, they go on to the same points."""

from __future__ import annotations

import json
from typing import Any

import optuna
import pytest
from in_process import make, run_in_process
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from clnp_search.config import Sweep
from clnp_search.search import trial
from clnp_search.storage import RunFolder, run_folder
from clnp_search.verification import verify

SEARCH: dict[str, Any] = {
    "points": 6,
    "alpha": {"low": 1e-5, "high": 1e-2},
    "learning_rate": {"low": 1e-3, "high": 1e-1},
}
SWEEPS = {
    "random": make(search=SEARCH | {"algorithm": "random"}),
    "optuna": make(search=SEARCH | {"algorithm": "optuna", "batch": 2}),
    "accuracy": make(search=SEARCH | {"algorithm": "optuna", "batch": 4, "objectives": ["accuracy"]}),
}


@pytest.fixture(scope="module", params=SWEEPS)
def searched(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Sweep, RunFolder]:
    """A sweep and its finished run."""
    folder = run_folder(str(tmp_path_factory.mktemp("runs")), request.param)
    run_in_process(SWEEPS[request.param], folder)
    return SWEEPS[request.param], folder


def test_every_task_tries_points_of_its_own_and_is_proven(searched: tuple[Sweep, RunFolder]) -> None:
    _, folder = searched
    plans = [folder.read_plan(task) for task in range(2)]
    assert all(plan is not None and len(plan.points) == 6 and len(folder.read_points(plan.task)) == 6 for plan in plans)
    assert plans[0].points != plans[1].points  # type: ignore[union-attr]
    assert all(check.passed for check in verify(folder))


def test_a_search_that_was_cut_short_anywhere_ends_with_the_same_state(
    searched: tuple[Sweep, RunFolder], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep, whole = searched
    folder, train, left = run_folder(str(tmp_path), "cut"), trial.train_pack, 0

    def cut_short(*arguments: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return train(*arguments)

    monkeypatch.setattr(trial, "train_pack", cut_short)
    for attempt in range(20):
        left = 1 + attempt % 2
        try:
            summary = run_in_process(sweep, folder)
            break
        except KeyboardInterrupt:
            continue
    else:
        pytest.fail("it did not end")
    assert attempt
    assert summary.state_digest == whole.read_summary().state_digest  # type: ignore[union-attr]
    for task in range(2):
        assert [record.key for record in folder.read_points(task)] == [record.key for record in whole.read_points(task)]


def test_the_study_that_is_kept_has_what_the_task_has_seen(searched: tuple[Sweep, RunFolder]) -> None:
    sweep, folder = searched
    if sweep.search.algorithm != "optuna":
        assert not folder.exists("tasks/000/study.log")
        return
    assert folder.local_path is not None
    storage = JournalStorage(JournalFileBackend(str(folder.local_path / "tasks" / "000" / "study.log")))
    study = optuna.load_study(study_name="task 0", storage=storage)
    records = folder.read_points(0)
    assert [trial.user_attrs["point"] for trial in study.trials] == [record.point.name for record in records]
    assert [trial.values[0] for trial in study.trials] == [record.val_accuracy for record in records]


def test_the_pareto_front_of_a_task_is_written_down(searched: tuple[Sweep, RunFolder]) -> None:
    _, folder = searched
    header, *rows = folder.read("tasks/000/pareto.csv").decode().splitlines()
    assert header == "point,theta,val_accuracy,unit_sparsity"
    values = [tuple(map(float, row.rsplit(",", 2)[1:])) for row in rows]
    assert values == sorted(values, key=lambda each: each[0])
    assert [sparsity for _, sparsity in values] == sorted((sparsity for _, sparsity in values), reverse=True)
    assert all(json.loads(row.split('"')[1]) for row in rows)


def test_a_fork_takes_over_what_optuna_proposed_first(searched: tuple[Sweep, RunFolder], tmp_path: Any) -> None:
    from clnp_search.branching import fork, points_taken_over

    sweep, folder = searched
    new = run_folder(str(tmp_path), "fork")
    changed = sweep.model_copy(update={"forgetting": sweep.forgetting.model_copy(update={"margin": 0.5})})
    fork(folder, changed, -1, new)
    run_in_process(changed, new)
    taken, _ = points_taken_over(new)
    assert taken >= sweep.search.batch_size
