"""From a picture to the tensor a model expects: the model's own way, or the paper's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from numbers import Real
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from timm.data.config import resolve_data_config
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.transforms_factory import create_transform
from torch import Tensor, nn

from vitprobe.data.bands import Picture, Wanted
from vitprobe.data.decoding import to_wanted
from vitprobe.data.stated import StatedImages, state_images
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
        mean: subtracted from each channel, in 0..1; given above 1, in the values that the files hold.
        std: each channel is divided by it.
        given: whether the user gave mean and std.
        assumed: whether mean and std are averages over other channels, for want of those of the model's.
        stated: what the model says of its images; None where that is not asked.
    """

    mode: str
    size: tuple[int, int]
    crop_pct: float
    crop_mode: str
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    given: bool = False
    assumed: bool = False
    stated: StatedImages | None = field(default=None, compare=False)

    @property
    def channels(self) -> int:
        """Channels of the result."""
        return len(self.mean)

    @property
    def stored(self) -> bool:
        """Whether mean and std are of the values that files hold, which are then not scaled to 0..1."""
        return self.given and max(*self.mean, *self.std) > 1

    @property
    def wanted(self) -> Wanted:
        """What it takes of a picture."""
        return Wanted(self.channels, self.given, self.stored)

    @property
    def resize(self) -> tuple[int, int]:
        """What a height and a width are resized to before the crop (in "center" the shorter side alone), in pixels."""
        height, width = (math.floor(side / self.crop_pct) for side in self.size)
        return height, width

    @cached_property
    def _pipeline(self) -> Callable[[Image.Image], Tensor]:
        unit = 255 if self.stored else 1  # timm's pipeline makes 0..1 of 8 bits first
        return self._timms(tuple(value / unit for value in self.mean), tuple(value / unit for value in self.std))

    @cached_property
    def _geometry(self) -> Callable[[Image.Image], Tensor]:
        """The same without normalisation, for one channel."""
        return self._timms((0.0,), (1.0,))

    def _timms(self, mean: tuple[float, ...], std: tuple[float, ...]) -> Callable[[Image.Image], Tensor]:
        return create_transform(  # type: ignore[return-value]
            input_size=(len(mean), *self.size),
            is_training=False,
            interpolation=self.interpolation,
            mean=mean,
            std=std,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
        )

    def __call__(self, image: Picture) -> Float[Tensor, "channel out_height out_width"]:
        """The normalised tensor of a picture, float32."""
        if isinstance(image, Image.Image) and image.mode != {1: "L", 3: "RGB"}.get(self.channels):
            image = to_wanted(image, self.wanted)
        if isinstance(image, Image.Image):
            return self._pipeline(image)
        # Normalised first: what a border is filled with, 0, is then the mean.
        planes = [Image.fromarray(plane) for plane in self.normalise(image).numpy()]
        return torch.cat([self._geometry(plane) for plane in planes])

    def normalise(self, bands: np.ndarray) -> Float[Tensor, "channel height width"]:
        """An array `(H, W, C)` of uint8, uint16 or float32 as the model expects its values, at its own size."""
        unit = np.iinfo(bands.dtype).max if bands.dtype.kind == "u" and not self.stored else 1
        mean, std = (np.array(part, np.float32) for part in (self.mean, self.std))
        values = (bands.astype(np.float32) / np.float32(unit) - mean) / std
        return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))

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

    def for_channels(
        self, channels: int, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
    ) -> ImageTransform:
        """The same for a model of so many channels, with the user's mean and standard deviation where they are given.

        Without them, and where the model's own are for another number of channels, the average of these is taken for
        every channel.

        Args:
            channels: of the model's images.
            mean: one value for every channel, or one for all.
            std: the same.

        Raises:
            UserError: for another number of values, or only one of the two.
        """
        if (mean is None) != (std is None):
            missing = "std" if std is None else "mean"
            raise UserError(f"mean and std belong together: give {missing} too (--{missing})")
        if mean is not None and std is not None:
            values = [_for_each(part, channels, name) for part, name in ((mean, "mean"), (std, "std"))]
            return replace(self, mean=values[0], std=values[1], given=True, assumed=False)
        if channels == self.channels:
            return self
        values = [(sum(part) / len(part),) * channels for part in (self.mean, self.std)]
        return replace(self, mean=values[0], std=values[1], assumed=True)

    @property
    def remarks(self) -> list[str]:
        """What a reader must know: defaults that were taken for what the model does not say."""
        known = ("mean", "std") if self.given or self.assumed else ()
        taken = {name: getattr(self, name) for name in ("mean", "std", "interpolation", "crop_pct")}
        line = self.stated.remark(taken, known) if self.stated is not None else ""
        said = [line] if line else []
        if self.stored:
            said.append("mean and std above 1 are taken for the values in the files, which are not scaled to 0..1")
        if not self.assumed:
            return said
        channels = f"{self.channels} channel{'s' * (self.channels > 1)}"
        return [
            *said,
            f"mean and std for {channels} are not known: the average of those of the usual ones is taken, "
            f"{self.mean[0]:.3f} and {self.std[0]:.3f}; give others with --mean and --std",
        ]


def _for_each(values: Sequence[float], channels: int, name: str) -> tuple[float, ...]:
    """One value for each channel."""
    if len(values) not in (1, channels):
        raise UserError(
            f"{name} has {len(values)} values, and the model takes {channels} channel{'s' * (channels > 1)}: give one "
            f"value for each, or one for all"
        )
    return tuple(values) * (channels // len(values))


def check_normalisation(name: str, given: Any) -> list[float] | None:
    """Mean or standard deviation that a user gave, as a list of numbers; None for none.

    Args:
        name: "mean" or "std".
        given: a number, or one for each channel.

    Raises:
        UserError: for what is no number, or a standard deviation that is not above 0.
    """
    if given is None:
        return None
    if isinstance(given, str) or not (isinstance(given, Real) or hasattr(given, "__iter__")):
        raise UserError(f"{name} is {given!r}: give a number, or one for each channel")
    values = [given] if isinstance(given, Real) else list(given)
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError):
        numbers = []
    if not numbers or not all(math.isfinite(number) and (name != "std" or number > 0) for number in numbers):
        raise UserError(f"{name} is {given!r}: give a number{' above 0' * (name == 'std')}, or one for each channel")
    return numbers


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
            pixels unless a patch embedding says otherwise), which the result's `remarks` say.
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
        own = stated if normalizer else None
        return ImageTransform(mode, size, PAPER_CROP, "center", "bicubic", mean, std, stated=own)
    return ImageTransform(
        mode=mode,
        size=size,
        crop_pct=float(config["crop_pct"]),
        crop_mode=config["crop_mode"],
        interpolation=config["interpolation"],
        mean=tuple(map(float, config["mean"])),
        std=tuple(map(float, config["std"])),
        stated=stated,
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
