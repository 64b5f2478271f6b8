"""The statistics of a view: each defined one computed, and those declared outside the package checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from vitprobe.attention.view import AttentionView
from vitprobe.errors import UserError
from vitprobe.statistics.table import Asks, Need, Statistic, select

_ROUNDING = 1e-4  # of a bound, or of 1 where that is less


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
    value = _computed(statistic, view)
    if view.subtracted is None or view.subtracted_weight is None or not statistic.per_head:
        return value
    if statistic.asks == "weights":  # whose probabilities are the difference already
        return value
    return value - view.subtracted_weight * _computed(statistic, view.subtracted)


def _computed(statistic: Statistic, view: AttentionView) -> Tensor:
    if not statistic.outside:
        return statistic.compute(view)
    value = statistic.compute(AskedView(view, statistic))  # pyright: ignore[reportArgumentType]
    return _checked(statistic, view, value)


def _checked(statistic: Statistic, view: AttentionView, value: Any) -> Tensor:
    """What a function from outside gave.

    Raises:
        UserError: for another shape, values outside the bounds, or values that are not finite where attention is.
    """
    batch, heads, _ = view.shape
    wanted, words = ((batch, heads), "(B, H)") if statistic.per_head else ((batch, 1), "(B, 1)")
    if not isinstance(value, Tensor):
        raise UserError(f"{statistic.name} gave a {type(value).__name__}, not a tensor {wanted}, {words}")
    if value.shape != wanted:
        hint = "" if statistic.per_head else "; with a value per head leave per_head=False out"
        raise UserError(f"{statistic.name} gave the shape {tuple(value.shape)}, not {wanted}, {words}{hint}")
    value = value if value.is_floating_point() else value.float()
    low, high = statistic.bounds(view.layout)
    outside = (value < low - _ROUNDING * max(1.0, abs(low))) | (value > high + _ROUNDING * max(1.0, abs(high)))
    if view.subtracted is None and bool(outside.any()):
        raise UserError(
            f"{statistic.name} gave {float(value[outside][0]):g} in block {view.block}, outside its bounds "
            f"{low:g} to {high:g}: correct the function, or the bounds that it was declared with"
        )
    broken = value.isnan() if statistic.infinite else ~value.isfinite()
    if bool(broken.any()) and bool(view.patch_sums.log_z.isfinite().all()):  # otherwise activations are broken
        raise UserError(
            f"{statistic.name} gave {float(value[broken][0]):g} in block {view.block}, where the attention is finite: "
            f"correct the function"
        )
    return value


class AskedView:
    """An `AttentionView` as a statistic from outside sees it: what it asked for, and an error for everything else.

    Where a pass over the rows serves the model and the statistics at once, queries and keys are gone when statistics
    are computed: what was not asked for would silently be wrong.
    """

    _ALWAYS = ("block", "layout", "shape", "num_heads")
    _NORMS = {  # noqa: RUF012 - a constant
        "residual_norms": "residual",
        "output_norms": "residual",
        "update_norms": "update",
        "unscaled_update_norms": "update",
    }
    _ROWS = {"cls_row": "cls", "patch_sums": "sums", "patch_rows": "rows"}  # noqa: RUF012

    def __init__(self, view: AttentionView, statistic: Statistic) -> None:
        self._view, self._statistic = view, statistic

    def __getattr__(self, name: str) -> Any:
        view, statistic = self._view, self._statistic
        if name in self._NORMS and self._NORMS[name] not in statistic.needs:
            raise UserError(f"{statistic.name} reads {name}: declare it with needs={self._NORMS[name]!r}")
        if name == "cls_row" and "cls" not in statistic.needs:
            raise UserError(f"{statistic.name} reads {name}: declare it with needs='cls'")
        asks = get_args(Asks)
        least = "tokens" if name in self._ALWAYS or name in self._NORMS else self._ROWS.get(name, "weights")
        if asks.index(statistic.asks) < asks.index(least):
            raise UserError(f"{statistic.name} reads {name}, but asks for {statistic.asks!r}: declare asks={least!r}")
        return getattr(view, name)

    @property
    def __class__(self) -> type:
        return AttentionView
