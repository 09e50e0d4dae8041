"""Schedules, the loss, and checkpoints that go on to the same bits."""

from __future__ import annotations

import ctypes
import json
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from builders import GRAPHS, HEADS, make_network, make_pack, make_samples, make_state, make_training, run_all
from torch.nn import functional

from clnp_search.clnp.graph import conv
from clnp_search.clnp.initial import draw
from clnp_search.clnp.pack import Features, Pack, cross_entropy
from clnp_search.clnp.scan import Candidate, scan
from clnp_search.clnp.state import Architecture, State, read_safetensors
from clnp_search.clnp.training import Training, TrainingSettings

SMALL = make_network()
DROPOUT = conv((2, 6, 6), [4, "pool"], [5], dropout=0.25)
NETWORKS = {"mlp": GRAPHS["mlp"], "conv_norm": GRAPHS["conv_norm"], "dropout": DROPOUT}
ALPHAS: list[tuple[float, ...]] = [(0.0, 0.0, 0.0), (0.01, 0.02, 0.03), (0.1, 0.0, 0.2)]
RATES = [0.01, 0.01, 0.02]
SETTINGS = TrainingSettings(epochs=4, batch_size=8, weight_decay=0.01)


def started(
    settings: TrainingSettings = SETTINGS, device: torch.device | str = "cpu", network: str = "mlp"
) -> tuple[Pack, Training]:
    graph = NETWORKS[network]
    alphas = [(*alpha, *alpha)[: len(graph.layers)] for alpha in ALPHAS]
    return make_training(make_state(Architecture(graph), 1), alphas, RATES, settings, device)


# Schedules


def test_a_constant_schedule_keeps_the_learning_rate() -> None:
    _, training = started(replace(SETTINGS, schedule="constant"))
    run_all(training)
    assert [[seen.learning_rate for seen in epoch] for epoch in training.history] == [RATES] * 4


def test_a_cosine_schedule_falls_from_the_learning_rate_to_zero_step_by_step() -> None:
    _, training = started()
    run_all(training)
    # 30 samples in batches of 8 are 4 steps; an epoch shows the rate of its last one.
    expected = [[rate * (1 + math.cos(math.pi * (4 * epoch + 3) / 16)) / 2 for rate in RATES] for epoch in range(4)]
    for epoch, rates in zip(training.history, expected, strict=True):
        assert [seen.learning_rate for seen in epoch] == pytest.approx(rates, rel=1e-12)


def test_the_first_step_of_a_cosine_schedule_is_at_the_full_learning_rate() -> None:
    one_step = replace(SETTINGS, epochs=1, batch_size=30)
    _, training = started(one_step)
    assert [seen.learning_rate for seen in training.run_epoch()] == RATES


# Epochs


def test_an_epoch_counts_itself_and_is_kept() -> None:
    _, training = started()
    seen = [training.run_epoch() for _ in range(4)]
    assert training.finished
    assert training.epoch == 4
    assert training.history == seen
    assert [epoch[0].epoch for epoch in seen] == [0, 1, 2, 3]


def test_the_train_loss_is_the_mean_over_all_samples_without_the_penalty() -> None:
    # A rate that moves nothing, so that every batch sees the same network.
    settings = TrainingSettings(epochs=1, batch_size=8, optimizer="sgd")
    pack, training = make_training(State.empty(SMALL), ALPHAS, [1e-30] * 3, settings)
    inputs, labels = make_samples(50, seed=0)
    block = pack.blocks[0]
    logits = block.logits(block.forward(pack.features(inputs[:30], labels[:30]).batch(slice(0, 30))[0])).detach()
    expected = [functional.cross_entropy(own.T, labels[:30]).item() for own in logits]
    assert [seen.train_loss for seen in training.run_epoch()] == pytest.approx(expected, rel=1e-6)


def test_the_validation_accuracy_is_that_of_the_trained_network() -> None:
    pack, training = started()
    run_all(training)
    inputs, labels = make_samples(50, seed=1)
    correct = pack.num_correct(pack.features(inputs[30:], labels[30:]))
    assert [seen.val_accuracy for seen in training.history[-1]] == [right / 20 for right in correct]


