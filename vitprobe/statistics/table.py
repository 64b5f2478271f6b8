"""What a statistic declares of itself, and the registry that holds one entry each."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from vitprobe.attention.view import AttentionView
from vitprobe.errors import UserError
from vitprobe.layout import TokenLayout

Bounds = Callable[[TokenLayout], tuple[float, float]]
Need = str  # one of NEEDS
Asks = Literal["tokens", "cls", "sums", "rows"]

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
        unit: "share", "ratio", "nats", "patches" or "px".
        bounds: layout → (lowest, highest) possible value; `inf` where there is none.
        needs: what a model must have for it to be defined: keys of `NEEDS`. What does without "distribution" is linear
            in the attention weights.
        asks: what it asks of the view, the dearest last: "tokens" (norms of tokens), "cls" (the row of [cls]), "sums"
            (what each patch row's weights were divided by), "rows" (the whole of each patch row).
        compute: AttentionView → `(B, H)`, or `(B, 1)` where it is one number a block.
        uniform: layout → its value under uniform attention, every token to every token alike; None where attention
            weights do not decide it.
        per_head: whether it has one value a head.
        figure: the figure of the paper (arXiv 2412.03215) that it feeds, if any.
        released_name: its name in the paper's released script, if it has one there.
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


def declare(name: str, label: str, unit: str, bounds: Bounds, needs: str = "", **extra) -> Callable:
    """Decorator that enters a pure function `view → (B, H)` in `STATISTICS` under `name`; returns the function."""

    def enter(compute: Callable) -> Callable:
        STATISTICS[name] = Statistic(name, label, unit, bounds, frozenset(needs.split()), compute, **extra)
        return compute

    return enter


def select(names: Sequence[str] | None) -> list[Statistic]:
    """The statistics of these names in the table's order; all without names.

    Raises:
        UserError: for a name that is not in the table, with the nearest ones, or for no name at all.
    """
    if names is None:
        return list(STATISTICS.values())
    names = [names] if isinstance(names, str) else list(names)
    if not names:
        raise UserError("no statistic is asked for; name at least one, or leave the argument out for all of them")
    for name in names:
        if name not in STATISTICS:
            near = difflib.get_close_matches(name, STATISTICS, n=3, cutoff=0.5) or list(STATISTICS)
            raise UserError(f"there is no statistic {name!r}; the nearest are {', '.join(near)}")
    return [statistic for statistic in STATISTICS.values() if statistic.name in names]


def available_needs(view: AttentionView) -> frozenset[Need]:
    """What the capture behind `view` offers beside its layout: keys of `NEEDS`."""
    available = set()
    if view.residual_norms is not None and view.output_norms is not None:
        available.add("residual")
    if view.update_norms is not None and view.unscaled_update_norms is not None:
        available.add("update")
    return frozenset(available)


def compute_statistics(
    view: AttentionView, names: Sequence[str] | None = None
) -> dict[str, Float[Tensor, "batch head"]]:
    """`{name: (B, H)}` (`(B, 1)` for those with one number a block) of every statistic defined for the view."""
    available, signed = available_needs(view), view.subtracted is not None
    defined = [each for each in select(names) if each.undefined(view.layout, available, signed) is None]
    with torch.no_grad():
        if any(statistic.asks == "rows" for statistic in defined):
            _ = view.patch_rows  # one pass serves all
        return {statistic.name: _value(statistic, view) for statistic in defined}


def _value(statistic: Statistic, view: AttentionView) -> Float[Tensor, "batch head"]:
    """A statistic of a view; of a difference of attentions the difference, which only linear ones are asked for."""
    value = statistic.compute(view)
    if view.subtracted is None or view.subtracted_weight is None or not statistic.per_head:
        return value
    return value - view.subtracted_weight * statistic.compute(view.subtracted)
