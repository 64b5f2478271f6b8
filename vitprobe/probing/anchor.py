"""The anchor of a trained probe: logistic regression, fitted to its end, on the same vectors.

A probe of a few thousand steps may be far from where training would end, and one aggregator's farther than another's;
a gain then mixes aggregation with speed. Where nothing of the aggregator is trained, the end is known: the problem is
convex, and L-BFGS solves it. Where the trained probe stays below that, its protocol is too short.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from vitprobe.aggregation.base import Aggregator
from vitprobe.probing.feeds import Crops, Fed, Feed
from vitprobe.probing.heldout import held_out
from vitprobe.probing.logistic import STRENGTHS, fit_best
from vitprobe.probing.scores import correct
from vitprobe.probing.tap import Tap

IMAGES = 20_000  # that an anchor is fitted on, at most: a lower anchor where there are more, never a higher one
ITERATIONS = 200  # of L-BFGS for each strength


@dataclass(frozen=True)
class Anchor:
    """Logistic regression on the vectors of one aggregator without weights, unaugmented.

    Attributes:
        accuracy: share of the test images that it has right.
        heldout_accuracy: the same of the held-out images, which select C.
        c: the selected C.
        images: training images that it was fitted on.
        converged: whether L-BFGS ended before its last iteration.
    """

    accuracy: float
    heldout_accuracy: float
    c: float
    images: int
    converged: bool


@dataclass
class Pooling:
    """A feed that keeps, of all images that pass without crops, the vectors of aggregators without weights.

    Attributes:
        feed: the feed.
        aggregators: by the name of the result, with the place it reads.
        labels: classes of the images that passed.
        vectors: by the name of the result, a part for each batch.
    """

    feed: Feed
    aggregators: Mapping[str, tuple[Aggregator, Tap]]
    labels: list[Tensor] = field(default_factory=list)
    vectors: dict[str, list[Tensor]] = field(default_factory=dict)

    def __call__(self, order: Sequence[int], crops: Crops | None = None) -> Generator[Fed, None, None]:
        """The images at some positions, a batch at a time."""
        for fed in self.feed(order, crops):
            if crops is None and fed.indices:
                self.labels.append(fed.labels.cpu())
                for name, (aggregator, tap) in self.aggregators.items():
                    with torch.no_grad():
                        self.vectors.setdefault(name, []).append(aggregator(fed.tokens[tap]).cpu())
            yield fed

    def read(self, order: Sequence[int], progress: Callable[[int], Any]) -> None:
        """Let the images at some positions pass, without crops."""
        for fed in self(order):
            progress(fed.count)

    def found(self, name: str) -> tuple[Tensor, Tensor]:
        """The vectors of one aggregator, and the images' classes."""
        return torch.cat(self.vectors[name]), torch.cat(self.labels)


def anchor_positions(
    positions: Sequence[int], labels: Int[np.ndarray, " image"], seed: int, most: int = IMAGES
) -> list[int]:
    """Which training images anchors are fitted on: all, or about `most`, drawn class by class."""
    if len(positions) <= most:
        return list(positions)
    chosen = np.asarray(positions)
    return chosen[held_out(labels[chosen], most / len(chosen), seed)].tolist()


def fit_anchors(
    train: Pooling, heldout: Pooling, test: Pooling, num_classes: int, progress: Callable[[int], Any]
) -> dict[str, Anchor]:
    """Fit on the training images, select C on the held-out ones, test.

    Args:
        train: what passed of the images to fit on.
        heldout: of those to select on.
        test: of those to test on.
        num_classes: classes.
        progress: called with 1 after each anchor.
    """
    anchors = {}
    for name in train.vectors:
        vectors, labels = train.found(name)
        if len(labels.unique()) < 2:
            continue
        best = fit_best(
            vectors, labels, *heldout.found(name), num_classes=num_classes, strengths=STRENGTHS, iterations=ITERATIONS
        )
        given, right = test.found(name)
        accuracy = float(correct(best.classifier.scores(given), right).double().mean())
        anchors[name] = Anchor(accuracy, max(best.heldout_accuracy.values()), best.c, len(labels), best.converged)
        progress(1)
    return anchors
