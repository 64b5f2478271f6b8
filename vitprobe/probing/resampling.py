"""Intervals and paired differences of accuracies, over other images and other seeds than those that were seen.

Images are resampled by the Bayesian bootstrap (Rubin, "The Bayesian bootstrap", Annals of Statistics 1981): each image
gets a random weight from the exponential distribution. Two images are added, one at each end of what a value can be,
with half an image's weight on average: a hundred right ones of a hundred do not say that there is no wrong one. Without
seeds this is the Jeffreys interval of a share. Seeds are few, and drawing three again from three cannot show how far a
fourth may lie: their deviations get random multipliers whose sum has Student's distribution, with one degree of freedom
less than there are seeds. Both are drawn once for all results, so that differences between them are paired.

Limits: what images and seeds do together (this seed is wrong on that image) is in both parts, which makes intervals
somewhat too wide: in simulations 95 % intervals held the truth in 95 to 99 % of runs. The backbone's weights, the
training images and what was selected on the slice held out from them are taken as they are: of other ones nothing is
said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from vitprobe.probing.scores import class_weights

LEVEL = 0.95
DRAWS = 10_000
METHOD = "Bayesian bootstrap over images, Student multipliers over seeds"

_CHUNK = 1 << 23  # weights held at once: 32 MB


@dataclass(frozen=True, eq=False)
class Interval:
    """Values with their 95 % intervals and, of differences, p-values; all arrays have one entry a value.

    Attributes:
        value: what was measured.
        low: the interval's lower end, never above the value.
        high: its upper end, never below the value.
        p_value: two-sided, of the value being 0.
    """

    value: Float[np.ndarray, " value"]
    low: Float[np.ndarray, " value"]
    high: Float[np.ndarray, " value"]
    p_value: Float[np.ndarray, " value"]


@dataclass(frozen=True, eq=False)
class Resample:
    """Accuracies of several results as they might have been on other images and with other seeds.

    Attributes:
        value: the accuracies, shares in 0..1.
        images: each draw's accuracies on other images.
        seeds: what other seeds add to them.
        ends: weight of the added images in each draw: the one of the highest value, the one of the lowest.
    """

    value: Float[np.ndarray, " result"]
    images: Float[np.ndarray, "draw result"]
    seeds: Float[np.ndarray, "draw result"]
    ends: Float[np.ndarray, "draw 2"]

    def accuracies(self) -> Interval:
        """The accuracy of each result."""
        return self._interval(self.value, self.images, self.seeds, (0.0, 1.0))

    def differences(self, first: Sequence[int], second: Sequence[int]) -> Interval:
        """Accuracy of each `first` result less that of its `second`, on the same images and seeds.

        Args:
            first: positions of results.
            second: as many.
        """
        one, other = np.asarray(first, dtype=np.intp), np.asarray(second, dtype=np.intp)
        value, images, seeds = (part[..., one] - part[..., other] for part in (self.value, self.images, self.seeds))
        return self._interval(value, images, seeds, (-1.0, 1.0))

    def _interval(
        self,
        value: Float[np.ndarray, " value"],
        images: Float[np.ndarray, "draw value"],
        seeds: Float[np.ndarray, "draw value"],
        bounds: tuple[float, float],
    ) -> Interval:
        low, high = bounds
        kept = 1 - self.ends.sum(axis=1, keepdims=True)
        draws = kept * images + (self.ends @ np.array([high, low]))[:, None] + seeds
        ends = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0).clip(low, high)
        rarer = np.minimum((draws <= 0).sum(axis=0), (draws >= 0).sum(axis=0))
        p_value = np.minimum(1.0, 2 * (rarer + 1) / (len(draws) + 1))
        return Interval(value, np.minimum(ends[0], value), np.maximum(ends[1], value), p_value)


def resample(
    right: Bool[np.ndarray, "result seed image"],
    labels: Int[np.ndarray, " image"] | None = None,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Resample:
    """Draw accuracies on other images and with other seeds; the same arguments give the same draws.

    Args:
        right: whether each result was right, with each seed, on each image.
        labels: the images' classes, for accuracies that are means over classes; images are then weighted within their
            class. Without, every image counts the same.
        draws: how many.
        seed: of the draws.
    """
    images_rng, seeds_rng = np.random.default_rng(seed).spawn(2)
    order = np.arange(right.shape[2]) if labels is None else np.argsort(labels, kind="stable")
    share = np.full(len(order), 1 / len(order)) if labels is None else class_weights(labels)
    starts = np.array([0]) if labels is None else np.unique(labels[order], return_index=True)[1]
    over_seeds = right.mean(axis=1)
    value = over_seeds @ share

    images = np.empty((draws, len(right)))
    total = np.empty(draws)
    sizes = np.diff([*starts, len(order)])
    columns = over_seeds[:, order].T.astype(np.float32)
    step = max(1, _CHUNK // len(order))
    for start in range(0, draws, step):
        part = slice(start, min(start + step, draws))
        weights = images_rng.standard_exponential((part.stop - start, len(order)), dtype=np.float32)
        classes = np.add.reduceat(weights, starts, axis=1)
        total[part] = classes.sum(axis=1)
        weights /= np.repeat(classes * len(starts), sizes, axis=1)
        images[part] = weights @ columns

    ends = images_rng.standard_gamma(0.5, (draws, 2))
    ends /= (total + ends.sum(axis=1))[:, None]
    multipliers = _student_multipliers(seeds_rng, draws, right.shape[1])
    return Resample(value, images, multipliers @ (right @ share).T, ends)


def _student_multipliers(rng: np.random.Generator, draws: int, seeds: int) -> Float[np.ndarray, "draw seed"]:
    """Rows that add up to 0, whose products with the seeds' values are Student's t times their standard error."""
    if seeds < 2:
        return np.zeros((draws, seeds))
    normal = rng.standard_normal((draws, seeds))
    normal -= normal.mean(axis=1, keepdims=True)
    scale = np.sqrt(rng.chisquare(seeds - 1, (draws, 1)) / (seeds - 1))
    return normal / (scale * np.sqrt(seeds * (seeds - 1)))


def holm(p_values: Float[np.ndarray, " value"]) -> Float[np.ndarray, " value"]:
    """p-values adjusted by Holm's method for having looked at all of them; NaN stays and does not count."""
    order = np.argsort(p_values)  # NaN last
    known = int(np.isfinite(p_values).sum())
    adjusted = p_values[order].astype(np.float64)
    steps = adjusted[:known] * np.arange(known, 0, -1)
    adjusted[:known] = np.minimum(1.0, np.maximum.accumulate(steps))
    result = np.empty_like(adjusted)
    result[order] = adjusted
    return result
