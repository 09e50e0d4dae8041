"""Input that nobody means well with, or that chance has made: a clear error or the same value, and nothing else.

Examples are the same in every run. What takes minutes is marked slow.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import make_network, make_point, make_record, make_result, make_scan, make_state, make_sweep, make_trained
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clnp_search.config import Sweep, load_sweep, parse_sweep, sweep_of
from clnp_search.errors import Damaged, InputError
from clnp_search.records import (
    CurveStep,
    Environment,
    Epoch,
    Fork,
    Point,
    PointRecord,
    ScanRecord,
    Selection,
    TaskPlan,
    Units,
    summarise,
)
from clnp_search.selection import candidates, choose
from clnp_search.storage import RunFolder, _sealed, run_folder

# What is not as it was written, and what is, and is not as this version writes it.
REFUSED = (Damaged, InputError)
FEW = settings(derandomize=True, max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module", autouse=True)
def subnormal_numbers() -> None:
    """All floats are there, whatever an earlier test has trained in this process."""
    torch.set_flush_denormal(False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return run_folder(str(tmp_path_factory.mktemp("runs")), "run")


@contextmanager
def only_refused(what: str) -> Iterator[None]:
    """Inside, nothing is raised but a refusal that names `what`."""
    try:
        yield
    except REFUSED as error:
        if what not in str(error):
            raise AssertionError(f"{what} is not named: {error}") from error


# Sweep files

KEYS = sorted(
    {
        f"{section}.{key}" if section else key
        for section, known in {
            "": Sweep,
            **{name: field.annotation for name, field in Sweep.model_fields.items()},
        }.items()
        for key in getattr(known, "model_fields", ())
    }
    | {"network.name", "network.hidden", "network.module", "network.layers", "network.width", "network.unknown", "x.y"}
)
ODD = st.sampled_from(
    [
        "",
        " ",
        "auto",
        "none",
        "1%",
        "-1%",
        "nan%",
        "1e400%",
        "../up",
        "a:b",
        "a.b:c",
        "pool",
        "valid 0",
        "\0",
        "\ud800",
        "é",
    ]
)
PLAIN = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-3, 3),
    st.floats(),
    st.text(max_size=8),
    ODD,
    st.binary(max_size=3),
)
VALUES = st.recursive(
    PLAIN,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.one_of(st.sampled_from(["low", "high", "*", "name", "module"]), PLAIN), inner, max_size=3),
    ),
    max_leaves=8,
)


def with_value(key: str, value: Any) -> dict[str, Any]:
    """A sound sweep with one value in another's place."""
    raw = make_sweep().model_dump(mode="json")
    *sections, last = key.split(".")
    place: Any = raw
    for section in sections:
        place = place.setdefault(section, {})
    place[last] = value
    return raw


def check_any_value(key: str, value: Any) -> None:
    raw = with_value(key, value)
    with only_refused(key.split(".")[0]):
        sweep = parse_sweep(raw, "sweep.yaml")
        assert parse_sweep(sweep.model_dump(mode="json"), "again") == sweep


@FEW
@given(st.sampled_from(KEYS), VALUES)
def test_any_value_at_any_key_is_a_sweep_or_a_fault_that_names_the_key(key: str, value: Any) -> None:
    check_any_value(key, value)


@pytest.mark.slow
@settings(FEW, max_examples=30_000)
@given(st.sampled_from(KEYS), VALUES)
def test_any_value_at_any_key_at_length(key: str, value: Any) -> None:
    check_any_value(key, value)


TEXT = st.one_of(
    st.text(max_size=12), st.sampled_from(["1e-6", "null", "~", "2001-01-01", "<<", "- a", ":0", "*a", "#"])
)
ARGUMENTS = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**63), 2**63), st.floats(allow_nan=False), TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXT, inner, max_size=4)),
    max_leaves=10,
)


@settings(FEW, max_examples=150)
@given(st.dictionaries(TEXT, ARGUMENTS, max_size=3))
def test_a_sweep_reads_back_from_its_yaml_or_is_refused(folder: RunFolder, arguments: dict[str, Any]) -> None:
    with only_refused("scenario.arguments"):
        sweep = make_sweep(scenario={"name": "a:b", "arguments": arguments})
        folder.write_sweep(sweep.to_yaml())
        assert sweep_of(folder) == sweep


