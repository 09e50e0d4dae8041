"""What `gc` deletes, and that all commands find what they need afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest
from in_process import SWEEP, make, run_in_process

from clnp_search.branching import fork, reselect
from clnp_search.cleaning import delete, garbage_of
from clnp_search.cli import app
from clnp_search.errors import InputError
from clnp_search.lease import this_process
from clnp_search.report.page import report
from clnp_search.search.points import pack_name
from clnp_search.storage import RunFolder, run_folder
from clnp_search.verification import verify

RAY, TMP = "ray/18eb/trial_1/result.json", "tasks/000/points/p000.json.0123.tmp"
LOST = "tasks/001/points/p009.safetensors"


@pytest.fixture
def littered(copy: RunFolder) -> RunFolder:
    """A finished run, as real ones look after years of kills."""
    copy.write(RAY, b"{}")
    copy.write(TMP, b"{")
    copy.write(LOST, b"tensors")
    copy.write_checkpoint(0, "0123456789abcdef", b"half of a pack")
    return copy


def files(folder: RunFolder) -> dict[str, bytes]:
    return {path: folder.read(path) for path in folder.sizes()}


def test_only_what_nothing_needs_is_deleted(copy: RunFolder, littered: RunFolder) -> None:
    found = garbage_of(littered)
    checkpoint = "tasks/000/packs/0123456789abcdef.safetensors"
    assert [each.path for each in found] == ["ray/", checkpoint, TMP, LOST]
    assert found[0].num_bytes == 2
    before = files(littered)
    delete(littered, found)
    gone = {RAY, TMP, LOST, checkpoint}
    assert files(littered) == {path: data for path, data in before.items() if path not in gone}
    assert garbage_of(littered) == ()


def test_all_commands_find_what_they_need_and_the_same_digests_afterwards(littered: RunFolder, tmp_path: Path) -> None:
    before, expected = verify(littered), littered.read_summary()
    delete(littered, garbage_of(littered))
    assert verify(littered) == before
    assert run_in_process(SWEEP, littered) == expected
    assert reselect(littered, SWEEP, 1, SWEEP.forgetting).evaluated == 0
    assert report([littered]).tables
    branch = run_folder(str(tmp_path), "branch")
    fork(littered, make(forgetting={"margin": "4%"}), 0, branch)
    assert run_in_process(make(forgetting={"margin": "4%"}), branch).tasks[0] == expected.tasks[0]  # type: ignore[union-attr]


def test_a_checkpoint_of_points_that_still_train_is_kept(copy: RunFolder) -> None:
    copy.delete("tasks/001/result.json")
    plan = copy.read_plan(1)
    assert plan is not None
    [pack] = plan.packs
    name = pack_name([plan.keys[index] for index in pack])
    for each in (name, "a-half-of-it"):
        copy.write_checkpoint(1, each, b"")
    record = copy.read_points(1)[0]
    assert [garbage.path for garbage in garbage_of(copy)] == [f"tasks/001/packs/{name}.safetensors"]
    copy.delete_point(1, record)
    assert garbage_of(copy) == ()


def test_it_is_shown_first_and_deleted_when_asked_for(
    littered: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(littered)
    app(["gc", "--all", "--storage", littered.storage], standalone_mode=False)
    assert files(littered) == before
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 5
    assert said[-1] == "4 places, 0.0 MiB; `--delete` deletes them"
    app(["gc", littered.uri, "--delete"], standalone_mode=False)
    assert capsys.readouterr().out.splitlines()[-1] == "4 places, 0.0 MiB; deleted"
    assert set(before) - set(files(littered)) == {each.split(": ")[1].split(",")[0] for each in said[1:4]} | {RAY}


@pytest.mark.parametrize("more", [[], ["--delete"]])
def test_a_run_that_is_driven_is_refused(littered: RunFolder, more: list[str]) -> None:
    littered.write_lease(this_process())
    before = files(littered)
    with pytest.raises(InputError, match=r"is being run by process .*: its files are in use"):
        app(["gc", littered.uri, *more], standalone_mode=False)
    assert files(littered) == before


@pytest.mark.parametrize("arguments", [[], ["run", "--all"]])
def test_runs_are_named_or_all_of_them_meant(arguments: list[str]) -> None:
    with pytest.raises(InputError, match="allowed: one of the two"):
        app(["gc", *arguments], standalone_mode=False)
