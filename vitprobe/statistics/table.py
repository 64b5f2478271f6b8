"""What a statistic declares of itself, and the table `STATISTICS` that holds one entry each."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from vitprobe.attention.view import AttentionView
from vitprobe.errors import UserError
from vitprobe.layout import TokenLayout
from vitprobe.plugins import load_plugins

Bounds = Callable[[TokenLayout], tuple[float, float]]
Need = str  # one of NEEDS
Asks = Literal["tokens", "cls", "sums", "rows", "weights"]

NEEDS = {
    "cls": "a [cls] token",
    "registers": "register tokens",
    "patches": "more than one patch",
    "residual": "the residual stream, hooked at the block",
    "update": "an attention update that the block adds on its own, apart from its MLP's",
    "distribution": "attention weights that are a distribution, which the difference A1 − λ·A2 is not",
}


@dataclass(frozen=True)
class Statistic:
    """One number an image, block and head.

    Attributes:
        name: its name in tables and files.
        label: what an axis says.
        unit: "share", "ratio", "nats", "patches", "px", or a word of one's own.
        bounds: layout → (lowest, highest) possible value; `inf` where there is none.
        needs: what a model must have for it to be defined: keys of `NEEDS`. What does without "distribution" is linear
            in the attention weights.
        asks: what it asks of the view, the most expensive last: "tokens" (norms of tokens), "cls" (the row of [cls]),
            "sums" (what each patch row's weights were divided by), "rows" (entropy and distance of each patch row),
            "weights" (anything: queries, keys, the probabilities themselves).
        compute: AttentionView → `(B, H)`, or `(B, 1)` where it is one number a block.
        uniform: layout → its value under uniform attention, every token to every token alike; None where attention
            weights do not decide it.
        per_head: whether it has one value a head.
        figure: the figure of the paper (arXiv 2412.03215) that it feeds, if any; see `of_the_paper`.
        released_name: its name in the paper's released script, if it has one there.
        maximum: layout → words for its highest value, where that is what its values are read against ("log 196" for an
            entropy): figures draw a line there, and the tolerance of a run is a share of it instead of the mean.
        from_zero: whether an axis begins at its lowest possible value; else just under the lowest value drawn.
        infinite: whether infinite values are right; elsewhere they are reported as a model's broken activations.
        share_of: the name of the statistic of which it is a share of the maximum, comparable between models of
            different sizes; see `comparable`.
        heading: a short label for the columns of printed tables, of those statistics that are printed first.
        outside: whether it was declared outside the package, so that what it asks for and gives is checked.
    """

    name: str
    label: str
    unit: str
    bounds: Bounds
    needs: frozenset[Need]
    compute: Callable[[AttentionView], Float[Tensor, "batch head"]]
    asks: Asks = "tokens"
    uniform: Callable[[TokenLayout], float] | None = None
    per_head: bool = True
    figure: int | None = None
    released_name: str | None = None
    maximum: Callable[[TokenLayout], str] | None = None
    from_zero: bool = True
    infinite: bool = False
    share_of: str | None = None
    heading: str | None = None
    outside: bool = False

    @property
    def bounded(self) -> bool:
        """Whether its values have an upper bound (then its interval is a t interval, else one on the log scale)."""
        return self.bounds(TokenLayout(grid=(2, 2), has_cls=True))[1] != float("inf")

    def undefined(self, layout: TokenLayout, available: frozenset[Need], signed: bool = False) -> str | None:
        """Why it is undefined for a model of this layout whose capture offers `available`; None if it is defined.

        `signed` is for attention that is a difference, whose weights may be negative.
        """
        met = {
            "cls": layout.has_cls,
            "registers": layout.num_registers > 0,
            "patches": layout.num_patches > 1,
            "distribution": not signed,
        }
        missing = sorted(need for need in self.needs - available if not met.get(need, False))
        return f"needs {' and '.join(NEEDS[need] for need in missing)}" if missing else None


STATISTICS: dict[str, Statistic] = {}


def enter(name: str, label: str, unit: str, bounds: Bounds, needs: str = "", **extra) -> Callable:
    """Decorator that enters a pure function `view → (B, H)` in `STATISTICS` under `name`; returns the function."""

    def add(compute: Callable) -> Callable:
        STATISTICS[name] = Statistic(name, label, unit, bounds, frozenset(needs.split()), compute, **extra)
        return compute

    return add


def select(names: Sequence[str] | None) -> list[Statistic]:
    """Return the statistics of these names in the table's order; default: all, those of installed plugins too.

    Raises:
        UserError: for a name that is not in the table, with the nearest ones, or for no name at all.
    """
    if names is None:
        load_plugins()
        return list(STATISTICS.values())
    names = [names] if isinstance(names, str) else list(names)
    if not names:
        raise UserError("no statistic is asked for; name at least one, or leave the argument out for all of them")
    for name in names:
        if not is_known(name):
            near = difflib.get_close_matches(name, STATISTICS, n=3, cutoff=0.5) or list(STATISTICS)
            raise UserError(f"there is no statistic {name!r}; the nearest are {', '.join(near)}")
    return [statistic for statistic in STATISTICS.values() if statistic.name in names]


def is_known(name: str) -> bool:
    """Whether there is a statistic of this name; plugins are loaded before the answer is no."""
    return name in STATISTICS or (load_plugins() and name in STATISTICS)


def of_the_paper() -> tuple[Statistic, ...]:
    """The statistics of Figures 3, 4 and 5 of "Beyond [cls]" (arXiv 2412.03215), in this order.

    Example:
        >>> [statistic.name for statistic in of_the_paper()]
        ['cls_self_attention', 'cls_entropy', 'patch_self_attention_ratio']
    """
    return tuple(sorted((s for s in STATISTICS.values() if s.figure is not None), key=lambda s: s.figure or 0))


def comparable() -> tuple[Statistic, ...]:
    """The paper's three on scales from 0 to 1 that all models have in common, in the order of `of_the_paper`.

    An entropy in nats grows with the number of patches. Where models of different sizes, or three curves with each
    other, are compared, its share of the maximum log N stands in its place.

    Example:
        >>> [statistic.name for statistic in comparable()]
        ['cls_self_attention', 'cls_entropy_share', 'patch_self_attention_ratio']
    """
    shares = {s.share_of: s for s in STATISTICS.values() if s.share_of is not None}
    return tuple(shares.get(statistic.name, statistic) for statistic in of_the_paper())
