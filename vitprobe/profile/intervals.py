"""Means and confidence intervals over images, with the independent image as the unit.

Images that are not independent (crops of one photograph) share a group: means are taken within groups first, and n
counts groups. Bounded statistics get a t interval, clipped at their bounds; unbounded ratios are heavy-tailed, and get
one on the log scale, which is about their geometric mean. Where the data themselves decided how many images there
are, both are of a confidence sequence instead (`sequence_half_width`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


def group_means(values: Float[np.ndarray, "image ..."], groups: Sequence[str]) -> Float[np.ndarray, "group ..."]:
    """Mean within each group, float64, in the order in which groups first appear."""
    codes: dict[str, int] = {}
    index = np.array([codes.setdefault(group, len(codes)) for group in groups], dtype=np.intp)
    sums = np.zeros((len(codes), *values.shape[1:]))
    np.add.at(sums, index, values.astype(np.float64))
    return sums / np.bincount(index, minlength=len(codes)).reshape(-1, *[1] * (values.ndim - 1))


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
    means = group_means(values, groups)
    n, mean = len(means), np.asarray(means.mean(axis=0))
    logarithmic = on_log_scale(bounds)
    if n < 2 or (logarithmic and not (np.isfinite(means) & (means > 0)).all()):
        nothing = np.full(mean.shape, np.nan)
        return Estimate(mean, mean, nothing, nothing, n, "none")
    scaled = np.log(means) if logarithmic else means
    middle = np.asarray(scaled.mean(axis=0))
    spread = np.asarray((scaled - scaled[0]).std(axis=0, ddof=1))  # exactly 0 of values that are all the same
    if sequential:
        half = sequence_half_width(spread, n, np.inf if logarithmic else bounds[1] - bounds[0], level)
        half = np.where(np.isfinite(half), half, np.nan)
    else:
        half = stats.t.ppf((1 + level) / 2, n - 1) * spread / np.sqrt(n)
    ends = np.stack([middle - half, middle + half])
    low, high = np.exp(ends) if logarithmic else np.clip(ends, *bounds)
    center = np.exp(middle) if logarithmic else mean
    kind = ("log-" if logarithmic else "") + ("cs" if sequential else "t")
    return Estimate(mean, np.asarray(center), np.asarray(low), np.asarray(high), n, kind)
