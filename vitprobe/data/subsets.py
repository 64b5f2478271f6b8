"""Some of the images of another source, and images held decoded in memory."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from vitprobe.data.bands import ByteStream, Picture, Wanted
from vitprobe.data.decoding import BadImageError
from vitprobe.data.images import Images, digest

HELD_BYTES = 2**29  # a set of pictures larger than that is decoded again in every epoch


class SubsetImages(Images):
    """The images at some positions of another source, under their names there."""

    def __init__(self, images: Images, positions: Sequence[int], source: str) -> None:
        names = [images.names[position] for position in positions]
        super().__init__(source, names, [images.groups[position] for position in positions])
        self.images, self.positions = images, list(positions)
        self.wanted, self.normalised, self.left_out = images.wanted, images.normalised, images.left_out

    def for_model(self, wanted: Wanted) -> Images:
        """The same positions of the other source for a model."""
        again = copy.copy(self)
        again.wanted = wanted
        again.images = self.images.for_model(wanted)
        return again

    def read(self, index: int) -> Picture | Tensor:
        """As the other source reads it."""
        return self.images.read(self.positions[index])

    def open(self, index: int) -> ByteStream | None:
        """As the other source opens it."""
        return self.images.open(self.positions[index])

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

    def __init__(self, images: Images, pixels: UInt8[Tensor, "n channel height width"], bad: Mapping[int, str]) -> None:
        self.source, self.names, self.groups = images.source, images.names, images.groups
        self.wanted = images.wanted
        self.images, self.pixels, self.bad = images, pixels, dict(bad)

    def read(self, index: int) -> Picture:
        """The picture."""
        if index in self.bad:
            raise BadImageError(self.names[index], self.bad[index])
        bands = self.pixels[index].permute(1, 2, 0).contiguous().numpy()
        channels = bands.shape[-1]
        return bands if channels not in (1, 3) else Image.fromarray(bands[..., 0] if channels == 1 else bands)

    def fingerprint(self) -> str:
        """That of the source they were decoded from."""
        return self.images.fingerprint()


def hold(images: Images, most_bytes: int = HELD_BYTES) -> HeldImages | None:
    """Return the images decoded once into memory; None if their sizes differ, or they take over `most_bytes`.

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
            return None
        decoded = np.asarray(picture)
        if decoded.dtype != np.uint8:
            return None
        decoded = np.atleast_3d(decoded).transpose(2, 0, 1)  # of a grey picture there is no axis of channels
        if pixels is None:
            if len(images) * decoded.nbytes > most_bytes:
                return None
            pixels = np.zeros((len(images), *decoded.shape), np.uint8)
        if decoded.shape != pixels.shape[1:]:
            return None
        pixels[index] = decoded
    return None if pixels is None else HeldImages(images, torch.from_numpy(pixels), bad)
