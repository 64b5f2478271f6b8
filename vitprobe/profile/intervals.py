"""Means and confidence intervals over images, with the independent image as the unit.

Images that are not independent (crops of one photograph) share a group: means are taken within groups first, and n
counts groups. Bounded statistics get a t interval, clipped at their bounds; unbounded ratios are heavy-tailed, and get
one on the log scale, which is about their geometric mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import stats

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """Means over images with their intervals; the arrays share the trailing shape of the values.

    Attributes:
        mean: the plain mean of group means.
        center: what the interval is about: the mean, or the geometric mean ("log-t").
        low: the interval's lower end, NaN where there is none.
        high: its upper end.
        n: independent groups.
        kind: "t", "log-t", or "none" (fewer than two groups, or a ratio of 0 or ∞).
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


def estimate(
    values: Float[np.ndarray, "image ..."],
    groups: Sequence[str],
    bounds: tuple[float, float] = (-np.inf, np.inf),
    level: float = LEVEL,
) -> Estimate:
    """Mean over images and its two-sided interval at `level`.

    Values with an upper bound of infinity (ratios) are taken to the log scale; others get a t interval clipped at
    `bounds`. With fewer than two groups the interval is NaN.
    """
    means = group_means(values, groups)
    n, mean = len(means), np.asarray(means.mean(axis=0))
    logarithmic = bounds[0] >= 0 and bounds[1] == np.inf
    if n < 2 or (logarithmic and not (np.isfinite(means) & (means > 0)).all()):
        nothing = np.full(mean.shape, np.nan)
        return Estimate(mean, mean, nothing, nothing, n, "none")
    scaled = np.log(means) if logarithmic else means
    middle = np.asarray(scaled.mean(axis=0))
    half = stats.t.ppf((1 + level) / 2, n - 1) * scaled.std(axis=0, ddof=1) / np.sqrt(n)
    ends = np.stack([middle - half, middle + half])
    low, high = np.exp(ends) if logarithmic else np.clip(ends, *bounds)
    center = np.exp(middle) if logarithmic else mean
    kind = "log-t" if logarithmic else "t"
    return Estimate(mean, np.asarray(center), np.asarray(low), np.asarray(high), n, kind)
