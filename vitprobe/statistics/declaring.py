"""`declare`: a statistic of one's own, which then works wherever the package's do."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any, cast, get_args

from torch import Tensor

from vitprobe.attention.view import AttentionView
from vitprobe.errors import UserError
from vitprobe.layout import TokenLayout
from vitprobe.statistics.table import NEEDS, STATISTICS, Asks, Statistic

Compute = Callable[[AttentionView], Tensor]

_SAMPLE = TokenLayout(grid=(2, 2), has_cls=True, num_registers=1)


def declare(
    name: str,
    *,
    label: str,
    unit: str,
    bounds: tuple[float | int, float | int] | Callable[[TokenLayout], tuple[float | int, float | int]],
    asks: Asks | str,
    needs: str | Iterable[str] = (),
    uniform: float | int | Callable[[TokenLayout], float | int] | None = None,
    per_head: bool = True,
    maximum: str | Callable[[TokenLayout], str] | None = None,
    from_zero: bool = True,
    infinite: bool = False,
    heading: str | None = None,
) -> Callable[[Compute], Compute]:
    """Declare a statistic: a decorator on a function that takes an `AttentionView` and returns `(B, H)`.

    From then on `name` works as the package's own statistics do: in `capture(keep="statistics")`, `analyze`, tables,
    intervals, `tolerance=`, `figures.statistic`, and on the command line where a plugin declares it. Each value is
    checked for its shape and bounds. Declaring the same function again (a notebook cell run twice) replaces it.

    Args:
        name: letters, digits and underscores.
        label: the words on an axis, without the unit.
        unit: "share", "ratio", "nats", "patches", "px", or a word of your own.
        bounds: lowest and highest possible value, or a function of the `TokenLayout`. Two finite numbers, `(0, inf)`
            for a ratio (its intervals and axes are on the log scale), or `(-inf, inf)`.
        asks: what the function reads of the view; each includes those before it, and the last is the most expensive.
            "tokens": `residual_norms`, `update_norms`, `unscaled_update_norms`, `output_norms`, `(B, N)`.
            "cls": `cls_row`, a `RowSummary` of the [cls] row (logarithms of sums of weights, entropy).
            "sums": `patch_sums`, the same of the patch rows without entropies.
            "rows": `patch_rows`, with entropies (nats) and distances (patches).
            "weights": anything: `query`, `key`, `probabilities()` of shape `(B, H, N, N)`. Takes a pass of its own.
        needs: what a model must have, of "cls", "registers", "patches" (more than one), "residual", "update" and
            "distribution" (weights that are at least 0 and sum to 1, which those of differential attention are not);
            a string with spaces between them or several strings. Default: nothing. A model without it has no such
            statistic, with the reason in `Profile.undefined`. Without "distribution" the function must be linear in
            the attention weights.
        uniform: the value under uniform attention, or a function of the layout; default: none is known.
        per_head: whether there is a value per head, `(B, H)`; else one per block, `(B, 1)`. Default: True.
        maximum: words for the highest value, or a function of the layout: figures draw a line there, and
            `analyze(tolerance=)` counts as a share of it rather than of the mean. Default: none.
        from_zero: whether an axis begins at the lowest possible value. Default: True.
        infinite: whether infinite values are right. Default: False.
        heading: a short label; with it the statistic is among those that `vitprobe analyze` prints.

    Returns:
        The decorator; it returns the function unchanged.

    Raises:
        UserError: for a name that is taken or is no name, unknown `asks` or `needs`, or bounds that are none. When it
            is computed: for a value of another shape, outside the bounds, NaN, or for reading what it did not ask for.

    Example:
        >>> import vitprobe as vp
        >>> @vp.statistics.declare(
        ...     "patches_to_patches", label="patches' attention to patches", unit="share", bounds=(0, 1), asks="sums",
        ...     uniform=lambda layout: layout.num_patches / layout.num_tokens,
        ... )
        ... def patches_to_patches(view):
        ...     return (view.patch_sums.log_z_patches - view.patch_sums.log_z).exp().mean(dim=-1)
        >>> vp.statistics.STATISTICS["patches_to_patches"].unit
        'share'
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z]\w*", name):
        raise UserError(f"{name!r} is no name for a statistic: use letters, digits and underscores")
    if asks not in get_args(Asks):
        raise UserError(f"{name}: asks={asks!r} is not known; choose {_either(get_args(Asks))}")
    needed = frozenset(needs.split() if isinstance(needs, str) else needs)
    if unknown := sorted(map(str, needed - NEEDS.keys())):
        raise UserError(f"{name}: needs={', '.join(unknown)!r} is not known; choose among {', '.join(NEEDS)}")
    found = _function(bounds)
    _check_bounds(name, found(_SAMPLE))

    def ends(layout: TokenLayout) -> tuple[float, float]:
        low, high = found(layout)
        return float(low), float(high)

    if maximum is not None and not math.isfinite(ends(_SAMPLE)[1]):
        raise UserError(f"{name}: maximum= names the highest possible value, and its bounds have none: leave it out")

    def add(compute: Compute) -> Compute:
        earlier = STATISTICS.get(name)
        if earlier is not None and not (earlier.outside and _place(earlier.compute) == _place(compute)):
            raise UserError(f"there is a statistic {name} already ({_where(earlier)}): give yours another name")
        STATISTICS[name] = Statistic(
            name,
            label,
            unit,
            ends,
            needed,
            compute,
            asks=cast(Asks, asks),
            uniform=None if uniform is None else _function(uniform),
            per_head=per_head,
            maximum=None if maximum is None else _function(maximum),
            from_zero=from_zero,
            infinite=infinite,
            heading=heading,
            outside=True,
        )
        return compute

    return add


def _function(given: Any) -> Callable[[TokenLayout], Any]:
    return given if callable(given) else lambda layout: given


def _check_bounds(name: str, found: Any) -> None:
    try:
        low, high = map(float, found)
    except (TypeError, ValueError):
        low, high = math.nan, math.nan
    both = math.isfinite(low) == math.isfinite(high)
    if not (low < high and (both or (low >= 0 and high == math.inf))):
        raise UserError(
            f"{name}: bounds={found!r} are none; give two finite numbers, (0, inf) for a ratio, or (-inf, inf)"
        )


def _place(function: Callable) -> tuple[str, str]:
    """Where a function was defined."""
    return getattr(function, "__module__", ""), getattr(function, "__qualname__", "")


def _where(statistic: Statistic) -> str:
    return f"from {_place(statistic.compute)[0]}" if statistic.outside else "vitprobe's own"


def _either(words: Iterable[str]) -> str:
    *others, last = map(repr, words)
    return f"{', '.join(others)} or {last}"
