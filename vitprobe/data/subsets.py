"""Some of the images of another source, and images held decoded in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from vitprobe.data.decoding import BadImageError
from vitprobe.data.images import Images, digest

HELD_BYTES = 2**29  # a set of pictures larger than that is decoded again in every epoch


class SubsetImages(Images):
    """The images at some positions of another source, under their names there."""

    def __init__(self, images: Images, positions: Sequence[int], source: str) -> None:
        names = [images.names[position] for position in positions]
        super().__init__(source, names, [images.groups[position] for position in positions])
        self.images, self.positions = images, list(positions)

    def read(self, index: int) -> Image.Image | Tensor:
        """As the other source reads it."""
        return self.images.read(self.positions[index])

    def fingerprint(self) -> str:
        """sha256 over that of the other source, and which images these are; empty where that is."""
        whole = self.images.fingerprint()
        return digest([whole, *self.names]) if whole else ""


class HeldImages(Images):
    """Pictures of one size in memory, which nobody needs to decode again.

    Attributes:
        pixels: all of them, 0 to 255; black where one could not be read.
        bad: position → why that image could not be read.
    """

    def __init__(self, images: Images, pixels: UInt8[Tensor, "n 3 height width"], bad: Mapping[int, str]) -> None:
        self.source, self.names, self.groups = images.source, images.names, images.groups
        self.images, self.pixels, self.bad = images, pixels, dict(bad)

    def read(self, index: int) -> Image.Image:
        """The picture, as RGB."""
        if index in self.bad:
            raise BadImageError(self.names[index], self.bad[index])
        return Image.fromarray(self.pixels[index].permute(1, 2, 0).contiguous().numpy())

    def fingerprint(self) -> str:
        """That of the source they were decoded from."""
        return self.images.fingerprint()


def hold(images: Images, most_bytes: int = HELD_BYTES) -> Images:
    """The same images decoded once into memory; as they are where their sizes differ, or they take over `most_bytes`.

    That is known after the first images: of a set too large no more than one is decoded for nothing.
    """
    pixels: np.ndarray | None = None
    bad: dict[int, str] = {}
    for index in range(len(images)):
        try:
            picture = images.read(index)
        except BadImageError as error:
            bad[index] = error.reason
            continue
        if isinstance(picture, Tensor):
            return images
        decoded = np.asarray(picture).transpose(2, 0, 1)
        if pixels is None:
            if len(images) * decoded.nbytes > most_bytes:
                return images
            pixels = np.zeros((len(images), *decoded.shape), np.uint8)
        if decoded.shape != pixels.shape[1:]:
            return images
        pixels[index] = decoded
    return images if pixels is None else HeldImages(images, torch.from_numpy(pixels), bad)
