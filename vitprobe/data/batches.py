"""Batches of images, with the bad ones dropped and reported - never replaced."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vitprobe.data.bands import Picture, Wanted
from vitprobe.data.decoding import BadImageError
from vitprobe.errors import UserError

FEW_IMAGES = 256  # below it, starting workers takes longer than they save
MOST_WORKERS = 8


Key = tuple[int, ...]  # of a shard, see `shards.py`


@runtime_checkable
class Readable(Protocol):
    """What batches need of a source; every `Images` has it.

    Attributes:
        names: one distinct name per image.
        groups: what each image was taken from.
        wanted: the channels that the model takes.
    """

    names: list[str]
    groups: list[str]
    wanted: Wanted

    def read(self, index: int) -> Picture | Tensor:
        """Return the image at a position: a picture, or a tensor that is normalised already."""
        ...


@dataclass
class Batch:
    """Images for one forward pass, and those of the same stretch that could not be read.

    Attributes:
        pixels: the readable images (none where all were bad).
        indices: their positions in the source.
        names: their names.
        groups: what each was taken from.
        skipped: name and reason of each bad image.
        shard: the number of the shard that it is cut from; of a stream, the part's number and the shard's in it.
        last: whether it is the last of its shard.
        ends: whether it is the last of its part of a stream.
    """

    pixels: Float[Tensor, "batch channel height width"]
    indices: list[int]
    names: list[str]
    groups: list[str]
    skipped: list[tuple[str, str]] = field(default_factory=list)
    shard: Key = (0,)
    last: bool = False
    ends: bool = False

    def __len__(self) -> int:
        """How many images can be used."""
        return len(self.indices)

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory (a torch DataLoader calls this)."""
        return replace(self, pixels=self.pixels.pin_memory())


@dataclass
class Item:
    """What a worker made of one image: a tensor, or the reason why not."""

    index: int
    name: str
    group: str
    result: Any


class _Items(Dataset):
    """The images at some positions, read and transformed; errors come back as values, not raised.

    torch wraps what a worker raises into lines of traceback, which would bury our one line.
    """

    def __init__(self, images: Readable, order: Sequence[int], transform: Callable[[Any], Tensor]) -> None:
        self.images, self.order, self.transform = images, order, transform

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, position: int) -> Item:
        index = self.order[position]
        try:
            image = self.images.read(index)
            result = image if isinstance(image, Tensor) else self.transform(image)
        except BadImageError as error:
            result = error
        return Item(index, self.images.names[index], self.images.groups[index], result)


def iterate(
    images: Readable,
    order: Sequence[int],
    transform: Callable[[Any], Tensor],
    batch_size: int,
    workers: int = 0,
    pin_memory: bool = False,
    start_method: str | None = None,
) -> Generator[Batch, None, None]:
    """The images at the positions in `order`, in batches; closing the generator ends the workers.

    Args:
        images: the source.
        order: positions in it.
        transform: from a picture to a float tensor (channels, height, width); images that are tensors already pass it
            by.
        batch_size: images a batch, at least 1; bad images leave a batch smaller (possibly empty).
        workers: processes that read ahead; 0 reads here.
        pin_memory: put the pixels into page-locked memory, for copies to a GPU.
        start_method: how workers start ("fork", "spawn", "forkserver"); by default as Python does.

    Raises:
        UserError: for images of different sizes, a transform that gives no image, or workers that die.
    """
    check_batching(batch_size, workers)
    return load(images, order, cut(range(len(order)), batch_size), transform, workers, pin_memory, start_method)


def check_batching(batch_size: int, workers: int | None) -> None:
    """Returns where there can be such batches.

    Raises:
        UserError: where there cannot.
    """
    if batch_size < 1 or (workers or 0) < 0:
        raise UserError(f"batch size {batch_size} with {workers} workers cannot be: at least 1, and 0 workers or more")


def cut(positions: range, size: int) -> list[range]:
    """Consecutive pieces of at most `size`."""
    return [positions[start : start + size] for start in range(0, len(positions), size)]


