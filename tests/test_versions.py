"""Run folders of other versions: each command goes on with them, or refuses them and says why."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from builders import make_sweep, write_run

from clnp_search.cli import app
from clnp_search.errors import InputError
from clnp_search.storage import VERSION, RunFolder, _sealed, open_run

COMMANDS = [
    ["status"],
    ["verify"],
    ["resume"],
    ["report"],
    ["compare"],
    ["gc"],
    ["evaluate", "--task", "0"],
    ["export", "--task", "0", "--out", "task0.onnx"],
    ["reselect", "--task", "0"],
    ["fork", "--after-task", "0", "--name", "branch"],
]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written") / "runs" / "run"
    for _ in write_run(RunFolder(str(folder)), make_sweep(name="run")):
        pass
    return folder


@pytest.fixture
def run(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of a finished run, in `runs/` of the current one."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(written, tmp_path / "runs" / "run"))


def change(path: Path, how: Callable[[dict[str, Any]], object]) -> None:
    """Changes a record, which stays sealed as another version would have sealed it."""
    record = json.loads(path.read_text())
    del record["sha256"]
    how(record)
    path.write_bytes(_sealed(json.dumps(record, indent=1).removesuffix("\n}").encode()))


@pytest.mark.parametrize("schema", [0, 2])
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_each_command_refuses_a_folder_of_another_schema(run: Path, command: list[str], schema: int) -> None:
    change(run / "summary.json", lambda record: record.update(schema=schema, unheard_of=[1]))
    change(run / "tasks/000/plan.json", lambda record: record["environment"].update(clnp_search="9.8"))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    expected = f"a run folder of schema {schema}; clnp-search {VERSION} reads schema 1 alone. Use clnp-search 9.8 that"
    with pytest.raises(InputError, match=expected):
        app([command[0], "run", *command[1:]], standalone_mode=False)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_the_same_command_does_not_go_on_with_a_folder_of_another_schema(run: Path) -> None:
    change(run / "summary.json", lambda record: record.update(schema=2))
    Path("run.yaml").write_text(make_sweep(name="run").to_yaml())
    with pytest.raises(InputError, match="a run folder of schema 2"):
        app(["run", "run.yaml", "--storage", "runs", "--tracking-uri", "none"], standalone_mode=False)


def test_a_record_with_more_fields_is_read(run: Path) -> None:
    expected = RunFolder(str(run)).read_results()
    change(run / "tasks/001/result.json", lambda record: record.update(more=1))
    assert RunFolder(str(run)).read_results() == expected


def test_a_record_that_lacks_a_field_is_of_another_version_and_not_damaged(run: Path) -> None:
    change(run / "tasks/001/result.json", lambda record: record.pop("digest"))
    with pytest.raises(InputError, match=r"tasks/001/result.json: written by another version .*: digest: .* required"):
        app(["status", "run"], standalone_mode=False)


def test_a_sweep_with_keys_of_another_version_says_whose_they_are(run: Path) -> None:
    change(run / "tasks/000/plan.json", lambda record: record["environment"].update(clnp_search="9.8"))
    with (run / "sweep.yaml").open("a") as stream:
        stream.write("unheard_of: 1\n")
    with pytest.raises(InputError, match=r"unheard_of.*\n.*begun by clnp-search 9.8; this is "):
        app(["status", "run"], standalone_mode=False)


def test_a_folder_of_this_version_opens(run: Path) -> None:
    assert open_run("run", "runs").read_summary() is not None
