"""Every command line of the documents and of the sweep files' comments is one that the program takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from string import Template

import pytest
from typer.main import get_command

from clnp_search.cli import app
from clnp_search.config import load_sweep

ROOT = Path(__file__).parents[1]
SOURCES = [ROOT / "README.md", ROOT / "docker" / "README.md", *sorted((ROOT / "sweeps").glob("*.yaml"))]


def documented(path: Path) -> list[list[str]]:
    """The arguments of each `clnp-search` in a document's shell blocks, or in a sweep file's comments; of a loop, as
    it begins.
    """
    text = path.read_text(encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    if path.suffix == ".yaml":
        blocks = [text.replace("\n#     ", " ").replace("\n#   ", "\n")]
    found = []
    for block in blocks:
        values = dict(re.findall(r'^(\w+)="(.*)"$', block, re.MULTILINE) + re.findall(r"for (\w+) in (\S+)", block))
        lines = Template(block.replace("\\\n", "")).safe_substitute(values)
        found += re.findall(r"^(?:.*\s)?clnp-search ([^\n#;]+)", lines, re.MULTILINE)
    return [shlex.split(each) for each in found]


COMMANDS = {path: documented(path) for path in SOURCES}


def test_the_documents_have_commands() -> None:
    assert {path.name for path in SOURCES if COMMANDS[path]} == {"README.md", "split_cifar.yaml"}


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(arguments, id=f"{path.parent.name}/{path.name} {' '.join(arguments)[:60]}")
        for path, commands in COMMANDS.items()
        for arguments in commands
    ],
)
def test_a_documented_command_is_one(arguments: list[str]) -> None:
    name, *rest = arguments
    command = get_command(app).get_command(None, name)  # type: ignore[attr-defined, arg-type]
    asked = command.make_context(name, rest).params
    if name == "run":
        load_sweep(ROOT / asked["sweep_file"], asked["overrides"])
