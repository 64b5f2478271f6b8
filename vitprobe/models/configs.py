"""The config by which timm knows a model's images, for architectures that are ours."""

from __future__ import annotations

from typing import Any

from torch import nn

from vitprobe.models.entries import NORMALISATIONS


def describe_images(
    module: nn.Module, architecture: str, normalisation: str, *, crop_pct: float, num_classes: int
) -> None:
    """Give a model that timm did not create the `pretrained_cfg` that its images follow from.

    Args:
        module: the model; its image size is read from its patch embedding.
        architecture: its name, in messages too.
        normalisation: a key of `NORMALISATIONS`.
        crop_pct: the crop's share of the resized picture, 0..1.
        num_classes: of its classifier; 0 for none.
    """
    mean, std = NORMALISATIONS[normalisation]
    described: Any = module
    described.pretrained_cfg = described.default_cfg = {
        "architecture": architecture,
        "input_size": (3, *described.patch_embed.img_size),
        "fixed_input_size": True,
        "interpolation": "bicubic",
        "crop_pct": crop_pct,
        "crop_mode": "center",
        "mean": mean,
        "std": std,
        "num_classes": num_classes,
        "classifier": "head",
        "first_conv": "patch_embed.proj",
    }
