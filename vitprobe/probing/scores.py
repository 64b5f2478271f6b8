"""What is right and what is not: per-image correctness from the scores of a classifier."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor

TOP = 5


def correct(
    scores: Float[Tensor, "*batch image classes"], labels: Int[Tensor, " image"], top: int = 1
) -> Bool[Tensor, "*batch image"]:
    """Whether each image's own class is among the `top` classes of highest score.

    A class that scores as much as the image's own counts as before it, so that a classifier that cannot tell gets
    nothing right; neither does one that gives NaN. With no more than `top` classes every image is right.
    """
    own = scores.gather(-1, labels.expand(scores.shape[:-1])[..., None])
    return (~(scores < own)).sum(dim=-1) <= min(top, scores.shape[-1])


def mean_per_class(
    right: Bool[np.ndarray, "*batch image"], labels: Int[np.ndarray, " image"]
) -> Float[np.ndarray, "*batch"]:
    """The mean over classes of each class's share of right images; classes without an image do not count."""
    return np.asarray(np.average(right, axis=-1, weights=class_weights(labels)))


def class_weights(labels: Int[np.ndarray, " image"]) -> Float[np.ndarray, " image"]:
    """A weight an image that gives every class the same say; they add up to 1."""
    _, index, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return 1 / (len(counts) * counts[index])
