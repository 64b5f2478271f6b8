"""One vector an image by each aggregator without weights: what k-NN and logistic regression classify."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vitprobe.aggregation.base import Aggregator
from vitprobe.probing.feeds import Feed
from vitprobe.probing.tap import Tap


@dataclass(frozen=True, eq=False)
class Pooled:
    """The vectors of a set's images that could be read.

    Attributes:
        indices: positions of these images in the set.
        vectors: by the name of the result.
        skipped: name and reason of each image that could not be read.
    """

    indices: list[int]
    vectors: dict[str, Float[Tensor, "image dim"]]
    skipped: list[tuple[str, str]]


@torch.no_grad()
def pool(
    aggregators: Mapping[str, tuple[Aggregator, Tap]], feed: Feed, count: int, progress: Callable[[int], Any]
) -> Pooled:
    """The vectors of all `count` images of a set, on the CPU.

    Args:
        aggregators: by the name of the result, with the place it reads.
        feed: gives the tokens.
        count: images.
        progress: called with the number of images of each batch.
    """
    indices: list[int] = []
    skipped: list[tuple[str, str]] = []
    parts: dict[str, list[Tensor]] = {name: [] for name in aggregators}
    for fed in feed(range(count)):
        indices += fed.indices
        skipped += fed.skipped
        if fed.indices:
            for name, (aggregator, tap) in aggregators.items():
                parts[name].append(aggregator(fed.tokens[tap]).cpu())
        progress(fed.count)
    return Pooled(indices, {name: torch.cat(found) for name, found in parts.items() if found}, skipped)
