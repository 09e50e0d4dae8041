"""A user's module as a graph; or every reason why it cannot be one, named at once.

torch.fx follows the module's forward, in evaluation, down to the layers of torch.nn. Each call is then run on a small
example and becomes a node, by its name and the shapes that it saw: what a forward computes with sizes is evaluated, and
a view is a flatten if that is what it does. What is done only while training (auxiliary heads) is left out.

To have another op traced, write a function under `@_traces(names)`. Names are compared without case and underscores,
so that `nn.ReLU`, `torch.relu`, `functional.relu_` and `Tensor.relu` are one.
"""

from __future__ import annotations

import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from clnp_search.clnp.graph import CLASSES, INPUT, Builder, Graph, run
from clnp_search.clnp.ops import (
    ACTIVATIONS,
    Activation,
    AdaptivePool,
    Add,
    Affine,
    AvgPool,
    BatchNorm,
    Concat,
    Conv,
    Depthwise,
    Dropout,
    Flatten,
    Linear,
    MaxPool,
    MeanPositions,
    Multiply,
    Op,
    PRelu,
    Reader,
    ToMap,
)

BATCH = 2  # samples of the example; batch normalisation would take one, but a view might not tell it from a channel


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

    def tensors(self, module: nn.Module) -> dict[str, dict[str, Tensor]]:
        """Copies of all parameters and statistics of such a module in the graph's layout, its own head's included."""
        found = {}
        for name, sources in self.sources.items():
            shapes = self.graph.shapes(self.graph.by_name[name], classes=1)
            found[name] = {
                parameter: attrgetter(source)(module).detach().float().reshape(-1, *shapes[parameter][1:]).clone()
                for parameter, source in sources.items()
            }
        return found

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
        reason = "is not trained by the module (requires_grad or no_grad), but would be here"
        if fixed:
            raise NetworkRefused([Refused(source, reason) for source in fixed])

    def without_head_bias(self) -> Traced:
        """The same with no bias in the head."""
        head = self.graph.by_name[self.graph.head]
        op = replace(head.op, bias=False)  # type: ignore[call-arg]
        nodes = tuple(replace(node, op=op) if node is head else node for node in self.graph.nodes)
        sources = {**self.sources, head.name: {"weight": self.sources[head.name]["weight"]}}
        return Traced(replace(self.graph, nodes=nodes), sources)


