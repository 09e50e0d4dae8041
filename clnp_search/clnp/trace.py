"""A user's module as a graph; or every reason why it cannot be one, named at once.

torch.fx follows the module's forward, in evaluation, down to the layers of torch.nn; what it asks of sizes, a small
example answers. Each call is then run on the example and becomes a node, by its name and the shapes that it saw: a view
is a flatten if that is what it does (`calls`). What is done only while training (auxiliary heads) is left out.
"""

from __future__ import annotations

import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from clnp_search.clnp.calls import HANDLERS, REASONS, Call, NoNode, Step, Value, batch_of, plain_name
from clnp_search.clnp.graph import CLASSES, INPUT, Builder, Graph, run
from clnp_search.clnp.ops import Op, Reader

BATCH = 2  # samples of the example; batch normalisation would take one, but a view might not tell it from a channel
RESERVED = {CLASSES, "born", "heads", "memory"}  # what a state calls its own tensors


@dataclass(frozen=True)
class Refused:
    """Why a network cannot be used: the dotted name of a module of it, or its own class, and the reason."""

    module: str
    reason: str


class NetworkRefused(ValueError):  # noqa: N818 - it says what is the case
    """The units of a network cannot be frozen one by one, or it is none; `refused` has every reason."""

    def __init__(self, refused: Sequence[Refused]) -> None:
        self.refused = tuple(dict.fromkeys(refused))
        super().__init__("\n".join(f"{each.module}: {each.reason}" for each in self.refused))


@dataclass(frozen=True)
class Traced:
    """The graph of a module, and which of its tensors are whose parameters.

    Args:
        sources: For each node, the dotted names of its parameters in the module.
    """

    graph: Graph
    sources: dict[str, dict[str, str]]

    def tensors(self, module: nn.Module, others: Mapping[str, Tensor] | None = None) -> dict[str, dict[str, Tensor]]:
        """Copies of all parameters and statistics of such a module in the graph's layout, its own head's included.

        Args:
            others: Parameters in place of the module's own, by their dotted names.
        """
        found = {}
        for name, sources in self.sources.items():
            shapes = self.graph.shapes(self.graph.by_name[name], classes=1)
            own = {key: (others or {}).get(source, attrgetter(source)(module)) for key, source in sources.items()}
            lacks = {"weight": self.graph.lacking.get(name)}
            found[name] = {
                key: _laid_out(tensor.detach().float(), shapes[key], lacks.get(key)) for key, tensor in own.items()
            }
        return found

    def require_alike(self, module: nn.Module, example: Tensor, log_softmax: bool) -> None:
        """Nothing, if the graph computes what the module does: with its own parameters, and with random ones, because
        zeros hide what they multiply; and if the module leaves them as they are, large ones too.

        Args:
            log_softmax: Whether the module makes logarithms of probabilities of the logits.

        Raises:
            NetworkRefused: It does not.
        """
        random = torch.Generator().manual_seed(0)
        drawn = {
            name: (torch.randn(own.shape, generator=random) / (own.numel() / max(1, len(own))) ** 0.5).to(own)
            for name, own in module.named_parameters()
            if own.ndim and own.numel()
        }
        own = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
        large = {name: 100 * parameter for name, parameter in own.items()}
        for others in (large, own, own | drawn):
            given = {name: parameter.clone() for name, parameter in others.items()}
            output = functional_call(module, given, (example.clone(),))
            same = partial(torch.allclose, rtol=0, atol=0, equal_nan=True)
            if changed := [name for name, each in others.items() if not same(given[name], each)]:
                raise NetworkRefused([Refused(name, "is changed by the forward that reads it") for name in changed])
            if others is large:  # what comes of them may be too large for numbers
                continue
            ours = run(self.graph, {INPUT: example}, self.tensors(module, others))[self.graph.nodes[-1].name]
            ours = ours.log_softmax(1) if log_softmax else ours
            if not torch.allclose(ours, output, rtol=1e-3, atol=1e-3 * float(output.abs().max()), equal_nan=True):
                reason = "computes something else than its layers one after another, as changes in place can do"
                raise NetworkRefused([Refused(type(module).__name__, reason)])

    def require_trained(self, module: nn.Module, output: Tensor) -> None:
        """Nothing, if gradients of the module's own output reach all of these parameters.

        Raises:
            NetworkRefused: Some are held fixed, which only a forward of the module's own could keep to.
        """
        reached, functions, seen = set[int](), [output.grad_fn], set[Any]()
        while functions:
            function = functions.pop()
            if function is not None and function not in seen:
                seen.add(function)
                reached.add(id(getattr(function, "variable", None)))
                functions.extend(following for following, _ in function.next_functions)
        sources = [source for own in self.sources.values() for source in own.values()]
        fixed = [
            source
            for source in sources
            if isinstance(parameter := attrgetter(source)(module), nn.Parameter) and id(parameter) not in reached
        ]
        reason = "is not trained by the module (requires_grad), but would be here"
        if fixed:
            raise NetworkRefused([Refused(source, reason) for source in fixed])

    def without_head_bias(self) -> Traced:
        """The same with no bias in the head."""
        head = self.graph.by_name[self.graph.head]
        op = replace(head.op, bias=False)  # type: ignore[call-arg]
        nodes = tuple(replace(node, op=op) if node is head else node for node in self.graph.nodes)
        sources = {**self.sources, head.name: {"weight": self.sources[head.name]["weight"]}}
        return Traced(replace(self.graph, nodes=nodes), sources)


