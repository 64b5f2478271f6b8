"""From a picture to the tensor a model expects: the model's own way, or the paper's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from jaxtyping import Float
from PIL import Image
from timm.data.config import resolve_data_config
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.transforms_factory import create_transform
from torch import Tensor, nn

from vitprobe.data.decoding import to_rgb
from vitprobe.data.stated import state_images
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
        remark: one line on what of this is not the model's word: defaults that were taken. "" where there are none.
    """

    mode: str
    size: tuple[int, int]
    crop_pct: float
    crop_mode: str
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    remark: str = field(default="", compare=False)

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
    module: nn.Module | Sequence[nn.Module],
    mode: str = "model",
    img_size: int | tuple[int, int] | None = None,
    normalizer: str = "",
) -> ImageTransform:
    """The transform for a model's images.

    Args:
        module: the model, or the part of it that holds its blocks followed by what holds that part. The first that says
            how its images are prepared (timm's `pretrained_cfg`, open_clip's `preprocess_cfg` or `image_mean`) is
            believed; where none does, timm's defaults are taken (bicubic, crop of 0.875, ImageNet's mean and std, 224
            pixels unless a patch embedding says otherwise), which the result's `remark` says.
        mode: "model" for what is said of this model; "paper" for what Beyond [cls] (arXiv 2412.03215) gave every
            model: shorter side to int(size·16/14), bicubic, centre crop, ImageNet's mean and std.
        img_size: pixels of the result, a side or (height, width); by default what the model was built for.
        normalizer: the class of a module by which the model normalises its images itself; the transform does not then.

    Raises:
        UserError: for an unknown mode, or a size below one pixel.
    """
    if mode not in ("model", "paper"):
        raise UserError(
            f"there is no transform {mode!r}: use 'model' (what the model was trained with, from timm's config) "
            f"or 'paper' (shorter side to 256 for a crop of 224, bicubic, ImageNet's mean and std)"
        )
    parts = [module] if isinstance(module, nn.Module) else list(module)
    stated = state_images(parts, normalizer)
    # timm asks for a config that is not empty
    config = resolve_data_config(pretrained_cfg={"input_size": (3, 224, 224)} | stated.config)
    size = _size(parts, config, img_size)
    if mode == "paper":
        mean, std = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD) if not normalizer else (config["mean"], config["std"])
        remark = stated.remark(config) if normalizer else ""
        return ImageTransform(mode, size, PAPER_CROP, "center", "bicubic", mean, std, remark)
    return ImageTransform(
        mode=mode,
        size=size,
        crop_pct=float(config["crop_pct"]),
        crop_mode=config["crop_mode"],
        interpolation=config["interpolation"],
        mean=tuple(map(float, config["mean"])),
        std=tuple(map(float, config["std"])),
        remark=stated.remark(config),
    )


def _size(
    parts: Sequence[nn.Module], config: dict[str, Any], img_size: int | tuple[int, int] | None
) -> tuple[int, int]:
    """Height and width: as asked, else as built (which need not be what the config says), else of the config."""
    size: Any = img_size
    for holder in (holder for part in parts for holder in (part, getattr(part, "encoder", None))):
        if size is None:
            size = getattr(getattr(holder, "patch_embed", None), "img_size", None)
    if size is None:
        size = config["input_size"][-2:]
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise UserError(f"an image size of {height}×{width} pixels cannot be: give a side of at least one patch")
    return int(height), int(width)
