"""Moments over groups of images, of values that come a part at a time.

The one accumulator of the package: intervals (`intervals.py`) and stopping (`stopping.py`) are computed from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

Scale = Callable[[Float[np.ndarray, "group ..."]], Float[np.ndarray, "group ..."]]


class GroupMoments:
    """Mean, spread and skewness of group means.

    A group's values are averaged first, so that each group counts once. Moments of parts are merged as by Chan, Golub
    and LeVeque ("Updating formulae and a pairwise algorithm for computing sample variances", 1982) and Pébay (third
    moments; Sandia report 2008-6212). Taking a part out is merging it with a negative count. All moments are of
    differences from the first group, so that equal values leave a spread of exactly 0.

    Attributes:
        n: groups that count so far.
        open: images and their sum, of each group that may get more images.
    """

    def __init__(self, sizes: Mapping[str, int] | None = None, *, alone: bool = False, scale: Scale | None = None):
        """Say what the groups are.

        Args:
            sizes: images of each group. A group counts when it is whole, and memory holds the others alone. Default:
                unknown; a group counts from its first image on, by its mean so far.
            alone: whether every image is a group of its own; then no group is held, and names of groups are not read.
            scale: function from group means to the scale that moments are of, such as `numpy.log`; default: none.
        """
        self.n = 0
        self.open: dict[str, tuple[int, Any]] = {}
        self._sizes, self._alone, self._scale = sizes, alone, scale
        self._total: Any = 0.0  # of group means, before they are put on the scale
        self._undefined: Any = 0  # groups without a finite value on the scale
        # On the scale, as differences from the first group: mean, and the sums of the second and third powers of
        # differences from it.
        self._origin: Any = None
        self._middle: Any = 0.0
        self._squares: Any = 0.0
        self._cubes: Any = 0.0

    def add(self, values: Float[np.ndarray, "image ..."], groups: Sequence[str]) -> None:
        """Take some images, `(n, …)`, with the group of each."""
        values = np.asarray(values, dtype=np.float64)
        if self._alone:
            self._merge(values, 1)
            return
        growing = list(dict.fromkeys(groups))
        if self._sizes is None:
            self._merge(self._means([group for group in growing if group in self.open]), -1)
        for group, value in zip(groups, values, strict=True):
            count, total = self.open.get(group, (0, 0.0))
            self.open[group] = count + 1, total + value
        whole = growing
        if self._sizes is not None:
            whole = [group for group in growing if self.open[group][0] == self._sizes[group]]
        self._merge(self._means(whole), 1)
        if self._sizes is not None:
            for group in whole:
                del self.open[group]

    def _means(self, groups: Sequence[str]) -> Float[np.ndarray, "group ..."]:
        return np.array([self.open[group][1] / self.open[group][0] for group in groups])

    def _merge(self, means: Float[np.ndarray, "group ..."], sign: int) -> None:
        """Put groups in (sign 1), or take them out (sign -1)."""
        if not len(means):
            return
        with np.errstate(divide="ignore", invalid="ignore"):
            scaled = means if self._scale is None else self._scale(means)
        finite = np.isfinite(scaled)
        if self._origin is None:
            self._origin = np.where(finite[0], scaled[0], 0.0)
        before, new = self.n, sign * len(means)
        self.n = n = before + new
        self._total = self._total + sign * means.sum(axis=0)
        self._undefined = self._undefined + sign * (~finite).sum(axis=0)
        if n == 0:
            self._middle = self._squares = self._cubes = 0.0 * self._origin
            return
        away = np.where(finite, scaled, self._origin) - self._origin
        middle = away.mean(axis=0)
        squares, cubes = (sign * ((away - middle) ** power).sum(axis=0) for power in (2, 3))
        step = middle - self._middle
        self._cubes = (
            self._cubes
            + cubes
            + step**3 * before * new * (before - new) / n**2
            + 3 * step * (before * squares - new * self._squares) / n
        )
        self._middle = self._middle + step * new / n
        self._squares = self._squares + squares + step**2 * before * new / n

    @property
    def plain_mean(self) -> Float[np.ndarray, "*shape"]:
        """Mean of group means, before they are put on the scale."""
        return np.asarray(self._total / self.n)

    @property
    def defined(self) -> Bool[np.ndarray, "*shape"]:
        """Whether every group has a finite value on the scale."""
        return np.asarray(self._undefined == 0)

    @property
    def mean(self) -> Float[np.ndarray, "*shape"]:
        """Mean on the scale; NaN where a group has no finite value."""
        return np.where(self.defined, self._origin + self._middle, np.nan)

    @property
    def spread(self) -> Float[np.ndarray, "*shape"]:
        """Standard deviation on the scale, n - 1 in its denominator; NaN where a group has no finite value."""
        squares = np.maximum(self._squares, 0.0)  # rounding may leave less, where groups were taken out
        return np.where(self.defined, np.sqrt(squares / (self.n - 1)), np.nan)

    @property
    def skewness(self) -> Float[np.ndarray, "*shape"]:
        """Third standardised moment on the scale, n in its denominators; 0 without spread."""
        variance = np.asarray(self._squares / self.n)
        some = variance > 0
        return np.where(some, self._cubes / self.n / np.where(some, variance, 1.0) ** 1.5, 0.0)
