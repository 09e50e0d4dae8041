"""Random crops and flips of training images."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from clnp_search.clnp.augment import augment
from clnp_search.clnp.seeds import generator


def make_images(num: int = 64, channels: tuple[int, ...] = (3,)) -> Tensor:
    """Images [num, C, 5, 7] without a zero, so that what moves in is seen."""
    return torch.randint(1, 256, (num, *channels, 5, 7), generator=generator(0, "images"), dtype=torch.uint8)


def windows(image: Tensor, crop: int, flip: bool) -> list[Tensor]:
    """Every image that may come out, one by one: the slow twin."""
    *channels, height, width = image.shape
    padded = torch.zeros(*channels, height + 2 * crop, width + 2 * crop, dtype=image.dtype, device=image.device)
    padded[..., crop : crop + height, crop : crop + width] = image
    found = [
        padded[..., top : top + height, left : left + width]
        for top in range(2 * crop + 1)
        for left in range(2 * crop + 1)
    ]
    return found + ([each.flip(-1) for each in found] if flip else [])


@pytest.mark.parametrize("channels", [(3,), (1,), ()])
@pytest.mark.parametrize(("crop", "flip"), [(0, False), (2, False), (0, True), (1, True), (8, True)])
def test_every_image_is_a_window_of_itself(
    crop: int, flip: bool, channels: tuple[int, ...], device: torch.device
) -> None:
    raw = make_images(16, channels).to(device)
    changed = augment(raw, generator(0, "augment"), crop, flip)
    assert (changed.shape, changed.dtype, changed.device) == (raw.shape, raw.dtype, raw.device)
    for image, seen in zip(raw, changed, strict=True):
        assert any(torch.equal(seen, window) for window in windows(image, crop, flip))


def test_all_windows_occur_about_as_often() -> None:
    raw = make_images(1).expand(1800, -1, -1, -1)
    changed = augment(raw, generator(0, "augment"), 1, True)
    counts = [int((changed == window).flatten(1).all(1).sum()) for window in windows(raw[0], 1, True)]
    assert sum(counts) == 1800
    assert min(counts) > 60
    assert max(counts) < 140


def test_nothing_to_do_changes_nothing_and_never_the_raw_images() -> None:
    raw = make_images()
    before = raw.clone()
    assert torch.equal(augment(raw, generator(0, "augment")), raw)
    augment(raw, generator(0, "augment"), 3, True)
    assert torch.equal(raw, before)


def test_the_generator_decides(device: torch.device) -> None:
    raw = make_images().to(device)
    first, again, other = (augment(raw, generator(seed, "augment"), 2, True) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(first.cpu(), augment(raw.cpu(), generator(0, "augment"), 2, True))


def test_as_many_numbers_are_drawn_for_every_setting() -> None:
    seen = []
    for crop, flip in ((0, False), (4, False), (4, True)):
        random = generator(0, "augment")
        augment(make_images(), random, crop, flip)
        seen.append(random.get_state())
    assert all(torch.equal(state, seen[0]) for state in seen)
