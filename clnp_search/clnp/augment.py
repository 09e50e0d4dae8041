"""Random crops and flips of training images, drawn from a seed and made on the images' device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def augment(raw: Tensor, generator: torch.Generator, crop: int = 0, flip: bool = False) -> Tensor:
    """The same images [B, C, H, W] (or [B, H, W]), each moved and mirrored by chance.

    The same generator state gives the same images on every device; numbers are drawn on the CPU, as many for every
    setting.

    Args:
        raw: Raw values; what moves in from outside is zero.
        generator: Of the CPU.
        crop: By how many pixels at most an image is moved, in each direction.
        flip: Whether half of the images are mirrored, left to right.
    """
    num, (height, width) = len(raw), raw.shape[-2:]
    drawn = torch.rand(3, num, generator=generator)
    top, left = (drawn[:2] * (2 * crop + 1)).long().clamp_(max=2 * crop).to(raw.device)
    # Every position of the crop window, as a view; each sample takes one, so that whole images are copied.
    windows = functional.pad(raw, (crop,) * 4).unfold(-2, height, 1).unfold(-2, width, 1)
    moved = windows[torch.arange(num, device=raw.device), ..., top, left, :, :]
    if not flip:
        return moved
    mirrored = (drawn[2] < 0.5).to(raw.device).view(-1, *(1,) * (raw.ndim - 1))
    return torch.where(mirrored, moved.flip(-1), moved)
