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
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from vitprobe.errors import UserError
from vitprobe.layout import TokenLayout
from vitprobe.profile.intervals import on_log_scale, sequence_half_width, statistic_bounds
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


@dataclass
class GroupMoments:
    """Mean and standard deviation over groups of several quantities, as their values come one by one.

    A group that gets another value changes its mean, so the sum of each is kept, unless every image is a group alone.

    Attributes:
        logarithmic: which quantities count by the logarithm of their group mean.
        grouped: whether a group may have several images.
        n: groups so far.
    """

    logarithmic: Bool[np.ndarray, " quantity"]
    grouped: bool = True
    n: int = 0
    _groups: dict[str, tuple[int, Vector]] = field(default_factory=dict)
    _origin: Vector | None = None  # sums are of differences from it: little cancels, and equal values leave exactly 0
    _sum: Any = 0.0
    _squares: Any = 0.0
    _undefined: Any = 0  # groups without a finite value

    def add(self, group: str, values: Vector) -> None:
        """Take the values of one image of this group."""
        count, total = self._groups.get(group, (0, np.zeros_like(values)))
        if count:
            self._count(total / count, -1)
        self._count((total + values) / (count + 1), 1)
        if self.grouped:
            self._groups[group] = (count + 1, total + values)

    def _count(self, means: Vector, times: int) -> None:
        with np.errstate(divide="ignore", invalid="ignore"):
            scaled = np.where(self.logarithmic, np.log(means), means)
        finite = np.isfinite(scaled)
        if self._origin is None:
            self._origin = np.where(finite, scaled, 0.0)
        difference = np.where(finite, scaled - self._origin, 0.0)
        self.n += times
        self._sum = self._sum + times * difference
        self._squares = self._squares + times * difference**2
        self._undefined = self._undefined + times * ~finite

    @property
    def mean(self) -> Vector:
        """Over groups, on each quantity's own scale; NaN where a group has no finite value."""
        assert self._origin is not None  # a value has come
        return np.where(self._undefined, np.nan, self._origin + self._sum / self.n)

    @property
    def spread(self) -> Vector:
        """The standard deviation, likewise; needs two groups."""
        squares = np.maximum(self._squares - self._sum**2 / self.n, 0.0)
        return np.where(self._undefined, np.nan, np.sqrt(squares / (self.n - 1)))


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
            self._moments = GroupMoments(required.logarithmic, self._grouped)
        for group, values in zip(shard.groups, np.concatenate(list(means.values()), axis=1), strict=True):
            self._moments.add(group, values)
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
