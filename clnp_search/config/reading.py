"""Sweeps from files, from plain data, and from run folders. Every fault is named at once, before any work."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from clnp_search.config.faults import faults_between_sections, faults_of
from clnp_search.config.sections import NETWORKS, STRENGTHS
from clnp_search.config.sweep import UNRECORDED, Sweep
from clnp_search.config.text import apply_overrides, parse_yaml, plain_data
from clnp_search.errors import InputError
from clnp_search.importing import IMPORT_PATH
from clnp_search.passwords import masked
from clnp_search.storage import MAX_SWEEP_BYTES, NAME_PATTERN, NAMES, VERSION, RunFolder, join_uri

if TYPE_CHECKING:
    from clnp_search.clnp.state import State
    from clnp_search.records import TaskPlan

# What texts of a pattern are, in words.
PATTERNS = {NAME_PATTERN: NAMES, f"^{IMPORT_PATH}$": "package.module:name"}
# What a fork may change: what was decided before its first own task stays as it was.
FORKED_SECTIONS = ("training", "search", "forgetting")


def load_sweep(path: Path, overrides: list[str] | None = None) -> Sweep:
    """The sweep in a YAML file, with `key=value` overrides applied.

    Raises:
        InputError: The file cannot be read or has faults; names each with its key, its value and what is allowed.
    """
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_SWEEP_BYTES + 1)
        text = data.decode()
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    if len(data) > MAX_SWEEP_BYTES:
        raise InputError(f"{path}: a sweep file has at most {MAX_SWEEP_BYTES} bytes; this one has more")
    raw = parse_yaml(text, str(path))
    if not isinstance(raw, dict):
        raise InputError(f"{path}: a sweep file holds keys such as scenario and network; this one holds {raw!r:.80}")
    raw = plain_data(raw, str(path))  # what stands twice by an alias is then two things
    apply_overrides(raw, overrides or [])
    raw.setdefault("name", path.stem)
    raw.setdefault("modules", list(dict.fromkeys([str(path.parent), "."])))
    return parse_sweep(raw, str(path))


def parse_sweep(raw: dict[str, Any], source: str) -> Sweep:
    """The sweep that plain data describe.

    Raises:
        InputError: As `load_sweep`.
    """
    raw, sweep = plain_data(raw, source), None
    faults: list[str] = []
    try:
        sweep = Sweep.model_validate(raw)
    except ValidationError as error:
        details = error.errors()
        # A list whose items are all faulty counts as empty too; its items say more.
        lists = {detail["loc"][:end] for detail in details for end in range(len(detail["loc"]))}
        faults.extend(
            _explain(detail) for detail in details if detail["type"] != "too_short" or detail["loc"] not in lists
        )
        faulty = {detail["loc"][0] for detail in details if detail["loc"]}
        if not faulty & {"scenario", "network", "method"}:  # on which other sections lean
            with suppress(ValidationError):
                sweep = Sweep.model_validate({key: value for key, value in raw.items() if key not in faulty})
    faults.extend(faults_between_sections(raw))
    if sweep is not None:
        faults.extend(faults_of(sweep))
    if faults or sweep is None:
        each_once = dict.fromkeys(faults)
        listed = "\n".join(f"  {fault}" for fault in each_once)
        raise InputError(f"{source}: {len(each_once)} fault(s)\n{listed}")
    return sweep


def sweep_of(folder: RunFolder) -> Sweep:
    """The resolved sweep of a run.

    Raises:
        InputError: This is no run folder, or its sweep is of another version.
    """
    source = join_uri(folder.uri, "sweep.yaml")
    raw = parse_yaml(folder.read_sweep(), source)
    try:
        return parse_sweep(raw if isinstance(raw, dict) else {}, source)
    except InputError as error:
        if (writer := folder.written_by()) in ("", f"clnp-search {VERSION}"):
            raise
        raise InputError(f"{error}\nThe run was begun by {writer}; this is {VERSION}.") from error


def sweep_at(folder: RunFolder, sweep: Sweep, plan: TaskPlan) -> Sweep:
    """The settings of a task: the run's own, or those that a task which it shares with another run was planned with."""
    fork = folder.read_fork()
    return sweep if fork is None or plan.task > fork.after_task else planned_with(sweep, plan.settings)


def planned_with(sweep: Sweep, settings: Mapping[str, Any]) -> Sweep:
    """A sweep with the settings of training, search and forgetting that a task was planned with.

    Args:
        settings: As `Sweep.settings` gives them.

    Raises:
        InputError: They are none.
    """
    raw = sweep.model_dump(mode="json")
    for section, values in UNRECORDED.items():
        raw[section] |= values
    for key, value in settings.items():
        section, _, name = key.partition(".")
        # Of a method that has no strength, a zero is recorded.
        if section in FORKED_SECTIONS and (name != "strength" or sweep.method in STRENGTHS):
            raw[section][name] = value
    return parse_sweep(raw, "a task's recorded settings")


def overridden(sweep: Sweep, overrides: Sequence[str], source: str = "--set") -> Sweep:
    """A sweep with `key=value` overrides applied.

    Args:
        source: What faults are said to be of.

    Raises:
        InputError: As `load_sweep`.
    """
    raw = sweep.model_dump(mode="json")
    apply_overrides(raw, overrides)
    return parse_sweep(raw, source)


def network_state(folder: RunFolder, sweep: Sweep, task: int) -> State:
    """The state that a committed task is computed from: the latest, or its own if it keeps a network of its own.

    Raises:
        InputError: It is not committed.
        Damaged: As `RunFolder.read_state`.
    """
    alone = sweep.baseline is not None and sweep.baseline.ALONE
    return folder.read_state(task if alone else len(folder.read_results()) - 1)


def _explain(detail: Any) -> str:
    """One pydantic error as `key: value: what is allowed`."""
    *sections, last = detail["loc"]
    # An unknown key may look like a branch.
    is_key = detail["type"] == "extra_forbidden" or not _is_branch(last)
    location = [part for part in sections if not _is_branch(part)] + [last] * is_key
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")
    if detail["type"] == "extra_forbidden":
        known = _keys_at(detail["loc"][:-1])
        close = difflib.get_close_matches(str(location[-1]), known, 1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}? " if close else ""
        return f"{key}: unknown key; {hint}Known here: {', '.join(known)}"
    if detail["type"] == "network" and isinstance(detail["input"], dict):
        return f"{key}.name: {detail['input'].get('name')!r}: {detail['msg']}"
    if detail["type"] == "missing":
        return f"{key}: missing; it has no default"
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "model_type":
        message = f"allowed: a section, with some of {', '.join(_keys_at(detail['loc']))}"
    elif detail["type"] == "tuple_type":
        message = "allowed: a list"
    elif detail["type"] == "string_pattern_mismatch":
        message = f"allowed: {PATTERNS[detail['ctx']['pattern']]}"
    elif detail["type"] == "too_short":
        message = f"allowed: a list of {detail['ctx']['min_length']} or more"
    return f"{key}: {masked(repr(detail['input'])):.80}: {message[:1].lower() + message[1:]}"


def _keys_at(location: Sequence[Any]) -> list[str]:
    """The keys of the section at a pydantic location."""
    section: Any = Sweep
    for part in location:
        section = NETWORKS[part] if part in NETWORKS else section.model_fields[part].annotation
    return list(section.model_fields)


def _is_branch(part: str | int) -> bool:
    """Whether an entry of a pydantic location names a branch of a union instead of a key."""
    return isinstance(part, str) and (any(mark in part for mark in "[(") or part == "constrained-int")
