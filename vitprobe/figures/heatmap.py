"""One statistic of one model, block by head: where among the heads it happens."""

from __future__ import annotations

from matplotlib.axes import Axes

from vitprobe.errors import UserError
from vitprobe.figures.curves import ProfileLike, as_profile
from vitprobe.figures.style import LABEL_SIZE, new_axes, style
from vitprobe.statistics import select


def heads(profile: ProfileLike | object, name: str = "cls_self_attention", *, ax: Axes | None = None) -> Axes:
    """Draw the mean of one statistic for every block (column) and head (row), and give the axes (never shown).

    Colour runs from the statistic's lower bound to the largest value drawn; the colour bar says which.

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
    with style():
        ax = new_axes() if ax is None else ax
        seaborn.heatmap(
            grid,
            ax=ax,
            vmin=entry.bounds(profile.layout)[0],
            cmap="cividis",  # even to the eye, also without colour vision
            xticklabels="auto",
            yticklabels="auto",
            cbar_kws={"label": f"{entry.label} ({entry.unit})"},
            rasterized=True,
        )
        ax.set_xlabel("block", fontsize=LABEL_SIZE)
        ax.set_ylabel("head", fontsize=LABEL_SIZE)
        unfinished = getattr(profile, "unfinished", None)
        ax.set_title(f"{profile.name} ({unfinished})" if unfinished else profile.name, fontsize=LABEL_SIZE)
        ax.tick_params(length=0, rotation=0)
    return ax