def trace(module: nn.Module, input_shape: tuple[int, ...]) -> Traced:
    """The graph of a module that takes batches of samples and gives logits [batch, classes].

    Its last linear layer is the head, or a convolution that only parameterless steps follow. The module is not changed.

    Args:
        input_shape: (features,) or (C, H, W).

    Raises:
        NetworkRefused: It is no such network; has every reason.
    """
    if lazy := [name for name, each in module.named_modules() if any(map(is_lazy, each.parameters(recurse=False)))]:
        raise NetworkRefused(
            [Refused(name, "has no shape yet; call the network once where it is made") for name in lazy]
        )
    example = torch.rand(BATCH, *input_shape, generator=torch.Generator().manual_seed(0))
    example = example.to(next((parameter.device for parameter in module.parameters()), "cpu"))
    tracer = _Tracer()
    with _evaluating(module), torch.random.fork_rng(devices=[]):
        with torch.no_grad():
            walk = _Walk(module, tracer)
            walk.logits(example.clone())  # what it reads may be changed in place
            traced = walk.build(input_shape)
            ours = run(traced.graph, {INPUT: example}, traced.tensors(module))[traced.graph.nodes[-1].name]
        with torch.enable_grad():
            output = module(example.clone())
    if not torch.allclose(ours, output, rtol=1e-3, atol=1e-3 * float(output.detach().abs().max()), equal_nan=True):
        reason = "computes something else than its layers one after another, as changes in place can do"
        raise NetworkRefused([Refused(type(module).__name__, reason)])
    traced.require_trained(module, output)
    return traced


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    modes = {each: each.training for each in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for each, mode in modes.items():
            each.training = mode


class _Tracer(fx.Tracer):
    """Follows a forward down to the layers of torch.nn. A module that cannot be followed stays whole, with a reason."""

    def __init__(self) -> None:
        super().__init__()
        self.failed: dict[str, str] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module is one call: a class of torch.nn that does what it says, or is refused whatever it does."""
        kind = _kind(m)
        return kind is not None and (_plain(kind.__name__) in _REASONS or _is_plain(m, kind))

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """What a call of a module gives."""
        stack = OrderedDict(self.module_stack)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception as error:  # a user's forward may raise anything
            self.module_stack = stack
            path = self.path_of_module(m)
            self.failed[path] = f"cannot be followed, as where control flow depends on data: {_described(error)}"
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


_SAME = {
    "iadd": "add",
    "isub": "sub",
    "subtract": "sub",
    "imul": "mul",
    "multiply": "mul",
    "itruediv": "div",
    "truediv": "div",
    "truedivide": "div",
    "divide": "div",
    "concat": "cat",
    "concatenate": "cat",
    "clip": "clamp",
}


# Arguments by numpy's names, which torch takes too.
_NUMPY = {"axis": "dim", "keepdims": "keepdim"}


def _plain(name: str) -> str:
    """A name as names are compared: without case and underscores, one for all ways to write an operation."""
    plain = name.lower().replace("_", "")
    return _SAME.get(plain, plain)


class _NoNode(Exception):  # noqa: N818 - never leaves this module
    """A call becomes no node: the reason, or none if something that it reads is no node either."""


@dataclass
class _Step:
    """A node to be. Without an op there is none: `reason` says why, or something before it does."""

    name: str
    module: str
    shape: tuple[int, ...]
    inputs: tuple[str, ...]
    op: Op | None = None
    units: int = 0
    sources: dict[str, str] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True)
class _Value:
    """A step's value, in the shape that the forward sees it in: a view of a map or an expanded gate has another one."""

    step: _Step
    shape: tuple[int, ...]


@dataclass
class _Call:
    """A call of a module, a function or a method.

    Args:
        label: The name of what is called.
        path: Dotted name of the module that is called, or that calls.
        module: What is called, if it is a module.
        args: Tensors as values; sizes and numbers as they are.
        shape: Of what it gives.
    """

    label: str
    path: str
    module: nn.Module | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shape: tuple[int, ...]

    def settings(self, **defaults: Any) -> list[Any]:
        """Settings by name: a module's attributes, or a function's arguments after the first, in this order."""
        if self.module is not None:
            return [getattr(self.module, name, default) for name, default in defaults.items()]
        named = {_NUMPY.get(name, name): value for name, value in self.kwargs.items()}
        given = {**dict(zip(defaults, self.args[1:], strict=False)), **named}
        return [given.get(name, default) for name, default in defaults.items()]

    @property
    def in_place(self) -> bool:
        """Whether it changes what it reads."""
        named = self.label.endswith("_") or self.label in ("iadd", "isub", "imul", "itruediv")
        positional = _HANDLERS.get(_plain(self.label)) is _activation and self.args[-1:] == (True,)
        return named or positional or bool(self.kwargs.get("inplace", getattr(self.module, "inplace", False)))

    def value(self, position: int = 0) -> _Value:
        """The tensor that it reads there, in any shape."""
        values = self.args or tuple(self.kwargs.values())
        value = values[position] if position < len(values) else None
        if not isinstance(value, _Value):
            raise _NoNode(f"{self.label} of something else than tensors of the network")
        if value.step.op is None:
            raise _NoNode
        return value

    def read(self, position: int = 0, dims: int = 0) -> _Value:
        """The map or the flat values that it reads there; of so many dimensions, if any are given."""
        value = self.value(position)
        if value.shape != value.step.shape or len(value.shape) not in ((dims,) if dims else (2, 4)):
            raise _NoNode(f"{self.label} of values of shape {_sample(value.shape)}")
        return value

    def node(
        self, op: Op, inputs: _Value | Sequence[_Value], units: int = 0, sources: dict[str, str] | None = None
    ) -> _Step:
        """A step of this call. Sources are the parameters' names in the module."""
        paths = {parameter: f"{self.path}.{name}".lstrip(".") for parameter, name in (sources or {}).items()}
        inputs = [inputs] if isinstance(inputs, _Value) else inputs
        function = self.label.strip("_")
        name = self.path if self.module is not None else f"{self.path}.{_SAME.get(function, function)}".lstrip(".")
        return _Step(name, self.path, self.shape, tuple(each.step.name for each in inputs), op, units, paths)


def _sample(shape: Sequence[int]) -> str:
    return f"[batch{''.join(f', {size}' for size in shape[1:])}]"


_Handler = Callable[[_Call], _Step]
_HANDLERS: dict[str, _Handler] = {}


def _traces(names: str) -> Callable[[_Handler], _Handler]:
    def register(handler: _Handler) -> _Handler:
        _HANDLERS.update(dict.fromkeys(names.split(), handler))
        return handler

    return register


class _Walk(fx.Interpreter):
    """Runs what a module does on an example, and makes a step of each call on the way."""

    def __init__(self, module: nn.Module, tracer: _Tracer) -> None:
        root = nn.Sequential(module)  # the module's own forward is then one call among others
        super().__init__(root, graph=tracer.trace(root))
        self.extra_traceback = False
        self._class, self._scopes = type(module).__name__, tracer.node_name_to_scope
        self._failed = {path.partition(".")[2]: reason for path, reason in tracer.failed.items()}
        self._steps: dict[str, _Step] = {}
        self._values: dict[fx.Node, _Value] = {}
        self._numbers: dict[fx.Node, Any] = {}
        self._owners: dict[int, str] = {}
        self._faults: list[Refused] = []
        self._last: _Step | None = None

    def logits(self, example: Tensor) -> Tensor:
        """The logits of an example.

        Raises:
            NetworkRefused: There are none.
        """
        output = self.run(example)
        if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != len(example):
            tensor = isinstance(output, Tensor)
            given = (
                f"values of shape {_sample(output.shape)}"
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
            self._last = self._values[n.args[0]].step if n.args[0] in self._values else None  # type: ignore[index]
        elif n.op == "placeholder":
            self._values[n] = _Value(self._append(_Step(INPUT, "", tuple(value.shape), (), Op())), tuple(value.shape))
        elif isinstance(value, Tensor) or _holds_tensors(value):
            self._take(n, path, tuple(getattr(value, "shape", ())))
        else:
            self._numbers[n] = value
            known = value is None or _plain(_label(n)) in _SIZES
            if not known and any(each in self._values for each in n.all_input_nodes):
                self._fault(path, f"{_label(n)} makes a number of the data, on which the network would depend")
        return value

    def _take(self, node: fx.Node, path: str, shape: tuple[int, ...]) -> None:
        """Makes the step of a call that gives a tensor."""
        label, module = _label(node), None
        if node.op == "call_module":
            module = self.submodules[str(node.target)]
            label = (_kind(module) or type(module)).__name__
        known: Any = lambda each: self._values.get(each, self._numbers.get(each))  # noqa: E731 - map_arg knows no values
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), known)
        call = _Call(label, path, module, args, kwargs, shape)
        read = [each for each in node.all_input_nodes if each in self._values]
        try:
            step = self._step(node, call)
        except _NoNode as error:
            inputs = tuple(self._values[each].step.name for each in read)
            step = _Step(f"{path}.{label}", path, shape, inputs, reason="".join(error.args))
        value = _Value(step if self._steps.get(step.name) is step else self._append(step), shape)
        self._values[node] = value
        if read and call.in_place:  # who reads the input from now on reads this
            self._values[read[0]] = value

    def _step(self, node: fx.Node, call: _Call) -> _Step:
        """The step of a call.

        Raises:
            _NoNode: There is none.
        """
        held = [each for each in node.all_input_nodes if each.op == "get_attr"]
        follows = any(self._is_strange(each) for each in node.all_input_nodes if each not in held)
        if node.op == "get_attr" or (call.module is None and follows):
            raise _NoNode
        if call.module is not None:
            self._check(call.module, call.path)
        handler = _HANDLERS.get(_plain(call.label))
        if handler is None:
            unknown = "is none of the operations that are known (clnp/ops.py says how to add one)"
            raise _NoNode(f"{call.label} {_REASONS.get(_plain(call.label), unknown)}")
        if held:
            raise _NoNode(f"{call.label} reads the tensor {_label(held[0])!r}, which no layer of torch.nn holds")
        return handler(call)

    def _is_strange(self, node: fx.Node) -> bool:
        """Whether a value is no map and not flat, for a reason given: what is done to it is no other fault."""
        value = self._values.get(node)
        return value is not None and value.step.op is None and len(value.shape) not in (2, 4)

    def _check(self, module: nn.Module, path: str) -> None:
        if path in self._failed:
            raise _NoNode(self._failed[path])
        if parametrize.is_parametrized(module):
            raise _NoNode("computes its parameters from others (torch.nn.utils.parametrize)")
        if module._forward_hooks or module._forward_pre_hooks:
            raise _NoNode("has hooks, which can change what it computes")
        for name, parameter in module.named_parameters():
            owner = self._owners.get(id(parameter))
            if owner == path:
                raise _NoNode("is called twice: its units would be frozen in one place and free in another")
            if owner is not None:
                raise _NoNode(f"shares its {name} with {owner}")
        self._owners.update(dict.fromkeys(map(id, module.parameters()), path))

    def _append(self, step: _Step) -> _Step:
        """Keeps a step under a name of its own."""
        wanted, number = step.name, 1
        while step.name in (*self._steps, CLASSES):
            step.name, number = f"{wanted}_{number}", number + 1
        self._steps[step.name] = step
        return step

    def _path(self, node: fx.Node) -> str:
        """The dotted name of the module that a node calls or is called by; nothing for the network itself."""
        path = str(node.target) if node.op == "call_module" else self._scopes[node.name][0]
        return path.partition(".")[2]

    def _fault(self, path: str, reason: str) -> None:
        self._faults.append(Refused(path or self._class, reason))

    def _upstream(self, step: _Step | None) -> set[str]:
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
                if _plain(label) in _REASONS:
                    self._fault(f"{path}.{name}".strip("."), f"{label} {_REASONS[_plain(label)]}")
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
        if self._faults:
            raise NetworkRefused(self._faults)
        return Traced(graph, sources)

    def _head(self) -> _Step | None:
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


