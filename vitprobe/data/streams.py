"""Sets too big to list: read part by part, each from its beginning, and never held."""

from __future__ import annotations

import copy
import importlib
import logging
from abc import abstractmethod
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from io import BytesIO
from itertools import islice
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from vitprobe.data.batches import Batch, Item, Key, collate, cut, same_size, shape_of, survive
from vitprobe.data.decoding import BadImageError, decode
from vitprobe.data.images import Groups, Images
from vitprobe.data.reading import Reading
from vitprobe.data.shards import SHARD_IMAGES, Share
from vitprobe.errors import UserError


class Sample(NamedTuple):
    """One image of a stream, not decoded: its name, its file's bytes or why there are none, and its label, if any."""

    name: str
    content: bytes | None
    reason: str = ""
    label: str | None = None


class StreamImages(Images):
    """Images that come part after part, each part from its beginning; always in the same order.

    `names` and `groups` are empty and `len()` raises TypeError: nobody has counted them.

    Attributes:
        parts: how many parts there are.
    """

    listed = False
    streamed = True

    def __init__(self, source: str, parts: int, groups: Groups) -> None:
        if groups is not None and not callable(groups):
            raise UserError("a stream is not listed, so groups cannot be a list: give a function of an image's name")
        super().__init__(source, ())
        self.parts = parts
        self._group = groups

    def regrouped(self, groups: Groups) -> StreamImages:
        """The same stream with other groups."""
        again = copy.copy(self)
        StreamImages.__init__(again, self.source, self.parts, groups)
        return again

    def batches(self, reading: Reading, share: Share | None = None) -> Generator[Batch, None, None]:
        """Return the batches of a share of the shards; default: of all. A batch never crosses a shard.

        Raises:
            UserError: as `iterate_stream`.
        """
        workers = reading.workers_for(reading.num_images)
        return iterate_stream(
            self,
            reading.transform,
            reading.batch_size,
            share or Share(),
            reading.num_images,
            workers,
            reading.pin_memory,
        )

    def total(self, reading: Reading, share: Share | None = None) -> int | None:
        """Return this process's part of `num_images`; None if all images are read, as nobody has counted them."""
        if reading.num_images is None:
            return None
        return reading.num_images // (share or Share()).size

    def unheeded(self, reading: Reading) -> list[str]:
        """Say that the first images are read, not a random draw."""
        if reading.num_images is None:
            return []
        return [f"{self.source} is a stream, of which the first {reading.num_images} images are taken"]

    def __len__(self) -> int:
        """Refused: nobody has counted them."""
        raise TypeError("a stream does not tell how many images it gives")

    def group(self, name: str) -> str:
        """What the image of this name was taken from."""
        return str(self._group(name)) if self._group is not None else name

    def read(self, index: int) -> Image.Image:
        """Refused: a stream is read from its beginning.

        Raises:
            UserError: always.
        """
        raise UserError(f"a stream is read from its beginning, so image {index} cannot be read alone")

    @abstractmethod
    def samples(self, part: int) -> Generator[Sample, None, None]:
        """The images of a part, from its beginning.

        Raises:
            UserError: where the part cannot be read to its end.
        """


def iterate_stream(
    images: StreamImages,
    transform: Callable[[Any], Tensor],
    batch_size: int,
    share: Share,
    num_images: int | None = None,
    workers: int = 0,
    pin_memory: bool = False,
) -> Generator[Batch, None, None]:
    """The batches of one process's share of a stream: shard (p, k) is always part p's samples 64·k to 64·(k + 1).

    Args:
        images: the source.
        transform: from a picture to a float tensor (channels, height, width).
        batch_size: images a batch, cut inside a shard.
        share: which shards.
        num_images: only the first so many of the stream; then every process reads it from its beginning.
        workers: processes that decode; each reads the share, and decodes every so many-th batch of it.
        pin_memory: put the pixels into page-locked memory, for copies to a GPU.

    Raises:
        UserError: as `iterate`, and where a part cannot be read to its end.
    """
    loader = DataLoader(
        _Batches(images, transform, batch_size, share, num_images),
        batch_size=None,
        num_workers=workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # its own, or each pass would advance the caller's random numbers
    )
    with closing(same_size(survive(loader))) as batches:
        for batch in batches:
            yield replace(batch, groups=[images.group(name) for name in batch.names])