def test_the_data_order_depends_on_seed_task_and_epoch_alone() -> None:
    _, ours = started()
    _, same = started()
    ours.run_epoch()
    torch.rand(100)
    same.run_epoch()
    assert ours.history == same.history


def test_what_is_random_in_a_step_is_drawn_anew_for_every_seed_task_and_step(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    train_batch = Pack.train_batch

    def watched(pack: Pack, features: Features, index: torch.Tensor, seed: int = 0) -> torch.Tensor:
        drawn.append(seed)
        return train_batch(pack, features, index, seed)

    monkeypatch.setattr(Pack, "train_batch", watched)
    for seed, task in ((0, 0), (1, 0), (2**63 - 1, 0), (0, 1)):
        train, validation = make_samples(30, seed=0), make_samples(9, seed=1)
        pack = make_pack(State.empty(SMALL), ALPHAS)
        settings = TrainingSettings(epochs=2, batch_size=8)
        training = Training(pack, RATES, pack.features(*train), pack.features(*validation), settings, seed, task)
        run_all(training)
    assert len(set(drawn)) == len(drawn) == 4 * 2 * 4
    for seed in drawn:
        torch.Generator().manual_seed(seed + 255)


class MallInfo(ctypes.Structure):
    """glibc's struct mallinfo2: bytes of malloc's heap, of which some are free, and of blocks mapped beside it."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ["arena", "ordblks", "smblks", "hblks", "mapped", "usmblks", "fsmblks", "used", "free", "keepcost"]
    ]


def large_blocks() -> tuple[int, int]:
    """Takes a block for which malloc's heap has no room, and frees it; how many were mapped, and how many are kept."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = MallInfo
    before = mallinfo()
    block = torch.empty(before.free + (64 << 20), dtype=torch.uint8)
    mapped = mallinfo().mapped - before.mapped
    size = len(block)
    del block
    return mapped // size, mallinfo().free // size


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="memory is kept by settings of glibc's malloc")
def test_an_epoch_uses_the_memory_of_those_before(monkeypatch: pytest.MonkeyPatch) -> None:
    _, training = make_training(State.empty(SMALL), ALPHAS, RATES, TrainingSettings(1, batch_size=1000))
    inside = []
    monkeypatch.setattr(Pack, "shrink", lambda *_: inside.append(large_blocks()))
    assert large_blocks() == (1, 0)
    training.run_epoch()
    assert inside == [(0, 1)]
    assert large_blocks() == (1, 0)


@pytest.mark.parametrize(("head", "bias"), HEADS)
@pytest.mark.parametrize("network", GRAPHS)
def test_a_task_trains_the_same_on_what_one_task_would_have_left(network: str, head: str, bias: str) -> None:
    state = make_state(Architecture(GRAPHS[network], head, bias), 3)
    group = next(iter(state.born))
    state = state.widened({group: len(state.born[group]) + 2})
    inputs, labels = make_samples(50, state.graph.input_shape)
    split = (inputs[:30], labels[:30]), (inputs[30:], labels[30:])
    trained, settings, alphas = [], TrainingSettings(2, 8, "adam"), [(0.01,) * len(state.graph.layers)]
    for each in (state, state.as_one_task):
        pack = Pack(each, 2, alphas, draw(each, 2, seed=1, task=3))
        parts = [pack.features(*part) for part in split]
        run_all(Training(pack, [0.02], *parts, settings, 0, 3))
        point = pack.point(0, pack.activities(parts[0])[0])
        record = scan(Candidate(each, point, inputs, labels), 0, 20, "per_layer")
        again = Pack(each, 2, alphas, [point.pruned(each.graph, dict.fromkeys(each.born, 0.1))])
        run_all(Training(again, [0.02], *(again.features(*part) for part in split), settings, 0, 3))
        rounds = [pack.point(0, pack.activities(pack.features(*split[0]))[0]).to_bytes() for pack in (pack, again)]
        trained.append((rounds, replace(record, seconds=0.0)))
    assert state.as_one_task.faults() == []
    assert trained[0] == trained[1]