PAIRS = list(pairwise("abcdefghi"))
HEAD = "scenario: {name: permuted_digits}\nnetwork: {hidden: [4, 4]}\n"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (
            "a: &a [x]\n" + "".join(f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in PAIRS),
            "30 YAML",
        ),
        (
            "a: &a {k: 1}\n" + "".join(f"{b}: &{b} {{<<: [{', '.join([f'*{a}'] * 9)}]}}\n" for a, b in PAIRS),
            "30 YAML",
        ),
        (
            "a: &a [" + "x, " * 40 + "]\n" + "".join(f"{b}: &{b} [*{a}, *{a}, *{a}]\n" for a, b in PAIRS),
            "100000",
        ),
        ("a: &a [*a]\n", "nested 32 deep"),
        ("a: " + "[" * 2_000, "not a YAML file"),
        ("a: " + "{a: " * 50_000, "not a YAML file"),
        ("a: " + "x" * 300_000, "at most 262144 bytes"),
        ("seed: 1\nseed: 2\n", "duplicate key"),
        ("seed: 0x" + "f" * 10_000, "seed: a whole number; allowed: of up to 64 bits"),
        ("seed: " + "9" * 10_000, "not a YAML file"),
        ("seed: !!int ''", "not a YAML file"),
        ("seed: 2001-01-01", "seed: datetime.date(2001, 1, 1): allowed: text, numbers"),
        ("search: {alpha: [.nan]}", "search.alpha[0]: nan: allowed"),
        ("search: {learning_rate: -.inf}", "search.learning_rate: -inf: allowed"),
        ("seed: !!python/object/apply:os.system [touch seen]", "not a YAML file"),
        ('storage: "a\\0b"', "storage: 'a\\x00b': a character of it cannot be printed"),
        ("{[a]: b}", "not a YAML file"),
        ("name: ../up", "name: '../up': "),
    ],
)
def test_a_hostile_sweep_file_is_refused_in_a_sentence(tmp_path: Path, text: str, fault: str) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(HEAD + text)
    with pytest.raises(InputError) as caught:
        load_sweep(path)
    assert fault in str(caught.value)
    assert str(path) in str(caught.value)


# Records

COUNTS = st.integers(0, 2**53)
FLOATS = st.floats(allow_nan=False)
FRACTIONS = st.tuples(FLOATS, FLOATS)
SOME_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=10)
POINTS = st.builds(Point, st.integers(0, 10**6), st.lists(FLOATS, max_size=4).map(tuple), FLOATS)
STEPS = st.builds(CurveStep, FRACTIONS, FLOATS, st.tuples(COUNTS, COUNTS))
RECORDS = st.builds(
    PointRecord,
    key=SOME_TEXT,
    point=POINTS,
    status=st.sampled_from(["done", "failed"]),
    val_correct=st.just(0),
    val_total=COUNTS,
    epochs=st.lists(st.builds(Epoch, COUNTS, FLOATS, FLOATS, FLOATS), max_size=3).map(tuple),
    seconds=FLOATS,
    reason=SOME_TEXT,
    notes=st.lists(SOME_TEXT, max_size=2).map(tuple),
    round=st.integers(0, 9),
    val_accuracies=st.lists(FLOATS, max_size=3).map(tuple),
)
SCANS = st.builds(
    ScanRecord,
    point=st.integers(0, 999),
    theta=st.one_of(st.none(), FRACTIONS),
    val_correct=st.integers(0, 7),
    val_total=st.just(7),
    active=st.tuples(st.integers(0, 3), st.integers(0, 4)),
    totals=st.just((3, 4)),
    weight_sparsity=FLOATS,
    curve=st.lists(STEPS, max_size=3).map(tuple),
    layer_curves=st.lists(st.lists(STEPS, max_size=2).map(tuple), max_size=2).map(tuple),
    rule=st.sampled_from(["global", "per_layer-of-64"]),
    min_correct=COUNTS,
)


@FEW
@given(RECORDS)
def test_a_point_reads_back_to_its_last_bit(folder: RunFolder, record: PointRecord) -> None:
    folder.write_point(0, record, None)
    again = folder.read_point(0, record.point.name_in(record.round))
    assert repr(again) == repr(record)


