"""The text of a sweep file as plain data, and back. What YAML has beyond plain data is refused."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from clnp_search.errors import InputError
from clnp_search.passwords import masked
from clnp_search.records import UNWRITABLE

# Of a sweep file: values, keys and lists among them, and how deep these may be nested. So few aliases repeat a value at
# most 60,000 times, however they are nested.
MAX_VALUES, MAX_DEPTH, MAX_ALIASES = 100_000, 32, 30
WORD = re.compile(r"[A-Za-z_/][A-Za-z0-9_./-]*")
ALIAS = re.compile(r"""(?:^|[\s\[{,:])\*[^\s\]},"']""")


def parse_yaml(text: str, source: str) -> Any:
    """What a YAML text says.

    Raises:
        InputError: It is no YAML, or repeats too much by aliases.
    """
    if "&" in text and len(ALIAS.findall(text)) > MAX_ALIASES:
        raise InputError(f"{source}: more than {MAX_ALIASES} YAML aliases")
    try:
        return YAML(typ="safe", pure=True).load(text)
    except Exception as error:  # of a text that is no YAML, the parser raises many kinds
        raise InputError(f"{source}: not a YAML file: {masked(str(error))}") from error


def quoted(value: Any) -> Any:
    """The same with all text in quotes that is more than a word: the writer does not see all that needs them."""
    if isinstance(value, Mapping):
        return {quoted(name): quoted(each) for name, each in value.items()}
    if isinstance(value, list):
        return [quoted(each) for each in value]
    return DoubleQuotedScalarString(value) if isinstance(value, str) and not WORD.fullmatch(value) else value


def plain_data(raw: Any, source: str) -> Any:
    """A copy of what a file or a script gave, of such values alone as JSON has too, and with text for keys.

    What YAML's aliases repeat is counted as often as it is repeated.

    Raises:
        InputError: There are other values in it, or too many.
    """
    left, faults = MAX_VALUES, list[str]()

    def plain(value: Any, key: str, depth: int) -> Any:
        nonlocal left
        left -= 1
        if left < 0 or depth > MAX_DEPTH:
            raise InputError(f"{source}: {key:.80}: more than {MAX_VALUES} values, or nested {MAX_DEPTH} deep")
        if isinstance(value, Mapping):
            below = f"{key}." if key else ""
            faults.extend(f"{key}: a key of it is {_not_plain(name)}" for name in value if _not_plain(name))
            names = {name: str(name) for name in value if not _not_plain(name)}
            return {name: plain(value[each], f"{below}{name}", depth + 1) for each, name in names.items()}
        if isinstance(value, list | tuple):
            return [plain(each, f"{key}[{index}]", depth + 1) for index, each in enumerate(value)]
        if what := _not_plain(value):
            faults.append(f"{key}: {what}")
        return value

    copy = plain(raw, "", 0)
    if faults:
        listed = "\n".join(f"  {fault}" for fault in faults)
        raise InputError(f"{source}: {len(faults)} fault(s)\n{listed}")
    return copy


def _not_plain(value: Any) -> str:
    """What a value is that JSON and YAML do not give back as it was written, and what is allowed; else nothing."""
    if isinstance(value, str):
        return f"{masked(ascii(value)):.80}: a character of it cannot be printed" if UNWRITABLE.search(value) else ""
    if isinstance(value, int):
        return "" if -(2**63) <= value < 2**64 else "a whole number; allowed: of up to 64 bits"
    if value is None or (isinstance(value, float) and math.isfinite(value)):
        return ""
    return f"{value!a:.80}: allowed: text, numbers, true, false, null, and lists and mappings of these"


def apply_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> None:
    """Puts the value of each `key=value` where it belongs in plain data.

    Raises:
        InputError: One is none, or its key is below something else than a section; names each such.
    """
    faults = []
    for override in overrides:
        try:
            _apply(raw, override)
        except InputError as error:
            faults.append(str(error))
    if faults:
        raise InputError("\n".join(faults))


def _apply(raw: dict[str, Any], override: str) -> None:
    source = f"--set {masked(override)}"
    key, separator, value = override.partition("=")
    if not separator or not key.strip():
        raise InputError(f"{source}: write key=value, for example --set training.epochs=3")
    *sections, last = key.strip().split(".")
    place: Any = raw
    for section in sections:
        if isinstance(place, dict):
            place[section] = {} if place.get(section) is None else place[section]
            place = place[section]
    if not isinstance(place, dict):
        raise InputError(f"{source}: {'.'.join(sections)} is no section")
    place[last] = parse_yaml(value, source)