def load(
    images: Readable,
    order: Sequence[int],
    batches: Sequence[Sequence[int]],
    transform: Callable[[Any], Tensor],
    workers: int,
    pin_memory: bool,
    start_method: str | None,
) -> Generator[Batch, None, None]:
    """Batches of the images at some positions of `order`, one for each entry of `batches`."""
    loader = DataLoader(
        _Items(images, order, transform),
        batch_sampler=batches,  # type: ignore[arg-type]  # ranges do as well as lists
        num_workers=workers,
        collate_fn=partial(collate, shape=shape_of(images, transform)),
        pin_memory=pin_memory,
        multiprocessing_context=start_method if workers else None,
        generator=torch.Generator(),  # its own, or each pass would advance the caller's random numbers
    )
    return same_size(survive(loader))


def default_workers(n_images: int | None, cores: int | None = None, processes: int = 1) -> int:
    """How many processes should read ahead: 0 for few images, else one core less than there are, 1 to 8.

    None is more images than anybody has counted. So many `processes` share the cores.
    """
    if n_images is not None and n_images < FEW_IMAGES:
        return 0
    if cores is None:
        # the cores this process may use: on a cluster fewer than the machine has
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores // processes - 1, MOST_WORKERS))


def shape_of(images: Readable, transform: Callable[[Any], Tensor]) -> tuple[int, int, int]:
    """Channels, height and width of what a transform makes of some images; sides of 0 where it does not say."""
    height, width = getattr(transform, "size", (0, 0))
    return images.wanted.channels, height, width


def collate(items: list[Item], shape: tuple[int, int, int]) -> Batch | UserError:
    """A batch of the good items; an error is handed over as a value (see `_Items`).

    Args:
        items: what a worker made of each image.
        shape: channels that each image must have, and height and width of a batch without images.
    """
    good = [item for item in items if isinstance(item.result, Tensor)]
    bad = [item for item in items if isinstance(item.result, BadImageError)]
    pixels: list[Tensor] = []
    for item in items:
        image = item.result
        if isinstance(image, BadImageError):
            continue
        if not isinstance(image, Tensor):
            return _not_an_image(item, f"a {type(image).__name__}", shape[0])
        if image.ndim != 3 or image.shape[0] != shape[0] or not image.is_floating_point():
            return _not_an_image(item, described(image), shape[0])
        pixels.append(image)
        if image.shape != pixels[0].shape:
            return _size_error(item.name, image, pixels[0])
    return Batch(
        pixels=torch.stack(pixels).float() if pixels else torch.zeros(0, *shape),
        indices=[item.index for item in good],
        names=[item.name for item in good],
        groups=[item.group for item in good],
        skipped=[(item.name, item.result.reason) for item in bad],
    )


def survive(loader: DataLoader) -> Generator[Batch, None, None]:
    """A loader's batches, and an error in one line where a worker handed one over, or died."""
    batches = iter(loader)
    try:
        while isinstance(given := _next(batches), Batch):
            yield given
    finally:
        # before an error goes up: its traceback would keep the workers, and those found as garbage end after seconds
        del batches
    if given is not None:
        raise given


def _next(batches: Iterator[Batch | UserError]) -> Batch | UserError | None:
    """What comes next; None at the end."""
    try:
        return next(batches, None)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error) or not re.search("exited unexpectedly|killed by signal", str(error)):
            raise
    return UserError(
        "a process that reads images died (most often memory or shared memory ran out): "
        "use fewer workers, 0 to read in the main process, or smaller batches"
    )


def same_size(batches: Generator[Batch, None, None]) -> Generator[Batch, None, None]:
    """Batches as they come, as long as all images have one size: another size would be another number of tokens."""
    first: Tensor | None = None
    with closing(batches):  # ends the workers at once, see `survive`
        for batch in batches:
            if len(batch):
                first = batch.pixels[0] if first is None else first
                if batch.pixels.shape[1:] != first.shape:
                    raise _size_error(batch.names[0], batch.pixels[0], first)
            yield batch


def _size_error(name: str, image: Tensor, first: Tensor) -> UserError:
    return UserError(
        f"image {name} is {image.shape[-2]}×{image.shape[-1]} pixels where those before it are "
        f"{first.shape[-2]}×{first.shape[-1]}: give images of one size, or files and PIL images, which are resized"
    )


def _not_an_image(item: Item, came: str, channels: int) -> UserError:
    return UserError(
        f"the transform made {came} of image {item.name}: it must give a float tensor ({channels}, height, width)"
    )


def described(tensor: Tensor) -> str:
    """Return the type and the shape of a tensor, for a message."""
    return f"a tensor of {str(tensor.dtype).removeprefix('torch.')} with the shape {tuple(tensor.shape)}"
