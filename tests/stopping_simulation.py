"""Runs that stop by the rule of `vitprobe.profile.stopping`, thousands at a time, on data whose mean is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import stats

from vitprobe.data.shards import SHARD_IMAGES
from vitprobe.layout import TokenLayout
from vitprobe.profile.intervals import sequence_half_width
from vitprobe.profile.stopping import FEWEST_GROUPS, required_precision

LAYOUT = TokenLayout((14, 14), has_cls=True)
RATIO, SHARE, ENTROPY = "patch_norm_max_ratio", "patch_self_attention_ratio", "cls_entropy_share"
MOST = 32_768  # images; a run that is not done by then has run out of data


@dataclass(frozen=True)
class Population:
    """Values drawn independently, standing for a statistic of the table, and their true centre.

    Attributes:
        draw: (random numbers, shape) → values.
        center: their mean; the mean of their logarithm for a ratio, whose interval is about that.
        statistic: which one they stand for.
        signed: whether weights are signed, so that there are no bounds.
    """

    draw: Callable[[np.random.Generator, tuple[int, int]], np.ndarray]
    center: float
    statistic: str
    signed: bool = False


POPULATIONS = {
    "normal, mean 1, sd 0.5": Population(lambda r, n: r.normal(1, 0.5, n), 1.0, SHARE, signed=True),
    "exponential": Population(lambda r, n: r.exponential(1, n), 1.0, SHARE, signed=True),
    "lognormal, sigma 0.5": Population(lambda r, n: r.lognormal(0, 0.5, n), math.exp(0.125), SHARE, signed=True),
    "lognormal, sigma 1": Population(lambda r, n: r.lognormal(0, 1, n), math.exp(0.5), SHARE, signed=True),
    "lognormal, sigma 1, as a ratio": Population(lambda r, n: r.lognormal(0.7, 1, n), 0.7, RATIO),
    "exponential, as a ratio": Population(lambda r, n: r.exponential(1, n), -float(np.euler_gamma), RATIO),
    "beta(2, 20), as a share": Population(lambda r, n: r.beta(2, 20, n), 2 / 22, SHARE),
    "beta(0.5, 20), as a share": Population(lambda r, n: r.beta(0.5, 20, n), 0.5 / 20.5, SHARE),
    "beta(20, 2), as an entropy share": Population(lambda r, n: r.beta(20, 2, n), 20 / 22, ENTROPY),
    "0 or 1, half each": Population(lambda r, n: (r.random(n) < 0.5) * 1.0, 0.5, SHARE),
    "0 or 1, 1 in 20": Population(lambda r, n: (r.random(n) < 0.05) * 1.0, 0.05, SHARE),
    "0 or 1, 1 in 100": Population(lambda r, n: (r.random(n) < 0.01) * 1.0, 0.01, SHARE),
}


@dataclass(frozen=True)
class Outcome:
    """Of each run whether its interval held the true centre at the end, whether it did at every look, and n."""

    covered: np.ndarray
    always: np.ndarray
    used: np.ndarray


def simulate(population: Population, tolerance: float, runs: int, rule: str = "cs", seed: int = 0) -> Outcome:
    """Runs by the rule as implemented: a look after each shard, none before `FEWEST_GROUPS`.

    Args:
        population: what is drawn.
        tolerance: T.
        runs: how many.
        rule: "cs" for the confidence sequence, "t" for a t interval looked at again and again.
        seed: of the drawing.
    """
    rng = np.random.default_rng(seed)
    required = required_precision([population.statistic], tolerance, LAYOUT, population.signed)
    total, squares = np.zeros(runs), np.zeros(runs)
    covered, always, used = np.zeros(runs, dtype=bool), np.ones(runs, dtype=bool), np.zeros(runs, dtype=int)
    live, n = np.arange(runs), 0
    while len(live):
        values = population.draw(rng, (len(live), SHARD_IMAGES))
        # Of differences from the truth, which cancel little; values that are all the same still leave a spread of 0.
        values = (np.log(values) if required.logarithmic[0] else values) - population.center
        n += SHARD_IMAGES
        total[live] += values.sum(axis=1)
        squares[live] += (values**2).sum(axis=1)
        error = total[live] / n
        variance = (squares[live] - n * error**2) / (n - 1)
        spread = np.where(variance > 1e-12, np.sqrt(np.maximum(variance, 0)), 0.0)
        mean = error + population.center
        if rule == "cs":
            half = sequence_half_width(spread, n, required.reach)
            done = required.known(mean, spread, n)
        else:
            half = stats.t.ppf(0.975, n - 1) * spread / math.sqrt(n)
            done = half <= required.relative * np.abs(mean) + required.absolute
        done = (done & (n >= FEWEST_GROUPS)) | (n >= MOST)
        holds = np.abs(error) <= half
        always[live] &= holds
        covered[live[done]] = holds[done]
        used[live[done]] = n
        live = live[~done]
    return Outcome(covered, always, used)
