"""Other methods on the same networks, to compare with: what each does to a pack, and what it hands on to the next task.

All of a baseline's units take part in every task. So a pack trains the whole network, on a state in which nothing is
frozen, from the parameters that the last task left; and the state after a task is one in which all units are active
from the first task on. What else a method must know of earlier tasks is the state's `memory`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from clnp_search.clnp.graph import CLASSES, INPUT, Graph, Node, compute
from clnp_search.clnp.ops import Linear
from clnp_search.clnp.pack import Pack, Regulariser, evaluation_batch, free_part
from clnp_search.clnp.state import FREE, KEEP_ALL, FreeParameters, Parameters, State, TaskInfo, commit, flat, nested

DAMPING = 0.1  # of SI, "xi" there; the paper's for permuted MNIST
FISHER_CHUNK = 64  # samples whose gradients of one layer are held at a time


class Baseline:
    """How a method goes from task to task. As it stands it is fine-tuning: the last network is trained further.

    Class attributes:
        GOES_ON: Whether a task starts from the last network, instead of anew.
        JOINT: Whether a task is trained on the data of all tasks so far.
        ALONE: Whether a task keeps a network of its own, that of its own state.
    """

    GOES_ON: ClassVar[bool] = True
    JOINT: ClassVar[bool] = False
    ALONE: ClassVar[bool] = False

    def pack(
        self,
        state: State,
        drawn: Parameters,
        strengths: Sequence[float],
        classes: Sequence[int],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Pack:
        """The pack of some points, before their training.

        Args:
            state: After the last task.
            drawn: Fresh parameters at full size.
            strengths: One for each point.
            classes: Of each task whose samples are trained on; those of several tasks have a head together, one after
                another, unless the head is shared.
        """
        graph, start = state.graph, dict(drawn)
        if self.GOES_ON and state.tasks:
            start |= state.tensors
            if state.architecture.head == "shared":
                start[graph.head] = state.heads[-1]
        num_classes = len(start[graph.head]["weight"])
        alphas = [(0.0,) * len(graph.layers)] * len(strengths)
        pack = Pack(State.empty(state.architecture), num_classes, alphas, start, device, dtype)
        if len(classes) > 1 and state.architecture.head == "multi":
            tasks = torch.arange(len(classes)).repeat_interleave(torch.tensor(classes))
            pack.class_tasks = tasks.to(pack.device)
        pack.regulariser = self.regulariser(pack, state, strengths)
        return pack

    def regulariser(self, pack: Pack, state: State, strengths: Sequence[float]) -> Regulariser | None:
        """What it adds to a pack's training.

        Args:
            state: After the last task.
            strengths: One for each point.
        """
        return None

    def learned(self, pack: Pack, position: int, trained: FreeParameters, info: TaskInfo, raw: Tensor) -> Parameters:
        """What it must know of a trained point of the pack, by node and parameter, at full size.

        Args:
            raw: The task's training samples.
        """
        return {}

    def finished(
        self, pack: Pack, position: int, trained: FreeParameters, info: TaskInfo, raw: Tensor
    ) -> FreeParameters:
        """A trained point with what the method must know of it."""
        learned = flat(self.learned(pack, position, trained, info, raw))
        if pack.state.architecture.head == "multi":  # a head of its own is not trained again
            learned = {name: each for name, each in learned.items() if not _is_of_head(pack.graph, name)}
        return replace(trained, learned={name: each.cpu() for name, each in learned.items()})

    def after(self, state: State, info: TaskInfo, trained: FreeParameters) -> State:
        """The state after one more task.

        Raises:
            ValueError: A parameter is not finite.
        """
        tasks = (*state.tasks, info)
        alone = _alone(state, info, trained)
        (head,) = alone.heads
        if state.architecture.head == "shared":
            heads = (head,) * len(tasks)
        elif self.JOINT:
            sizes = [task.num_classes for task in tasks]
            parts = {name: tensor.split(sizes) for name, tensor in head.items()}
            heads = tuple({name: parts[name][index] for name in parts} for index in range(len(tasks)))
        else:
            heads = (*state.heads, head)
        after = replace(alone, tasks=tasks, heads=heads, parent=state.digest)
        after = replace(after, memory=self.memory(state, after, trained.learned))
        if faults := after.faults():
            raise ValueError(f"task {state.num_tasks} cannot be committed: " + "; ".join(faults))
        return after

    def memory(self, state: State, after: State, learned: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """What the next task must know besides the network `after` this one.

        Args:
            state: Before it.
            learned: As `learned` gave it of the point that was chosen.
        """
        return {}


class SingleTask(Baseline):
    """Every task has a network of its own, from fresh parameters: nothing is handed on, so nothing is forgotten."""

    GOES_ON, ALONE = False, True


class Joint(Baseline):
    """Every task is trained anew on the data of all tasks so far: what could be had if no data were ever gone."""

    GOES_ON, JOINT = False, True


class Ewc(Baseline):
    """Elastic weight consolidation: a parameter is held where it was by how much old predictions depend on it.

    Source: Kirkpatrick et al. 2017, "Overcoming catastrophic forgetting in neural networks", equation 3, with a
    penalty for each earlier task: strength / 2 * sum of F (w - w*)^2. Their sum over tasks is one quadratic form, whose
    F is the sum and whose w* the mean by F.
    """

    def regulariser(self, pack: Pack, state: State, strengths: Sequence[float]) -> Regulariser | None:
        return Quadratic(pack, state, strengths) if state.memory else None

    def learned(self, pack: Pack, position: int, trained: FreeParameters, info: TaskInfo, raw: Tensor) -> Parameters:
        network = _values(_alone(pack.state, info, trained))
        tensors = {node: {name: each.to(pack.device) for name, each in own.items()} for node, own in network.items()}
        return fisher(pack.graph, tensors, info.transform(raw.to(pack.device)))

    def memory(self, state: State, after: State, learned: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        now, importance, anchor = flat(_values(after)), dict[str, Tensor](), dict[str, Tensor]()
        for name, new in learned.items():
            importance[name], anchor[name] = new, now[name]
            if state.memory:
                old = state.memory["importance"][name]
                importance[name] = total = old + new
                mean = (old * state.memory["anchor"][name] + new * now[name]) / total
                anchor[name] = torch.where(total > 0, mean, now[name])
        return {"importance": importance, "anchor": anchor}


class Si(Baseline):
    """Synaptic intelligence: a parameter is held where it was by how much its way there has lowered the loss.

    Source: Zenke, Poole and Ganguli 2017, "Continual learning through synaptic intelligence", equations 4 and 5:
    strength * sum of Omega (w - w*)^2, of the last task's w*. That Omega never falls below zero is from their code.
    """

    def regulariser(self, pack: Pack, state: State, strengths: Sequence[float]) -> Regulariser | None:
        return PathIntegral(pack, state, strengths)

    def learned(self, pack: Pack, position: int, trained: FreeParameters, info: TaskInfo, raw: Tensor) -> Parameters:
        assert isinstance(pack.regulariser, PathIntegral)
        gained = pack.regulariser.importance(position)
        parts = {
            node: {name: gained.get(f"{node}/{name}", torch.zeros_like(tensor)) for name, tensor in own.items()}
            for node, own in trained.tensors.items()
        }
        return _values(_alone(pack.state, info, replace(trained, tensors=parts)))

    def memory(self, state: State, after: State, learned: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        now, before = flat(_values(after)), state.memory.get("importance", {})
        importance = {name: (before.get(name, 0.0) + new).clamp(min=0) for name, new in learned.items()}
        return {"importance": importance, "anchor": {name: now[name] for name in importance}}


class PackNet(Baseline):
    """Each task keeps the largest of the weights that are still free, as they are, and gives the others back, at zero.

    Two thirds of the epochs train all free weights; then the smallest of each layer, a share that is the strength, are
    pruned, and the rest of the epochs trains what is left. Biases are the first task's. A head of the task's own is
    neither pruned nor kept from anything.

    Source: Mallya and Lazebnik 2018, "PackNet: adding multiple tasks to a single network by iterative pruning",
    section 3, where 20 epochs before pruning and 10 after it are in that proportion; one learning rate schedule over
    both is our choice.
    """

    def regulariser(self, pack: Pack, state: State, strengths: Sequence[float]) -> Regulariser | None:
        return Held(pack, state, strengths)

    def memory(self, state: State, after: State, learned: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        owner, task = {}, state.num_tasks
        for name, tensor in flat(_values(after)).items():
            if name.endswith("/weight") and _is_packed(after, name):
                before = (
                    state.memory["owner"][name] if state.memory else torch.full_like(tensor, FREE, dtype=torch.int32)
                )
                owner[name] = before.where((before != FREE) | (tensor == 0), task)
        return {"owner": owner}


BASELINES: dict[str, Baseline] = {
    "single_task": SingleTask(),
    "finetune": Baseline(),
    "joint": Joint(),
    "ewc": Ewc(),
    "si": Si(),
    "packnet": PackNet(),
}


class Quadratic(Regulariser):
    """strength / 2 * sum of importance * (w - anchor)^2, of a state's memory."""

    def __init__(self, pack: Pack, state: State, strengths: Sequence[float]) -> None:
        importance, anchor = (_parts(state, state.memory.get(what, {}), pack) for what in ("importance", "anchor"))
        factors = torch.tensor(strengths, dtype=torch.float32, device=pack.device)
        self._trained = list(pack.trainable())
        # Of one step: of its parameters from the anchor; what else a step keeps may stand here afterwards.
        self._difference = [torch.empty_like(tensor.detach()) for *_, tensor in self._trained]
        self._terms = [
            (tensor, factors[points].view(-1, *[1] * (tensor.ndim - 1)), importance[name], anchor[name], difference)
            for (name, points, tensor), difference in zip(self._trained, self._difference, strict=True)
            if name in importance
        ]

    @torch.no_grad()
    def begin(self) -> None:
        for tensor, factor, importance, anchor, difference in self._terms:
            assert tensor.grad is not None
            torch.sub(tensor, anchor, out=difference).mul_(importance)
            tensor.grad.addcmul_(difference, factor)


