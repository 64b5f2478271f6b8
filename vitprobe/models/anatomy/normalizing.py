"""Models that normalise their images themselves, before their transformer gets them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from vitprobe.models.anatomy.measured import entering, noise_for
from vitprobe.models.anatomy.parts import Anatomy


def find_normalizer(anatomy: Anatomy) -> str:
    """The class of a module that changes the images before the patch embedding gets them; "" without one.

    A module that looks like one is tried: one image of noise is run, and compared with what enters the embedding.
    """
    names = list(_candidates(anatomy))
    if not names:
        return ""
    images = noise_for(anatomy.module, anatomy.channels, anatomy.image_size)
    entered = entering(anatomy.module, images, anatomy.images_enter)
    same = entered is not None and entered.shape == images.shape and torch.equal(entered, images)
    return "" if same else names[0]


def _candidates(anatomy: Anatomy) -> Iterator[str]:
    """Classes of modules around the transformer that keep a mean and a standard deviation to compute with.

    They are called after that (torchvision's `Normalize`), or keep both as buffers.
    """
    around = anatomy.lineage[1 : anatomy.lineage.index(anatomy.module) + 1]
    for holder in around:
        for part in (holder, *(child for child in holder.children() if child not in anatomy.lineage)):
            for inner in (part,) if part is holder else part.modules():
                if _normalises(inner):
                    yield type(inner).__name__


def _normalises(part: nn.Module) -> bool:
    values: list[Any] = [getattr(part, name, None) for name in ("mean", "std")]
    if "normali" in type(part).__name__.lower() and all(value is not None for value in values):
        return True
    buffers = dict(part.named_buffers(recurse=False))
    return any(f"{word}mean" in buffers and f"{word}std" in buffers for word in ("", "_", "pixel_", "image_"))
