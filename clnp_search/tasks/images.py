"""Images as arrays, decoded in place by Pillow: class folders, the same in a zip, and torchvision's data sets.

Every fault of a data set is named at once, with its place, before any of it is used.
"""

from __future__ import annotations

import io
import os
import sys
import time
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from clnp_search.errors import InputError
from clnp_search.records import UNWRITABLE
from clnp_search.tasks.data import RawData, label_faults, require
from clnp_search.tasks.torchvision_sets import train_and_test

if TYPE_CHECKING:
    from PIL.Image import Image

T = TypeVar("T")
Opened = Callable[[], io.BytesIO]
SPLITS = ("train", "test")
MAX_ENTRY_BYTES = 256 << 20
MAX_BYTES = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2  # of all images together
PROGRESS_AFTER_S, PROGRESS_EVERY_S = 2.0, 10.0
GREY_MODES = ("1", "L", "LA", "La")
# Decoded by Pillow alone; for others, such as EPS, it starts programs.
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")  # more than 8 bits a value
DEEP_RAW_MODES = (";16B", ";16L", ";16N")  # likewise of colours, in a file; those of BGR;16 have fewer


@dataclass(frozen=True)
class Sample:
    """An image that is still to be decoded.

    Args:
        place: Where it is, for messages.
        read: Gives the image and its label.
    """

    place: str
    read: Callable[[], tuple[Image, int]]


def load_class_folders(
    root: Path, size: tuple[int, int] | None = None, used: Callable[[Sequence[str]], Collection[int]] | None = None
) -> RawData:
    """The images of `root/train/CLASS/*` and `root/test/CLASS/*`; labels are the ranks of the classes' names.

    Images are [N, 1, H, W] if all are grey, else [N, 3, H, W].

    Args:
        root: A folder, or a zip of one, which is read without unpacking it.
        size: Height and width that every image is resized to.
        used: Says, of the names of all classes, which labels are read; None for all.

    Raises:
        InputError: The data have faults; names them all.
    """
    faults: list[str] = []
    folders = _class_folders(root, faults)
    names = sorted(folders["train"].keys() | folders["test"].keys())
    if not names:
        require([*faults, "no class folder: images lie in train/CLASS/ and test/CLASS/"], str(root))
    try:
        labels = range(len(names)) if used is None else sorted(used(names))
    except InputError as error:
        if faults:
            require([*faults, str(error)], str(root))
        raise
    samples: dict[str, list[Sample]] = {split: [] for split in SPLITS}
    for split, other in (SPLITS, SPLITS[::-1]):
        if not folders[split]:
            faults.append(f"{root / split}: no class; images lie in {split}/CLASS/")
        for label in labels if folders[split] else ():
            files = folders[split].get(names[label])
            if files is None:
                faults.append(f"{root / other / names[label]}: class is in {other} but not in {split}")
            elif not files:
                faults.append(f"{root / split / names[label]}: empty class")
            for place, open_file in files or ():
                samples[split].append(Sample(str(root / place), partial(_open_image, open_file, label)))
    return _raw_data(samples["train"], samples["test"], len(names), size, faults, str(root))


def load_torchvision(
    name: str, root: Path, arguments: Mapping[str, Any], size: tuple[int, int] | None = None
) -> tuple[RawData, tuple[str, ...]]:
    """One of torchvision's classification data sets, and the names of its classes.

    Raises:
        InputError: It cannot be had, or has faults; names them all.
    """
    parts = dict(zip(SPLITS, train_and_test(name, root, arguments), strict=True))
    train, test = (
        [Sample(f"{name}: {split} sample {index}", partial(_item, part, index)) for index in range(len(part))]
        for split, part in parts.items()
    )
    names = getattr(parts["train"], "classes", ())
    raw = _raw_data(train, test, len(names), size, [], f"torchvision's {name}")
    require(label_faults(raw), f"torchvision's {name}")
    return raw, tuple(str(each) for each in names) or tuple(str(index) for index in range(raw.num_classes))


