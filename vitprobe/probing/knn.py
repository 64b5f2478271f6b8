"""k nearest neighbours by cosine: every k and temperature from one search over the whole bank."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from vitprobe.errors import UserError
from vitprobe.probing.features import check_features
from vitprobe.probing.scores import TOP, correct

NEIGHBOURS = (5, 10, 15, 20, 50, 100, 200)
TEMPERATURES = (0.07, 0.1, 0.2)

_QUERIES, _BANK = 1024, 65_536  # compared at once: 256 MB of similarities


@dataclass(frozen=True, eq=False)
class Neighbours:
    """The nearest images of the bank, nearest first.

    Attributes:
        similarity: their cosines.
        labels: their classes.
    """

    similarity: Float[Tensor, "query neighbour"]
    labels: Int[Tensor, "query neighbour"]


@dataclass(frozen=True, eq=False)
class KNNResult:
    """k-NN on the test images, with the k and the temperature that were best on the held-out ones.

    Attributes:
        k: neighbours.
        temperature: by which similarities are divided.
        heldout_accuracy: accuracy on the held-out slice, of every k and temperature.
        top1: whether each test image is right.
        top5: whether its class is among the best five.
    """

    k: int
    temperature: float
    heldout_accuracy: dict[tuple[int, float], float]
    top1: Bool[Tensor, " query"]
    top5: Bool[Tensor, " query"]


def search(
    bank: Float[Tensor, "bank dim"],
    labels: Int[Tensor, " bank"],
    queries: Float[Tensor, "query dim"],
    *,
    size: int,
    k: int = max(NEIGHBOURS),
) -> Neighbours:
    """The k nearest images of the bank to each query, by cosine in float32 whatever the features are.

    Args:
        bank: features of all training images; a part of them alone would not be the protocol's k-NN.
        labels: their classes.
        queries: features of the images to classify, on the bank's device.
        size: images that the bank must hold, for it to be all of them.
        k: neighbours.

    Raises:
        UserError: for fewer images than k, or features that are not finite.
    """
    assert len(bank) == len(labels) == size, f"the bank holds {len(bank)} of {size} images"
    require_neighbours(k, size)
    check_features(bank, "training")
    check_features(queries, "query")
    found = [_nearest(bank, F.normalize(part.float(), dim=1), k) for part in queries.split(_QUERIES)]
    similarity, index = (torch.cat(parts) for parts in zip(*found, strict=True))
    return Neighbours(similarity, labels[index])


def require_neighbours(k: int, size: int) -> None:
    """Raises a UserError where a bank of this size has no k images."""
    if k > size:
        raise UserError(
            f"k-NN with k = {k} needs {k} training images to search, there are {size} (held-out ones not counted): "
            f"choose a smaller k, or give more images"
        )


def fitting(ks: Sequence[int], size: int) -> tuple[int, ...]:
    """Those of some numbers of neighbours that a bank of this size has.

    Raises:
        UserError: where it has none of them.
    """
    fit = tuple(k for k in ks if k <= size)
    if not fit:
        raise UserError(
            f"k-NN takes at least {min(ks)} training images beside the held-out ones, and there "
            f"{'is' if size == 1 else 'are'} {size}: give more, or take --protocol logistic"
        )
    return fit


def _nearest(bank: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosines and positions of the k nearest, the bank taken part by part and normalised there: no copy of it."""
    similarity = queries.new_empty(len(queries), 0)
    index = torch.empty(len(queries), 0, dtype=torch.long, device=queries.device)
    for start in range(0, len(bank), _BANK):
        part = F.normalize(bank[start : start + _BANK].float(), dim=1)
        near, where = (queries @ part.T).topk(min(k, len(part)), dim=1)
        similarity, index = torch.cat([similarity, near], dim=1), torch.cat([index, where + start], dim=1)
        similarity, best = similarity.topk(min(k, similarity.shape[1]), dim=1)
        index = index.gather(1, best)
    return similarity, index


def vote(neighbours: Neighbours, k: int, temperature: float, num_classes: int) -> Float[Tensor, "query {num_classes}"]:
    """Scores of the classes: the softmax weights, over similarity / temperature, of the k nearest that are of each."""
    weights = (neighbours.similarity[:, :k] / temperature).softmax(dim=1)
    scores = weights.new_zeros(len(weights), num_classes)
    return scores.scatter_add_(1, neighbours.labels[:, :k], weights)


def knn(
    train: Float[Tensor, "train dim"],
    train_labels: Int[Tensor, " train"],
    test: Float[Tensor, "test dim"],
    test_labels: Int[Tensor, " test"],
    heldout: Bool[Tensor, " train"],
    *,
    size: int,
    num_classes: int,
    ks: Sequence[int] = NEIGHBOURS,
    temperatures: Sequence[float] = TEMPERATURES,
) -> KNNResult:
    """Classify the test images by their neighbours among all training images.

    k and temperature are those with the best accuracy on the held-out training images, searched among the others; of
    equal ones the first. The test images decide nothing.

    Args:
        train: features of all training images.
        train_labels: their classes, from 0.
        test: features of the test images.
        test_labels: their classes.
        heldout: which training images select k and temperature.
        size: training images that there are.
        num_classes: classes.
        ks: numbers of neighbours to choose from.
        temperatures: temperatures to choose from.

    Raises:
        UserError: where fewer images than the largest k are left beside the held-out ones, or features are not finite.
    """
    assert len(train) == size, f"the bank holds {len(train)} of {size} images"
    most, rest = max(ks), ~heldout
    slice_ = search(train[rest], train_labels[rest], train[heldout], size=int(rest.sum()), k=most)
    accuracy = {
        (k, temperature): float(_correct(slice_, train_labels[heldout], k, temperature, num_classes, 1).float().mean())
        for k, temperature in itertools.product(ks, temperatures)
    }
    k, temperature = max(accuracy, key=lambda pair: accuracy[pair])
    near = search(train, train_labels, test, size=size, k=most)
    top1, top5 = (_correct(near, test_labels, k, temperature, num_classes, top) for top in (1, TOP))
    return KNNResult(k, temperature, accuracy, top1, top5)


def _correct(near: Neighbours, labels: Tensor, k: int, temperature: float, num_classes: int, top: int) -> Tensor:
    parts = zip(
        near.similarity.split(_QUERIES), near.labels.split(_QUERIES), labels.split(_QUERIES), strict=True
    )  # fmt: skip
    return torch.cat(
        [
            correct(vote(Neighbours(similarity, theirs), k, temperature, num_classes), own, top)
            for similarity, theirs, own in parts
        ]
    )
