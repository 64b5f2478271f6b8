"""The augmentation that probes are trained with: a random crop, resized, and a flip; each image's draw by its number.

The definition is one picture's (`AugmentedImages`); `augment_held` gives the same of a whole batch of small pictures
in two matrix products, as enlarging is linear in each direction. A test holds the one to the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64, UInt8
from PIL import Image
from torch import Tensor

from vitprobe.data.images import Images
from vitprobe.data.transforms import ImageTransform

BATCH_NUMBERS = 2**24  # of float32 that are alive at once for each tensor of a batch
LARGEST_SIDE = 128  # of pictures that are resized by matrix products; of larger ones most weights would be 0


@dataclass(frozen=True)
class Augmentation:
    """The crops that training draws: BYOL's, as MAE's and the paper's probes have them.

    One draw an image, without torchvision's ten tries; Pillow's bicubic.

    Attributes:
        scale: the least and the largest share of the picture's area.
        ratio: the least and the largest width over height.
        flip: whether half of the crops are mirrored.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True

    def describe(self) -> dict[str, Any]:
        """As JSON holds it, for a protocol or a manifest."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


class Crops(NamedTuple):
    """Which part of each picture is taken, in pixels, and whether it is mirrored."""

    top: Int64[np.ndarray, " batch"]
    left: Int64[np.ndarray, " batch"]
    height: Int64[np.ndarray, " batch"]
    width: Int64[np.ndarray, " batch"]
    flipped: Bool[np.ndarray, " batch"]


def draw_crops(
    augmentation: Augmentation, indices: Sequence[int], height: int, width: int, seed: int, epoch: int
) -> Crops:
    """The crops of some images of one size; an image's depends on its number, the seed and the epoch alone."""
    draws = np.stack([_uniform(seed, epoch, index) for index in indices], axis=1)
    sides = crop_sides(augmentation, draws[0], draws[1], height * width)
    crop_height, crop_width = (
        np.rint(side).astype(np.int64).clip(1, most) for side, most in zip(sides, (height, width), strict=True)
    )
    return Crops(
        top=(draws[2] * (height - crop_height + 1)).astype(np.int64),
        left=(draws[3] * (width - crop_width + 1)).astype(np.int64),
        height=crop_height,
        width=crop_width,
        flipped=(draws[4] < 0.5) & augmentation.flip,
    )


def crop_sides(
    augmentation: Augmentation, area: np.ndarray, ratio: np.ndarray, whole: float | int = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Return height and width of random crops, which may be larger than the picture.

    Args:
        augmentation: the shares of the area, uniform, and the ratios of the sides, uniform in their logarithm.
        area: `(n,)` random numbers, 0 to 1.
        ratio: `(n,)` random numbers, 0 to 1.
        whole: area of the picture, in the square of the unit of the sides.
    """
    area = _between(area, *augmentation.scale) * whole
    ratio = np.exp(_between(ratio, *map(math.log, augmentation.ratio)))
    return np.sqrt(area / ratio), np.sqrt(area * ratio)


def _uniform(seed: int, epoch: int, index: int) -> np.ndarray:
    """Five random numbers, 0 to 1, of a counter-based generator: no other image's draw comes before this one."""
    key, counter = np.array([seed, epoch], np.uint64), np.array([0, 0, 0, index], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter)).random(5)


def _between(draw: np.ndarray, low: float, high: float) -> np.ndarray:
    return low + draw * (high - low)


class AugmentedImages(Images):
    """The images of another source, augmented, as normalised tensors `(channels, height, width)`."""

    def __init__(
        self, images: Images, augmentation: Augmentation, transform: ImageTransform, seed: int, epoch: int
    ) -> None:
        self.source, self.names, self.groups = images.source, images.names, images.groups
        self.images, self.augmentation, self.transform = images, augmentation, transform
        self.seed, self.epoch = seed, epoch
        self.wanted = images.wanted

    def read(self, index: int) -> Float[Tensor, "channel height width"]:
        """The crop of the image at a position."""
        picture = self.images.read(index)
        if not isinstance(picture, Image.Image):
            return self._of_tensor(picture if isinstance(picture, Tensor) else self.transform.normalise(picture), index)
        drawn = draw_crops(self.augmentation, [index], picture.height, picture.width, self.seed, self.epoch)
        top, left, height, width, flipped = (part.item() for part in drawn)
        # cropped before it is resized: the picture around it is not looked at
        crop = picture.crop((left, top, left + width, top + height))
        crop = crop.resize((self.transform.size[1], self.transform.size[0]), Image.Resampling.BICUBIC)
        if flipped:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        shades = np.atleast_3d(np.array(crop))  # of a grey picture there is no axis of channels
        return _normalise(torch.from_numpy(shades).permute(2, 0, 1).float(), self.transform).contiguous()

    def _of_tensor(self, pixels: Float[Tensor, "channel height width"], index: int) -> Tensor:
        """The same crop of what is normalised already, in float and with torch's resizing."""
        drawn = draw_crops(self.augmentation, [index], pixels.shape[-2], pixels.shape[-1], self.seed, self.epoch)
        top, left, height, width, flipped = (part.item() for part in drawn)
        crop = pixels[None, :, top : top + height, left : left + width].float()
        crop = F.interpolate(crop, self.transform.size, mode="bicubic", antialias=True)[0]
        return (crop.flip(-1) if flipped else crop).contiguous()

    def fingerprint(self) -> str:
        """That of the pictures."""
        return self.images.fingerprint()


