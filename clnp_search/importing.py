"""A user's own objects by import path, `package.module:name`."""

from __future__ import annotations

import difflib
import importlib
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from clnp_search.errors import InputError

IMPORT_PATH = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*"
# Modules that were read from a user's own folders, and when their files were written.
_theirs: dict[str, int] = {}


@contextmanager
def imported(key: str, path: str, folders: Sequence[Path]) -> Iterator[Any]:
    """The object at an import path, whose module is installed or lies in one of `folders`.

    They lead the import path inside the `with` block alone, so that what the object imports when it is called is
    found there too, and nothing of the program's own imports changes afterwards. What was read from such folders before
    is read again where other folders lead now, or a file has changed.

    Args:
        key: The setting that holds the path, for messages.

    Raises:
        InputError: There is no such module or object, or importing it fails.
    """
    module_name, _, name = path.partition(":")
    places = [str(folder.absolute()) for folder in folders]
    _forget_others(places)
    before = {*sys.modules}
    sys.path[:0] = places
    try:
        importlib.invalidate_caches()
        found: Any = _module(key, path, module_name, places)
        for part in name.split("."):
            if not hasattr(found, part):
                close = difflib.get_close_matches(part, dir(found), 1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise InputError(f"{key}: {path!r}: {module_name} ({_file(found)}) has no {part!r}{hint}")
            found = getattr(found, part)
        yield found
    finally:
        _theirs.update({each: _written(each) for each in {*sys.modules} - before if _is_from(each, places)})
        for place in places:
            if place in sys.path:
                sys.path.remove(place)


def _forget_others(places: Sequence[str]) -> None:
    """Has all of them read again if one would be another module now."""
    if any(not _is_from(name, places) or _written(name) != written for name, written in _theirs.items()):
        for name in _theirs:
            sys.modules.pop(name, None)
        _theirs.clear()


def _is_from(name: str, places: Sequence[str]) -> bool:
    """Whether a module that was imported is what these folders have under its name."""
    whole = name.partition(".")[0]
    spec = PathFinder.find_spec(whole, places) if whole in sys.modules else None
    if spec is None:
        return False
    if spec.origin is None:  # a folder without __init__.py
        return [*(spec.submodule_search_locations or ())] == [*getattr(sys.modules[whole], "__path__", ())]
    return spec.origin == getattr(sys.modules[whole], "__file__", None)


def _written(name: str) -> int:
    """When a module's file was written; 0 if there is none."""
    file = Path(getattr(sys.modules.get(name), "__file__", None) or "")
    return file.stat().st_mtime_ns if file.is_file() else 0


def _module(key: str, path: str, name: str, places: Sequence[str]) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and f"{name}.".startswith(f"{error.name}."):
            looked = " or ".join(places)
            raise InputError(f"{key}: {path!r}: no module {error.name!r}, neither in {looked} nor installed") from error
        raise InputError(f"{key}: {path!r}: {name} needs {error.name!r}, which is not there") from error
    except (Exception, SystemExit) as error:  # a user's module may raise anything, and end as a script does
        raise InputError(f"{key}: {path!r}: importing {name} raised {described(error)}") from error


def _file(found: Any) -> str:
    return getattr(found, "__file__", None) or type(found).__name__


def described(error: BaseException) -> str:
    """An error of a user's code, and the line of it that raised, if it came to that."""
    last = traceback.extract_tb(error.__traceback__)[-1:]
    own = [each for each in last if Path(__file__).parent not in Path(each.filename).parents]
    return f"{type(error).__name__}: {error}" + "".join(f" ({each.filename}, line {each.lineno})" for each in own)
