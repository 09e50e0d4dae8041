"""Class folders, and zips of them: what is read, and that every fault is named at once."""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from builders import make_sweep
from PIL import Image

from clnp_search.errors import InputError
from clnp_search.tasks import Scenario
from clnp_search.tasks.images import load_class_folders

Arrange = Callable[[Path], Path]


def write_image(path: Path, value: int = 0, size: tuple[int, int] = (4, 6), mode: str = "L") -> None:
    """A PNG of height and width `size`, all of one value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size[::-1], value if mode == "L" else (value, value + 1, value + 2)).save(path)


def write_folders(root: Path, classes: str = "abcd", mode: str = "L", each: int = 5) -> Path:
    """`each` images of each class in train, 2 in test; their values tell class and position."""
    for label, name in enumerate(classes):
        for split, num in (("train", each), ("test", 2)):
            for index in range(num):
                write_image(root / split / name / f"{index}.png", 20 * label + index, mode=mode)
    return root


def zipped(root: Path) -> Path:
    """A zip of a folder's content, folders included, beside it."""
    path = root.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(root.rglob("*")):
            archive.write(file, file.relative_to(root))
    return path


def as_it_is(root: Path) -> Path:
    return root


BOTH = pytest.mark.parametrize("arrange", [as_it_is, zipped], ids=["folder", "zip"])


def faults(root: Path, **settings: object) -> list[str]:
    """The lines of the message, without the headline and without the root."""
    with pytest.raises(InputError) as caught:
        load_class_folders(root, **settings)  # type: ignore[arg-type]
    return [line.strip().removeprefix(f"{root}/") for line in str(caught.value).splitlines()[1:]]


def scenario_of(root: Path, **settings: object) -> Scenario:
    return make_sweep(scenario={"name": "class_folders", "root": str(root), **settings}).load_scenario()


# What is read


@BOTH
def test_classes_are_labels_in_sorted_order(tmp_path: Path, arrange: Arrange) -> None:
    raw = load_class_folders(arrange(write_folders(tmp_path / "data", "badc")))
    assert raw.train_labels.tolist() == [label for label in range(4) for _ in range(5)]
    values = [20 * "badc".index("abcd"[label]) + index for label in range(4) for index in range(5)]
    assert raw.train_inputs[:, 0, 3, 5].tolist() == values
    assert raw.test_labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert raw.num_classes == 4


def test_a_folder_and_its_zip_are_the_same_data(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "data", ["a", "a-b", "a b", "B"])  # type: ignore[arg-type]
    assert load_class_folders(root).digest == load_class_folders(zipped(root)).digest


@BOTH
def test_grey_images_have_one_channel_and_colour_three(tmp_path: Path, arrange: Arrange) -> None:
    grey, colour = (write_folders(tmp_path / mode, mode=mode) for mode in ("L", "RGB"))
    assert load_class_folders(arrange(grey)).train_inputs.shape == (20, 1, 4, 6)
    inputs = load_class_folders(arrange(colour)).train_inputs
    assert inputs.shape == (20, 3, 4, 6)
    assert inputs[1, :, 0, 0].tolist() == [1, 2, 3]
    assert inputs.dtype == np.uint8


def test_images_are_seen_as_they_are_shown(tmp_path: Path) -> None:
    write_folders(tmp_path)
    turned, clear = Image.new("L", (4, 6), 9), Image.new("LA", (6, 4), (50, 0))
    turned.putpixel((0, 0), 7)
    exif = turned.getexif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    turned.save(tmp_path / "train/a/0.png", exif=exif)
    clear.putpixel((1, 0), (50, 255))
    clear.save(tmp_path / "train/a/1.png")
    first, second = load_class_folders(tmp_path).train_inputs[:2, 0]
    assert (first.shape, first[0, 5], first.min(), first.mean()) == ((4, 6), 7, 7, (23 * 9 + 7) / 24)
    assert (second[0, 1], second[0, 0], second[3, 5]) == (50, 255, 255)