def only_enlarged(pixels: UInt8[Tensor, "n channel height width"], size: tuple[int, int]) -> bool:
    """Whether `augment_held` takes these pictures: small ones, none of whose crops shrinks.

    Where one does, Pillow's versions differ in the direction that they resize first, which rounding makes matter.
    """
    height, width = pixels.shape[-2:]
    return height <= size[0] and width <= size[1] and max(height, width) <= LARGEST_SIDE


def augment_held(
    pixels: UInt8[Tensor, "n channel height width"],
    indices: Sequence[int],
    augmentation: Augmentation,
    transform: ImageTransform,
    seed: int,
    epoch: int,
) -> Float[Tensor, "batch channel out_height out_width"]:
    """What `AugmentedImages` reads at these positions of a set held in memory that is `only_enlarged`, all at once.

    Before normalisation a value may differ by 1 of 255, where rounding fell on the other side.
    """
    channels, height, width = pixels.shape[1:]
    crops = draw_crops(augmentation, indices, height, width, seed, epoch)
    step = max(1, BATCH_NUMBERS // (channels * max(height, transform.size[0]) * max(width, transform.size[1])))
    parts = [
        _resized(pixels[part], Crops(*(value[start : start + step] for value in crops)), transform.size)
        for start, part in zip(range(0, len(indices), step), torch.tensor(indices).split(step), strict=True)
    ]
    return _normalise(torch.cat(parts) if len(parts) > 1 else parts[0], transform)


def _resized(pixels: UInt8[Tensor, "batch channel height width"], crops: Crops, size: tuple[int, int]) -> Tensor:
    """The crops at one size, 0 to 255 in whole numbers: across first, then down, rounded after each as Pillow does."""
    batch, channels, height, width = pixels.shape
    across = _weights(width, size[1])[crops.width, :, width - crops.left]
    across = torch.where(torch.from_numpy(crops.flipped)[:, None, None], across.flip(1), across)
    down = _weights(height, size[0])[crops.height, :, height - crops.top]
    wide = _rounded(torch.bmm(pixels.float().flatten(1, 2), across.mT))
    wide = wide.view(batch, channels, height, size[1]).transpose(1, 2).reshape(batch, height, -1)  # (B, height, C·out)
    tall = _rounded(torch.bmm(down, wide))
    return tall.view(batch, size[0], channels, size[1]).transpose(1, 2).contiguous()


def _rounded(values: Tensor) -> Tensor:
    return values.add_(0.5).floor_().clamp_(0, 255)


@lru_cache(maxsize=4)
def _weights(side: int, size: int) -> Float[Tensor, "length size shift side"]:
    """What each pixel of a line of `side` counts for in the `size` pixels that a part of it is resized to.

    The part has the `length` and begins at `side - shift`. Pillow's bicubic (a = −1/2) of what is not shrunk: the
    kernel is cut at the ends of the part, and the weights of one pixel sum to 1.
    """
    length = torch.arange(side + 1)[:, None, None]
    center = (torch.arange(size)[:, None] + 0.5) * (length.double() / size)
    position = torch.arange(side)  # within the part
    distance = (position + 0.5 - center).abs()
    near = (1.5 * distance - 2.5) * distance * distance + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    weights = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0)) * (position < length)
    weights /= weights.sum(dim=2, keepdim=True)
    # nothing before the part and after it, and a view of the line from every place at which the part may begin
    return F.pad(weights.float(), (side, 0)).unfold(2, side, 1)


def _normalise(pixels: Tensor, transform: ImageTransform) -> Tensor:
    """Values of 0 to 255, `(…, C, H, W)`, as the model expects them."""
    mean, std = (torch.tensor(part)[:, None, None] for part in (transform.mean, transform.std))
    return pixels.div_(1 if transform.stored else 255).sub_(mean).div_(std)
