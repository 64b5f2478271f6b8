"""Where a bank's tokens come from: images that pass through the frozen model, or tokens stored on a disk."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from vitprobe.aggregation.batch import TokenBatch
from vitprobe.data.augment import Augmentation
from vitprobe.data.batches import cut
from vitprobe.data.labelled import LabelledSet
from vitprobe.data.labelled_batches import batches
from vitprobe.probing.cache import TokenCache
from vitprobe.probing.tap import Tap
from vitprobe.probing.tokens import FrozenModel

Crops = tuple[int, int]  # the seed and the epoch that images' crops depend on


class Fed(NamedTuple):
    """The tokens of some images of a set at every tap."""

    tokens: Mapping[Tap, TokenBatch]
    labels: Int64[Tensor, " batch"]
    indices: list[int]  # positions in the set, of the images that could be read
    skipped: list[tuple[str, str]]  # name and reason of each that could not

    @property
    def count(self) -> int:
        """Images, readable or not."""
        return len(self.indices) + len(self.skipped)


@runtime_checkable
class Feed(Protocol):
    """What gives the tokens of a labelled set's images."""

    def __call__(self, order: Sequence[int], crops: Crops | None = None) -> Generator[Fed, None, None]:
        """The images at some positions, a batch at a time; augmented where it is said whose crops to draw."""
        ...


@dataclass(frozen=True)
class ImageFeed:
    """Images through the frozen model, augmented in training.

    Attributes:
        frozen: the model, inside its context.
        split: the images.
        batch_size: images at a time.
        augmentation: of training images.
        workers: processes that read; chosen for the machine without.
    """

    frozen: FrozenModel
    split: LabelledSet
    batch_size: int
    augmentation: Augmentation | None = None
    workers: int | None = None

    def __call__(self, order: Sequence[int], crops: Crops | None = None) -> Generator[Fed, None, None]:
        """The images at some positions, a batch at a time; augmented where it is said whose crops to draw."""
        seed, epoch = crops or (0, 0)
        loaded = batches(
            self.split,
            self.frozen.model.transform,
            self.batch_size,
            order=order,
            augment=None if crops is None else self.augmentation,
            seed=seed,
            epoch=epoch,
            workers=self.workers,
            pin_memory=self.frozen.device.type == "cuda",
        )
        with closing(loaded):
            for batch in loaded:
                names = [self.split.ids[index] for index in batch.indices]
                tokens = self.frozen(batch.pixels, names) if names else {}
                yield Fed(tokens, batch.labels.to(self.frozen.device), batch.indices, batch.skipped)


@dataclass(frozen=True)
class CacheFeed:
    """Tokens that are on a disk; there are no crops.

    Attributes:
        cache: filled.
        split: the images they are of.
        batch_size: images at a time.
        device: where tokens are wanted.
    """

    cache: TokenCache
    split: LabelledSet
    batch_size: int
    device: torch.device

    def __call__(self, order: Sequence[int], crops: Crops | None = None) -> Generator[Fed, None, None]:
        """The images at some positions, a batch at a time."""
        readable, reasons = set(self.cache.readable.tolist()), dict(self.cache.skipped)
        for positions in cut(range(len(order)), self.batch_size):
            here = [order[position] for position in positions]
            good = [index for index in here if index in readable]
            bad = [self.split.ids[index] for index in here if index not in readable]
            stored = self.cache.batch(good).items() if good else ()
            tokens = {tap: replace(batch, tokens=batch.tokens.to(self.device)) for tap, batch in stored}
            labels = torch.from_numpy(self.split.labels[np.array(good, np.int64)]).to(self.device)
            yield Fed(tokens, labels, good, [(name, reasons[name]) for name in bad])