def test_a_diverging_point_ends_as_a_record_and_not_as_an_error() -> None:
    settings = TrainingSettings(epochs=2, batch_size=8, optimizer="sgd")
    pack, training = make_training(State.empty(SMALL), ALPHAS, [0.01, 1e30, 0.02], settings)
    run_all(training)
    assert pack.finite() == [True, False, True]
    assert math.isnan(training.history[-1][1].train_loss)
    assert 0 <= training.history[-1][1].val_accuracy <= 1


# The loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_and_its_gradient_equal_torchs(dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(3, 5, 7, generator=generator)).to(device, dtype)
    labels = torch.randint(5, (7,), generator=generator).to(device)
    loss, grad = cross_entropy(logits, labels, 7)
    assert grad.dtype == dtype
    for position in range(3):
        leaf = logits[position].double().requires_grad_()
        expected = functional.cross_entropy(leaf.T, labels)
        expected.backward()
        assert leaf.grad is not None
        torch.testing.assert_close(loss[position].double(), 7 * expected.detach(), rtol=1e-6, atol=1e-6)
        tolerance = 1e-6 if dtype == torch.float32 else 1e-3
        torch.testing.assert_close(grad[position].double(), leaf.grad, rtol=tolerance, atol=tolerance)


def test_cross_entropy_of_huge_logits_is_finite() -> None:
    loss, grad = cross_entropy(torch.tensor([[[1e30, -1e30], [-1e30, 1e30]]]), torch.tensor([0, 0]), 2)
    assert loss.item() == pytest.approx(2e30)
    assert grad.tolist() == [[[0, -0.5], [0, 0.5]]]


def test_cross_entropy_leaves_the_logits_as_they_are() -> None:
    logits = torch.randn(2, 4, 3)
    before = logits.clone()
    cross_entropy(logits, torch.tensor([0, 1, 2]), 3)
    assert torch.equal(logits, before)


# Checkpoints


@pytest.mark.parametrize(
    ("network", "optimizer", "done"),
    [
        *(("mlp", optimizer, done) for optimizer in ("adam", "adamw", "sgd") for done in (0, 1, 3, 4)),
        ("conv_norm", "adam", 1),
        ("dropout", "sgd", 2),
    ],
)
def test_a_restored_training_ends_at_the_bits_of_an_undisturbed_one(
    network: str, optimizer: str, done: int, device: torch.device
) -> None:
    settings = replace(SETTINGS, optimizer=optimizer)
    pack, undisturbed = started(settings, device, network)
    run_all(undisturbed)
    torch.rand(1)  # whatever else has drawn
    _, killed = started(settings, device, network)
    for _ in range(done):
        killed.run_epoch()
    data = killed.to_bytes()
    del killed
    resumed_pack, resumed = started(settings, device, network)
    resumed.restore(data)
    assert resumed.epoch == done
    run_all(resumed)
    assert resumed.history == undisturbed.history
    assert all(torch.equal(tensor, resumed_pack.tensors[name]) for name, tensor in pack.tensors.items())
    assert resumed.to_bytes() == undisturbed.to_bytes()


def test_a_training_goes_back_to_its_own_checkpoint() -> None:
    _, training = started()
    data = training.to_bytes()
    run_all(training)
    end = training.to_bytes()
    training.restore(data)
    assert training.epoch == 0
    run_all(training)
    assert training.to_bytes() == end


def test_sgd_without_momentum_is_restored() -> None:
    settings = replace(SETTINGS, optimizer="sgd", momentum=0.0)
    _, training = started(settings)
    training.run_epoch()
    _, resumed = started(settings)
    resumed.restore(training.to_bytes())
    run_all(training)
    run_all(resumed)
    assert resumed.to_bytes() == training.to_bytes()


def test_a_checkpoint_of_a_diverged_pack_is_restored() -> None:
    settings = TrainingSettings(epochs=2, batch_size=8, optimizer="sgd")
    _, training = make_training(State.empty(SMALL), ALPHAS, [0.01, 1e30, 0.02], settings)
    training.run_epoch()
    _, resumed = make_training(State.empty(SMALL), ALPHAS, [0.01, 1e30, 0.02], settings)
    resumed.restore(training.to_bytes())
    run_all(training)
    run_all(resumed)
    assert resumed.to_bytes() == training.to_bytes()