def _size(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()


# What gives sizes alone.
_SIZES = {"getattr", "size", "dim", "ndimension", "numel", "len", "assert", "isinstance", "istensor", "type"}
_REASONS = {
    name: reason
    for names, reason in {
        "layernorm rmsnorm groupnorm localresponsenorm crossmaplrn2d": (
            "normalises each sample by itself, mostly over several units; use batch normalisation"
        ),
        "softmax softmax2d softmin logsoftmax logsumexp normalize glu": (
            "makes a unit's value from other units, some of which may be free; logits are wanted as they are"
        ),
        "multiheadattention scaleddotproductattention shiftedwindowattention matmul bmm baddbmm einsum transformer "
        "transformerencoder transformerencoderlayer transformerdecoder transformerdecoderlayer": (
            "weighs units by one another, some of which may be free"
        ),
        "permute transpose swapaxes swapdims movedim t channelshuffle pixelshuffle pixelunshuffle roll flip": (
            "moves values between channels, positions or samples, where units cannot be followed"
        ),
        "chunk split tensorsplit unbind narrow indexselect": "takes channels apart, where units cannot be followed",
    }.items()
    for name in names.split()
}


def _layer(call: _Call) -> Any:
    """The layer that is called."""
    if call.module is None:
        call.value(1)
        raise _NoNode(f"{call.label} with weights as arguments; write a layer of torch.nn")
    return call.module


def _pair(value: Any) -> tuple[int, int]:
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    return values[0], values[-1]


@_traces("linear")
def _linear(call: _Call) -> _Step:
    module = _layer(call)
    sources = {name: name for name, _ in module.named_parameters()}
    return call.node(Linear("bias" in sources), call.read(dims=2), module.out_features, sources)


@_traces("conv2d")
def _convolution(call: _Call) -> _Step:
    module = _layer(call)
    depthwise = 1 < module.groups == module.in_channels == module.out_channels
    if module.groups > 1 and not depthwise:
        channels = f"{module.in_channels} -> {module.out_channels} channels"
        raise _NoNode(
            f"{call.label} of {channels} in {module.groups} groups; allowed: one, or one for each channel in and out"
        )
    if module.padding_mode != "zeros":
        raise _NoNode(f"{call.label} with padding_mode {module.padding_mode!r}; allowed: zeros")
    kernel, stride, dilation = _pair(module.kernel_size), _pair(module.stride), _pair(module.dilation)
    if module.padding == "same":
        both = [spread * (size - 1) for spread, size in zip(dilation, kernel, strict=True)]
        if any(each % 2 for each in both):
            raise _NoNode(f"{call.label} with padding 'same', which an even kernel cannot have on both sides")
        padding = _pair([each // 2 for each in both])
    else:
        padding = (0, 0) if module.padding == "valid" else _pair(module.padding)
    sources = {name: name for name, _ in module.named_parameters()}
    op = (Depthwise if depthwise else Conv)("bias" in sources, kernel, stride, padding, dilation)
    return call.node(op, call.read(dims=4), module.out_channels, sources)


@_traces("batchnorm1d batchnorm2d")
def _batch_norm(call: _Call) -> _Step:
    module = _layer(call)
    if module.running_mean is None:
        raise _NoNode(f"{call.label} without running statistics: what a sample gives would depend on its batch")
    if module.momentum is None:
        raise _NoNode(f"{call.label} with momentum None; allowed: a number")
    sources = {"scale": "weight", "shift": "bias"} if module.affine else {}
    sources |= {"mean": "running_mean", "variance": "running_var"}
    return call.node(BatchNorm(module.affine, module.eps, module.momentum), call.read(), sources=sources)


@_traces("prelu")
def _prelu(call: _Call) -> _Step:
    module, value = _layer(call), call.read()
    if module.num_parameters != value.shape[1]:
        raise _NoNode(f"PReLU with one slope for all channels, frozen and free ones; use PReLU({value.shape[1]})")
    return call.node(PRelu(), value, sources={"slope": "weight"})


_ARGUMENTS = {
    "celu": ["alpha"],
    "elu": ["alpha"],
    "gelu": ["approximate"],
    "hardshrink": ["lambd"],
    "hardtanh": ["min_val", "max_val"],
    "leaky_relu": ["negative_slope"],
    "softplus": ["beta", "threshold"],
    "softshrink": ["lambd"],
    "threshold": ["threshold", "value"],
}


@_traces(" ".join(map(_plain, ACTIVATIONS)))
def _activation(call: _Call) -> _Step:
    function = next(name for name in ACTIVATIONS if _plain(name) == _plain(call.label))
    names = _ARGUMENTS.get(function, [])
    given = zip(names, call.settings(**dict.fromkeys(names)), strict=True)
    return call.node(
        Activation(function, tuple((name, value) for name, value in given if value is not None)), call.read()
    )


@_traces("clamp")
def _clamp(call: _Call) -> _Step:
    low, high = call.settings(min=None, max=None)
    if isinstance(low, int | float) and isinstance(high, int | float):
        return call.node(Activation("hardtanh", (("min_val", low), ("max_val", high))), call.read())
    if low == 0 and high is None:
        return call.node(Activation("relu"), call.read())
    raise _NoNode(f"clamp between {low} and {high}; allowed: two numbers, or 0 alone from below")


@_traces("maxpool2d")
def _max_pool(call: _Call) -> _Step:
    kernel, stride, padding, dilation, ceil, indices = call.settings(
        kernel_size=2, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False
    )
    if indices:
        raise _NoNode(f"{call.label} with return_indices")
    op = MaxPool(_pair(kernel), _pair(stride or kernel), _pair(padding), _pair(dilation), ceil)
    return call.node(op, call.read(dims=4))


@_traces("avgpool2d")
def _average_pool(call: _Call) -> _Step:
    kernel, stride, padding, ceil, count_padding, divisor = call.settings(
        kernel_size=2, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None
    )
    if divisor is not None:
        raise _NoNode(f"{call.label} with divisor_override")
    op = AvgPool(_pair(kernel), _pair(stride or kernel), _pair(padding), ceil, count_padding)
    return call.node(op, call.read(dims=4))


@_traces("adaptiveavgpool2d adaptivemaxpool2d")
def _adaptive_pool(call: _Call) -> _Step:
    size, indices = call.settings(output_size=1, return_indices=False)
    if indices:
        raise _NoNode(f"{call.label} with return_indices")
    value = call.read(dims=4)
    height, width = (
        own if wanted is None else wanted for wanted, own in zip(_pair(size), value.shape[2:], strict=True)
    )
    return call.node(AdaptivePool((height, width), "max" in _plain(call.label)), value)


@_traces("dropout dropout2d featuredropout")
def _dropout(call: _Call) -> _Step:
    share, training = call.settings(p=0.5, training=True)
    if training:
        raise _NoNode(f"{call.label} acts in evaluation too; give it training=self.training")
    single = _plain(call.label) == "dropout"
    return call.node(Dropout(share, "value" if single else "channel"), call.read(dims=0 if single else 4))


@_traces("stochasticdepth")
def _stochastic_depth(call: _Call) -> _Step:
    share, mode, training = call.settings(p=0.5, mode="batch", training=True)
    if training or mode != "row":
        raise _NoNode(f"{call.label} with mode {mode!r} and training {training}; allowed: 'row', and self.training")
    return call.node(Dropout(share, "sample"), call.read())


@_traces("identity contiguous clone")
def _identity(call: _Call) -> _Step:
    return call.value().step


@_traces("expand expandas")
def _expand(call: _Call) -> _Step:
    """A map of one position seen as a larger one: the product or the sum that reads it expands it by itself."""
    value = call.read()
    if call.shape[:2] != value.shape[:2] or len(call.shape) != len(value.shape):
        raise _NoNode(f"{call.label} from {_sample(value.shape)} to {_sample(call.shape)} copies units")
    return value.step


@_traces("flatten unflatten view viewas reshape reshapeas squeeze unsqueeze getitem")
def _reshape(call: _Call) -> _Step:
    """By what it does to the shape: while no value is left out, their order stays."""
    value, new = call.value(), call.shape
    step, old = value.step, value.step.shape
    index = call.args[1] if _plain(call.label) == "getitem" else ()
    in_order = all(
        each is None or isinstance(each, int | slice | type(...))
        for each in (index if isinstance(index, tuple) else (index,))
    )
    if in_order and _size(new) == _size(old):
        if len(old) == 4 and new == (old[0], _size(old[1:])):
            return call.node(Flatten(), value)
        if new == old or (new[:2] == old[:2] and (len(old) == 4 or len(new) == 3)):
            return step
        if len(old) == 2 and new == (*old, 1, 1):
            return call.node(ToMap(), value)
    raise _NoNode(f"{call.label} from {_sample(value.shape)} to {_sample(new)}, where units cannot be followed")


@_traces("mean")
def _mean(call: _Call) -> _Step:
    """Over all positions of a map, also of one that is seen with one dimension of positions."""
    dim, keep = call.settings(dim=None, keepdim=False)
    value = call.value()
    old, seen = value.step.shape, value.shape
    dims = {each % len(seen) for each in (range(len(seen)) if dim is None else [dim] if isinstance(dim, int) else dim)}
    over_positions = len(old) == 4 and old[:2] == seen[:2] and _size(old) == _size(seen)
    if not over_positions or dims != set(range(2, len(seen))) or (keep and len(seen) != 4):
        raise _NoNode(f"mean of {_sample(seen)} over dimensions {sorted(dims)}; allowed: over all positions at once")
    return call.node(AdaptivePool() if keep else MeanPositions(), value)


@_traces("add sub mul div neg")
def _arithmetic(call: _Call) -> _Step:
    """A sum or a product of two tensors, or a constant factor or summand."""
    kind = _plain(call.label)
    operands = (*call.args, *(call.kwargs[name] for name in ("input", "other") if name in call.kwargs))[:2]
    numbers = [each for each in operands if isinstance(each, int | float)]
    if call.kwargs.get("alpha", 1) != 1 or call.kwargs.get("rounding_mode"):
        raise _NoNode(f"{call.label} with alpha or rounding_mode")
    if kind != "neg" and not numbers:
        if kind not in ("add", "mul"):
            raise _NoNode(f"{call.label} of two tensors; allowed: their sum and their product")
        return call.node(Add() if kind == "add" else Multiply(), _alike(call))
    number = float(numbers[0]) if numbers else 0.0
    reverse = bool(numbers) and numbers[0] is operands[0]
    if kind == "div" and (reverse or not number):
        raise _NoNode(f"{call.label} of or by something else than a number other than 0")
    factor, summand = {
        "add": (1.0, number),
        "sub": (-1.0, number) if reverse else (1.0, -number),
        "mul": (number, 0.0),
        "div": (1 / (number or 1.0), 0.0),
        "neg": (-1.0, 0.0),
    }[kind]
    value = call.read(int(reverse))
    return value.step if (factor, summand) == (1.0, 0.0) else call.node(Affine(factor, summand), value)


def _alike(call: _Call) -> list[_Value]:
    """The two values of a sum or a product: both flat, or both maps, one of which may have a single position."""
    one, other = values = [call.value(0), call.value(1)]
    whole = all(each.shape[:2] == each.step.shape[:2] and len(each.shape) == len(each.step.shape) for each in values)
    if not whole or len(one.shape) not in (2, 4) or len(one.shape) != len(other.shape):
        raise _NoNode(f"{call.label} of {_sample(one.shape)} and {_sample(other.shape)}, whose units are not alike")
    return values


@_traces("cat")
def _concatenation(call: _Call) -> _Step:
    (dim,) = call.settings(dim=0)
    parts = call.args[0] if call.args else call.kwargs["tensors"]
    if dim % len(call.shape) != 1:
        raise _NoNode(f"{call.label} over dimension {dim}; allowed: 1, over channels")
    whole = replace(call, args=tuple(parts))
    return call.node(Concat(), [whole.read(position) for position in range(len(parts))])