@FEW
@given(SCANS)
def test_a_scan_reads_back_to_its_last_bit(folder: RunFolder, scan: ScanRecord) -> None:
    folder.write_scan(0, scan)
    assert repr(folder.read_scan(0, scan.point, scan.rule, scan.min_correct)) == repr(scan)


Readers = dict[str, tuple[Callable[[], Any], bytes]]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, Readers]:
    """A folder, and of each kind of record in it how it is read, and its bytes."""
    folder = run_folder(str(tmp_path_factory.mktemp("runs")), "records")
    result = make_result(0, (0.9,), {"hidden0": Units(4, 2, 2, 2)})
    environment = Environment("cpu", 1, "float32", "2.15", "0.1")
    points = (make_point(0), make_point(1))
    folder.write_plan(TaskPlan(0, "task", "parent", points, ("a", "b"), ((0, 1),), environment))
    folder.write_point(0, make_record(0, 9848), None)
    folder.write_scan(0, make_scan(1, 9848, rule="global"))
    folder.write_selection(0, Selection(0.9, 0.01, 5, (0,), 0, ()))
    folder.write_result(result)
    folder.write_summary(summarise("run", "running", 0, "", (result,)))
    folder.write_fork(Fork("elsewhere", 0))
    readers: dict[str, Callable[[], Any]] = {
        "tasks/000/plan.json": lambda: folder.read_plan(0),
        "tasks/000/points/p000.json": lambda: folder.read_points(0),
        "tasks/000/scans/001-global-0.json": lambda: folder.read_scans(0),
        "tasks/000/selection.json": lambda: folder.read_selection(0),
        "tasks/000/result.json": folder.read_results,
        "summary.json": folder.read_summary,
        "fork.json": folder.read_fork,
    }
    return folder, {path: (read, folder.read(path)) for path, read in readers.items()}


PATHS = st.sampled_from(
    [
        "tasks/000/plan.json",
        "tasks/000/points/p000.json",
        "tasks/000/scans/001-global-0.json",
        "tasks/000/selection.json",
        "tasks/000/result.json",
        "summary.json",
        "fork.json",
    ]
)


@FEW
@given(PATHS, st.binary(max_size=50), st.booleans())
def test_any_bytes_in_a_record_are_refused_by_name(
    records: tuple[RunFolder, Readers], path: str, data: bytes, with_their_sha256: bool
) -> None:
    folder, readers = records
    read, whole = readers[path]
    folder.write(path, _sealed(data) if with_their_sha256 else data)
    with pytest.raises(REFUSED, match=path):
        read()
    folder.write(path, whole)


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=5,
)


@settings(FEW, max_examples=150)
@given(PATHS, st.data(), JSON)
def test_any_value_in_a_record_with_its_sha256_is_that_value_or_refused_by_name(
    records: tuple[RunFolder, Readers], path: str, data: st.DataObject, value: Any
) -> None:
    folder, readers = records
    read, whole = readers[path]
    values = json.loads(whole)
    del values["sha256"]
    place: Any = values
    while True:
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        if not place[key] or not isinstance(place[key], dict | list) or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = value
    folder.write(path, _sealed(json.dumps(values, indent=1).removesuffix("\n}").encode()))
    with only_refused(path):
        read()
    folder.write(path, whole)


@pytest.mark.parametrize("body", [b'{"a": ' + b"[" * 100_000, b'{"a": ' + b"1" * 100_000, b'{"a": "\xff"'])
def test_a_hostile_document_with_its_sha256_is_refused_by_name(folder: RunFolder, body: bytes) -> None:
    folder.write("summary.json", _sealed(body))
    with pytest.raises(InputError, match=r"summary.json: written by another version"):
        folder.read_summary()


# Files that are no files, or not of the folder


def no_file(path: Path, kind: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "link to itself":
        path.symlink_to(path.name)
    elif kind == "link out":
        outside = Path(str(path).partition("/damaged/")[0]) / "outside.json"
        outside.write_text("{}")
        path.symlink_to(outside)
    else:
        with path.open("wb") as stream:
            stream.truncate(1 << 40)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "link to itself", "link out", "a terabyte"])