def test_memory_is_checked_again_when_colour_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folders(tmp_path)
    write_image(tmp_path / "train/d/4.png", 100, mode="RGB")
    monkeypatch.setattr("clnp_search.tasks.images.MAX_BYTES", 28 * 4 * 6)
    (fault,) = faults(tmp_path)
    assert fault.startswith("train/d/4.png: 28 images of its size take 2016 bytes")


@pytest.mark.parametrize("where", ["train/a/0.png", "train/c/1.png", "test/d/1.png"])
def test_one_image_in_colour_makes_all_of_them_so(tmp_path: Path, where: str) -> None:
    write_folders(tmp_path)
    write_image(tmp_path / where, 100, mode="RGB")
    raw = load_class_folders(tmp_path)
    values = np.concatenate([raw.train_inputs, raw.test_inputs])[:, :, 0, 0]
    assert values.shape == (28, 3)
    assert [100, 101, 102] in values.tolist()
    assert (np.diff(values, axis=1) == 0).all(1).sum() == 27


def test_other_modes_are_read_as_grey_or_colour(tmp_path: Path) -> None:
    write_folders(tmp_path)
    colours = np.array([[[255, 0, 0], [0, 0, 255]]], np.uint8).repeat(4, 0).repeat(3, 1)
    image = Image.fromarray(colours)
    image.quantize(2).save(tmp_path / "train/a/palette.png")
    image.convert("RGBA").save(tmp_path / "train/a/transparent.png")
    image.convert("1").save(tmp_path / "train/a/bits.png")
    raw = load_class_folders(tmp_path)
    for position in (6, 7):
        assert np.array_equal(raw.train_inputs[position], colours.transpose(2, 0, 1))
    assert set(raw.train_inputs[5].flat) <= {0, 255}


@BOTH
@pytest.mark.parametrize("orientation", [1, 3, 5, 6, 8])
def test_a_tiff_is_turned_as_it_says_wherever_it_lies(tmp_path: Path, arrange: Arrange, orientation: int) -> None:
    grey = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4))
    exif = Image.Exif()
    exif[0x0112] = orientation
    for split in ("train", "test"):
        for kind in ("tif", "png"):
            place = tmp_path / "data" / split / kind
            place.mkdir(parents=True)
            grey.save(place / f"0.{kind}", exif=exif)
    of_png, of_tiff = load_class_folders(arrange(tmp_path / "data")).train_inputs
    assert (of_png == of_tiff).all()


def test_a_class_whose_name_cannot_be_printed_is_refused(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "data", "ab")
    for split in ("train", "test"):
        os.rename(os.fsencode(root / split / "b"), os.fsencode(root / split) + b"/caf\xe9")
    found = faults(root)
    assert len(found) == 2
    assert all(line.endswith("a class whose name cannot be printed") for line in found)


@BOTH
def test_size_resizes_every_image(tmp_path: Path, arrange: Arrange) -> None:
    root = write_folders(tmp_path / "data")
    write_image(root / "train/a/0.png", 77, size=(9, 3))
    raw = load_class_folders(arrange(root), size=(2, 8))
    assert raw.train_inputs.shape == (20, 1, 2, 8)
    assert (raw.train_inputs[0] == 77).all()


def test_only_the_classes_that_are_used_are_read(tmp_path: Path) -> None:
    root = write_folders(tmp_path)
    (root / "train/c/0.png").write_text("no image")
    raw = load_class_folders(root, used=lambda names: {names.index("b"), names.index("d")})
    assert raw.train_labels.tolist() == [1] * 5 + [3] * 5
    assert raw.num_classes == 4


