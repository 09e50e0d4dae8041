"""Recorded work on a GPU; on a CPU, that it is called each time."""

from __future__ import annotations

import pytest
import torch
from builders import GRAPHS, make_state, make_training, run_all

from clnp_search.clnp.graph import conv
from clnp_search.clnp.replay import Replay
from clnp_search.clnp.state import Architecture
from clnp_search.clnp.training import TrainingSettings

NETWORKS = {**GRAPHS, "dropout": conv((2, 6, 6), [4, "pool"], [5], dropout=0.25)}


def test_work_is_done_each_time_it_is_called_on_what_its_tensors_hold_by_then(device: torch.device) -> None:
    replay, values = Replay(device), torch.tensor([1.0, 2.0], device=device)
    total = torch.zeros((), device=device)

    def add() -> torch.Tensor:
        total.add_(values.sum())
        return total * 2

    seen = []
    for step in range(4):
        values.fill_(step)
        seen.append(replay("add", add).item())
    assert seen == [0.0, 4.0, 12.0, 24.0]


def test_staged_values_are_found_at_one_place_for_each_shape(device: torch.device) -> None:
    replay = Replay(device)
    first, second, short = (
        replay.stage("levels", torch.full(shape, value, device=device))
        for shape, value in (((3,), 1.0), ((3,), 2.0), ((2,), 3.0))
    )
    assert second.tolist() == [2.0] * 3
    assert short.tolist() == [3.0] * 2
    if device.type == "cuda":
        assert first.data_ptr() == second.data_ptr() != short.data_ptr()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("kind", ["adam", "sgd"])
@pytest.mark.parametrize("network", NETWORKS)
def test_replayed_training_gives_the_bits_of_kernels_launched_one_by_one(
    network: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = TrainingSettings(4, 8, kind)

    def trained() -> dict[str, torch.Tensor]:
        state = make_state(Architecture(NETWORKS[network]), 1)
        alphas = [(alpha,) * len(state.graph.layers) for alpha in (0.0, 1e-4, 1e-3)]
        pack, training = make_training(state, alphas, [0.01, 0.01, 0.02], settings, "cuda")
        run_all(training)
        return pack.tensors

    replayed = trained()
    monkeypatch.setattr(Replay, "__call__", lambda self, key, work: work())
    for name, tensor in trained().items():
        assert torch.equal(replayed[name], tensor), name
