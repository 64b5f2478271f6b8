"""Intervals and paired differences of accuracies, over other images and, where there are several, other seeds.

Whether a probe is right depends on the image, on the seed, and on both together, so the accuracy of S seeds on n images
has the variance of a crossed design (images × seeds):

    images / n + seeds / S + both together / (n·S)

The spread of the images' means over seeds estimates the first and third terms. The spread of the seeds' accuracies, all
on the same images, estimates the second and third. Adding the two would count the third twice, so it is estimated on
its own, from what is left of the correctness without image and seed effects, and taken off the spread of the seeds.

The half-width over images and the half-width over seeds, each with its own Student quantile (few seeds have heavy
tails), add as squares: Zou and Donner, "Construction of confidence limits about effect measures", Statistics in
Medicine 2008. The interval of an accuracy over images is Wilson's. That of a difference is Student's, with two images
added, right in one result alone, of half a weight each: two results that agree on a hundred images do not say that they
agree everywhere. Its p-value is the level at which the interval reaches 0. Everything is a formula; nothing is drawn.

With one seed intervals are over images alone, and say nothing about other seeds. The backbone's weights, the training
images, and what was selected on the slice held out from them are taken as given. How often the intervals hold the truth
is in docs/verification.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import special

LEVEL = 0.95

_MOST = 2.0  # times the images: so many an accuracy over classes may count for where they differ much
_LEAST, _HALVINGS = np.log(1e-300), 50  # of p-values: the smallest, and the precision


@dataclass(frozen=True, eq=False)
class Interval:
    """Values with their 95 % intervals and, for differences, p-values; all arrays have one entry per value.

    Attributes:
        value: what was measured.
        low: the interval's lower end, never above the value.
        high: its upper end, never below the value.
        p_value: two-sided, for the true value being 0; NaN for accuracies.
    """

    value: Float[np.ndarray, " value"]
    low: Float[np.ndarray, " value"]
    high: Float[np.ndarray, " value"]
    p_value: Float[np.ndarray, " value"]


@dataclass(frozen=True, eq=False)
class Components:
    """Accuracies of several results on the same images, and the parts of their covariances.

    Attributes:
        value: the accuracies, shares in 0..1.
        images: covariances of the accuracies over other images, with these seeds.
        seeds: covariances over other seeds, on these images; 0 with one seed.
        both: what images and seeds do together, which is part of `images` and of `seeds`; 0 with one seed.
        num_images: how many equally weighted images say as much as these.
        images_df: degrees of freedom of `images`.
        num_seeds: how many seeds there are.
    """

    value: Float[np.ndarray, " result"]
    images: Float[np.ndarray, "result result"]
    seeds: Float[np.ndarray, "result result"]
    both: Float[np.ndarray, "result result"]
    num_images: float
    images_df: float
    num_seeds: int

    def accuracies(self) -> Interval:
        """Return the accuracy of each result with its interval; the part over images is Wilson's."""
        images, seeds, _ = self._variances(*(np.diagonal(part) for part in (self.images, self.seeds, self.both)))
        value, spread = self.value, self.value * (1 - self.value)
        with np.errstate(invalid="ignore", divide="ignore"):  # 0 / 0 where all is right, or all wrong
            size = np.fmin(spread / images, _MOST * self.num_seeds * self.num_images)
        size = np.where(spread > 0, size, self.num_images)
        t = _student(self.images_df, 1 - LEVEL)
        center = (size * value + t**2 / 2) / (size + t**2)
        half = t * np.sqrt(size * spread + t**2 / 4) / (size + t**2)
        over_seeds = self._seeds_t(1 - LEVEL) ** 2 * seeds
        low = value - np.sqrt(np.square(value - (center - half)) + over_seeds)
        high = value + np.sqrt(np.square(center + half - value) + over_seeds)
        return Interval(value, low.clip(0, value), high.clip(value, 1), np.full(value.shape, np.nan))

    def differences(self, first: Sequence[int], second: Sequence[int]) -> Interval:
        """Return the accuracy of each `first` result less that of its `second`, on the same images and seeds.

        Args:
            first: positions of results.
            second: as many.
        """
        one, other = np.asarray(first, dtype=np.intp), np.asarray(second, dtype=np.intp)
        value = self.value[one] - self.value[other]
        images, seeds, size = self._variances(
            *(
                part[one, one] + part[other, other] - part[one, other] - part[other, one]
                for part in (self.images, self.seeds, self.both)
            )
        )
        # One image more at 1 and one at -1, of half a weight each.
        center = value * size / (size + 1)
        images = (size * (size - 1) * images + size * (value - center) ** 2 + 1 + center**2) / (size + 1) / (size + 2)
        half = self._half_width(images, seeds, 1 - LEVEL)
        low, high = np.minimum(center - half, value), np.maximum(center + half, value)
        return Interval(value, low.clip(-1, 1), high.clip(-1, 1), self._p_value(np.abs(center), images, seeds))

    def _variances(
        self,
        images: Float[np.ndarray, " value"],
        seeds: Float[np.ndarray, " value"],
        both: Float[np.ndarray, " value"],
    ) -> tuple[Float[np.ndarray, " value"], Float[np.ndarray, " value"], Float[np.ndarray, " value"]]:
        """The variance over images, what seeds add to it, and how many images one seed would need for the first.

        Taking all of `both` off the seeds' spread would leave too little where few seeds lie close together by chance.
        So not all is taken off: none with two seeds, 3/4 with three, nearly all with many. The share was chosen for
        coverage, which it keeps between 0.92 and 0.975 for any sizes of the three parts.
        """
        images, both = np.maximum(images, 0), np.maximum(both, 0)
        if self.num_seeds == 1:
            return images, np.zeros_like(images), np.full(images.shape, self.num_images)
        seeds = np.maximum(seeds - (1 - (self.num_seeds - 1) ** -2.0) * both, 0)
        shared = np.divide(both, images, out=np.zeros_like(images), where=images > 0).clip(0, 1)
        return images, seeds, self.num_images * (1 + (self.num_seeds - 1) * shared)

    def _seeds_t(self, p_value: Float[np.ndarray, "*value"] | float) -> Float[np.ndarray, "*value"]:
        return _student(max(self.num_seeds - 1.0, 1.0), p_value)

    def _half_width(
        self,
        images: Float[np.ndarray, " value"],
        seeds: Float[np.ndarray, " value"],
        p_value: Float[np.ndarray, " value"] | float,
    ) -> Float[np.ndarray, " value"]:
        of_images = _student(self.images_df, p_value) ** 2 * images
        return np.sqrt(of_images + self._seeds_t(p_value) ** 2 * seeds)

    def _p_value(
        self,
        distance: Float[np.ndarray, " value"],
        images: Float[np.ndarray, " value"],
        seeds: Float[np.ndarray, " value"],
    ) -> Float[np.ndarray, " value"]:
        """The p-value at which the half-width is this distance, by halving the range of its logarithm."""
        low, high = np.full(distance.shape, _LEAST), np.zeros(distance.shape)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            wider = self._half_width(images, seeds, np.exp(middle)) > distance
            low, high = np.where(wider, middle, low), np.where(wider, high, middle)
        return np.exp(high)


