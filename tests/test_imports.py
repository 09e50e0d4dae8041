"""Imports run one way (DESIGN.md, section 4), as the source says."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "clnp_search"
MODULES = sorted(PACKAGE.rglob("*.py"))

# From the top down. Parts of one level do not import one another.
LEVELS = [
    {"__main__", "api"},
    {"cli"},
    {"verification", "planning", "branching", "cleaning"},
    {"baseline"},
    {"sequence"},
    {"agreement", "listener"},
    {"search", "selection", "tracking", "report"},
    {"forecast", "pareto", "progress"},
    {"config", "lease"},
    {"tasks", "storage"},
    {"clnp"},
    {"importing"},
    {"records", "errors", "passwords"},
]
LEVEL_OF = {part: level for level, parts in enumerate(LEVELS) for part in parts}
ALLOWED_IN_CLNP = {"torch", "numpy", "safetensors", *sys.stdlib_module_names}


def part_of(path: Path) -> str:
    """The part that a module belongs to: its file or folder directly under the package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Dotted names that a module imports, wherever in it, type checking included."""
    package = ("clnp_search", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def imported_parts(path: Path) -> set[str]:
    """The parts of the package that a module imports."""
    names = [name.split(".") for name in imports(path)]
    return {name[1] for name in names if name[0] == "clnp_search" and len(name) > 1}


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def test_every_part_of_the_package_has_its_level_here() -> None:
    assert {part_of(path) for path in MODULES} - LEVEL_OF.keys() - {"__init__"} == set()


@pytest.mark.parametrize("path", [path for path in MODULES if part_of(path) in LEVEL_OF], ids=name_of)
def test_a_module_imports_from_its_own_part_and_from_lower_levels_only(path: Path) -> None:
    own = part_of(path)
    wrong = [part for part in imported_parts(path) - {own} if LEVEL_OF.get(part, -1) <= LEVEL_OF[own]]
    assert wrong == []


@pytest.mark.parametrize("path", sorted((PACKAGE / "clnp").rglob("*.py")), ids=name_of)
def test_the_method_needs_torch_numpy_and_safetensors_alone(path: Path) -> None:
    roots = {name.split(".")[0] for name in imports(path)}
    assert roots - ALLOWED_IN_CLNP <= {"clnp_search"}
    assert imported_parts(path) <= {"clnp", "records", "errors"}


@pytest.mark.parametrize("name", ["records", "errors", "passwords"])
def test_the_lowest_level_needs_the_standard_library_alone(name: str) -> None:
    assert {name.split(".")[0] for name in imports(PACKAGE / f"{name}.py")} <= sys.stdlib_module_names


def test_importing_the_package_stays_light() -> None:
    code = "import sys, clnp_search; print(*sorted({'torch', 'ray', 'mlflow', 'pydantic', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert done.stdout.strip() == ""


# What parts of torch and scikit-learn import when asked for something small; together, more than all else of a command.
HEAVY = {"torch._dynamo", "sympy", "sklearn", "scipy"}


def test_what_every_command_does_imports_nothing_heavy() -> None:
    code = f"""
import sys
from pathlib import Path
from builders import GRAPHS, make_training, run_all
from clnp_search.clnp.state import Architecture, State
from clnp_search.clnp.training import TrainingSettings
from clnp_search.tasks.data import load_digits
load_digits(Path())
for graph in GRAPHS.values():
    alphas = [(0.1,) * len(graph.layers)]
    _, training = make_training(State.empty(Architecture(graph)), alphas, [0.01], TrainingSettings(1, 8))
    run_all(training)
print(*sorted({HEAVY} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent / "tests")
    assert (done.stdout.strip(), done.stderr) == ("", "")