@pytest.mark.parametrize("name", ["summary.json", "sweep.yaml", "mlflow.json", "tasks/000/points/p000.json"])
def test_what_is_no_file_of_the_folder_is_refused_unread(tmp_path: Path, kind: str, name: str) -> None:
    no_file(tmp_path / "damaged" / name, kind)
    folder = run_folder(str(tmp_path), "damaged")
    reads = {"summary.json": folder.read_summary, "sweep.yaml": folder.read_sweep, "mlflow.json": folder.read_tracking}
    with pytest.raises(Damaged, match=f"{name}: (is no file|leads out of the run folder|1099511627776 bytes; at most)"):
        reads.get(name, lambda: folder.read_point(0, "p000"))()


def test_a_terabyte_of_tensors_is_refused_unread(tmp_path: Path) -> None:
    no_file(tmp_path / "damaged" / "tasks/000/points/p000.safetensors", "a terabyte")
    with pytest.raises(Damaged, match="1099511627776 bytes; at most"):
        run_folder(str(tmp_path), "damaged").read_trained(0, make_record(0, 1))


def test_nothing_is_written_or_deleted_through_a_link(tmp_path: Path) -> None:
    folder = run_folder(str(tmp_path), "run")
    (tmp_path / "outside" / "points").mkdir(parents=True)
    (tmp_path / "outside" / "points" / "p000.json").write_text("kept")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tasks").mkdir()
    (tmp_path / "run" / "tasks" / "000").symlink_to(tmp_path / "outside")
    for act in (
        lambda: folder.write_point(0, make_record(0, 1), None),
        lambda: folder.delete_point(0, make_record(0, 1)),
        lambda: folder.read_points(0),
    ):
        with pytest.raises(Damaged, match="leads out of the run folder"):
            act()
    assert (tmp_path / "outside" / "points" / "p000.json").read_text() == "kept"


def test_a_storage_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    run_folder(str(tmp_path / "runs"), "run").write("a/b", b"1")
    assert (tmp_path / "disk" / "run" / "a" / "b").read_bytes() == b"1"


@FEW
@given(st.lists(st.sampled_from(["..", "a", ".", "", "/", "\\", "~", "a..b", "$HOME", "%2e%2e"]), max_size=6))
def test_no_name_leads_out_of_the_folder(folder: RunFolder, parts: list[str]) -> None:
    assert folder.local_path is not None
    name = "/".join(parts)
    with suppress(Damaged, OSError):
        folder.write(name, b"1")
        assert folder.local_path in (folder.local_path / name.lstrip("/")).resolve().parents
    assert {path.name for path in folder.local_path.parent.iterdir()} == {folder.name}


@FEW
@given(st.text(max_size=12))
def test_any_name_of_a_run_is_a_folder_of_the_storage_or_refused(tmp_path_factory: Any, name: str) -> None:
    storage = tmp_path_factory.getbasetemp()
    with suppress(InputError):
        path = run_folder(str(storage), name).local_path
        assert path is not None
        assert path.parent == storage
        assert path.name == name


# Tensors

STATE = make_state(make_network((4, 4)), 2)