class PathIntegral(Quadratic):
    """SI's penalty, and the integral of its importances: by how much a parameter's steps lowered the data's loss."""

    def __init__(self, pack: Pack, state: State, strengths: Sequence[float]) -> None:
        super().__init__(pack, state, [2 * strength for strength in strengths])
        self._start, self._penalty, self._path = (
            [make(tensor.detach()) for *_, tensor in self._trained]
            for make in (torch.clone, torch.zeros_like, torch.zeros_like)
        )

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {f"path/{index}": path for index, path in enumerate(self._path)}

    @torch.no_grad()
    def begin(self) -> None:
        super().begin()
        for (*_, tensor), before, penalty in zip(self._trained, self._difference, self._penalty, strict=True):
            assert tensor.grad is not None
            before.copy_(tensor)
            penalty.copy_(tensor.grad)

    @torch.no_grad()
    def stepped(self) -> None:
        of_all = zip(self._trained, self._difference, self._penalty, self._path, strict=True)
        for (*_, tensor), before, penalty, path in of_all:
            assert tensor.grad is not None
            path.addcmul_(torch.sub(tensor.grad, penalty, out=penalty), torch.sub(tensor, before, out=before), value=-1)

    @torch.no_grad()
    def importance(self, position: int) -> dict[str, Tensor]:
        """What a point's parameters have gained: the integral over the squared way, damped, on the CPU."""
        return {
            name: (path / ((tensor - start).square() + DAMPING))[position - points.start].cpu()
            for (name, points, tensor), start, path in zip(self._trained, self._start, self._path, strict=True)
            if points.start <= position < points.stop
        }