class _Batches(IterableDataset):
    """The batches of a share that fall to one of the loader's workers; errors come back as values, not raised."""

    def __init__(
        self,
        images: StreamImages,
        transform: Callable[[Any], Tensor],
        batch_size: int,
        share: Share,
        num_images: int | None,
    ) -> None:
        # Groups are the main process's: a function need not go to others.
        self.images, self.transform = images.regrouped(None), transform
        self.batch_size, self.share, self.num_images = batch_size, share, num_images
        self._shape = shape_of(images, transform)

    def __iter__(self) -> Iterator[Batch | UserError]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        try:
            for ordinal, (samples, place) in enumerate(self._plan()):
                if ordinal % workers == number:  # the loader takes from its workers in turn, so order is kept
                    batch = collate([self._item(sample) for sample in samples], self._shape)
                    yield replace(batch, **place) if isinstance(batch, Batch) else batch
        except UserError as error:
            yield error

    def _plan(self) -> Iterator[tuple[list[Sample], dict[str, Any]]]:
        """The samples of each batch of the share, and the batch's place."""
        images, share, left = self.images, self.share, self.num_images
        # Without knowing what is in the parts before, nobody can tell which are the first images of all.
        apart = left is None and images.parts >= share.size
        for part in share.parts(images.parts) if apart else range(images.parts):
            with closing(images.samples(part)) as samples:
                shard, piece = list(islice(samples, _least(SHARD_IMAGES, left))), 0
                while shard:
                    left = None if left is None else left - len(shard)
                    following = list(islice(samples, _least(SHARD_IMAGES, left)))
                    key = (part, piece)
                    if key not in share.done and (apart or share.has_turn(key)):
                        yield from self._cut(shard, key, ends=not following)
                    shard, piece = following, piece + 1
            if left == 0:
                return

    def _cut(self, shard: list[Sample], key: Key, ends: bool) -> Iterator[tuple[list[Sample], dict[str, Any]]]:
        for positions in cut(range(len(shard)), self.batch_size):
            last = positions[-1] + 1 == len(shard)
            yield shard[positions[0] : positions[-1] + 1], {"shard": key, "last": last, "ends": last and ends}

    def _item(self, sample: Sample) -> Item:
        try:
            if sample.content is None:
                raise BadImageError(sample.name, sample.reason)
            result = self.transform(decode(BytesIO(sample.content), sample.name, self.images.wanted))
        except BadImageError as error:
            result = error
        return Item(-1, sample.name, sample.name, result)


def _least(size: int, left: int | None) -> int:
    return size if left is None else min(size, left)


def require(package: str, what: str) -> None:
    """Returns where a package of the extra `data` is installed.

    Raises:
        UserError: where it is not, with the line that installs it.
    """
    try:
        importlib.import_module(package)
    except ImportError:
        raise UserError(f"{what} needs the package {package}: pip install 'vitprobe[data]'") from None


@contextmanager
def whole_part(name: str) -> Iterator[None]:
    """Whatever breaks while a part is read as a UserError: what is missing of it may be read another time."""
    try:
        yield
    except (GeneratorExit, UserError):
        raise
    except Exception as error:  # of a tar, a disk, a network, a table
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{name} cannot be read to its end ({reason}); mend it, and --resume goes on") from None


@contextmanager
def quiet(logger: str) -> Iterator[None]:
    """A library's remarks kept to itself meanwhile."""
    log = logging.getLogger(logger)
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before