def test_a_checkpoint_of_a_full_network_is_restored() -> None:
    full = make_state(replace(SMALL, head="single"), 1, theta=-1.0)
    _, training = make_training(full, ALPHAS, RATES, SETTINGS)
    training.run_epoch()
    _, resumed = make_training(full, ALPHAS, RATES, SETTINGS)
    resumed.restore(training.to_bytes())
    assert resumed.epoch == 1


@pytest.mark.parametrize("length", [0, 1, 8, 100, -1])
def test_a_checkpoint_that_was_cut_short_raises_value_error(length: int) -> None:
    _, training = started()
    training.run_epoch()
    _, other = started()
    with pytest.raises(ValueError, match="not a checkpoint of this pack"):
        other.restore(training.to_bytes()[:length])


def test_a_damaged_checkpoint_header_raises_nothing_but_value_error() -> None:
    _, training = started(replace(SETTINGS, optimizer="sgd"))
    training.run_epoch()
    data = training.to_bytes()
    _, other = started(replace(SETTINGS, optimizer="sgd"))
    refused = 0
    for position in range(8 + int.from_bytes(data[:8], "little")):
        try:
            other.restore(data[:position] + bytes([data[position] ^ 16]) + data[position + 1 :])
        except ValueError:
            refused += 1
    assert refused > 500


def rewritten(data: bytes, change: Callable[[dict[str, torch.Tensor]], None]) -> bytes:
    header, tensors = read_safetensors(data, "training")
    change(tensors)
    return safetensors.torch.save(tensors, {"training": json.dumps(header)})


@pytest.mark.parametrize("name", ["pack.0/hidden0/bias", "optimizer.count", "optimizer.2.1.0"])
def test_a_checkpoint_without_a_parameter_raises_value_error(name: str) -> None:
    def remove(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[name]

    _, training = started()
    with pytest.raises(ValueError, match="not a checkpoint of this pack"):
        training.restore(rewritten(training.to_bytes(), remove))


def test_a_parameter_that_would_only_fit_by_broadcasting_raises_value_error() -> None:
    def shrink(tensors: dict[str, torch.Tensor]) -> None:
        name = "pack.0/hidden0/bias"
        tensors[name] = tensors[name][:1].contiguous()

    _, training = started()
    with pytest.raises(ValueError, match="not a checkpoint of this pack"):
        training.restore(rewritten(training.to_bytes(), shrink))


def other_packs() -> list[tuple[str, Training]]:
    state = make_state(SMALL, 1)
    wide = make_state(make_network((6, 6)), 1)
    sgd = replace(SETTINGS, optimizer="sgd")
    return [
        ("fewer points", make_training(state, ALPHAS[:1], RATES[:1], SETTINGS)[1]),
        ("more points", make_training(state, [*ALPHAS, ALPHAS[0]], [*RATES, 0.05], SETTINGS)[1]),
        ("other learning rates", make_training(state, ALPHAS, [0.01, 0.02, 0.02], SETTINGS)[1]),
        ("another optimizer", make_training(state, ALPHAS, RATES, sgd)[1]),
        ("another width", make_training(wide, ALPHAS, RATES, SETTINGS)[1]),
        ("another task", make_training(make_state(SMALL, 2), ALPHAS, RATES, SETTINGS)[1]),
        ("more epochs", make_training(state, ALPHAS, RATES, replace(SETTINGS, epochs=9))[1]),
    ]


@pytest.mark.parametrize("other", [pytest.param(each, id=name) for name, each in other_packs()])
def test_a_checkpoint_of_another_pack_raises_value_error_and_changes_nothing(other: Training) -> None:
    other.run_epoch()
    _, training = started()
    training.run_epoch()
    before = training.to_bytes()
    with pytest.raises(ValueError, match="not a checkpoint of this pack"):
        training.restore(other.to_bytes())
    assert training.to_bytes() == before


def test_a_state_is_no_checkpoint() -> None:
    _, training = started()
    with pytest.raises(ValueError, match="not a checkpoint of this pack"):
        training.restore(make_state(SMALL, 1).to_bytes())
