"""Batches of a labelled set: as the model's own transform makes them, or augmented for training."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vitprobe.data.augment import Augmentation, AugmentedImages, augment_held, only_enlarged
from vitprobe.data.batches import check_batching, cut, default_workers, iterate
from vitprobe.data.images import Images
from vitprobe.data.labelled import LabelledSet
from vitprobe.data.subsets import HeldImages
from vitprobe.data.transforms import ImageTransform


class LabelledBatch(NamedTuple):
    """Images for one forward pass, and those of the same stretch that could not be read."""

    pixels: Float[Tensor, "batch channel height width"]
    labels: Int64[Tensor, " batch"]
    indices: list[int]
    skipped: list[tuple[str, str]]  # name and reason of each bad image


def shuffled(positions: Sequence[int], seed: int, epoch: int) -> list[int]:
    """The same positions in an order that depends on the seed and the epoch alone."""
    return np.random.default_rng([seed, epoch]).permutation(np.asarray(positions, np.int64)).tolist()


def batches(
    split: LabelledSet,
    transform: ImageTransform,
    batch_size: int,
    *,
    order: Sequence[int] | None = None,
    augment: Augmentation | None = None,
    seed: int = 0,
    epoch: int = 0,
    workers: int | None = None,
    pin_memory: bool = False,
) -> Generator[LabelledBatch, None, None]:
    """The images of a set, or those at the positions in `order`, in batches; closing the generator ends the workers.

    An image's crop depends on the seed, the epoch and its position in the set: not on the order, on the batch it falls
    into, nor on how many workers there are.

    Args:
        split: the images.
        transform: the model's; of an augmented image its size, mean and standard deviation count alone.
        batch_size: images a batch, at least 1; bad images leave a batch smaller (possibly empty).
        order: positions in `split`; all of them from the first on without (see `shuffled`).
        augment: what training draws; without it the images come as the model's own transform makes them.
        seed: of the crops.
        epoch: likewise.
        workers: processes that read ahead; chosen for the machine without. Pictures held in memory need none.
        pin_memory: put the pixels into page-locked memory, for copies to a GPU.

    Raises:
        UserError: as `vitprobe.data.batches.iterate`.
    """
    check_batching(batch_size, workers)
    held, order = split.held, range(len(split)) if order is None else order
    images: Images = split.images if held is None else held
    if workers is None:
        workers = default_workers(len(order)) if held is None else 0
    if augment is not None:
        if held is not None and only_enlarged(held.pixels, transform.size):
            yield from _augmented(held, split, transform, batch_size, order, augment, seed, epoch)
            return
        images = AugmentedImages(images, augment, transform, seed, epoch)
    with closing(iterate(images, order, transform, batch_size, workers, pin_memory)) as loaded:
        for batch in loaded:
            labels = torch.from_numpy(split.labels[batch.indices])
            yield LabelledBatch(batch.pixels, labels, batch.indices, batch.skipped)


def _augmented(
    images: HeldImages,
    split: LabelledSet,
    transform: ImageTransform,
    batch_size: int,
    order: Sequence[int],
    augment: Augmentation,
    seed: int,
    epoch: int,
) -> Generator[LabelledBatch, None, None]:
    """The same of small pictures held in memory, a batch at a time."""
    for positions in cut(range(len(order)), batch_size):
        here = [order[position] for position in positions]
        good = [index for index in here if index not in images.bad]
        skipped = [(images.names[index], images.bad[index]) for index in here if index in images.bad]
        pixels = torch.zeros(0, transform.channels, *transform.size)
        if good:
            pixels = augment_held(images.pixels, good, augment, transform, seed, epoch)
        yield LabelledBatch(pixels, torch.from_numpy(split.labels[good]), good, skipped)
