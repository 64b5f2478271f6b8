"""Shards: fixed slices of one global order of images, cut into batches inside, and dealt to processes.

A shard is computed whole by one process, whichever and whenever, so what stands in a batch never depends on how many
processes there are or where a run was broken off.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from vitprobe.data.batches import Batch, Key, Readable, cut, load

SHARD_IMAGES = 64


@dataclass(frozen=True)
class Share:
    """What one of `size` processes does of a run: of the shards that are not done, its own in turn.

    Attributes:
        rank: the process, from 0.
        size: how many there are.
        done: shards that are finished already.
        ended: of a stream, the parts whose every shard is.
    """

    rank: int = 0
    size: int = 1
    done: frozenset[Key] = frozenset()
    ended: frozenset[int] = frozenset()

    def shards(self, n_images: int) -> list[int]:
        """Numbers of the shards to do of so many images."""
        missing = [number for number in range(-(-n_images // SHARD_IMAGES)) if (number,) not in self.done]
        return missing[self.rank :: self.size]

    def parts(self, n_parts: int) -> list[int]:
        """The parts of a stream that fall to this process alone."""
        return [part for part in range(n_parts) if part not in self.ended][self.rank :: self.size]

    def has_turn(self, key: Key) -> bool:
        """Whether a shard of a stream that every process reads whole falls to this one."""
        return sum(key) % self.size == self.rank


def iterate_shards(
    images: Readable,
    order: Sequence[int],
    transform: Callable[[Any], Tensor],
    batch_size: int,
    share: Share,
    workers: int = 0,
    pin_memory: bool = False,
) -> Generator[Batch, None, None]:
    """The batches of one process's share of the shards: shard k is always `order[64·k : 64·(k + 1)]`.

    Batches are cut inside a shard, so what is in one does not depend on who computes it, or when.

    Args and Raises: as `iterate`.
    """
    plan: list[tuple[int, range]] = []
    for number in share.shards(len(order)):
        start = number * SHARD_IMAGES
        shard = range(start, min(start + SHARD_IMAGES, len(order)))
        plan += [(number, positions) for positions in cut(shard, batch_size)]
    positions = [positions for _, positions in plan]
    with closing(load(images, order, positions, transform, workers, pin_memory, None)) as batches:
        for (number, here), batch in zip(plan, batches, strict=True):
            yield replace(batch, shard=(number,), last=here[-1] + 1 in (len(order), (number + 1) * SHARD_IMAGES))
