"""The threshold scan: the highest theta whose pruned model stays inside the margin. Evaluation only, no training.

Accuracy is not monotone in theta, so every distinct activity is tried, from the highest down, and the first that
passes is the answer. Two observations make that cheap. Units sorted by activity turn every pruned model into a prefix
of each group, so models are slices: when a group gains a unit, its others stay as they were, and so does all before
them. And a theta is rejected, exactly, as soon as more samples are wrong than the margin allows; the samples that a
recent model got most wrong say so at once. Only a theta that survives those few is evaluated on the whole split.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from clnp_search.clnp.graph import INPUT, Node
from clnp_search.clnp.ops import Linear, Reader
from clnp_search.clnp.pack import CACHE_BYTES, Block, Features, Trunk
from clnp_search.clnp.state import FreeParameters, State, mean_outputs, own_index, shift
from clnp_search.records import CurveStep, ScanRecord

CURVE_STEPS = 16
# A sample counts as wrong without a full evaluation only if its margin is below this share of the largest logit:
# a few samples round differently from a whole split, by about 1e-6.
ROUNDING = 1e-4
HELD_BYTES = 3 << 29  # what the values of a search may take
# Starts of the search for one theta a group, times the free units: all that pass in small networks, few in wide ones,
# and one in networks of maps.
STARTED_UNITS = 4096

Counts = tuple[int, ...]


class Candidate:
    """One trained point, ready to be evaluated at any threshold.

    Its free units are sorted by falling activity, so that a model with `counts[g]` units of group g keeps the first
    ones of each group.

    Args:
        state: What the point was trained on.
        trained: The point's parameters and activities.
        inputs: [N, ...] of the validation split, as the network takes samples.
        labels: [N] int64.

    Attributes:
        tried: Models that a scan has gone through so far.
    """

    def __init__(
        self, state: State, trained: FreeParameters, inputs: Tensor, labels: Tensor, cache_bytes: int = CACHE_BYTES
    ) -> None:
        graph, device = state.graph, inputs.device
        self.state, self.graph, self.labels, self.tried = state, graph, labels, 0
        self.groups = tuple(graph.groups)
        order = {group: torch.argsort(trained.activities[group], descending=True, stable=True) for group in self.groups}
        self.activities = [trained.activities[group][order[group]] for group in self.groups]
        self.all: Counts = tuple(len(values) for values in self.activities)
        sizes = dict(zip(self.groups, self.all, strict=True))
        self._tensors: dict[str, dict[str, Tensor]] = {}
        for node in graph.nodes:
            if node.name in trained.tensors:
                rows, columns = (own_index(each.groups, order, sizes) for each in (node, graph.source(node)))
                is_head = node.name == graph.head
                own = {name: part if is_head else part[rows] for name, part in trained.tensors[node.name].items()}
                if "weight.own" in own:
                    own["weight.own"] = own["weight.own"][:, columns]
                self._tensors[node.name] = {name: part[None].to(device) for name, part in own.items()}
        # For each layer that makes up for what is pruned: by group and number of units kept, what the others give.
        self.given: dict[str, dict[str, Tensor]] = {}
        for name, means in trained.means.items():
            groups = [group for group in graph.source(graph.by_name[name]).groups if group in sizes]
            ordered = means[own_index(tuple(groups), order, sizes)].to(device)
            given = mean_outputs(self._tensors[name]["weight.own"][0], ordered).split(
                [sizes[each] for each in groups], 1
            )
            of_group = self.given[name] = {}
            for group, part in zip(groups, given, strict=True):  # a group may be there twice
                pruned = functional.pad(part.flip(1).cumsum(1).flip(1), (0, 1))
                of_group[group] = of_group[group] + pruned if group in of_group else pruned
        active = state.active()
        self.frozen = tuple(len(active[group]) for group in self.groups)
        self.features = Features(Trunk(state, device), inputs, labels, cache_bytes)
        self.held_limit = min(HELD_BYTES, cache_bytes)

    def model(self, counts: Counts) -> Block:
        """The model that keeps the first `counts[g]` free units of each group."""
        kept = dict(zip(self.groups, counts, strict=True))
        sizes = dict(zip(self.groups, self.all, strict=True))

        def cut(tensor: Tensor, dim: int, groups: Sequence[str]) -> Tensor:
            if len(groups) == 1:
                return tensor.narrow(dim, 0, kept.get(groups[0], 0))  # a view
            units = {group: torch.arange(kept[group]) for group in groups if group in kept}
            return tensor.index_select(dim, own_index(tuple(groups), units, sizes).to(tensor.device))

        whole = dict(self._tensors)
        for name, given in self.given.items():
            shift(self.graph, whole, name, torch.stack([part[:, kept[group]] for group, part in given.items()]).sum(0))
        tensors: dict[str, dict[str, Tensor]] = {}
        for name, own in whole.items():
            node = self.graph.by_name[name]
            parts = dict(own) if name == self.graph.head else {each: cut(own[each], 1, node.groups) for each in own}
            if "weight.own" in parts:
                parts["weight.own"] = cut(parts["weight.own"], 2, self.graph.source(node).groups)
            tensors[name] = parts
        return Block(self.graph, kept, tensors, self.state.architecture.head_reads_frozen)

    @cached_property
    def passing(self) -> set[str]:
        """Nodes that are read unit by unit alone: of a unit whose values stay, theirs are not needed any more."""
        nodes = self.graph.pooled_first.nodes
        read = {name for node in nodes for name in node.inputs}
        beyond = {name for node in nodes if isinstance(node.op, Reader) or len(node.inputs) > 1 for name in node.inputs}
        several = {node.name for node in nodes if len(node.groups) > 1}
        return {node.name for node in nodes if not isinstance(node.op, Linear)} & read - beyond - several

    @cached_property
    def _readers(self) -> list[tuple[Node, tuple[str, ...]]]:
        """The layers, and the groups that each reads."""
        return [(node, self.graph.source(node).groups) for node in self.graph.nodes if isinstance(node.op, Reader)]

    @cached_property
    def adding(self) -> set[str]:
        """Layers to whose values, if these are held, what new units give can be added."""
        return {
            node.name
            for node, read in self._readers
            if len(read) == 1 and read != (INPUT,) and node.name not in self.given
        }

    @cached_property
    def shared(self) -> set[str]:
        """Layers of which what all their units read of frozen ones is held.

        Of maps that read nothing else it is not, because it is asked for once.
        """
        frozen = {INPUT: 1, **dict(zip(self.groups, self.frozen, strict=True))}
        own = {INPUT: 0, **dict(zip(self.groups, self.all, strict=True))}
        return {
            node.name
            for node, read in self._readers
            if any(frozen[group] for group in read) and (not node.positions or any(own[group] for group in read))
        }

    @cached_property
    def added_bytes(self) -> int:
        """What `Grown` holds of a sample besides, at most, to add to it."""
        return 4 * sum(self.graph.value_size(name, self.graph.groups) for name in self.passing & self.adding)

    @cached_property
    def held_bytes(self) -> int:
        """What `Grown` holds of a sample, at most: values, and what layers read of frozen units."""
        order = self.graph.pooled_first
        values = [node.name for node in order.nodes if node.name not in self.passing]
        return 4 * sum(order.value_size(name, order.groups) for name in [*values, *self.shared])

    @cached_property
    def unbiased(self) -> Block:
        """The model that keeps all units, its layers without their biases."""
        whole = self.model(self.all)
        for node in self.graph.nodes:
            if isinstance(node.op, Reader):
                whole.tensors[node.name].pop("bias", None)
        return whole

    @torch.inference_mode()
    def logits(self, counts: Counts) -> Tensor:
        """Logits [N, C] of a model on the whole split."""
        model, order = self.model(counts), self.graph.pooled_first
        return torch.cat(
            [model.logits(model.forward(levels, graph=order))[0].T for levels, _ in self.features.batches()]
        )

    def num_correct(self, counts: Counts | None = None) -> int:
        """How many samples of the whole split a model gets right; by default, the one that keeps all units."""
        return self.right(self.logits(self.all if counts is None else counts))

    def right(self, logits: Tensor) -> int:
        """How many samples of the whole split these logits [N, C] get right."""
        return int((logits.argmax(1) == self.labels).sum())

    def path(self, thetas: Iterable[Sequence[float]]) -> list[Counts]:
        """For each group its thetas, of as many models: free units of each whose activity is strictly above."""
        limits = [torch.tensor(each, dtype=torch.float64) for each in thetas]
        above = zip(self.activities, limits, strict=True)
        return list(zip(*(torch.searchsorted(-values, -limit).tolist() for values, limit in above), strict=True))


class Grown:
    """A candidate's models on a few samples, while they gain units.

    What does not change is kept: what the frozen units give, all values before the first layer that reads a new unit,
    and of layers that read what they read before, the units that they had. A layer that reads new units, and whose
    values are kept, adds what these give. Models that are evaluated at once stand one behind another as samples, from
    the first layer on that reads different units in them.

    Args:
        hold: Whether values are kept at all, which takes memory.
        add: Whether those of all layers of the candidate's `adding` are.
    """

    @torch.inference_mode()
    def __init__(self, candidate: Candidate, samples: Tensor | slice, hold: bool = True, add: bool = True) -> None:
        self._candidate, self._hold = candidate, hold
        self._passing = candidate.passing - candidate.adding if add else candidate.passing
        self._levels, self.labels = candidate.features.batch(samples)
        self._order = candidate.graph.pooled_first
        self._shared: dict[str, Tensor] = {}  # what each layer's units, all of them, read of the frozen ones
        self._values: dict[str, Tensor] = {}  # of the last model
        self._units = dict.fromkeys(self._order.by_name, 0)

    @torch.inference_mode()
    def advance(self, path: Sequence[Counts]) -> Tensor:
        """Logits [K, S, C] of K models on a path; none has fewer units than the one before, or than the last time."""
        if not self._hold:
            blocks = map(self._candidate.model, path)
            return torch.cat([each.logits(each.forward(self._levels, graph=self._order)) for each in blocks]).mT
        model, samples = self._candidate.model(path[-1]), len(self.labels)
        kept = {group: torch.tensor(counts) for group, *counts in zip(self._candidate.groups, *path, strict=True)}
        differ = {group for group, counts in kept.items() if counts[0] < counts[-1]}
        apart: set[str] = set()  # nodes whose values differ from model to model
        before, stay = dict(self._units), dict.fromkeys(self._units, 0)  # units that were there, and whose values stay
        for node in self._order.nodes:
            source, is_reader = self._order.source(node), isinstance(node.op, Reader)
            reads_others = (is_reader and not differ.isdisjoint(source.groups)) or not apart.isdisjoint(node.inputs)
            if reads_others and model.width(node):
                apart.add(node.name)
            elif all(stay[name] == self._units[name] for name in node.inputs):
                stay[node.name] = before[node.name]
            elif not is_reader and len(node.groups) == 1:
                stay[node.name] = min(stay[name] for name in node.inputs)
            self._units[node.name], first = model.width(node) // node.taps, stay[node.name]
            if first == self._units[node.name]:
                continue
            models = len(path) if node.name in apart else 1
            read = {name: self._values[name] for name in node.inputs if name in self._values}
            can_add = node.name in self._candidate.adding and node.name in self._values
            if can_add and 0 < stay[source.name] < self._units[source.name]:
                value = self._added(model, node, stay[source.name], kept)
            elif is_reader:
                read = {name: _without_pruned(value, samples, source, kept) for name, value in read.items()}
                value = self._read(model, node, read, first, models)
            else:
                read = {name: _for_each(self._from(name, first), samples, models) for name in read}
                value = model.compute(self._order, node, read, self._levels, first=first)
            if first and node.name not in self._passing:
                value = torch.cat([self._values[node.name], value], 1 if value.ndim == 4 else 0)
            self._values[node.name] = value
        logits = model.logits(self._values)[0].unflatten(1, (-1, samples)).permute(1, 2, 0)
        for name in self._passing:
            self._values.pop(name, None)
        for name in apart & self._values.keys():
            value = self._values[name]
            self._values[name] = value[-samples:] if value.ndim == 4 else value[:, -samples:]
        return logits.expand(len(path), -1, -1)

    def _from(self, name: str, first: int) -> Tensor:
        """A node's value from a unit on."""
        value = self._values[name]
        return value if name in self._passing else _channels(value, first * self._order.by_name[name].taps)

    def _added(self, model: Block, node: Node, there: int, kept: Mapping[str, Tensor]) -> Tensor:
        """The value of a layer for each model; the last one had the first `there` units of its input."""
        value, source, samples = self._values[node.name], self._order.source(node), len(self.labels)
        read, weight = self._values[source.name], model.tensors[node.name]["weight.own"][0]
        dim = 1 if value.ndim == 4 else 0
        if (units := value.shape[dim]) < len(weight):
            rows = _product(node, weight[units:, :there], _channels(read, 0, there * source.taps))
            value = torch.cat([value, rows + self._read(model, node, {}, units, 1)], dim)
        more = _without_pruned(_channels(read, there * source.taps), samples, source, kept, there)
        added = _by_model(_product(node, weight[:, there:], more), samples)
        return _joined(added.add_(_by_model(value, samples)))

    def _read(self, model: Block, node: Node, own: dict[str, Tensor], first: int, models: int) -> Tensor:
        """A layer's value from its unit `first` on."""
        if node.name not in self._candidate.shared:
            return model.compute(self._order, node, own, self._levels, first=first)
        nothing = {INPUT: self.labels.new_empty(models * len(self.labels), 0)}
        value = model.compute(self._order, node, own, nothing, first=first)
        if model.shared(self._order, node, self._levels) is None:
            return value
        if node.name not in self._shared:
            self._shared[node.name] = self._candidate.unbiased.compute(self._order, node, {}, self._levels)
        shared, units = self._shared[node.name], model.width(node)
        shared = _channels(shared, first, units)
        return _joined(_by_model(value, len(self.labels)) + _by_model(shared, len(self.labels)))