def _laid_out(tensor: Tensor, shape: tuple[int, ...], lacks: Tensor | None) -> Tensor:
    """A copy of a module's tensor in the graph's layout, with zeros for the weights that its layer lacks."""
    if lacks is None:
        return tensor.reshape(-1, *shape[1:]).clone()
    full = tensor.new_zeros(shape)
    full[~lacks[:, :, 0]] = tensor.reshape(-1, shape[2])
    return full


def trace(module: nn.Module, input_shape: tuple[int, ...]) -> Traced:
    """The graph of a module that takes batches of samples and gives logits [batch, classes].

    Its last linear layer is the head, or a convolution that only parameterless steps follow. A log-softmax at its end
    is left out: the cross-entropy of what it gives is that of the logits. The module is not changed.

    Args:
        input_shape: (features,) or (C, H, W).

    Raises:
        NetworkRefused: It is no such network; has every reason.
    """
    if lazy := [name for name, each in module.named_modules() if any(map(is_lazy, each.parameters(recurse=False)))]:
        raise NetworkRefused(
            [Refused(name, "has no shape yet; call the network once where it is made") for name in lazy]
        )
    if isinstance(module, nn.DataParallel):
        raise NetworkRefused(
            [Refused("DataParallel", "spreads a network over devices; give the network, its `module`")]
        )
    if held := _held_in_evaluation(module):
        raise NetworkRefused([Refused(name, "stays in evaluation when its network trains") for name in held])
    if hooked := _with_hooks(module):
        raise NetworkRefused([Refused(name, "has hooks, which can change how it is trained") for name in hooked])
    example = torch.rand(BATCH, *input_shape, generator=torch.Generator().manual_seed(0))
    example = example.to(next((parameter.device for parameter in module.parameters()), "cpu"))
    tracer = _Tracer(example)
    with _evaluating(module), torch.random.fork_rng(devices=[]):
        with torch.no_grad():
            walk = _Walk(module, tracer)
            walk.logits(example.clone())  # what it reads may be changed in place
            traced = walk.build(input_shape)
            more = torch.cat([example, example[:1]])  # what a forward makes of the batch's size must not count
            traced.require_alike(module, more, walk.ends_in_log_softmax)
        with torch.enable_grad():
            output = module(example.clone())
    traced.require_trained(module, output)
    return traced