class Held(Regulariser):
    """PackNet's masks: what earlier tasks own stays, and what is pruned stays zero, whatever the optimizer does."""

    def __init__(self, pack: Pack, state: State, shares: Sequence[float]) -> None:
        owner, first = _parts(state, state.memory.get("owner", {}), pack), not state.tasks
        lacking = _parts(state, {f"{name}/weight": lacks for name, lacks in pack.graph.lacking.items()}, pack)
        self._shares = list(shares)
        self._tensors, self._held, self._fixed = list[Tensor](), list[Tensor](), list[Tensor]()
        layers: dict[tuple[str, int], list[tuple[int, slice]]] = {}
        for name, points, tensor in pack.trainable():
            if not _is_packed(state, name):
                continue
            if "/weight" in name:
                held = (owner[name] != FREE).expand_as(tensor) if name in owner else torch.zeros_like(tensor) > 0
                held = held | lacking.get(name, held)
                layers.setdefault((name.rpartition("/")[0], points.start), []).append((len(self._tensors), points))
            else:
                held = torch.full_like(tensor, not first, dtype=torch.bool)
            self._tensors.append(tensor)
            self._held.append(held.clone())
            self._fixed.append(tensor.detach().where(held, 0.0))
        self._layers = list(layers.values())

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {f"held/{index}": held for index, held in enumerate(self._held)}

    @torch.no_grad()
    def stepped(self) -> None:
        for tensor, held, fixed in zip(self._tensors, self._held, self._fixed, strict=True):
            tensor.copy_(torch.where(held, fixed, tensor))

    @torch.no_grad()
    def ended(self, epoch: int, epochs: int) -> None:
        if epoch != max(1, epochs - epochs // 3):
            return
        for layer in self._layers:
            for position, share in enumerate(self._shares[layer[0][1]]):
                self._prune(
                    [(self._tensors[index][position], self._held[index][position]) for index, _ in layer], share
                )
        self.stepped()

    def _prune(self, parts: Sequence[tuple[Tensor, Tensor]], share: float) -> None:
        """Holds the smallest share of a layer's free weights, which makes them zero."""
        sizes = torch.cat([tensor.abs()[~held] for tensor, held in parts])
        pruned = torch.zeros_like(sizes, dtype=torch.bool)
        pruned[sizes.argsort(stable=True)[: round(share * len(sizes))]] = True
        for (_, held), own in zip(parts, pruned.split([int((~held).sum()) for _, held in parts]), strict=True):
            held[~held] = own


def fisher(graph: Graph, tensors: Parameters, inputs: Tensor) -> Parameters:
    """The diagonal of a network's Fisher information: the mean over samples, and over the classes as the network itself
    predicts them, of the squared gradient of the predicted log-probability.

    No label is drawn: every class counts by its probability.

    Args:
        tensors: The network's parameters at full size, the head's included.
        inputs: [N, ...], as the network takes samples.
    """
    total = {node: {name: torch.zeros_like(each) for name, each in own.items()} for node, own in tensors.items()}
    for batch in inputs.split(evaluation_batch(graph, inputs.device.type)):
        values, layers = {INPUT: batch}, list[tuple[Node, list[Tensor]]]()
        with torch.enable_grad():
            for node in graph.nodes:
                read = [values[name] for name in node.inputs]
                values[node.name] = out = compute(node, read, tensors.get(node.name, {}), len(batch))
                if node.name in tensors:
                    out.requires_grad_()  # gradients of each sample's values are enough to know those of parameters
                    layers.append((node, [value.detach() for value in read]))
            logarithms = values[graph.nodes[-1].name].log_softmax(1)
        outputs = [values[node.name] for node, _ in layers]
        for chosen in logarithms.T:
            gradients = torch.autograd.grad(chosen.sum(), outputs, retain_graph=True)
            root = chosen.detach().div(2).exp()
            for (node, read), gradient in zip(layers, gradients, strict=True):
                weighted = gradient * root.view(-1, *[1] * (gradient.ndim - 1))
                for name, each in _squares(node, read, tensors[node.name], weighted):
                    total[node.name][name] += each
    return {node: {name: each / len(inputs) for name, each in own.items()} for node, own in total.items()}


def _squares(
    node: Node, read: Sequence[Tensor], tensors: Mapping[str, Tensor], gradient: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """The squares of each sample's gradients of a node's parameters, summed over samples.

    Args:
        gradient: Of each sample's output.
    """
    trained = {name: tensor for name, tensor in tensors.items() if name not in node.op.STATISTICS}
    if isinstance(node.op, Linear):  # each gradient is a product of two vectors, and so is its square
        squares = gradient.square()
        yield "weight", (squares.T @ read[0].square()).view_as(trained["weight"])
        if "bias" in trained:
            yield "bias", squares.sum(0)
        return

    def of_sample(inputs: list[Tensor], own: Tensor) -> dict[str, Tensor]:
        def output(parameters: dict[str, Tensor]) -> Tensor:
            return node.op.plain([each[None] for each in inputs], {**tensors, **parameters})

        (gradients,) = torch.func.vjp(output, trained)[1](own[None])
        return gradients

    for start in range(0, len(gradient), FISHER_CHUNK):
        part = slice(start, start + FISHER_CHUNK)
        gradients = torch.func.vmap(of_sample)([each[part] for each in read], gradient[part])
        for name, each in gradients.items():
            yield name, each.square().sum(0)


def _alone(state: State, info: TaskInfo, trained: FreeParameters) -> State:
    """A network that was trained as a whole, as the state of that one task."""
    empty = State.empty(state.architecture)
    rows = len(trained.tensors[state.graph.head]["weight.own"])  # those of several tasks, if it was trained on them
    return commit(empty, replace(info, num_classes=rows), trained, dict.fromkeys(state.graph.groups, KEEP_ALL))


def _values(state: State) -> Parameters:
    """A network's parameters at full size, those of the last head included."""
    return {**state.tensors, state.graph.head: state.heads[-1]}


def _parts(state: State, tensors: Mapping[str, Tensor], pack: Pack) -> dict[str, Tensor]:
    """Full-size tensors by name as a pack of the whole network has its parameters."""
    parts = free_part(State.empty(state.architecture), nested(tensors))
    return {name: each.to(pack.device) for name, each in flat(parts.tensors).items()}


def _is_of_head(graph: Graph, name: str) -> bool:
    return graph.by_name[name.rpartition("/")[0]].groups == (CLASSES,)


def _is_packed(state: State, name: str) -> bool:
    """Whether a parameter is shared by tasks: all are, but for those of a head of the task's own."""
    return state.architecture.head != "multi" or not _is_of_head(state.graph, name)