def _raw_data(
    train: Sequence[Sample],
    test: Sequence[Sample],
    num_classes: int,
    size: tuple[int, int] | None,
    faults: list[str],
    source: str,
) -> RawData:
    """All samples decoded.

    Args:
        num_classes: 0 if only the labels tell.
        faults: What is wrong already.
    """
    pixels, labels = _decode([*train, *test], size, faults, source)
    cut, num_classes = len(train), num_classes or int(labels.max(initial=0)) + 1
    require(faults, source)
    return RawData(pixels[:cut], labels[:cut], pixels[cut:], labels[cut:], num_classes)


def _decode(
    samples: Sequence[Sample], size: tuple[int, int] | None, faults: list[str], source: str
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Pixels [N, C, H, W] and labels [N] of all samples; what is wrong with one is added to `faults`."""
    pixels: NDArray[np.uint8] | None = None
    labels = np.zeros(len(samples), np.int64)
    first = ""
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow's decoders work without the interpreter's lock
        decoded = _reported(pool.map(partial(_pixels, size=size), samples), len(samples), source)
        for index, (sample, result) in enumerate(zip(samples, decoded, strict=True)):
            if isinstance(result, str):
                faults.append(f"{sample.place}: {result}")
                continue
            image, labels[index] = result
            if pixels is not None and image.shape[1:] != pixels.shape[2:]:
                (height, width), (rows, columns) = image.shape[1:], pixels.shape[2:]
                faults.append(
                    f"{sample.place}: {height} x {width} pixels, where {first} has {rows} x {columns}; "
                    "set scenario.size: [height, width] to resize all"
                )
                continue
            if pixels is None or len(image) > pixels.shape[1]:  # the first one, or the first colours after grey alone
                if (num_bytes := len(samples) * image.size) > MAX_BYTES:
                    pool.shutdown(cancel_futures=True)
                    faults.append(
                        f"{sample.place}: {len(samples)} images of its size take {num_bytes} bytes, more than half of "
                        f"this machine's memory, {MAX_BYTES}; set a smaller scenario.size: [height, width]"
                    )
                    break
                first = first or sample.place
                pixels = (
                    np.empty((len(samples), *image.shape), np.uint8) if pixels is None else pixels.repeat(3, axis=1)
                )
            pixels[index] = image
    return np.empty((0, 1, 1, 1), np.uint8) if pixels is None else pixels, labels


def _pixels(sample: Sample, size: tuple[int, int] | None) -> tuple[NDArray[np.uint8], int] | str:
    """An image as [1 or 3, H, W] and its label, or what is wrong with it.

    It is turned as its EXIF says, and laid on white where it is transparent.
    """
    from PIL import Image, ImageOps

    try:
        image, label = sample.read()
        with image:
            if image.width * image.height > (Image.MAX_IMAGE_PIXELS or 1 << 27):
                return f"{image.width} x {image.height} pixels: too large to be decoded safely"
            if deep := _deep_mode(image):
                return f"its mode is {deep}; images of more than 8 bits a value are not read"
            mode = "L" if image.mode in GREY_MODES else "RGB"
            ImageOps.exif_transpose(image, in_place=True)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert(mode)
            if size is not None and image.size != size[::-1]:
                image = image.resize(size[::-1], Image.Resampling.BILINEAR)
            values = np.asarray(image)
    except Exception as error:  # decoders raise many kinds
        return f"does not decode: {type(error).__name__}: {error}"
    return values[None] if values.ndim == 2 else values.transpose(2, 0, 1), label


def _deep_mode(image: Image) -> str:
    """The mode of an image of more than 8 bits a value, else nothing; where Pillow would cut them, that in the file."""
    modes = [image.mode]
    for tile in getattr(image, "tile", ()):  # of an image that is not decoded yet
        arguments = tile.args if isinstance(tile.args, tuple) else (tile.args,)
        is_deep_ppm = tile.codec_name.startswith("ppm") and arguments[-1] > 255  # their largest value
        modes.append(f"{arguments[0]}{';16B' if is_deep_ppm else ''}")
    return next((mode for mode in modes if mode in DEEP_MODES or mode.endswith(DEEP_RAW_MODES)), "")


def _open_image(open_file: Opened, label: int) -> tuple[Image, int]:
    from PIL import Image

    return Image.open(open_file(), formats=FORMATS), label


def _item(part: Any, index: int) -> tuple[Image, int]:
    image, label = part[index]
    if int(label) != label:
        raise TypeError(f"its label is {label!r}, not a class number")
    return image, int(label)


Folders = dict[str, dict[str, list[tuple[str, Opened]]]]


def _class_folders(root: Path, faults: list[str]) -> Folders:
    """For each split and class the files, sorted: their names inside `root`, and how each is opened."""
    if root.is_dir():
        entries = _folder_entries(root)
    elif root.is_file():
        entries = _zip_entries(root, faults)
    else:
        raise InputError(f"scenario.root: {root} is neither a folder nor a zip; it holds train/CLASS/ and test/CLASS/")
    found: Folders = {split: {} for split in SPLITS}
    unprintable: dict[str, None] = {}
    for name, open_file in sorted(entries, key=lambda entry: entry[0].split("/")):
        split, *inner = name.rstrip("/").split("/")
        if split not in SPLITS or not inner or any(part.startswith(".") for part in inner):
            continue
        if UNWRITABLE.search(inner[0]):
            unprintable[str(root / split / inner[0])] = None
        elif name.endswith("/") and len(inner) == 1:
            found[split].setdefault(inner[0], [])
        elif not name.endswith("/") and len(inner) == 2:
            found[split].setdefault(inner[0], []).append((name, open_file))
        else:
            faults.append(f"{root / name}: out of place; images lie in {split}/CLASS/, and nothing else does")
    faults.extend(f"{place!a}: a class whose name cannot be printed" for place in unprintable)
    return found


def _folder_entries(root: Path) -> Iterator[tuple[str, Opened]]:
    for split in SPLITS:
        for pattern in ("*", "*/*"):
            for path in (root / split).glob(pattern):
                name = path.relative_to(root).as_posix()
                yield (f"{name}/" if path.is_dir() else name), partial(_read, path)


def _zip_entries(root: Path, faults: list[str]) -> Iterator[tuple[str, Opened]]:
    try:
        archive = zipfile.ZipFile(root)
    except (zipfile.BadZipFile, OSError) as error:
        raise InputError(f"scenario.root: {root} cannot be read as a zip: {error}") from error
    for entry in archive.infolist():
        name = entry.filename
        if name.startswith("/") or "\\" in name or ".." in PurePosixPath(name).parts:
            faults.append(f"{root}: {name!r}: a name that leads out of the zip")
        elif entry.file_size > MAX_ENTRY_BYTES:
            faults.append(f"{root / name}: {entry.file_size} bytes; at most {MAX_ENTRY_BYTES} are read")
        else:
            yield name, partial(_unzipped, archive, entry)


def _read(path: Path) -> io.BytesIO:
    # In memory, as an entry of a zip is: Pillow maps some files, and turns those wrongly.
    if (num_bytes := path.stat().st_size) > MAX_ENTRY_BYTES:
        raise ValueError(f"{num_bytes} bytes; at most {MAX_ENTRY_BYTES} are read")
    return io.BytesIO(path.read_bytes())


def _unzipped(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> io.BytesIO:
    return io.BytesIO(archive.read(entry))


def _reported(items: Iterable[T], total: int, source: str) -> Iterator[T]:
    """The same items; where they take long, a line on standard error now and then says how far they are."""
    due = time.monotonic() + PROGRESS_AFTER_S
    for index, item in enumerate(items):
        yield item
        if time.monotonic() > due:
            due = time.monotonic() + PROGRESS_EVERY_S
            print(f"decoding {source}: {index + 1} of {total} images", file=sys.stderr, flush=True)