def with_header(data: bytes, change: Callable[[dict[str, Any]], Any]) -> bytes:
    """A file of tensors with another header."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header = change(header) or header
    text = json.dumps(header).encode() if isinstance(header, dict) else header
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def claims(header: dict[str, Any], units: int) -> None:
    """A network of many units, of which the file has four."""
    state = json.loads(header["__metadata__"]["state"])
    state["graph"]["groups"]["hidden0"] = units
    header["__metadata__"]["state"] = json.dumps(state)


HEADERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a shape of 2**60": lambda header: header["hidden0/weight"].update(shape=[2**60, 1]),
    "offsets that overlap": lambda header: header["hidden0/weight"].update(data_offsets=[0, 16]),
    "offsets beyond the end": lambda header: header["hidden0/weight"].update(data_offsets=[0, 2**60]),
    "a negative offset": lambda header: header["hidden0/weight"].update(data_offsets=[-8, 0]),
    "an unknown type": lambda header: header["hidden0/weight"].update(dtype="OBJECT"),
    "no metadata": lambda header: header.pop("__metadata__") and None,
    "a network of 2**50 units": lambda header: claims(header, 2**50),
    "a network of 2**70 units": lambda header: claims(header, 2**70),
    "a network of -1 units": lambda header: claims(header, -1),
    "names that lead out": lambda header: header.update({"../../x": header.pop("hidden0/weight")}),
    "deep nesting": lambda header: b'{"__metadata__":' + b"[" * 100_000,
}


@pytest.mark.parametrize("what", HEADERS)
@pytest.mark.parametrize("kind", ["state", "point"])
def test_a_hostile_header_is_refused_without_taking_memory(folder: RunFolder, what: str, kind: str) -> None:
    if kind == "state":
        data = with_header(STATE.to_bytes(), HEADERS[what])
        folder.write("tasks/001/state.safetensors", data)
        folder.write_result(
            make_result(1, (0.9, 0.9), {"hidden0": Units(4, 2, 2, 2)}, state_sha256=hashlib.sha256(data).hexdigest())
        )
        read: Callable[[], Any] = lambda: folder.read_state(1)  # noqa: E731
    else:
        if "network" in what or "metadata" in what:
            pytest.skip("a point has none")

        def change(header: dict[str, Any]) -> Any:
            header["hidden0/weight"] = header.pop("parameters/hidden0/weight.own")
            return HEADERS[what](header)

        data = with_header(make_trained(STATE).to_bytes(), change)
        folder.write("tasks/001/points/p000.safetensors", data)
        record = make_record(0, 1, parameters_sha256=hashlib.sha256(data).hexdigest())
        read = lambda: folder.read_trained(1, record)  # noqa: E731
    why = r"not a |no network|born/hidden0 is of another shape"
    with pytest.raises(InputError, match=f"safetensors: written by another version .*({why})"):
        read()


# The choice


@st.composite
def searches(draw: st.DrawFn) -> tuple[list[PointRecord], list[ScanRecord], float]:
    """Points with few accuracies and settings, so that there are many ties; each with a scan."""
    number = draw(st.integers(1, 6))
    few = st.sampled_from([1e-4, 1e-3])
    records = [
        make_record(index, draw(st.integers(96, 100)), 100, point=make_point(index, draw(few), draw(few)))
        for index in range(number)
    ]
    scans = [
        replace(
            make_scan(index, 0, (draw(st.integers(0, 4)), 2)), val_correct=draw(st.integers(90, 100)), val_total=100
        )
        for index in range(number)
    ]
    return records, scans, draw(st.sampled_from([0.0, 0.01, 0.02, 0.05]))


def chosen(records: list[PointRecord], scans: list[ScanRecord], margin: float) -> Selection | None:
    """The choice among the candidates that stay inside after pruning; None if there is none."""
    limit, inside = candidates(records, margin)
    points = {record.point.index for record in inside}
    kept = [scan for scan in scans if scan.point in points and scan.val_correct >= limit]
    return choose(records, kept, margin) if kept else None


@settings(FEW, max_examples=300)
@given(searches(), st.randoms(use_true_random=False))
def test_the_choice_depends_on_no_order_and_is_inside_the_margin(search: Any, chance: Any) -> None:
    records, scans, margin = search
    choice = chosen(records, scans, margin)
    mixed, mixed_scans = [*records], [*scans]
    chance.shuffle(mixed)
    chance.shuffle(mixed_scans)
    again = chosen(mixed, mixed_scans, margin)
    assert (again and again.chosen) == (choice and choice.chosen)
    if choice is not None:
        best = max(record.val_correct for record in records)
        assert scans[choice.chosen].val_correct >= best - round(margin * 100) == choice.min_correct
        assert records[choice.chosen].val_correct >= choice.min_correct
        assert choice.chosen in choice.candidates


@settings(FEW, max_examples=300)
@given(searches())
def test_a_larger_margin_never_chooses_less_sparsity_of_the_same_scans(search: Any) -> None:
    records, scans, _ = search
    choices = [chosen(records, scans, margin) for margin in (0.0, 0.01, 0.02, 0.05)]
    sparsities = [scans[choice.chosen].unit_sparsity for choice in choices if choice is not None]
    assert sparsities == sorted(sparsities)
