"""torchvision's classification data sets, by name."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clnp_search.errors import InputError

# The names of the training and test parts, where a data set has others.
SPLITS = {
    "ImageNet": ("train", "val"),
    "Imagenette": ("train", "val"),
    "OxfordIIITPet": ("trainval", "test"),
    "Places365": ("train-standard", "val"),
}


def train_and_test(
    name: str, root: Path, arguments: Mapping[str, Any] | None = None, hint: str = "Put its files there"
) -> tuple[Any, Any]:
    """The training and the test part of one of `torchvision.datasets`, read from `root` or downloaded to it.

    Args:
        arguments: More of its constructor's.
        hint: What to do where it is not there.

    Raises:
        InputError: torchvision has no such data set, or it is neither there nor can be downloaded, or it is damaged,
            or its constructor takes other arguments, or torchvision does not fit torch.
    """
    try:
        datasets = importlib.import_module("torchvision.datasets")
    except Exception as error:  # a torchvision built for another torch fails in many ways
        raise InputError(
            f"torchvision cannot be imported: {error}\n"
            "Its build does not fit the installed torch; install both in one step, for example `uv sync`."
        ) from error
    if name not in datasets.__all__:
        close = difflib.get_close_matches(name, datasets.__all__, 1)
        hint = f"; did you mean {close[0]!r}?" if close else f"; allowed: {', '.join(datasets.__all__)}"
        raise InputError(f"scenario.name: 'torchvision:{name}': torchvision has no such data set{hint}")
    make = getattr(datasets, name)
    known = inspect.signature(make).parameters
    is_mnist = issubclass(make, datasets.MNIST)  # whose descendants hide some of its arguments
    if "train" in known or is_mnist:
        parts: tuple[dict[str, Any], ...] = ({"train": True}, {"train": False})
    elif "split" in known:
        parts = tuple({"split": split} for split in SPLITS.get(name, ("train", "test")))
    else:
        raise InputError(
            f"scenario.name: 'torchvision:{name}': it has no training and test part of its own; "
            "arrange it as class_folders, or give your own scenario by import path"
        )
    # QMNIST's `what` overrules `train`.
    if taken := sorted({*parts[0], "what"} & (arguments or {}).keys()):
        raise InputError(f"scenario.arguments: {', '.join(taken)}: both parts of {name} are read, each with its own")
    settings = {"download": True} if "download" in known or is_mnist else {}
    try:
        train, test = (make(str(root), **{**settings, **(arguments or {}), **part}) for part in parts)
    except TypeError as error:
        given = dict(arguments or {})
        raise InputError(f"scenario.arguments: {given}: {name} cannot be made with these: {error}") from error
    except Exception as error:  # torchvision and urllib raise many kinds
        raise InputError(
            f"scenario.root: {name} under {root} can be neither read nor downloaded: {type(error).__name__}: {error}\n"
            f"{hint}, or point scenario.root to where it is."
        ) from error
    return train, test
