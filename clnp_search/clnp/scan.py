"""The threshold scan: the highest theta whose pruned model stays inside the margin. Evaluation only, no training.

Accuracy is not monotone in theta, so every distinct activity is tried, from the highest down, and the first that
passes is the answer. Two observations make that cheap. Units sorted by activity turn every pruned model into a
prefix of each layer, so models are slices, and the next one differs from the last by a few columns. And a theta is
rejected, exactly, as soon as more samples are wrong than the margin allows; the samples that a recent model got most
wrong say so at once. Only a theta that survives those few samples is evaluated on the whole split.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from clnp_search.clnp.activations import ACTIVATIONS
from clnp_search.clnp.pack import Trunk
from clnp_search.clnp.state import FreeParameters, State
from clnp_search.records import CurveStep, ScanRecord

CURVE_STEPS = 16
# A sample counts as wrong without a full evaluation only if its margin is below this share of the largest logit:
# incremental sums round differently from a fresh evaluation, by about 1e-6.
ROUNDING = 1e-4

Counts = tuple[int, ...]


class Candidate:
    """One trained point, ready to be evaluated at any threshold.

    Its free units are sorted by falling activity, so that a model with `counts[l]` units of layer l keeps the
    first ones of each layer.

    Args:
        state: What the point was trained on.
        trained: The point's parameters and activities.
        inputs: [N, in_features] of the validation split.
        labels: [N] int64.
    """

    def __init__(self, state: State, trained: FreeParameters, inputs: Tensor, labels: Tensor) -> None:
        architecture = state.architecture
        device = inputs.device
        self.state, self.labels = state, labels
        self._activation = ACTIVATIONS[architecture.activation]
        trunk = Trunk(state, device)
        self.frozen = tuple(len(layer.active(state.num_tasks)) for layer in state.layers)
        self.activities = []
        self._own: list[Tensor] = []
        levels = trunk.split_levels(inputs)
        self._base: list[Tensor] = []
        below = torch.zeros(0, dtype=torch.int64)
        for index, activity in enumerate(trained.activities):
            order = torch.argsort(activity, descending=True, stable=True)
            weight, bias = trained.weights[index][order].to(device), trained.biases[index][order].to(device)
            self.activities.append(activity[order])
            width = trunk.widths[index]
            self._base.append(functional.linear(levels[index], weight[:, :width], bias))
            self._own.append(weight[:, width:][:, below])
            below = order
        weight = trained.head_weight.to(device)
        width = trunk.widths[-1] if architecture.head == "multi" else 0
        bias = torch.zeros(len(weight)) if trained.head_bias is None else trained.head_bias
        self._base.append(functional.linear(levels[-1][:, :width], weight[:, :width], bias.to(device)))
        self._own.append(weight[:, width:][:, below])
        # The first layer's outputs depend on no threshold.
        self._first = self._activation.apply_(self._base[0])

    def logits(self, counts: Counts, samples: Tensor | slice = slice(None)) -> Tensor:
        """Logits [S, C] of the model that keeps `counts[l]` free units of each layer, on some samples."""
        return Grown(self, samples).advance(counts)

    def num_correct(self, logits: Tensor) -> int:
        """How many samples of the whole split these logits [N, C] get right."""
        return int((logits.argmax(1) == self.labels).sum())

    def counts(self, theta: Iterable[float]) -> Counts:
        """Free units of each layer whose activity is strictly above its theta."""
        return tuple(int((values > limit).sum()) for values, limit in zip(self.activities, theta, strict=True))


class Grown:
    """A candidate's model on a few samples, while units are added to it.

    `advance` to larger counts adds the new units' columns to the pre-activations of the layer above; only layers
    above that one are computed afresh.
    """

    def __init__(self, candidate: Candidate, samples: Tensor | slice) -> None:
        self._first = candidate._first[samples]
        self._base = [base[samples] for base in candidate._base[1:]]
        self._own = candidate._own[1:]
        self._apply = candidate._activation.function
        self._counts: Counts = (0,) * len(candidate.activities)
        # Only the head's columns exist from the start; those of a hidden layer are written as its units come.
        self._sums = [torch.empty_like(base) for base in self._base[:-1]] + [self._base[-1].clone()]

    def advance(self, counts: Counts) -> Tensor:
        """Logits [S, C] of the model with `counts` free units in each layer; counts never shrink."""
        num_classes = len(self._own[-1])
        before, self._counts = (*self._counts, num_classes), counts
        after = (*counts, num_classes)
        below, rewritten = self._first[:, : counts[0]], False
        for layer, (sums, base, weight) in enumerate(zip(self._sums, self._base, self._own, strict=True), start=1):
            old, new, old_width, width = before[layer], after[layer], before[layer - 1], after[layer - 1]
            if rewritten:
                torch.addmm(base[:, :new], below, weight[:new, :width].T, out=sums[:, :new])
            else:
                if width > old_width and old:
                    sums[:, :old].addmm_(below[:, old_width:], weight[:old, old_width:width].T)
                if new > old:
                    sums[:, old:new] = torch.addmm(base[:, old:new], below, weight[old:new, :width].T)
                # Units that were here before have changed if the layer below has gained any.
                rewritten = width > old_width and old > 0
            if layer < len(self._sums):
                below = self._apply(sums[:, :new])
        return self._sums[-1]


def highest_passing(candidate: Candidate, path: list[Counts], min_correct: int) -> tuple[int, dict[int, int]]:
    """The first model on a path that gets at least `min_correct` samples right.

    Args:
        path: Free units of each layer, growing from entry to entry.

    Returns:
        Its position on the path (`len(path)` if none passes), and for each position that was evaluated on the whole
        split, the samples that are right.
    """
    total = len(candidate.labels)
    allowed = total - min_correct
    evaluated: dict[int, int] = {}
    position = 0
    while position < len(path):
        logits = candidate.logits(path[position])
        evaluated[position] = candidate.num_correct(logits)
        if evaluated[position] >= min_correct:
            return position, evaluated
        # The samples that are most wrong now will mostly be wrong in the next models too: a few more than the margin
        # allows are enough while most are wrong, and all that may turn near the threshold.
        num_hardest = allowed + 64 if total - evaluated[position] > 3 * allowed else 2 * allowed + 64
        hardest = _margins(logits, candidate.labels).topk(min(total, num_hardest), largest=False).indices
        labels = candidate.labels[hardest]
        grown = Grown(candidate, hardest)
        for position in range(position + 1, len(path) + 1):  # noqa: B020
            if position < len(path) and _clearly_wrong(grown.advance(path[position]), labels) <= allowed:
                break
    return position, evaluated


def scan(
    candidate: Candidate, point: int, min_correct: int, rule: str = "global", curve_steps: int = CURVE_STEPS
) -> ScanRecord:
    """The highest threshold that keeps a candidate inside the margin, with its curve.

    Args:
        point: The candidate's index in the grid.
        min_correct: Validation samples that the pruned model must get right.
        rule: `global`: one theta for all layers. `per_layer`: from there, each layer's own theta is raised as
            far as the others allow, from the last hidden layer to the first (our choice; the paper leaves it open).
        curve_steps: Evenly spaced thresholds on the curve, besides all that the search evaluated.
    """
    started = time.perf_counter()
    values = torch.cat([*candidate.activities, torch.zeros(1, dtype=torch.float64)]).unique().flip(0).tolist()
    path = [candidate.counts([value] * len(candidate.activities)) for value in values]
    chosen, evaluated = highest_passing(candidate, path, min_correct)
    spaced = {round(step * (len(path) - 1) / max(1, curve_steps - 1)) for step in range(curve_steps)}
    everything = Grown(candidate, slice(None))
    for position in sorted({*spaced, max(0, chosen - 1)} - evaluated.keys()):
        evaluated[position] = candidate.num_correct(everything.advance(path[position]))
    depth = len(candidate.activities)
    steps = [((values[position],) * depth, path[position], correct) for position, correct in sorted(evaluated.items())]
    curve = tuple(_curve(candidate, steps))
    if chosen == len(path):
        return _record(candidate, point, None, path[-1], evaluated[len(path) - 1], curve, (), started)
    theta, counts, correct = [values[chosen]] * depth, path[chosen], evaluated[chosen]
    layer_curves: list[tuple[CurveStep, ...]] = [()] * depth
    if rule == "per_layer":
        for layer in reversed(range(depth)):
            theta, counts, correct, layer_curves[layer] = _raise_layer(candidate, layer, theta, counts, min_correct)
    return _record(candidate, point, tuple(theta), counts, correct, curve, tuple(layer_curves), started)


def _raise_layer(
    candidate: Candidate, layer: int, theta: list[float], counts: Counts, min_correct: int
) -> tuple[list[float], Counts, int, tuple[CurveStep, ...]]:
    """The highest theta of one layer that passes while the others keep theirs."""
    values = candidate.activities[layer].unique().flip(0)
    tried = [*values[values > theta[layer]].tolist(), theta[layer]]
    thetas = [[*theta[:layer], value, *theta[layer + 1 :]] for value in tried]
    path = [candidate.counts(each) for each in thetas]
    chosen, evaluated = highest_passing(candidate, path, min_correct)
    for position in {max(0, chosen - 1)} - evaluated.keys():
        evaluated[position] = candidate.num_correct(candidate.logits(path[position]))
    steps = [(tuple(thetas[position]), path[position], correct) for position, correct in sorted(evaluated.items())]
    return thetas[chosen], path[chosen], evaluated[chosen], tuple(_curve(candidate, steps))


def _curve(candidate: Candidate, steps: list[tuple[tuple[float, ...], Counts, int]]) -> Iterator[CurveStep]:
    for theta, counts, correct in steps:
        yield CurveStep(theta, correct / len(candidate.labels), _active(candidate, counts))


def _active(candidate: Candidate, counts: Counts) -> Counts:
    return tuple(frozen + count for frozen, count in zip(candidate.frozen, counts, strict=True))


def _record(
    candidate: Candidate,
    point: int,
    theta: tuple[float, ...] | None,
    counts: Counts,
    correct: int,
    curve: tuple[CurveStep, ...],
    layer_curves: tuple[tuple[CurveStep, ...], ...],
    started: float,
) -> ScanRecord:
    architecture = candidate.state.architecture
    active = _active(candidate, counts)
    inputs = (architecture.in_features, *active[:-1])
    used = sum(units * width for units, width in zip(active, inputs, strict=True))
    weights = sum(units * width for units, width in zip(architecture.hidden, architecture.fan_in, strict=True))
    return ScanRecord(
        point=point,
        theta=theta,
        val_correct=correct,
        val_total=len(candidate.labels),
        active=active,
        totals=architecture.hidden,
        weight_sparsity=1.0 - used / weights,
        curve=curve,
        layer_curves=layer_curves,
        seconds=time.perf_counter() - started,
    )


def _margins(logits: Tensor, labels: Tensor) -> Tensor:
    """By how much each sample's true class leads the best other one [S]; negative where it is wrong."""
    others = logits.scatter(1, labels[:, None], float("-inf")).amax(1)
    return logits.gather(1, labels[:, None])[:, 0] - others


def _clearly_wrong(logits: Tensor, labels: Tensor) -> int:
    tolerance = ROUNDING * (1 + logits.abs().amax())
    return int((_margins(logits, labels) < -tolerance).sum())
