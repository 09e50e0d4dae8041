"""A user's own objects by import path, `package.module:name`."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clnp_search.errors import InputError

IMPORT_PATH = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*"


@contextmanager
def imported(key: str, path: str, folders: Sequence[Path]) -> Iterator[Any]:
    """The object at an import path, whose module is installed or lies in one of `folders`.

    They lead the import path inside the `with` block alone, so that what the object imports when it is called is
    found there too, and nothing of the program's own imports changes afterwards.

    Args:
        key: The setting that holds the path, for messages.

    Raises:
        InputError: There is no such module or object, or importing it fails.
    """
    module_name, _, name = path.partition(":")
    places = [str(folder.absolute()) for folder in folders]
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
        for place in places:
            if place in sys.path:
                sys.path.remove(place)


def _module(key: str, path: str, name: str, places: Sequence[str]) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and f"{name}.".startswith(f"{error.name}."):
            looked = " or ".join(places)
            raise InputError(f"{key}: {path!r}: no module {error.name!r}, neither in {looked} nor installed") from error
        raise InputError(f"{key}: {path!r}: {name} needs {error.name!r}, which is not there") from error
    except Exception as error:  # a user's module may raise anything
        raise InputError(f"{key}: {path!r}: importing {name} raised {described(error)}") from error


def _file(found: Any) -> str:
    return getattr(found, "__file__", None) or type(found).__name__


def described(error: BaseException) -> str:
    """An error of a user's code, with the line of it that raised."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = f" ({trace.tb_frame.f_code.co_filename}, line {trace.tb_lineno})" if trace else ""
    return f"{type(error).__name__}: {error}{where}"
