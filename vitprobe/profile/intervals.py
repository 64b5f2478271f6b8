"""Means and confidence intervals over images, with the independent image as the unit.

Images that are not independent (crops of one photograph) share a group: means are taken within groups first, and n
counts groups. Shares are often skewed, so their interval is corrected for skewness and respects their bounds
(`skew_t_ends`); unbounded ratios are heavy-tailed, and get a t interval on the log scale, which is about their
geometric mean. Where the data themselves decided how many images there are, both are confidence sequences instead
(`sequence_half_width`). docs/intervals.md shows how often they hold the truth.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Float
from scipy import special, stats

from vitprobe.layout import TokenLayout
from vitprobe.profile.moments import GroupMoments
from vitprobe.statistics import STATISTICS

LEVEL = 0.95
FEW = 30  # below this many groups, intervals of strongly skewed values hold less often than they say
TINY = 1e-300  # share of the distance between bounds that stands for 0 where a logarithm is taken
NARROWEST_AT = 500  # groups at which a confidence sequence is narrowest for its n; it must not depend on the data


@dataclass(frozen=True)
class Estimate:
    """Means over images with their intervals; the arrays share the trailing shape of the values.

    Attributes:
        mean: the plain mean of group means.
        center: the number that the interval is about, and contains: the mean, or the geometric mean on the log scale.
        low: the interval's lower end, NaN where there is none.
        high: its upper end.
        n: independent groups.
        kind: "skew-t" (of `skew_t_ends`), "log-t", "cs" or "log-cs" (confidence sequence), or "none" (fewer than two
            groups, or a ratio of 0 or ∞).
    """

    mean: Float[np.ndarray, "*shape"]
    center: Float[np.ndarray, "*shape"]
    low: Float[np.ndarray, "*shape"]
    high: Float[np.ndarray, "*shape"]
    n: int
    kind: str

    @property
    def about(self) -> str:
        """What `center` is: "mean" or "geometric mean"."""
        return about(self.kind)

    @property
    def few(self) -> bool:
        """Whether n is so small that an interval of strongly skewed values holds less often than it says."""
        return self.kind != "none" and self.n < FEW


def about(kind: str) -> str:
    """What an interval of this kind is about: "geometric mean" on the log scale, else "mean"."""
    return "geometric mean" if kind.startswith("log-") else "mean"


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


def skew_t_ends(
    mean: Float[np.ndarray, "*shape"],
    spread: Float[np.ndarray, "*shape"],
    skewness: Float[np.ndarray, "*shape"],
    n: int,
    bounds: tuple[float, float] = (-np.inf, np.inf),
    level: float = LEVEL,
) -> tuple[Float[np.ndarray, "*shape"], Float[np.ndarray, "*shape"]]:
    """Return the ends of an interval of a mean of skewed values: at each end, the farther of two intervals.

    One is the t interval after Hall's transformation, which removes skewness from the t statistic ("On the removal of
    skewness by transformation", JRSS B 54, 1992). It needs no more than three moments, and is too short at small n,
    where skewness is underestimated. The other is the t interval on the scale that the bounds of the values suggest,
    by the delta method: the logit scale between two bounds, the plain scale without. Near a bound it is skewed by
    itself, whatever n. With spread 0 both are the mean alone.

    Args:
        mean: mean over groups.
        spread: standard deviation over groups (n − 1 in its denominator).
        skewness: third standardised moment over groups (n in its denominators).
        n: groups, at least 2.
        bounds: lowest and highest possible value; both finite, or both infinite.
        level: confidence.

    Returns:
        Lower and upper ends, within `bounds`.
    """
    error = spread / np.sqrt(n)
    z = stats.t.ppf((1 + level) / 2, n - 1) * np.array([1.0, -1.0]).reshape(2, *[1] * np.ndim(mean))
    removed = z - skewness / (6 * np.sqrt(n))
    root = np.cbrt(1 + skewness / np.sqrt(n) * removed)
    hall = mean - error * 3 * removed / (
        root**2 + root + 1
    )  # 3·removed/(…) is (root − 1)/(skewness/3√n), but for 0 too
    other = mean - error * z
    if np.isfinite(bounds).all() and bounds[0] < bounds[1]:
        low, high = bounds
        share, rest = (np.clip(part / (high - low), TINY, 1.0) for part in (mean - low, high - mean))
        scale = (high - low) * share * rest  # 1 / the slope of the logit
        other = low + (high - low) * special.expit(np.log(share / rest) - z * error / scale)
    farther = (np.minimum(hall[0], other[0]), np.maximum(hall[1], other[1]))
    low, high = (np.where(spread > 0, np.clip(end, *bounds), mean) for end in farther)
    return low, high


class Running:
    """Mean over groups and its interval, of values that come a part at a time.

    Memory holds the sums of groups that are not whole yet, and nothing else that grows with the number of images.

    Attributes:
        moments: what has come.
    """

    def __init__(self, sizes: Mapping[str, int] | None, bounds: tuple[float, float] = (-np.inf, np.inf)) -> None:
        """`sizes` as of `group_sizes`, for all images that will come; `bounds` of their values."""
        self._bounds = bounds
        self._logarithmic = on_log_scale(bounds)
        # Clipped, as rounding may put values beyond a bound, where no scale reaches.
        scale = np.log if self._logarithmic else partial(np.clip, a_min=bounds[0], a_max=bounds[1])
        self.moments = GroupMoments(sizes, alone=sizes is None, scale=scale)

    def add(self, values: Float[np.ndarray, "image ..."], groups: Sequence[str]) -> None:
        """Take some images, with the group of each."""
        self.moments.add(values, groups)

    def estimate(self, level: float = LEVEL, sequential: bool = False) -> Estimate:
        """What has come; as `estimate`, the function."""
        n, mean = self.moments.n, self.moments.plain_mean
        if n < 2 or (self._logarithmic and not self.moments.defined.all()):
            nothing = np.full(mean.shape, np.nan)
            return Estimate(mean, mean, nothing, nothing, n, "none")
        middle, spread = self.moments.mean, self.moments.spread
        kind = ("log-" if self._logarithmic else "") + ("cs" if sequential else "t" if self._logarithmic else "skew-t")
        if kind == "skew-t":
            ends = skew_t_ends(middle, spread, self.moments.skewness, n, self._bounds, level)
        else:
            half = stats.t.ppf((1 + level) / 2, n - 1) * spread / np.sqrt(n)
            if sequential:
                reach = np.inf if self._logarithmic else self._bounds[1] - self._bounds[0]
                half = sequence_half_width(spread, n, reach, level)
                half = np.where(np.isfinite(half), half, np.nan)
            ends = middle - half, middle + half
            ends = tuple(np.clip(np.exp(end) if self._logarithmic else end, *self._bounds) for end in ends)
        center = np.exp(middle) if self._logarithmic else mean
        # Rounding may put a mean beyond a bound, and the ends of a point beside it; an interval contains its center.
        low, high = np.minimum(ends[0], center), np.maximum(ends[1], center)
        return Estimate(mean, np.asarray(center), np.asarray(low), np.asarray(high), n, kind)


def estimate(
    values: Float[np.ndarray, "image ..."],
    groups: Sequence[str],
    bounds: tuple[float, float] = (-np.inf, np.inf),
    level: float = LEVEL,
    sequential: bool = False,
) -> Estimate:
    """Mean over images and its two-sided interval at `level`.

    Values with an upper bound of infinity (ratios) are taken to the log scale; the interval of others is that of
    `skew_t_ends`. With fewer than two groups the interval is NaN.

    `sequential` is for values whose number the data decided: the interval is a confidence sequence.
    """
    running = Running(group_sizes(groups), bounds)
    running.add(values, groups)
    return running.estimate(level, sequential)
