"""How a source is to be read: in which order, in batches of which size, by how many processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from vitprobe.data.batches import default_workers


@dataclass(frozen=True)
class Reading:
    """What `Images.batches` is told.

    Attributes:
        transform: from a picture to a float tensor `(channels, height, width)`; tensors pass it by.
        batch_size: images per batch, at least 1.
        num_images: number of images to read, drawn at random where the source is listed, else its first ones; default:
            all.
        shuffled: whether all images are drawn at random too; default: they come in their own order.
        seed: seed of the drawing.
        workers: processes that read ahead, 0 to read in this one; default: chosen for the machine.
        processes: number of processes that share the machine's cores.
        pin_memory: whether pixels go into page-locked memory, for copies to a GPU.
    """

    transform: Callable[[Any], Tensor]
    batch_size: int
    num_images: int | None = None
    shuffled: bool = False
    seed: int = 0
    workers: int | None = None
    processes: int = 1
    pin_memory: bool = False

    def order(self, count: int) -> Sequence[int]:
        """Return the positions to read of a source of `count` images, in order."""
        if self.num_images is None and not self.shuffled:
            return range(count)
        return np.random.default_rng(self.seed).permutation(count)[: self.num_images].tolist()

    def workers_for(self, n_images: int | None) -> int:
        """Return the number of processes that read ahead; `n_images` is None where nobody has counted them."""
        return default_workers(n_images, processes=self.processes) if self.workers is None else self.workers