def _student(df: float, p_value: Float[np.ndarray, "*value"] | float) -> Float[np.ndarray, "*value"]:
    """The t that Student's distribution is beyond, to either side, with this probability."""
    return np.asarray(-special.stdtrit(df, np.divide(p_value, 2)))


def components(
    right: Bool[np.ndarray, "result seed image"], labels: Int[np.ndarray, " image"] | None = None
) -> Components:
    """Return accuracies and the parts of their variances.

    Args:
        right: whether each result was right, with each seed, on each image.
        labels: the images' classes, for accuracies that are means over classes: other images are then as many of each
            class. Without, every image counts the same.
    """
    _, num_seeds, num_images = right.shape
    classes = np.zeros(num_images, dtype=np.intp) if labels is None else labels
    # A class of one image says nothing of how images of a class differ. It is taken to vary as the others do on
    # average; where every class has one, the mean over classes is the accuracy, and so is its interval.
    if len(np.unique(classes)) == num_images:
        classes = np.zeros_like(classes)
    order = np.argsort(classes, kind="stable")
    _, starts, counts = np.unique(classes[order], return_index=True, return_counts=True)
    weight = 1 / (counts * len(counts) ** 2)  # of the variance of a class's images in that of the accuracy
    num_equal = 1 / weight.sum()
    free = counts - 1
    known = free > 0
    weight[known] += weight[~known].sum() * free[known] / max(free.sum(), 1)
    per_image = np.repeat(np.where(known, weight / np.maximum(free, 1), 0.0), counts)
    by_seed = (np.add.reduceat(right[:, :, order], starts, axis=-1, dtype=np.int64) / counts).mean(axis=-1)

    def less_class_means(values: Float[np.ndarray, "*batch image"]) -> Float[np.ndarray, "*batch image"]:
        means = np.add.reduceat(values, starts, axis=-1) / counts
        return values - np.repeat(means, counts, axis=-1)

    over_seeds = less_class_means(right.mean(axis=1)[:, order])
    images = (over_seeds * per_image) @ over_seeds.T
    seeds = both = np.zeros_like(images)
    if num_seeds > 1:
        away = by_seed - by_seed.mean(axis=1, keepdims=True)
        seeds = away @ away.T / (num_seeds * (num_seeds - 1))
        for seed in range(num_seeds):
            left = less_class_means(right[:, seed, order].astype(np.float64)) - over_seeds
            both = both + (left * per_image) @ left.T / (num_seeds * (num_seeds - 1))
    return Components(
        value=by_seed.mean(axis=1),
        images=images,
        seeds=seeds,
        both=both,
        num_images=float(num_equal),
        images_df=float(weight[known].sum() ** 2 / (weight[known] ** 2 / free[known]).sum()) if known.any() else 1.0,
        num_seeds=num_seeds,
    )


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
