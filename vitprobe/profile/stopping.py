"""Stop when it is known: whether the images so far tell every mean closely enough.

Images come in random order. After each shard, the mean over heads of every statistic in every block is known if the
half-width of its interval is at most

- T·|mean|,
- T·log N for an entropy in nats and T for one as a share of log N: T times the highest value, for statistics that are
  read against it (`Statistic.maximum`),
- T on the log scale for a ratio without an upper bound: a factor of e^T about its geometric mean,

and the run stops when all are known, after at least `FEWEST_GROUPS` independent groups. The interval is of a confidence
sequence (`intervals.sequence_half_width`), which looking again and again does not invalidate; coverage is of each
interval on its own. What is decided depends on the shards' values in their order and on nothing else, so any process
that sees them decides the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from vitprobe.errors import UserError
from vitprobe.layout import TokenLayout
from vitprobe.profile.intervals import on_log_scale, sequence_half_width, statistic_bounds
from vitprobe.profile.moments import GroupMoments
from vitprobe.profile.values import Shard, ShardValues
from vitprobe.statistics import STATISTICS

FEWEST_GROUPS = 64
Vector = Float[np.ndarray, " quantity"]


def check_tolerance(tolerance: Any) -> None:
    """Raises a UserError for a tolerance that is neither None nor a number above 0 and below 1."""
    is_number = isinstance(tolerance, Real) and not isinstance(tolerance, bool)
    if tolerance is not None and not (is_number and 0 < float(tolerance) < 1):
        raise UserError(f"tolerance is {tolerance!r}; it must be a number above 0 and below 1, such as 0.05 for 5 %")


@dataclass(frozen=True, eq=False)
class Precision:
    """How closely each of several means must be told, a number each.

    Attributes:
        relative: the half-width allowed for each unit of |mean|.
        absolute: the half-width allowed beside that.
        logarithmic: whether values are taken to the log scale.
        reach: the distance between a value's bounds; infinite on the log scale.
    """

    relative: Vector
    absolute: Vector
    logarithmic: Bool[np.ndarray, " quantity"]
    reach: Vector

    def known(self, mean: Vector, spread: Vector, n: int) -> Bool[np.ndarray, " quantity"]:
        """Which means are known after n groups with this standard deviation (both on the values' own scale)."""
        return sequence_half_width(spread, n, self.reach) <= self.relative * np.abs(mean) + self.absolute


def required_precision(names: Sequence[str], tolerance: float, layout: TokenLayout, signed: bool = False) -> Precision:
    """What a tolerance asks of a mean of each of these statistics (which may repeat)."""
    rows = []
    for name in names:
        low, high = bounds = statistic_bounds(name, layout, signed)
        if on_log_scale(bounds):
            rows.append((0.0, tolerance, True, math.inf))
        elif STATISTICS[name].maximum is not None:
            rows.append((0.0, tolerance * high, False, high - low))
        else:
            rows.append((tolerance, 0.0, False, high - low))
    relative, absolute, logarithmic, reach = map(np.array, zip(*rows, strict=True))
    return Precision(relative, absolute, logarithmic, reach)


class Stopper:
    """Decides after each shard whether the run is to go on.

    Attributes:
        tolerance: T.
        unknown: the blocks in which a statistic is not known yet, by its name; empty before the first shard.
        enough: whether all means are known.
        shards: taken so far.
    """

    def __init__(self, tolerance: float, layout: TokenLayout, signed: bool = False, grouped: bool = True) -> None:
        self.tolerance = tolerance
        self.unknown: dict[str, list[int]] = {}
        self.enough = False
        self.shards = 0
        self._layout, self._signed, self._grouped = layout, signed, grouped
        self._moments: GroupMoments | None = None

    @property
    def n(self) -> int:
        """Independent groups so far."""
        return 0 if self._moments is None else self._moments.n

    def add(self, shard: Shard) -> bool:
        """Take the next shard in order; whether all means are known now, so that no more are needed."""
        self.shards += 1
        if not shard.arrays:  # no image of it could be read
            return self.enough
        means = {name: array.astype(np.float64).mean(axis=2) for name, array in shard.arrays.items()}
        places = [(name, block) for name, of_name in means.items() for block in range(of_name.shape[1])]
        required = required_precision([name for name, _ in places], self.tolerance, self._layout, self._signed)
        if self._moments is None:
            scale = partial(_scaled, logarithmic=required.logarithmic)
            self._moments = GroupMoments(alone=not self._grouped, scale=scale)
        self._moments.add(np.concatenate(list(means.values()), axis=1), shard.groups)
        known = np.zeros(len(places), dtype=bool)
        if self.n >= FEWEST_GROUPS:
            known = required.known(self._moments.mean, self._moments.spread, self.n)
        self.unknown = {}
        for (name, block), settled in zip(places, known, strict=True):
            if not settled:
                self.unknown.setdefault(name, []).append(block)
        self.enough = not self.unknown
        return self.enough

    def follow(self, values: ShardValues) -> bool:
        """Take the shards that have come, in order, up to the first that is missing; whether there are enough.

        Shards after the one that made them enough are left aside, so `shards` is the same whoever computed them.
        """
        while not self.enough and (shard := values.shard(self.shards)) is not None:
            self.add(shard)
        return self.enough

    def describe(self) -> dict[str, Any]:
        """For the manifest: the tolerance, why the run stopped, after how many groups, and what is not known."""
        return {
            "tolerance": self.tolerance,
            "stopped": "known" if self.enough else "exhausted",
            "groups": self.n,
            "unknown": self.unknown,
        }


def _scaled(
    means: Float[np.ndarray, "group quantity"], logarithmic: Bool[np.ndarray, " quantity"]
) -> Float[np.ndarray, "group quantity"]:
    """The logarithms of some quantities, the others as they are."""
    return np.where(logarithmic, np.log(means), means)


def stopping_line(stopping: dict[str, Any]) -> str:
    """What `Stopper.describe` says, for the reader."""
    within = f"within the tolerance of {stopping['tolerance']:g}"
    n = stopping["groups"]
    if stopping["stopped"] == "known":
        return f"stopped after n = {n}: every mean over heads is known {within}"
    unknown = stopping["unknown"]
    count = sum(len(blocks) for blocks in unknown.values())
    if n < FEWEST_GROUPS:
        return f"the images ran out at n = {n}, below the {FEWEST_GROUPS} that --tolerance needs"
    worst = max(unknown, key=lambda name: len(unknown[name]))
    return (
        f"the images ran out at n = {n} with {count} means over heads not yet known {within}, most of "
        f"{worst} (blocks {', '.join(map(str, unknown[worst]))})"
    )
