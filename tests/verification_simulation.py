"""Verifications whose true accuracies and gains are known: how often do the intervals hold them?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy import stats

from vitprobe.probing.uncertainty import Interval, components

_CELLS = 1 << 22  # values drawn at once


@dataclass(frozen=True)
class Setting:
    """Three probes on the same images: an image is right where ability beats difficulty, in standard deviations.

    Attributes:
        accuracy: of the first and of the second probe, whose true difference is 0.
        gain: of the third over them.
        seeds: how many.
        images: test images.
        seed_spread: of a seed's ability, a probe's own; 0.02 moves an accuracy of 0.8 by about half a point.
        luck: of what a seed does on an image.
        taste: of what a probe does on an image, the same for all of its seeds.
        beta: difficulties are Beta(0.5, 0.5) shares on the scale of normal quantiles, halved: more images that
            are easy or hard for everyone.
        classes: how many, of `images / classes` images each; 0 for accuracies over images.
        class_spread: of the classes' difficulties.
        sizes: images of each class, over and over, in place of equal ones.
    """

    accuracy: float = 0.75
    gain: float = 0.02
    seeds: int = 3
    images: int = 1000
    seed_spread: float = 0.0
    luck: float = 0.4
    taste: float = 0.4
    beta: bool = False
    classes: int = 0
    class_spread: float = 0.5
    sizes: tuple[int, ...] = ()


GRID = (
    *(
        Setting(accuracy, seeds=1, images=images)
        for images in (100, 1000, 10_000)
        for accuracy in (0.5, 0.75, 0.9, 0.97)
    ),
    *(
        Setting(accuracy, seeds=seeds, images=images, seed_spread=spread, luck=luck)
        for seeds in (3, 5)
        for images, accuracies in ((100, (0.5, 0.9, 0.97)), (1000, (0.75, 0.97)), (10_000, (0.75,)))
        for accuracy in accuracies
        for spread in (0.0, 0.05, 0.2)
        for luck in (0.4, 1.0)
    ),
    *(Setting(seeds=seeds, images=1000, seed_spread=0.05 if seeds > 1 else 0.0, beta=True) for seeds in (1, 3, 5)),
)
CLASS_GRID = tuple(
    Setting(seeds=seeds, images=classes * size, seed_spread=spread, classes=classes)
    for seeds in (1, 3, 5)
    for classes, size in ((100, 1), (100, 2), (100, 3), (100, 5), (10, 10), (10, 100))
    for spread in ((0.0,) if seeds == 1 else (0.0, 0.2))
) + tuple(Setting(seeds=seeds, images=500, classes=100, sizes=(1, 1, 2, 5, 16)) for seeds in (1, 3, 5))


@dataclass(frozen=True)
class Outcome:
    """Shares of runs.

    Attributes:
        accuracy: whose interval held the true accuracy.
        gain: whose interval held the true gain.
        rejected: whose p-value was below 0.05 where there was no gain.
    """

    accuracy: float
    gain: float
    rejected: float


_PROBES = 3


def simulate(setting: Setting, runs: int, seed: int = 0) -> Outcome:
    """Many verifications of one setting, by the intervals as implemented."""
    rng = np.random.default_rng(seed)
    classes = _class_difficulties(setting)
    labels = _labels(setting) if setting.classes else None
    shares = np.array([setting.accuracy, setting.accuracy, setting.accuracy + setting.gain])
    abilities = np.array([_ability(setting, classes, share) for share in shares])
    held = np.zeros(3)
    for part in _parts(setting, runs):
        found = components(_draw(rng, setting, classes, labels, abilities, part), labels)
        first = range(0, _PROBES * part, _PROBES)
        second, third = ([position + place for position in first] for place in (1, 2))
        held[0] += _holds(found.accuracies(), np.tile(shares, part)) / _PROBES
        held[1] += _holds(found.differences(third, first), shares[2] - shares[0])
        held[2] += (found.differences(second, first).p_value < 0.05).sum()
    return Outcome(*(held / runs))


def _holds(found: Interval, truth: np.ndarray | float) -> int:
    return int(((found.low <= truth) & (truth <= found.high)).sum())


def _parts(setting: Setting, runs: int) -> Iterator[int]:
    """Runs to do at once: their results are taken as results on the same images, of which only pairs are compared."""
    most = min(50, max(1, _CELLS // (_PROBES * setting.seeds * setting.images)))
    for start in range(0, runs, most):
        yield min(most, runs - start)


def _labels(setting: Setting) -> np.ndarray:
    sizes = np.resize(setting.sizes or setting.images // setting.classes, setting.classes)
    return np.repeat(np.arange(setting.classes), sizes)


def _class_difficulties(setting: Setting) -> np.ndarray:
    """The same in every run: classes are not sampled."""
    if not setting.classes:
        return np.zeros(1)
    return setting.class_spread * stats.norm.ppf((np.arange(setting.classes) * 0.618 + 0.5) % 1)


def _difficulty(setting: Setting, uniform: np.ndarray) -> np.ndarray:
    return stats.norm.ppf(stats.beta.ppf(uniform, 0.5, 0.5)).clip(-5, 5) if setting.beta else stats.norm.ppf(uniform)


def _accuracy(setting: Setting, classes: np.ndarray, ability: float) -> float:
    """Its expectation over images and seeds; with one seed over images, for a seed whose ability is that."""
    spread = setting.seed_spread if setting.seeds > 1 else 0.0
    difficulty = _difficulty(setting, (np.arange(500) + 0.5) / 500) + classes[:, None]
    return float(
        stats.norm.cdf((ability - difficulty) / np.sqrt(spread**2 + setting.luck**2 + setting.taste**2)).mean()
    )


def _ability(setting: Setting, classes: np.ndarray, accuracy: float) -> float:
    low, high = -10.0, 10.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if _accuracy(setting, classes, middle) < accuracy else (low, middle)
    return low


def _draw(
    rng: np.random.Generator,
    setting: Setting,
    classes: np.ndarray,
    labels: np.ndarray | None,
    abilities: np.ndarray,
    runs: int,
) -> np.ndarray:
    images = setting.images if labels is None else len(labels)
    spread = setting.seed_spread if setting.seeds > 1 else 0.0
    normal = rng.standard_normal((runs, 1, 1, images), dtype=np.float32)
    difficulty = _difficulty(setting, stats.norm.cdf(normal)) if setting.beta else normal
    if labels is not None:
        difficulty = difficulty + classes[labels].astype(np.float32)
    difficulty = difficulty + setting.taste * rng.standard_normal((runs, _PROBES, 1, images), dtype=np.float32)
    ability = abilities[:, None, None] + spread * rng.standard_normal((runs, _PROBES, setting.seeds, 1))
    luck = rng.standard_normal((runs, _PROBES, setting.seeds, images), dtype=np.float32)
    right = setting.luck * luck < (ability - difficulty).astype(np.float32)
    return right.reshape(_PROBES * runs, setting.seeds, images)