def _product(node: Node, weight: Tensor, read: Tensor) -> Tensor:
    """What some weights [F, I, taps] of a layer make of values that they read."""
    return weight.flatten(1) @ read if read.ndim == 2 else node.op.plain([read], {"weight": weight})


def _channels(value: Tensor, first: int, end: int | None = None) -> Tensor:
    """Some channels of a value."""
    return value[:, first:end] if value.ndim == 4 else value[first:end]


def _by_model(value: Tensor, samples: int) -> Tensor:
    """A value [K * S, C, H, W] or [C, K * S] with a dimension for the models: [K, S, C, H, W] or [C, K, S]."""
    return value.unflatten(0 if value.ndim == 4 else 1, (-1, samples))


def _joined(value: Tensor) -> Tensor:
    """The same without that dimension."""
    return value.flatten(0, 1) if value.ndim == 5 else value.flatten(1)


def _for_each(value: Tensor, samples: int, models: int) -> Tensor:
    """A value that may be alike for all models, for each of them."""
    each = _by_model(value, samples)
    return _joined(each.expand(models, -1, -1, -1, -1) if each.ndim == 5 else each.expand(-1, models, -1))


def _without_pruned(value: Tensor, samples: int, node: Node, kept: Mapping[str, Tensor], first: int = 0) -> Tensor:
    """A node's value for each model, without the units beyond those that it keeps of each group [K].

    Args:
        first: The unit that the value begins with.
    """
    of_groups = [kept[group] for group in node.groups if group in kept]
    if all(counts[0] == counts[-1] for counts in of_groups):
        return value
    is_kept = torch.cat([torch.arange(int(counts[-1]))[:, None] < counts for counts in of_groups])[first:]
    is_kept = is_kept.repeat_interleave(node.taps, 0).to(value.device)
    each = _by_model(value, samples)
    return _joined(each * (is_kept.T[:, None, :, None, None] if each.ndim == 5 else is_kept[:, :, None]))


