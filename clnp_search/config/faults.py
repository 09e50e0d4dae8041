"""Faults that need two keys of a sweep file to see."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from clnp_search.config.sections import STRENGTHS, SearchConfig, network_kind
from clnp_search.config.values import AlphaValue, Range, parts_of
from clnp_search.tasks import Kind, kind_of

if TYPE_CHECKING:
    from clnp_search.config.sweep import Sweep


def faults_between_sections(raw: dict[str, Any]) -> Iterator[str]:
    """Faults that need two keys to see; skipped where the keys that they lean on are faulty themselves."""
    scenario = raw.get("scenario")
    if isinstance(scenario, dict) and (kind := kind_of(str(scenario.get("name")))):
        yield from _scenario_faults(scenario, kind, raw.get("network"))


def faults_of(sweep: Sweep) -> Iterator[str]:
    """Faults of a sweep whose sections are as they should be."""
    if sweep.head.kind == "multi" and sweep.head.bias != "frozen":
        yield f"head.bias: {sweep.head.bias}: heads of their own have biases of their own; allowed with kind: single"
    yield from _grid_faults(sweep)
    yield from _method_faults(sweep)


def _search_faults(search: SearchConfig) -> Iterator[str]:
    """Settings of an algorithm that another one is asked for, and ranges that there is nothing to draw from."""
    drawn = search.algorithm != "grid"
    for key in ("alpha", "learning_rate"):
        values = getattr(search, key)
        if drawn and len(values) > 1:
            yield (
                f"search.{key}: {len(values)} values; allowed with algorithm: {search.algorithm}: one, "
                "which may be a range {low: , high: }"
            )
        for index, value in enumerate(values):
            parts = parts_of(value).values()
            if not drawn and any(isinstance(part, Range) for part in parts):
                yield f"search.{key}[{index}]: a range; allowed with algorithm: random or optuna"
    if drawn and not search.ranges:
        yield f"search.alpha: no range to draw from; allowed with algorithm: {search.algorithm}: {{low: , high: }}"
    optuna = ("optuna",)
    for key, allowed in {
        "points": ("random", *optuna),
        "batch": optuna,
        "sampler": optuna,
        "objectives": optuna,
    }.items():
        value = getattr(search, key)
        if value != SearchConfig.model_fields[key].default and search.algorithm not in allowed:
            shown = ", ".join(value) if isinstance(value, tuple) else value
            yield f"search.{key}: {shown}; allowed with algorithm: {' or '.join(allowed)}, not with {search.algorithm}"


def alpha_faults(index: int, alpha: AlphaValue, layers: Sequence[str]) -> Iterator[str]:
    """How an alpha of the grid does not fit a network's layers."""
    key, names = f"search.alpha[{index}]", shorten(", ".join(layers), 200, placeholder="...")
    if isinstance(alpha, tuple) and len(alpha) != len(layers):
        yield (
            f"{key}: {list(alpha)} has {len(alpha)} values; allowed: one number, or {len(layers)}, one for each layer, "
            f"the head last: {names}"
        )
    if isinstance(alpha, dict):
        for pattern in alpha:
            if not any(fnmatchcase(layer, pattern) for layer in layers):
                yield f"{key}: {pattern!r} matches no layer; there are {names}"
        left = [layer for layer in layers if not any(fnmatchcase(layer, pattern) for pattern in alpha)]
        if left:
            left_out = shorten(", ".join(left), 200, placeholder="...")
            yield f"{key}: no pattern matches {left_out}; a last pattern '*' takes the rest"


def _scenario_faults(scenario: dict[str, Any], kind: Kind, network: Any) -> Iterator[str]:
    name, tasks, classes = (scenario.get(key) for key in ("name", "tasks", "classes"))
    if kind.allowed_tasks and isinstance(tasks, int) and tasks not in kind.allowed_tasks:
        listed = ", ".join(map(str, kind.allowed_tasks))
        yield f"scenario.tasks: {tasks} tasks cannot share the classes of {name}; allowed: {listed}"
    for key in ("classes", "size", "arguments"):
        if scenario.get(key) and key not in kind.keys:
            allowed = ", ".join(kind.keys) or "none of classes, size, arguments"
            yield f"scenario.{key}: {name} has no such setting; allowed: {allowed}"
    if isinstance(classes, list) and all(isinstance(each, list) for each in classes):
        if isinstance(tasks, int) and tasks > len(classes):
            yield f"scenario.tasks: {tasks}; scenario.classes has {len(classes)} lists"
        for index, each in enumerate(classes):
            if twice := sorted({str(one) for one in each if each.count(one) > 1}):
                yield f"scenario.classes[{index}]: {', '.join(twice)} more than once"
    augment = scenario.get("augment")
    if isinstance(augment, dict) and any(augment.values()):
        if kind.permuted:
            yield f"scenario.augment: the images of {name} are permuted, and cannot be moved or mirrored"
        elif network_kind(network) == "(mlp)":
            yield "scenario.augment: an mlp sees flat samples; allowed: a network that sees images"


def _grid_faults(sweep: Sweep) -> Iterator[str]:
    """Alphas that do not fit the network, as far as its layers are known, or values that give a point twice."""
    misused = list(_search_faults(sweep.search))
    yield from misused
    layers, alphas = sweep.network.layer_names, sweep.search.alpha
    misfits = [fault for index, each in enumerate(alphas) for fault in alpha_faults(index, each, layers) if layers]
    yield from misfits
    known = layers and not misfits and not misused and sweep.search.algorithm == "grid"
    if known:
        written: list[Any] = [sweep.layer_alphas(each, layers) for each in alphas]
    else:  # of patterns the order counts
        written = [tuple(each.items()) if isinstance(each, dict) else each for each in alphas]
    grids: dict[str, list[Any]] = {"alpha": written, "learning_rate": [*sweep.search.learning_rate]}
    for key, values in grids.items():
        for index, value in enumerate(values):
            if (first := values.index(value)) < index:
                same, shown = getattr(sweep.search, key)[first], getattr(sweep.search, key)[index]
                yield f"search.{key}[{index}]: {shown} is search.{key}[{first}], {same}, again; allowed: each once"


def _method_faults(sweep: Sweep) -> Iterator[str]:
    """What a method cannot do."""
    strengths, method = sweep.search.strength, sweep.method
    if strengths is not None:
        if method not in STRENGTHS:
            allowed = f"null, or of {', '.join(STRENGTHS)}"
            yield f"search.strength: {list(strengths)}: method {method} has none; allowed: {allowed}"
        elif method == "packnet" and max(strengths) >= 1:
            yield f"search.strength: {list(strengths)}: a share of weights to prune; allowed: 0 or more, less than 1"
        if len(set(strengths)) < len(strengths):
            yield f"search.strength: {list(strengths)}: a value is there twice; allowed: each once"
    if method == "clnp":
        return
    if sweep.search.algorithm != "grid":
        yield f"search.algorithm: {sweep.search.algorithm}: method {method} tries all strengths; allowed: grid"
    if sweep.search.tasks == "first" and method in ("ewc", "si") and len(sweep.strengths) > 1:
        yield f"search.tasks: first: {method} holds to earlier tasks alone; allowed: every, or one search.strength"
    if sweep.margins:
        yield f"margins: method {method} prunes by no margin; allowed: none"
    if sweep.capacity.on_depletion != "continue":
        yield f"capacity.on_depletion: {sweep.capacity.on_depletion}: method {method} uses all units; allowed: continue"
    if sweep.head.kind == "single" and sweep.head.bias == "per_task":
        yield f"head.bias: per_task: method {method} shares a single head and its bias; allowed: frozen, none"
