"""The images that a user's torch DataLoader gives, in its own order."""

from __future__ import annotations

import copy
from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import replace
from typing import Any

from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from vitprobe.data.batches import Batch, described, same_size
from vitprobe.data.images import Groups, Images
from vitprobe.data.reading import Reading
from vitprobe.data.shards import SHARD_IMAGES, Share
from vitprobe.errors import UserError

BATCH_KEYS = ("pixel_values", "image", "images")


class LoaderImages(Images):
    """The images that a torch DataLoader gives, in its own order: for `batches`, not for `read`.

    Names are running numbers. `names`, `groups` and `len()` cover the images that the loader announces; they are empty,
    and `len()` raises TypeError as it does for the loader, where it announces none (`announced` is None).
    """

    normalised = True
    listed = False
    resumable = False

    def __init__(self, loader: DataLoader, groups: Groups = None) -> None:
        self.announced = _announced(loader)
        if self.announced is None and groups is not None and not callable(groups):
            raise UserError(
                "the DataLoader does not tell how many images it gives, so groups cannot be a list: "
                "give a function from the running number (a string) to the group"
            )
        super().__init__("a DataLoader", map(str, range(self.announced or 0)), groups)
        self.loader = loader
        self.group_function = groups if callable(groups) else None

    def __len__(self) -> int:
        """How many images the loader announces."""
        if self.announced is None:
            raise TypeError("the DataLoader does not tell how many images it gives")
        return self.announced

    def regrouped(self, groups: Groups) -> LoaderImages:
        """Return the same loader with other groups."""
        again = copy.copy(self)
        LoaderImages.__init__(again, self.loader, groups)
        return again

    def group(self, index: int) -> str:
        """The group of the image that came at a position."""
        if index < len(self.groups):
            return self.groups[index]
        return str(self.group_function(str(index))) if self.group_function else str(index)

    def batches(self, reading: Reading, share: Share | None = None) -> Generator[Batch, None, None]:
        """Return the loader's own batches, of which `num_images` counts alone; a share cuts them at the shards.

        Raises:
            UserError: as `iterate_loader`.
        """
        given = iterate_loader(self)
        return given if share is None and reading.num_images is None else cut_loader(given, reading.num_images)

    def total(self, reading: Reading, share: Share | None = None) -> int | None:
        """Return the number of images that the loader announces, at most `num_images`; None if it announces none."""
        return min((count for count in (self.announced, reading.num_images) if count is not None), default=None)

    def unheeded(self, reading: Reading) -> list[str]:
        """Say that workers are the loader's own."""
        return [] if reading.workers is None else ["workers are those of the DataLoader (num_workers)"]

    def read(self, index: int) -> Image.Image:
        """Refused: a DataLoader is read in its own order.

        Raises:
            UserError: always.
        """
        raise UserError(
            f"a DataLoader gives its images in its own order, so image {index} cannot be read alone: "
            f"give the data set's folder or a list"
        )

    def fingerprint(self) -> str:
        """Empty: only reading all would tell."""
        return ""


def iterate_loader(images: LoaderImages) -> Generator[Batch, None, None]:
    """The batches of a user's DataLoader, whose images are normalised already.

    A batch may be a tensor (n, channels, height, width), a tuple or list that begins with it, or a dict with it under
    "pixel_values", "image" or "images". Names are running numbers.

    Raises:
        UserError: for anything else, or images of different sizes.
    """
    return same_size(_batches(images))


def _batches(images: LoaderImages) -> Generator[Batch, None, None]:
    start = 0
    for given in images.loader:
        pixels = pixels_of(given, images.wanted.channels)
        indices = list(range(start, start + len(pixels)))
        start += len(pixels)
        yield Batch(
            pixels=pixels.float(),
            indices=indices,
            names=[str(index) for index in indices],
            groups=[images.group(index) for index in indices],
        )


def cut_loader(batches: Generator[Batch, None, None], num_images: int | None) -> Generator[Batch, None, None]:
    """The first `num_images` (or all) of a DataLoader's batches as they come, cut where a shard is full."""
    seen = 0
    with closing(batches):
        for batch in batches:
            start = 0
            while start < len(batch) and (num_images is None or seen < num_images):
                room = SHARD_IMAGES - seen % SHARD_IMAGES
                if num_images is not None:
                    room = min(room, num_images - seen)
                piece = _part(batch, slice(start, start + room))
                number, start, seen = seen // SHARD_IMAGES, start + len(piece), seen + len(piece)
                yield replace(piece, shard=(number,), last=seen % SHARD_IMAGES == 0)
            if num_images is not None and seen >= num_images:
                return


def _part(batch: Batch, which: slice) -> Batch:
    return replace(
        batch,
        pixels=batch.pixels[which],
        indices=batch.indices[which],
        names=batch.names[which],
        groups=batch.groups[which],
    )


def pixels_of(given: Any, channels: int | None) -> Float[Tensor, "batch channel height width"]:
    """The images in what a user's DataLoader gave, of so many channels (of any number for None).

    Raises:
        UserError: for anything else.
    """
    came = f"a {type(given).__name__}"
    found: Any = given
    if isinstance(given, Mapping):
        came = f"a dict with the keys {', '.join(map(repr, given))}"
        found = next((given[key] for key in BATCH_KEYS if key in given), None)
    elif isinstance(given, list | tuple):
        came = f"a {type(given).__name__} of {', '.join(type(part).__name__ for part in given) or 'nothing'}"
        found = given[0] if given else None
    if isinstance(found, Tensor):
        if found.ndim == 4 and channels in (None, found.shape[1]) and found.is_floating_point():
            return found.detach()
        came = described(found)
    shape = f"(n, {channels or 'channels'}, height, width)"
    raise UserError(
        f"the DataLoader gave {came}: a batch is a float tensor {shape}, normalised for the model, "
        f"a tuple or list that begins with it, or a dict with it under {', '.join(map(repr, BATCH_KEYS))}"
    )


def _announced(loader: DataLoader) -> int | None:
    """How many images a loader will give, where it says so."""
    if isinstance(loader.dataset, IterableDataset) or loader.batch_size is None:
        return None
    try:
        return len(loader) * loader.batch_size if loader.drop_last else len(loader.sampler)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return None
