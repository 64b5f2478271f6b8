"""The interval of skewed values by its definition, column by column, to hold the package's to."""

from __future__ import annotations

import math

import numpy as np
from scipy import optimize, stats


def skew_t_reference(values: np.ndarray, bounds: tuple[float, float] = (0.0, 1.0)) -> tuple[float, float]:
    """The skewness-corrected interval of one column, with Hall's transformation inverted by bisection."""
    n, mean, spread = len(values), values.mean(), values.std(ddof=1)
    skewness, q = stats.skew(values), stats.t.ppf(0.975, len(values) - 1)

    def hall(t: float) -> float:
        a = skewness / 3 / math.sqrt(n)
        return t + a * t**2 + a**2 * t**3 / 3 + skewness / 6 / math.sqrt(n)

    corrected = [mean - optimize.brentq(lambda t, z=z: hall(t) - z, -1e4, 1e4, xtol=1e-12) * spread / math.sqrt(n)
                 for z in (q, -q)]  # fmt: skip
    plain = np.array([mean - q * spread / math.sqrt(n), mean + q * spread / math.sqrt(n)])
    if math.isfinite(bounds[1]):
        share = (mean - bounds[0]) / (bounds[1] - bounds[0])
        half = q * spread / math.sqrt(n) / (bounds[1] - bounds[0]) / (share * (1 - share))
        logit = math.log(share / (1 - share))
        plain = bounds[0] + (bounds[1] - bounds[0]) / (1 + np.exp([-(logit - half), -(logit + half)]))
    low, high = np.clip([min(corrected[0], plain[0]), max(corrected[1], plain[1])], *bounds)
    return float(low), float(high)