def test_hidden_files_and_other_folders_are_passed_over(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "data")
    before = load_class_folders(root).digest
    for name in ("train/.DS_Store", "test/a/.hidden", "README.md", "validation/a/0.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("not looked at")
    assert load_class_folders(root).digest == load_class_folders(zipped(root)).digest == before


def test_long_work_says_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("clnp_search.tasks.images.PROGRESS_AFTER_S", -1.0)
    load_class_folders(write_folders(tmp_path))
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"decoding {tmp_path}: 1 of 28 images\n"


# Tasks


def test_classes_are_shared_out_evenly_in_order(tmp_path: Path) -> None:
    scenario = scenario_of(write_folders(tmp_path), tasks=2, validation=2)
    assert [(task.name, task.classes) for task in scenario.tasks] == [("classes-a-b", (0, 1)), ("classes-c-d", (2, 3))]
    data = scenario.data(1)
    assert (len(data.train), len(data.validation), len(data.test)) == (8, 2, 4)
    assert set(data.test.labels.tolist()) == {0, 1}


def test_lists_of_classes_make_the_tasks(tmp_path: Path) -> None:
    root = write_folders(tmp_path, ["9", "10", "x", "y"])  # type: ignore[arg-type]
    sweep = make_sweep(
        scenario={"name": "class_folders", "root": str(root), "classes": [["y", 10], [9]]}, head={"kind": "multi"}
    )
    assert sweep.scenario.tasks == 2
    scenario = sweep.load_scenario()
    assert [task.classes for task in scenario.tasks] == [(3, 0), (1,)]
    assert set(scenario.data(0).train.inputs[:, 0, 0, 0].tolist()) <= {*range(20, 25), *range(60, 65)}


def test_tasks_of_unequal_class_counts_need_a_head_each(tmp_path: Path) -> None:
    settings = {"name": "class_folders", "root": str(write_folders(tmp_path)), "classes": [["a", "b"], ["c"]]}
    with pytest.raises(InputError, match=r"head.kind: single: the tasks have 1, 2 classes; .* allowed: multi"):
        make_sweep(scenario=settings, head={"kind": "single"}).load_scenario()


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"tasks": 3}, "scenario.tasks: 3 tasks cannot share 4 classes evenly; allowed: 1, 2, 4, or scenario.classes"),
        ({"classes": [["a", "z"], ["q"]]}, "scenario.classes: no class z, q; there are: a, b, c, d"),
    ],
)
def test_classes_that_do_not_make_the_tasks_are_refused(
    tmp_path: Path, settings: dict[str, object], fault: str
) -> None:
    with pytest.raises(InputError) as caught:
        scenario_of(write_folders(tmp_path), **settings)
    assert fault in str(caught.value)


# Faults