def _held_in_evaluation(module: nn.Module) -> list[str]:
    """The normalisations and dropouts that a network's own `train` does not switch on."""
    kinds = nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd
    before = {parameter: parameter.requires_grad for parameter in module.parameters()}
    with _evaluating(module):
        module.train(True)
        for parameter, wanted in before.items():
            parameter.requires_grad_(wanted)
        return [name for name, each in module.named_modules() if isinstance(each, kinds) and not each.training]


def _with_hooks(module: nn.Module) -> list[str]:
    """The modules that hold others, and the parameters, whose hooks no step of a trace would show."""
    found = [
        name or type(each).__name__
        for name, each in module.named_modules()
        if next(each.children(), None) is not None and (each._backward_hooks or each._backward_pre_hooks)
    ]
    return found + [name for name, each in module.named_parameters() if each._post_accumulate_grad_hooks]


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    modes = {each: each.training for each in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for each, mode in modes.items():
            each.training = mode


class _Sized(fx.Proxy):
    """A value in a forward that is followed, of which Python may see the example's sizes, but no numbers."""

    @property
    def _example(self) -> Any:
        return self.tracer.value(self.node)  # type: ignore[attr-defined]

    @property
    def shape(self) -> torch.Size:
        return self._example.shape

    @property
    def ndim(self) -> int:
        return self._example.ndim

    def size(self, dim: int | None = None) -> Any:
        return self._example.size(dim)

    def dim(self) -> int:
        return self._example.dim()

    def numel(self) -> int:
        return self._example.numel()

    ndimension, nelement = dim, numel

    def __len__(self) -> int:
        return len(self._example)

    def __iter__(self) -> Iterator[Any]:
        return (
            map(self.__getitem__, range(len(self))) if isinstance(self._example, tuple | list) else super().__iter__()
        )


class _NoSubmodule(Exception):  # noqa: N818 - it says what is the case
    """A module with parameters is called that its caller does not hold."""


class _Tracer(fx.Tracer):
    """Follows a forward down to the layers of torch.nn. A module that cannot be followed stays whole, with a reason."""

    def __init__(self, example: Tensor) -> None:
        super().__init__()
        self.failed: dict[str, str] = {}
        self.without_gradient: set[fx.Node] = set()
        self._example, self._is_evaluating = example, False

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """A call that the forward makes."""
        node = super().create_node(*args, **kwargs)
        if not torch.is_grad_enabled():
            self.without_gradient.add(node)
        return node

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """What stands for a node's value in the forward."""
        return _Sized(node, self)

    @cached_property
    def _evaluator(self) -> fx.Interpreter:
        evaluator = fx.Interpreter(self.root, garbage_collect_values=False, graph=self.graph)
        evaluator.args_iter = iter([self._example.clone()])
        return evaluator

    def value(self, node: fx.Node) -> Any:
        """A node's value on the example."""
        values, self._is_evaluating = self._evaluator.env, True
        try:
            for each in self.graph.nodes:  # in order, for some may change what they read
                if each not in values:
                    values[each] = self._evaluator.run_node(each)
        finally:
            self._is_evaluating = False
        return values[node]

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        """What an attribute of a module gives."""
        return attr_val if self._is_evaluating else super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module is one call: a class of torch.nn that does what it says, or is refused whatever it does."""
        kind = _kind(m)
        return kind is not None and (plain_name(kind.__name__) in REASONS or _is_plain(m, kind))

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """What a call of a module gives."""
        if self._is_evaluating:
            return forward(*args, **kwargs)
        if all(m is not each for each in self.root.modules()):  # made in a forward, or kept in a plain list
            if next(m.parameters(), None) is not None:
                what = f"calls a {type(m).__name__} that is no submodule, and so is not trained"
                raise _NoSubmodule(f"{what}; keep layers in an nn.ModuleList")
            return forward(*args, **kwargs)
        stack = OrderedDict(self.module_stack)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception as error:  # a user's forward may raise anything
            self.module_stack = stack
            path = self.path_of_module(m)
            why = f"cannot be followed, as where control flow depends on data: {_described(error)}"
            self.failed[path] = str(error) if isinstance(error, _NoSubmodule) else why
            return self.create_proxy("call_module", path, args, kwargs)


def _kind(module: nn.Module) -> Any:
    """The class of torch.nn that a module is or derives from, unless that only holds or calls others."""
    for kind in type(module).__mro__[:-1]:
        if kind.__module__.startswith(("torch.nn.modules", "torch.ao.nn", "torch.jit")):
            return None if kind is nn.Module or issubclass(kind, nn.Sequential) else kind
    return None


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    methods = ("forward", "_conv_forward")
    return all(getattr(type(module), name, None) is getattr(kind, name, None) for name in methods)


def _described(error: Exception) -> str:
    """An error's first line, and where outside torch it was raised."""
    frames = [each for each in traceback.extract_tb(error.__traceback__) if "/torch/" not in each.filename]
    own = [each for each in frames if each.filename != __file__]
    where = f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}{where}"


