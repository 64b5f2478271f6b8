"""From a picture to the tensor a model expects: the model's own way, or the paper's."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jaxtyping import Float
from PIL import Image
from timm.data.config import resolve_model_data_config
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.transforms_factory import create_transform
from torch import Tensor, nn

from vitprobe.data.decoding import to_rgb
from vitprobe.errors import UserError

PAPER_CROP = 14 / 16  # Beyond [cls] (arXiv 2412.03215): 256 pixels for a crop of 224, int(size·16/14)


@dataclass(frozen=True)
class ImageTransform:
    """Resize, crop, normalise; built by timm's `create_transform`, so the numbers here are all there is to know.

    Attributes:
        mode: "model" or "paper".
        size: height and width of the result, in pixels.
        crop_pct: the crop's share of the resized picture, 0..1.
        crop_mode: "center" (shorter side resized, middle cut out), "squash" (without regard
            to aspect) or "border" (padded).
        interpolation: as timm names it ("bicubic", "bilinear" …).
        mean: subtracted from each channel, in 0..1.
        std: each channel is divided by it.
    """

    mode: str
    size: tuple[int, int]
    crop_pct: float
    crop_mode: str
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def resize(self) -> tuple[int, int]:
        """What a height and a width are resized to before the crop (in "center" the shorter side alone), in pixels."""
        height, width = (math.floor(side / self.crop_pct) for side in self.size)
        return height, width

    @cached_property
    def _pipeline(self) -> Callable[[Image.Image], Tensor]:
        return create_transform(  # type: ignore[return-value]
            input_size=(3, *self.size),
            is_training=False,
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
        )

    def __call__(self, image: Image.Image) -> Float[Tensor, "3 height width"]:
        """The normalised tensor of a picture, float32."""
        return self._pipeline(image if image.mode == "RGB" else to_rgb(image))

    def describe(self) -> dict[str, Any]:
        """The transform as JSON holds it, for the manifest."""
        return {
            "mode": self.mode,
            "size": list(self.size),
            "resize": list(self.resize),
            "crop_pct": self.crop_pct,
            "crop_mode": self.crop_mode,
            "interpolation": self.interpolation,
            "mean": list(self.mean),
            "std": list(self.std),
        }


def model_transform(
    module: nn.Module, mode: str = "model", img_size: int | tuple[int, int] | None = None
) -> ImageTransform:
    """The transform for a model's images.

    Args:
        module: the model. One without timm's `pretrained_cfg` or open_clip's `preprocess_cfg` gets timm's defaults
            (bicubic, crop of 0.875, ImageNet's mean and std, 224 pixels unless its patch embedding says otherwise).
        mode: "model" for what timm's config says of this model; "paper" for what Beyond [cls] (arXiv 2412.03215) gave
            every model: shorter side to int(size·16/14), bicubic, centre crop, ImageNet's mean and std.
        img_size: pixels of the result, a side or (height, width); by default what the model was built for.

    Raises:
        UserError: for an unknown mode, or a size below one pixel.
    """
    if mode not in ("model", "paper"):
        raise UserError(
            f"there is no transform {mode!r}: use 'model' (what the model was trained with, from timm's config) "
            f"or 'paper' (shorter side to 256 for a crop of 224, bicubic, ImageNet's mean and std)"
        )
    config = resolve_model_data_config(module) | _open_clips_word(module)
    size = _size(module, config, img_size)
    if mode == "paper":
        return ImageTransform(mode, size, PAPER_CROP, "center", "bicubic", IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    return ImageTransform(
        mode=mode,
        size=size,
        crop_pct=float(config["crop_pct"]),
        crop_mode=config["crop_mode"],
        interpolation=config["interpolation"],
        mean=tuple(map(float, config["mean"])),
        std=tuple(map(float, config["std"])),
    )


def _open_clips_word(module: nn.Module) -> dict[str, Any]:
    """What open_clip says of the images of its model in `preprocess_cfg`, in timm's words; nothing for any other."""
    said: Any = getattr(module, "preprocess_cfg", None)
    if not isinstance(said, dict):
        return {}
    modes = {"shortest": "center", "longest": "border", "squash": "squash"}
    return {
        "mean": said["mean"],
        "std": said["std"],
        "interpolation": said["interpolation"],
        "crop_mode": modes[said["resize_mode"]],
        "crop_pct": 1.0,
    }


def _size(module: nn.Module, config: dict[str, Any], img_size: int | tuple[int, int] | None) -> tuple[int, int]:
    """Height and width: as asked, else as built (which need not be what the config says), else of the config."""
    size: Any = img_size
    for holder in (module, getattr(module, "encoder", None)):
        if size is None:
            size = getattr(getattr(holder, "patch_embed", None), "img_size", None)
    if size is None:
        size = config["input_size"][-2:]
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise UserError(f"an image size of {height}×{width} pixels cannot be: give a side of at least one patch")
    return int(height), int(width)