@BOTH
def test_every_fault_is_named_at_once_with_its_path(tmp_path: Path, arrange: Arrange) -> None:
    root = write_folders(tmp_path / "data")
    (root / "train/a/notes.txt").write_text("no image")
    whole = (root / "test/b/0.png").read_bytes()
    (root / "test/b/0.png").write_bytes(whole[: len(whole) // 2])
    write_image(root / "train/d/4.png", size=(5, 5))
    (root / "train/empty").mkdir()
    write_image(root / "test/empty/0.png")
    write_image(root / "train/only-train/0.png")
    write_image(root / "test/only-test/0.png")
    write_image(root / "train/a/inner/0.png")
    write_image(root / "train/lost.png")
    found = faults(arrange(root))
    for place, reason in {
        "train/a/notes.txt": "does not decode: UnidentifiedImageError",
        "test/b/0.png": "does not decode: ",
        "train/d/4.png": "5 x 5 pixels, where ",
        "train/empty": "empty class",
        "train/only-train": "class is in train but not in test",
        "test/only-test": "class is in test but not in train",
        "train/a/inner": "out of place; images lie in train/CLASS/",
        "train/lost.png": "out of place",
    }.items():
        assert any(line.startswith(place) and reason in line for line in found), (place, found)


def test_twenty_faults_are_shown_and_the_rest_counted(tmp_path: Path) -> None:
    write_folders(tmp_path, each=25)
    for path in (tmp_path / "train/a").iterdir():
        path.write_bytes(b"")
    found = faults(tmp_path)
    assert len(found) == 21
    assert found[-1] == "and 5 more"


@BOTH
def test_images_of_different_sizes_need_a_size(tmp_path: Path, arrange: Arrange) -> None:
    root = write_folders(tmp_path / "data")
    write_image(root / "test/b/1.png", size=(6, 4))
    (found,) = faults(arrange(root))
    assert "6 x 4 pixels, where" in found
    assert (
        f"{root}{'.zip' if arrange is zipped else ''}/train/a/0.png has 4 x 6; set scenario.size: [height, width]"
        in found
    )


def test_more_than_eight_bits_a_value_are_refused(tmp_path: Path) -> None:
    write_folders(tmp_path)
    Image.fromarray(np.full((4, 6), 40000, np.uint16)).save(tmp_path / "train/a/0.png")
    (found,) = faults(tmp_path)
    assert "train/a/0.png" in found
    assert "more than 8 bits" in found


@pytest.mark.parametrize(("kind", "values", "mode"), [(2, 3, "RGB;16B"), (4, 2, "LA;16B"), (6, 4, "RGBA;16B")])
def test_more_than_eight_bits_a_value_are_refused_in_colour_too(
    tmp_path: Path, kind: int, values: int, mode: str
) -> None:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 6, 4, 16, kind, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(4 * (1 + 6 * values * 2))))
    write_folders(tmp_path)
    (tmp_path / "train/a/0.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b""))
    wanted = f"train/a/0.png: its mode is {mode}; images of more than 8 bits a value are not read"
    assert faults(tmp_path) == [wanted]


def test_a_ppm_of_more_than_eight_bits_a_value_is_refused(tmp_path: Path) -> None:
    write_folders(tmp_path)
    (tmp_path / "train/a/0.png").write_bytes(b"P6 6 4 65535\n" + bytes(6 * 4 * 3 * 2))
    assert faults(tmp_path) == ["train/a/0.png: its mode is RGB;16B; images of more than 8 bits a value are not read"]


@pytest.mark.parametrize("limit", [23, 11])  # beyond Pillow's limit, and beyond twice of it
def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    write_folders(tmp_path, each=1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    assert len(faults(tmp_path)) == 12


def test_a_zip_entry_of_absurd_size_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_folders(tmp_path / "data")
    (root / "train/a/bomb.png").write_bytes(bytes(5000))
    monkeypatch.setattr("clnp_search.tasks.images.MAX_ENTRY_BYTES", 4000)
    assert faults(zipped(root)) == ["train/a/bomb.png: 5000 bytes; at most 4000 are read"]


@pytest.mark.parametrize("name", ["../train/a/x.png", "train/../../x.png", "/train/a/x.png", "train\\a\\x.png"])
def test_names_that_lead_out_of_a_zip_are_refused(tmp_path: Path, name: str) -> None:
    path = zipped(write_folders(tmp_path / "data"))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, b"x")
    (found,) = faults(path)
    assert "a name that leads out of the zip" in found


def test_a_damaged_entry_of_a_zip_is_named(tmp_path: Path) -> None:
    path = zipped(write_folders(tmp_path / "data"))
    with zipfile.ZipFile(path) as archive:
        entry = archive.getinfo("train/b/2.png")
    data = bytearray(path.read_bytes())
    data[entry.header_offset + 30 + len(entry.filename) + 20] ^= 0xFF
    path.write_bytes(data)
    (found,) = faults(path)
    assert found.startswith("train/b/2.png: does not decode: BadZipFile")


def test_a_root_that_is_neither_folder_nor_zip_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file.zip").write_text("no zip")
    (tmp_path / "empty").mkdir()
    for name, fault in (("file.zip", "cannot be read as a zip"), ("none", "neither a folder nor a zip")):
        with pytest.raises(InputError, match=f"scenario.root: .*{name}.*{fault}"):
            load_class_folders(tmp_path / name)
    assert faults(tmp_path / "empty") == ["no class folder: images lie in train/CLASS/ and test/CLASS/"]


def test_a_part_that_is_missing_is_named_once(tmp_path: Path) -> None:
    root = write_folders(tmp_path)
    (root / "test").rename(root / "validation")
    assert faults(root) == ["test: no class; images lie in test/CLASS/"]