def highest_passing(candidate: Candidate, path: list[Counts], min_correct: int) -> tuple[int, dict[int, int]]:
    """The first model on a path that gets at least `min_correct` samples right.

    Args:
        path: Free units of each group, growing from entry to entry.

    Returns:
        Its position on the path (`len(path)` if none passes), and for each position that was evaluated on the whole
        split, the samples that are right.
    """
    evaluated: dict[int, int] = {}
    position = 0
    while position < len(path):
        logits = candidate.logits(path[position])
        evaluated[position] = candidate.right(logits)
        if evaluated[position] >= min_correct:
            break
        position = _next_possible(candidate, path, position + 1, logits, len(candidate.labels) - min_correct)
    return position, evaluated


def _next_possible(candidate: Candidate, path: list[Counts], start: int, logits: Tensor, allowed: int) -> int:
    """The first position from `start` on at which too few samples are clearly wrong to rule it out.

    The samples that `logits`, of the model before, get most wrong are mostly wrong in the next models too. So they are
    seen first, part by part, until more of them are wrong than is allowed.
    """
    hardest = _margins(logits, candidate.labels).argsort()[: 2 * allowed + 64]
    parts = hardest.split(candidate.features.batch_size)
    # Biases that make up for what is pruned differ from model to model.
    together = 1 if candidate.given else candidate.features.batch_size // len(parts[0])
    held, added = (together * len(parts[0]) * each for each in (candidate.held_bytes, candidate.added_bytes))
    always = math.ceil((allowed + 1) / len(parts[0]))  # parts are seen
    adding = max(0, min(always, (candidate.held_limit - always * held) // max(1, added)))
    grown: list[Grown] = []
    for position in range(start, len(path), together):
        models = path[position : position + together]
        wrong = candidate.labels.new_zeros(len(models))
        for index, samples in enumerate(parts):
            if index == len(grown):
                fits = (index + 1) * held + adding * added <= candidate.held_limit
                grown.append(Grown(candidate, samples, fits, index < adding))
            wrong = wrong + _clearly_wrong(grown[index].advance(models), grown[index].labels)
            if (wrong > allowed).all():
                candidate.tried += len(models)
                break
        else:
            return position + int((wrong <= allowed).nonzero()[0])
    return len(path)


def scan(
    candidate: Candidate, point: int, min_correct: int, rule: str = "global", curve_steps: int = CURVE_STEPS
) -> ScanRecord:
    """The highest threshold that keeps a candidate inside the margin, with its curve.

    Args:
        point: The candidate's index in the grid.
        min_correct: Validation samples that the pruned model must get right.
        rule: `global`: one theta for all groups. `per_layer`: one for each; the fewest units that are found by
            raising one group's theta after another, from the last to the first and the other way, from global thetas
            that pass (our choice; the paper leaves it open). With `-of-N` behind it, only N thresholds are tried on
            each path, evenly spaced: a few thousand are too many where a single evaluation takes a second.
        curve_steps: Evenly spaced thresholds on the curve, besides all that the search evaluated.
    """
    started = time.perf_counter()
    kind, _, number = rule.partition("-of-")
    steps = int(number or 0)
    zero = torch.zeros(1, dtype=torch.float64)
    values = _thinned(torch.cat([*candidate.activities, zero]).unique().flip(0).tolist(), steps)
    path = candidate.path([values] * len(candidate.activities))
    chosen, evaluated = highest_passing(candidate, path, min_correct)
    for position in sorted({*_spaced(len(path), curve_steps), max(0, chosen - 1)} - evaluated.keys()):
        evaluated[position] = candidate.num_correct(path[position])
    depth = len(candidate.activities)
    seen = [((values[position],) * depth, path[position], correct) for position, correct in sorted(evaluated.items())]
    curve = tuple(_curve(candidate, seen))
    if chosen == len(path):
        return _record(candidate, point, None, path[-1], evaluated[len(path) - 1], curve, (), started)
    if kind == "global":
        theta = (values[chosen],) * depth
        return _record(candidate, point, theta, path[chosen], evaluated[chosen], curve, (), started)
    known: Known = {}
    raised = [
        _raise_all(candidate, [values[start]] * depth, order, min_correct, steps, known)
        for start in _starts(candidate, path, chosen, evaluated, min_correct)
        for order in (range(depth)[::-1], range(depth))
    ]
    best = min(raised, key=lambda each: (sum(each[1]), -each[2]))
    return _record(candidate, point, tuple(best[0]), *best[1:3], curve, best[3], started)


Raised = tuple[list[float], Counts, int, tuple[tuple[CurveStep, ...], ...]]
# For a group and the counts of the others: the steps (theta, counts, right samples) that were evaluated, and the best.
Step = tuple[float, Counts, int]
Known = dict[tuple[int, Counts], tuple[list[Step], Step]]


def _starts(
    candidate: Candidate, path: list[Counts], chosen: int, evaluated: dict[int, int], min_correct: int
) -> Iterator[int]:
    """Positions of global thetas from which single ones are raised: the highest that passes, and lower ones."""
    number = max(1, STARTED_UNITS // max(1, sum(candidate.all))) if candidate.graph.is_dense else 1
    lower = range(chosen, len(path))
    for position in sorted({chosen, *(lower[each] for each in _spaced(len(lower), number))}):
        correct = evaluated.get(position)
        correct = candidate.num_correct(path[position]) if correct is None else correct
        if correct >= min_correct:
            yield position


def _raise_all(
    candidate: Candidate, theta: list[float], order: Iterable[int], min_correct: int, steps: int, known: Known
) -> Raised:
    """Each group's theta raised as far as the others allow, one after another."""
    curves: list[tuple[CurveStep, ...]] = [()] * len(theta)
    (counts,), correct = candidate.path([[value] for value in theta]), 0
    for group in order:
        others = (group, (*counts[:group], *counts[group + 1 :]))
        if others not in known:  # many starts lead to the same models
            known[others] = _raise_one(candidate, group, theta, min_correct, steps)
        seen, (value, counts, correct) = known[others]
        curve = [([*theta[:group], tried, *theta[group + 1 :]], units, right) for tried, units, right in seen]
        curves[group] = tuple(_curve(candidate, curve))
        theta = [*theta[:group], value, *theta[group + 1 :]]
    return theta, counts, correct, tuple(curves)


def _raise_one(
    candidate: Candidate, group: int, theta: list[float], min_correct: int, steps: int
) -> tuple[list[Step], Step]:
    """The highest theta of one group that passes while the others keep theirs."""
    values = candidate.activities[group].unique().flip(0)
    tried = _thinned([*values[values > theta[group]].tolist(), theta[group]], steps)
    path = candidate.path([tried if each == group else [value] * len(tried) for each, value in enumerate(theta)])
    chosen, evaluated = highest_passing(candidate, path, min_correct)
    for position in {max(0, chosen - 1)} - evaluated.keys():
        evaluated[position] = candidate.num_correct(path[position])
    seen = [(tried[position], path[position], correct) for position, correct in sorted(evaluated.items())]
    return seen, (tried[chosen], path[chosen], evaluated[chosen])


def _spaced(length: int, number: int) -> list[int]:
    """At most `number` positions of `length`, evenly spaced, the first and the last among them."""
    return sorted({round(step * (length - 1) / max(1, number - 1)) for step in range(number)})


def _thinned(values: list[float], number: int) -> list[float]:
    """At most `number` of some values, likewise; all for 0."""
    return [values[position] for position in _spaced(len(values), number)] if number else values


def _curve(candidate: Candidate, steps: Iterable[tuple[Sequence[float], Counts, int]]) -> Iterator[CurveStep]:
    for theta, counts, correct in steps:
        yield CurveStep(tuple(theta), correct / len(candidate.labels), _active(candidate, counts))


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
    active, totals = _active(candidate, counts), tuple(candidate.graph.groups.values())
    used, weights = (
        candidate.graph.hidden_weights(dict(zip(candidate.groups, units, strict=True))) for units in (active, totals)
    )
    return ScanRecord(
        point=point,
        theta=theta,
        val_correct=correct,
        val_total=len(candidate.labels),
        active=active,
        totals=totals,
        weight_sparsity=1.0 - used / weights,
        curve=curve,
        layer_curves=layer_curves,
        seconds=time.perf_counter() - started,
    )


def _margins(logits: Tensor, labels: Tensor) -> Tensor:
    """By how much each sample's true class leads the best other one [..., S] in logits [..., S, C]; negative where it
    is wrong.
    """
    labels = labels.expand(logits.shape[:-1])[..., None]
    others = logits.scatter(-1, labels, -math.inf).amax(-1)
    return logits.gather(-1, labels)[..., 0] - others


def _clearly_wrong(logits: Tensor, labels: Tensor) -> Tensor:
    """How many samples each of some models [K] gets clearly wrong, by their logits [K, S, C]."""
    tolerance = ROUNDING * (1 + logits.abs().amax((1, 2)))
    return (_margins(logits, labels) < -tolerance[:, None]).sum(1)
