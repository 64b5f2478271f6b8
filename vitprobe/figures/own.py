"""`draw`: values of one's own over the blocks of profiles, in the same form as the package's figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from vitprobe.errors import UserError
from vitprobe.figures.curves import Curve, ProfileLike, Profiles, as_list, distinct
from vitprobe.figures.drawing import YAxis, draw_curves
from vitprobe.figures.style import new_axes, style

Bounds = tuple[float | int, float | int]

_OPTIONAL = ("ci_low", "ci_high", "head")


def draw(
    profiles: Profiles | object,
    values: Callable[[Any], Any],
    *,
    ylabel: str,
    bounds: Bounds | None = None,
    reference: Mapping[float, str] | Mapping[int, str] | None = None,
    notes: str | Sequence[str] = (),
    heads: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """Draw values of your own over blocks, one line per model, and return the axes (never shown).

    Colors, line styles, markers, the shared axis of relative depth, the legend and the notes under the axes are those
    of `statistic`; `save_figure` writes the result.

    Args:
        profiles: one profile or several.
        values: a function of a profile. Returns one number per block, `(blocks,)`, or a table with the columns block
            and center, perhaps ci_low and ci_high (a band), and perhaps head (`<NA>` for the mean over heads), as
            `Profile.table` has. A `UserError` that it raises is the reason why a model is not shown.
        ylabel: words on the axis, with the unit.
        bounds: lowest and highest possible value: the axis begins at the lowest; `(0, math.inf)` for ratios on a
            logarithmic axis; a lowest value below 0 for an axis that shows 0. Default: limits by the values alone.
        reference: height → words of dashed lines across the axes. Default: none.
        notes: lines under the legend; say there what bands are. Default: none.
        heads: whether to add a thin line per head, of tables with a column head. Default: False.
        ax: axes to draw on, in a figure with `layout="constrained"`. Default: a new figure, one column of a paper wide.

    Raises:
        UserError: for values of another shape, outside the bounds, or that no model has (with the reasons), or for what
            is no profile.

    Example:
        >>> import numpy as np
        >>> import vitprobe as vp
        >>> profile = vp.analyze("mae_vit_nano", num_images=2, statistics=["cls_entropy"], progress=False)
        >>> def effective_patches(profile):
        ...     return np.exp(profile.estimate("cls_entropy").center)
        >>> ax = vp.figures.draw(profile, effective_patches, ylabel="effective number of patches", bounds=(0, 64))
        >>> ax.get_ylabel()
        'effective number of patches'
    """
    curves, missing = [], []
    several = as_list(profiles)
    for name, profile in zip(distinct([profile.name for profile in several]), several, strict=True):
        try:
            curves.append(_read(name, profile, values(profile), bounds))
        except UserError as error:
            if isinstance(error, _WrongValues):
                raise
            missing.append((name, str(error).removeprefix(f"{profile.name} ")))
    if not curves:
        reasons = "; ".join(f"{model} ({reason})" for model, reason in missing)
        raise UserError(f"no model has the values to draw: {reasons}")
    axis = YAxis(ylabel, reference or {}, free=bounds is None)
    with style():
        own = ax is None
        ax = new_axes() if ax is None else ax
        lines = [notes] if isinstance(notes, str) else list(notes)
        draw_curves(ax, axis, curves, missing, bands=True, heads=heads, own=own, notes=lines)
    return ax


class _WrongValues(UserError):
    """Values that cannot be drawn: the caller's mistake, and no reason to leave a model out."""


def _read(name: str, profile: ProfileLike, found: Any, bounds: Bounds | None) -> Curve:
    table = found.copy() if isinstance(found, pd.DataFrame) else _table(name, profile, found)
    if missing := [column for column in ("block", "center") if column not in table]:
        raise _WrongValues(
            f"the table for {name} has no column {' and '.join(missing)}, but {', '.join(map(str, table.columns))}: "
            f"name the values center, one row per block"
        )
    for column in _OPTIONAL:
        if column not in table:
            table[column] = pd.NA if column == "head" else math.nan
    table = table.sort_values(by="block")
    whole = table["head"].isna()
    _check(name, profile, table[whole], bounds)
    of_head = {int(head): pd.DataFrame(rows) for head, rows in table[~whole].groupby("head")}  # pyright: ignore
    unfinished = getattr(profile, "unfinished", None)
    ends = (-math.inf, math.inf) if bounds is None else (float(bounds[0]), float(bounds[1]))
    rows = pd.DataFrame(table[whole])
    return Curve(name, profile.paradigm, profile.layout, profile.num_blocks, ends, rows, of_head, unfinished)


def _table(name: str, profile: ProfileLike, found: Any) -> pd.DataFrame:
    try:
        center = np.asarray(found, float)
    except (TypeError, ValueError):
        center = np.zeros(())
    if center.shape != (profile.num_blocks,):
        came = f"the shape {center.shape}" if center.ndim else f"a {type(found).__name__}"
        raise _WrongValues(
            f"the values of {name} have {came}: return ({profile.num_blocks},), one number per block, or a table with "
            f"the columns block and center"
        )
    return pd.DataFrame({"block": range(profile.num_blocks), "center": center})


def _check(name: str, profile: ProfileLike, rows: Any, bounds: Bounds | None) -> None:
    blocks, center = rows["block"].to_list(), rows["center"].to_numpy(float)
    if len(set(blocks)) < len(blocks):
        raise _WrongValues(f"the table for {name} has several rows for a block: one row per block, one per head beside")
    if not np.isfinite(center).any():
        raise UserError(f"{profile.name} no finite value")
    low, high = (-math.inf, math.inf) if bounds is None else bounds
    outside = center[(center < low) | (center > high)]
    if len(outside):
        raise _WrongValues(
            f"a value of {name} is {outside[0]:g}, outside bounds=({low:g}, {high:g}): correct one of them"
        )
