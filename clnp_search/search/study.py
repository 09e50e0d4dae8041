"""Points that Optuna proposes, a batch at a time, on the results of those before.

A study is made again from the task's records whenever it is asked, and each batch has a sampler with a seed of its own.
So a run that was killed goes on to the same points, and the file that is kept is for people (and for optuna-dashboard).
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import Trial, TrialState

from clnp_search.clnp.seeds import generator
from clnp_search.config import AlphaValue, SearchConfig, alpha_parts
from clnp_search.records import Outcome, Point

optuna.logging.set_verbosity(optuna.logging.WARNING)


class Study:
    """A task's study.

    Args:
        layers: Names of the network's layers, the head last.
    """

    def __init__(self, search: SearchConfig, seed: int, task: int, layers: Sequence[str]) -> None:
        self._search, self._seed, self._task, self._layers = search, seed, task, layers
        self._space: dict[str, BaseDistribution] = {
            name: FloatDistribution(each.low, each.high, log=True) for name, each in search.ranges.items()
        }
        self._batches = 0
        self._study = optuna.create_study(study_name=f"task {task}", directions=["maximize"] * len(search.objectives))

    def tell(self, points: Sequence[Point], outcomes: Sequence[Outcome]) -> None:
        """Takes note of a batch that was trained."""
        for point in points:
            self._study.enqueue_trial(self._values(point), {"point": point.name})
        for trial, outcome in zip(self._ask(len(points)), outcomes, strict=True):
            if outcome.accuracy is None:
                self._study.tell(trial, state=TrialState.FAIL)
                continue
            if "sparsity" in self._search.objectives:
                trial.set_constraint("margin", outcome.outside)
            told = {"accuracy": outcome.accuracy, "sparsity": outcome.sparsity}
            self._study.tell(trial, [told[each] for each in self._search.objectives])

    def propose(self, number: int) -> list[tuple[AlphaValue, float]]:
        """The next points: their alphas and learning rates."""
        ranges = self._search.ranges
        return [
            self._search.at({name: ranges[name].rounded(value) for name, value in trial.params.items()})
            for trial in self._ask(number)
        ]

    def to_bytes(self) -> bytes:
        """The study as a journal file, which Optuna and its dashboard open."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "study.log")
            optuna.copy_study(
                from_study_name=self._study.study_name,
                from_storage=self._study._storage,
                to_storage=JournalStorage(JournalFileBackend(str(path))),
            )
            return path.read_bytes()

    def _ask(self, number: int) -> list[Trial]:
        """Trials of one batch; those that are enqueued come first."""
        self._study.sampler = self._sampler()
        self._batches += 1
        return [self._study.ask(self._space) for _ in range(number)]

    def _sampler(self) -> BaseSampler:
        seed = generator(self._seed, "search", self._task, self._batches).initial_seed() % 2**32
        size = self._search.batch_size
        if self._search.sampler == "gp":
            return GPSampler(seed=seed, n_startup_trials=size)
        if self._search.sampler == "nsga2":
            return NSGAIISampler(seed=seed, population_size=max(2, size))
        return TPESampler(seed=seed, n_startup_trials=size)

    def _values(self, point: Point) -> dict[str, float]:
        """What a point has in place of each range."""
        parts = alpha_parts(self._search.alpha[0], self._layers)
        values = dict(zip(parts, point.alpha, strict=True)) | {"learning_rate": point.learning_rate}
        return {name: values.get(name, each.low) for name, each in self._search.ranges.items()}
