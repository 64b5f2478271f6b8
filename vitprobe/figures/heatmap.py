"""One statistic of one model, block by head: where among the heads it happens."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes

from vitprobe.errors import UserError
from vitprobe.figures.captions import POINTS, wrap
from vitprobe.figures.curves import ProfileLike, as_profile
from vitprobe.figures.style import LABEL_SIZE, new_axes, style
from vitprobe.profile.intervals import about
from vitprobe.statistics import select


def heads(profile: ProfileLike | object, name: str = "cls_self_attention", *, ax: Axes | None = None) -> Axes:
    """Draw the mean of one statistic for every block (column) and head (row), and give the axes (never shown).

    Colors run from the statistic's lower bound to the largest value drawn; those of signed values (differential
    attention) run as far below 0 as above. The color bar says which statistic it is, and whether an unbounded ratio's
    geometric mean is drawn.

    Args:
        profile: one profile.
        name: a name in `vitprobe.statistics.STATISTICS` that has one value a head.
        ax: axes to draw on; a new figure, one column of a paper wide, without.

    Raises:
        UserError: for an unknown statistic (with the nearest), one that the model does not have (with the reason), or
            one with a single value a block; or for what is no profile.
    """
    import seaborn  # takes a second to import, and only this figure needs it

    profile = as_profile(profile)
    entry = select([name])[0]
    if not entry.per_head:
        raise UserError(f"{name} has one value a block, not one a head; draw it with figures.statistic")
    table = profile.table([name]).dropna(subset=["head"])
    grid = table.pivot(index="head", columns="block", values="center")
    lowest, _ = profile.bounds(name)
    if lowest < 0:
        farthest = float(np.nanmax(np.abs(grid.to_numpy(float)))) or 1.0
        colors = {"vmin": -farthest, "vmax": farthest, "cmap": "PuOr_r"}  # white at 0, even to the eye on both sides
    else:
        colors = {"vmin": lowest, "cmap": "cividis"}  # even to the eye, also without colour vision
    geometric = "geometric mean" in {about(kind) for kind in table["interval"]}
    label = f"{entry.label} ({'geometric mean, ' if geometric else ''}{entry.unit})"
    with style():
        ax = new_axes() if ax is None else ax
        seaborn.heatmap(
            grid,
            ax=ax,
            **colors,
            xticklabels="auto",
            yticklabels="auto",
            cbar_kws={"label": wrap(label, 1.2 * ax.get_window_extent().height * POINTS / ax.figure.dpi, LABEL_SIZE)},
            rasterized=True,
        )
        ax.set_xlabel("block", fontsize=LABEL_SIZE)
        ax.set_ylabel("head", fontsize=LABEL_SIZE)
        unfinished = getattr(profile, "unfinished", None)
        ax.set_title(f"{profile.name} ({unfinished})" if unfinished else profile.name, fontsize=LABEL_SIZE)
        ax.tick_params(length=0, rotation=0)
    return ax
