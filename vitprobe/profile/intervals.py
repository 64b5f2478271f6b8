"""Means and confidence intervals over images, with the independent image as the unit.

Images that are not independent (crops of one photograph) share a group: means are taken within groups first, and n
counts groups. Bounded statistics get a t interval, clipped at their bounds; unbounded ratios are heavy-tailed, and get
one on the log scale, which is about their geometric mean. Where the data themselves decided how many images there
are, both are of a confidence sequence instead (`sequence_half_width`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import stats

from vitprobe.models.tokens import TokenLayout
from vitprobe.statistics import STATISTICS

LEVEL = 0.95
NARROWEST_AT = 500  # groups at which a confidence sequence is narrowest for its n; it must not depend on the data


@dataclass(frozen=True)
class Estimate:
    """Means over images with their intervals; the arrays share the trailing shape of the values.

    Attributes:
        mean: the plain mean of group means.
        center: what the interval is about: the mean, or the geometric mean ("log-t").
        low: the interval's lower end, NaN where there is none.
        high: its upper end.
        n: independent groups.
        kind: "t", "log-t", "cs" or "log-cs" (confidence sequence), or "none" (fewer than two groups, or a ratio of 0
            or ∞).
    """

    mean: Float[np.ndarray, "*shape"]
    center: Float[np.ndarray, "*shape"]
    low: Float[np.ndarray, "*shape"]
    high: Float[np.ndarray, "*shape"]
    n: int
    kind: str


def group_sizes(groups: Sequence[str]) -> Mapping[str, int] | None:
    """Images of each group; None where every image is a group of its own."""
    sizes = Counter(groups)
    return sizes if len(sizes) < len(groups) else None


def statistic_bounds(name: str, layout: TokenLayout, signed: bool = False) -> tuple[float, float]:
    """Lowest and highest value of a statistic; of signed attention weights, a difference, there is none."""
    statistic = STATISTICS[name]
    return (-np.inf, np.inf) if signed and statistic.per_head else statistic.bounds(layout)


def on_log_scale(bounds: tuple[float, float]) -> bool:
    """Whether values with these bounds are taken to the log scale: ratios without an upper one."""
    return bounds[0] >= 0 and bounds[1] == np.inf


def sequence_half_width(
    spread: Float[np.ndarray, "*shape"], n: int, reach: Float[np.ndarray, "*#shape"] | float, level: float = LEVEL
) -> Float[np.ndarray, "*shape"]:
    """Half-widths of intervals that hold at every n at once, so also at one that the data chose.

    The asymptotic confidence sequence with the Gaussian-mixture boundary of Waudby-Smith, Arbour, Sinha, Kennedy and
    Ramdas, "Time-uniform central limit theory and asymptotic confidence sequences" (arXiv 2103.06476). Its parameter
    rho is set, by their formula, to be narrowest at `NARROWEST_AT` groups. Like a t interval it rests on n being large
    enough for means to be near-normal; unlike one it may be looked at again and again.

    Where all n values are the same, a spread of 0 would say that nothing else exists. At most a share log(1/alpha)/n
    of other values is compatible with that (were it more, n alike in a row had a chance below alpha, at every n at
    once), and moves the mean by that share of the `reach` at most.

    Args:
        spread: standard deviation over groups (n − 1 in its denominator).
        n: groups, at least 2.
        reach: distance between the bounds of the values; infinite without.
        level: confidence.

    Returns:
        At least 0; infinite where there is neither spread nor a finite reach.
    """
    log_alpha = np.log(1 - level)
    scaled_n = n * (np.log(1 - 2 * log_alpha) - 2 * log_alpha) / NARROWEST_AT  # n·rho²
    boundary = np.sqrt(2 * (scaled_n + 1) / (scaled_n * n) * (np.log(scaled_n + 1) / 2 - log_alpha))
    return np.asarray(np.where(spread > 0, boundary * spread, -log_alpha / n * reach))


class Running:
    """Mean over groups and its interval, of values that come a part at a time.

    Memory holds the sums of groups that are not whole yet, and nothing else that grows with the number of images.
    Moments of parts are merged as by Chan, Golub and LeVeque ("Updating formulae and a pairwise algorithm for computing
    sample variances", 1982), of differences from the first group, so that equal values leave a spread of exactly 0.
    """

    def __init__(self, sizes: Mapping[str, int] | None, bounds: tuple[float, float] = (-np.inf, np.inf)) -> None:
        """`sizes` as of `group_sizes`, for all images that will come; `bounds` of their values."""
        self._sizes = sizes
        self._bounds = bounds
        self._logarithmic = on_log_scale(bounds)
        self._begun: dict[str, tuple[int, Any]] = {}  # images so far, and their sum
        self._n = 0
        self._has_interval = True
        # Of group means: their sum. Of these, or their logarithms, as differences from the first: mean and squares.
        self._total: Any = 0.0
        self._origin: Any = None
        self._middle: Any = 0.0
        self._squares: Any = 0.0

    def add(self, values: Float[np.ndarray, "image ..."], groups: Sequence[str]) -> None:
        """Take some images, with the group of each."""
        values = np.asarray(values, dtype=np.float64)
        means = values if self._sizes is None else self._whole(values, groups, self._sizes)
        if not len(means):
            return
        before, self._n = self._n, self._n + len(means)
        self._total = self._total + means.sum(axis=0)
        if self._logarithmic and not (np.isfinite(means) & (means > 0)).all():
            self._has_interval = False
        if not self._has_interval:
            return
        scaled = np.log(means) if self._logarithmic else means
        self._origin = scaled[0] if self._origin is None else self._origin
        away = scaled - self._origin
        middle = away.mean(axis=0)
        step = middle - self._middle
        self._middle = self._middle + step * len(means) / self._n
        self._squares = self._squares + ((away - middle) ** 2).sum(axis=0) + step**2 * before * len(means) / self._n

    def _whole(
        self, values: Float[np.ndarray, "image ..."], groups: Sequence[str], sizes: Mapping[str, int]
    ) -> Float[np.ndarray, "group ..."]:
        """Means of the groups that these images complete."""
        means = []
        for group, value in zip(groups, values, strict=True):
            count, total = self._begun.pop(group, (0, 0.0))
            count, total = count + 1, total + value
            if count == sizes[group]:
                means.append(total / count)
            else:
                self._begun[group] = count, total
        return np.array(means)

    def estimate(self, level: float = LEVEL, sequential: bool = False) -> Estimate:
        """What has come; as `estimate`, the function."""
        n, mean = self._n, np.asarray(self._total / self._n)
        if n < 2 or not self._has_interval:
            nothing = np.full(mean.shape, np.nan)
            return Estimate(mean, mean, nothing, nothing, n, "none")
        middle, spread = np.asarray(self._origin + self._middle), np.asarray(np.sqrt(self._squares / (n - 1)))
        if sequential:
            reach = np.inf if self._logarithmic else self._bounds[1] - self._bounds[0]
            half = sequence_half_width(spread, n, reach, level)
            half = np.where(np.isfinite(half), half, np.nan)
        else:
            half = stats.t.ppf((1 + level) / 2, n - 1) * spread / np.sqrt(n)
        ends = np.stack([middle - half, middle + half])
        low, high = np.exp(ends) if self._logarithmic else np.clip(ends, *self._bounds)
        center = np.exp(middle) if self._logarithmic else mean
        kind = ("log-" if self._logarithmic else "") + ("cs" if sequential else "t")
        return Estimate(mean, np.asarray(center), np.asarray(low), np.asarray(high), n, kind)


def estimate(
    values: Float[np.ndarray, "image ..."],
    groups: Sequence[str],
    bounds: tuple[float, float] = (-np.inf, np.inf),
    level: float = LEVEL,
    sequential: bool = False,
) -> Estimate:
    """Mean over images and its two-sided interval at `level`.

    Values with an upper bound of infinity (ratios) are taken to the log scale; the interval of others is clipped at
    `bounds`. With fewer than two groups the interval is NaN.

    `sequential` is for values whose number the data decided: the interval is of a confidence sequence, not Student's.
    """
    running = Running(group_sizes(groups), bounds)
    running.add(values, groups)
    return running.estimate(level, sequential)