class _Walk(fx.Interpreter):
    """Runs what a module does on an example, and makes a step of each call on the way."""

    def __init__(self, module: nn.Module, tracer: _Tracer) -> None:
        root = nn.Sequential(module)  # the module's own forward is then one call among others
        with torch.enable_grad():  # unless the forward itself does without
            graph = tracer.trace(root)
        super().__init__(root, graph=graph)
        self.extra_traceback = False
        self._class, self._scopes = type(module).__name__, tracer.node_name_to_scope
        self._without_gradient = tracer.without_gradient
        self._failed = {path.partition(".")[2]: reason for path, reason in tracer.failed.items()}
        self._steps: dict[str, Step] = {}
        self._values: dict[fx.Node, Value] = {}
        self._numbers: dict[fx.Node, Any] = {}
        self._owners: dict[int, str] = {}
        self._faults: list[Refused] = []
        self._logits: dict[fx.Node, Value] = {}  # what each log-softmax over classes reads
        self._last: Step | None = None
        self.ends_in_log_softmax = False

    def logits(self, example: Tensor) -> Tensor:
        """The logits of an example.

        Raises:
            NetworkRefused: There are none.
        """
        output = self.run(example)
        if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != len(example):
            tensor = isinstance(output, Tensor)
            given = (
                f"values of shape {batch_of(output.shape)}"
                if tensor
                else f"a {type(output).__name__.removeprefix('immutable_')}"
            )
            self._fault("", f"gives {given}; wanted is one tensor of logits, [batch, classes]")
            raise NetworkRefused(self._reasons())
        return output

    def run_node(self, n: fx.Node) -> Any:
        """The value of a traced call, whose step is made."""
        path = self._path(n)
        try:
            value = super().run_node(n)
        except Exception as error:  # a user's module may raise anything
            self._fault(path, f"fails: {_described(error)}")
            self._failed.setdefault("", "")  # what comes after it is judged by its names alone
            raise NetworkRefused(self._reasons()) from error
        if n.op == "output":
            last: Any = n.args[0]
            self.ends_in_log_softmax = last in self._logits
            found = self._logits.get(last) or self._values.get(last)
            self._last = None if found is None else found.step
        elif n.op == "placeholder":
            self._values[n] = Value(self._append(Step(INPUT, "", tuple(value.shape), (), Op())), tuple(value.shape))
        elif isinstance(value, Tensor) or _holds_tensors(value):
            self._take(n, path, tuple(getattr(value, "shape", ())))
        else:
            self._numbers[n] = value
            known = value is None or plain_name(_label(n)) in _SIZES
            if not known and any(each in self._values for each in n.all_input_nodes):
                self._fault(path, f"{_label(n)} makes a number of the data, on which the network would depend")
        return value

    def _take(self, node: fx.Node, path: str, shape: tuple[int, ...]) -> None:
        """Makes the step of a call that gives a tensor."""
        label, module = _label(node), self._own_layer(node, path)
        if node.op == "call_module":
            module = self.submodules[str(node.target)]
            label = (_kind(module) or type(module)).__name__
        known: Any = lambda each: self._values.get(each, self._numbers.get(each))  # noqa: E731 - map_arg knows no values
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), known)
        call = Call(label, path, module, args, kwargs, shape)
        read = [each for each in node.all_input_nodes if each in self._values]
        try:
            step = self._step(node, call)
            if node in self._without_gradient:
                above = (self._steps[name] for each in read for name in self._upstream(self._values[each].step))
                if any(each.sources for each in (step, *above)):
                    raise NoNode(f"{label} is computed without gradients (no_grad), but would be trained here")
        except NoNode as error:
            inputs = tuple(self._values[each].step.name for each in read)
            step = Step(f"{path}.{label}", path, shape, inputs, reason="".join(error.args))
        if plain_name(label) == "logsoftmax" and len(shape) == 2 and call.settings(dim=None) in ([1], [-1]):
            self._logits[node] = self._values[read[0]]
        value = Value(step if self._steps.get(step.name) is step else self._append(step), shape)
        self._values[node] = value
        if read and call.in_place:  # who reads the input from now on, by whatever name, reads this
            changed, before = self.env[read[0]], self._values[read[0]].step
            same = [each for each, own in self._values.items() if own.step is before and self.env.get(each) is changed]
            self._values |= dict.fromkeys(same, value)

    def _step(self, node: fx.Node, call: Call) -> Step:
        """The step of a call.

        Raises:
            NoNode: There is none.
        """
        held = [each for each in node.all_input_nodes if each.op == "get_attr"]
        follows = any(self._is_strange(each) for each in node.all_input_nodes if each not in held)
        if node.op == "get_attr" or (call.module is None and follows):
            raise NoNode
        if call.module is not None:
            self._check(call.module, call.path)
        handler = HANDLERS.get(plain_name(call.label))
        if handler is None:
            unknown = "is none of the operations that are known (clnp/ops.py says how to add one)"
            raise NoNode(f"{call.label} {REASONS.get(plain_name(call.label), unknown)}")
        if held and call.module is None:
            raise NoNode(f"{call.label} reads the tensor {_label(held[0])!r}, which no layer of torch.nn holds")
        return handler(call)

    def _own_layer(self, node: fx.Node, path: str) -> nn.Module | None:
        """The layer of torch.nn that is called from a forward of its own, as after a padding of its own."""
        layer = self.submodules.get(f"0.{path}")
        if not isinstance(layer, nn.Conv2d | nn.Linear) or _label(node) not in ("conv2d", "linear"):
            return None
        read = {str(each.target) for each in node.all_input_nodes if each.op == "get_attr"}
        return layer if read == {f"0.{path}.{name}" for name, _ in layer.named_parameters()} else None

    def _is_strange(self, node: fx.Node) -> bool:
        """Whether a value is no map and not flat, for a reason given: what is done to it is no other fault."""
        value = self._values.get(node)
        return value is not None and value.step.op is None and len(value.shape) not in (2, 4)

    def _check(self, module: nn.Module, path: str) -> None:
        if path in self._failed:
            raise NoNode(self._failed[path])
        if parametrize.is_parametrized(module):
            raise NoNode("computes its parameters from others (torch.nn.utils.parametrize)")
        hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
        if any(hooks) or any(parameter._backward_hooks for parameter in module.parameters()):
            raise NoNode("has hooks, which can change what it computes, or how it is trained")
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        for name, tensor in tensors.items():
            owner = self._owners.get(id(tensor))
            if owner == path:
                raise NoNode("is called twice: its units would be frozen in one place and free in another")
            if owner is not None:
                raise NoNode(f"shares its {name} with {owner}")
        self._owners.update(dict.fromkeys(map(id, tensors.values()), path))

    def _append(self, step: Step) -> Step:
        """Keeps a step under a name of its own."""
        wanted, number = step.name, 1
        while step.name in RESERVED | self._steps.keys():
            step.name, number = f"{wanted}_{number}", number + 1
        self._steps[step.name] = step
        return step

    def _path(self, node: fx.Node) -> str:
        """The dotted name of the module that a node calls or is called by; nothing for the network itself."""
        path = str(node.target) if node.op == "call_module" else self._scopes[node.name][0]
        return path.partition(".")[2]

    def _fault(self, path: str, reason: str) -> None:
        self._faults.append(Refused(path or self._class, reason))

    def _upstream(self, step: Step | None) -> set[str]:
        """A step and all that it depends on; all steps if there is none."""
        found = set(self._steps) if step is None else {step.name}
        for each in reversed(self._steps.values()):
            if each.name in found:
                found.update(each.inputs)
        return found

    def _reasons(self) -> list[Refused]:
        """Of all that the logits depend on, and of what lies in modules that could not be followed."""
        needed = self._upstream(self._last)
        for step in self._steps.values():
            inside = any(
                step.module.startswith(f"{path}.".lstrip(".")) and step.module != path for path in self._failed
            )
            if step.reason and (step.name in needed or inside):
                self._fault(step.module, step.reason)
        for path in self._failed:
            for name, module in self.submodules[f"0.{path}".rstrip(".")].named_modules():
                label = (_kind(module) or type(module)).__name__
                if plain_name(label) in REASONS:
                    self._fault(f"{path}.{name}".strip("."), f"{label} {REASONS[plain_name(label)]}")
        return self._faults

    def build(self, input_shape: tuple[int, ...]) -> Traced:
        """The graph of all that the logits depend on.

        Raises:
            NetworkRefused: There is none.
        """
        needed, head = self._upstream(self._last), self._head()
        builder, made, sources = Builder(input_shape), {INPUT}, {}
        for step in self._steps.values():
            if step.name == INPUT or step.name not in needed or step.op is None or not made.issuperset(step.inputs):
                continue
            try:
                if isinstance(step.op, Reader):
                    builder.layer(step.name, step.op, step.inputs[0], step.units, head=step is head)
                else:
                    builder.add(step.name, step.op, *step.inputs)
            except ValueError as error:
                self._fault(step.module, f"{step.name.rpartition('.')[2]} {error}")
                continue
            made.add(step.name)
            if step.sources:
                sources[step.name] = step.sources
        if reasons := self._reasons():
            raise NetworkRefused(reasons)
        graph = builder.build()
        if graph.nodes[-1].taps > 1:
            self._fault("", f"gives {graph.nodes[-1].taps} logits of each class, one for each position; pool them")
        if not graph.groups:
            self._fault("", "has no layer before the head, and so no unit that could be pruned")
        if graph.nodes[-1].groups != (CLASSES,):
            self._fault("", "joins values to its logits; the head is one layer, and each task has its own")
        if self._faults:
            raise NetworkRefused(self._faults)
        return Traced(graph, sources)

    def _head(self) -> Step | None:
        """The layer whose units are the classes."""
        assert self._last is not None
        after = {self._last.name}
        for step in reversed(self._steps.values()):
            if step.name in after and not isinstance(step.op, Reader):
                after.update(step.inputs)
        region = [step for step in self._steps.values() if step.name in after]
        if any(step.op is None for step in region):
            return None
        layers = [step for step in region if isinstance(step.op, Reader)]
        if not layers:
            self._fault("", "has no linear layer, and no convolution, that could be the head")
        elif len(layers) == 1:
            for step in region:
                if step.sources and step not in layers:
                    self._fault(step.module, "has parameters after the head, whose classes are each task's own")
        return layers[-1] if layers else None


def _label(node: fx.Node) -> str:
    """What a node calls, by its short name."""
    return node.target.rpartition(".")[2] if isinstance(node.target, str) else getattr(node.target, "__name__", "?")


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, list | tuple) and any(isinstance(each, Tensor) for each in value)


# What gives sizes alone.
_SIZES = {"getattr", "size", "dim", "ndimension", "numel", "len", "assert", "isinstance", "istensor", "type"}
