"""A line a model over blocks: Figures 3, 4 and 5 of "Beyond [cls]" (arXiv 2412.03215), and any other statistic."""

from __future__ import annotations

import warnings

from matplotlib.axes import Axes

from vitprobe.errors import UserError
from vitprobe.figures.curves import Profiles, as_list, read_curves
from vitprobe.figures.drawing import draw_statistic
from vitprobe.figures.style import new_axes, style
from vitprobe.statistics import select

ErrorBar = tuple[str, float | int]

INTERVAL: ErrorBar = ("ci", 95)


def cls_self_attention(
    profiles: Profiles | object, *, ax: Axes | None = None, errorbar: ErrorBar | None = INTERVAL, heads: bool = False
) -> Axes:
    """Figure 3 of the paper: the share of its attention that [cls] gives to itself, per block; as `statistic`."""
    return statistic(profiles, "cls_self_attention", ax=ax, errorbar=errorbar, heads=heads)


def cls_entropy(
    profiles: Profiles | object, *, ax: Axes | None = None, errorbar: ErrorBar | None = INTERVAL, heads: bool = False
) -> Axes:
    """Figure 4 of the paper: entropy in nats of the [cls] attention over patches, per block; as `statistic`."""
    return statistic(profiles, "cls_entropy", ax=ax, errorbar=errorbar, heads=heads)


def patch_self_attention_ratio(
    profiles: Profiles | object, *, ax: Axes | None = None, errorbar: ErrorBar | None = INTERVAL, heads: bool = False
) -> Axes:
    """Figure 5 of the paper: patches' attention to themselves over that to all patches, per block; as `statistic`."""
    return statistic(profiles, "patch_self_attention_ratio", ax=ax, errorbar=errorbar, heads=heads)


def patch_self_attention(
    profiles: Profiles | object, *, ax: Axes | None = None, errorbar: ErrorBar | None = INTERVAL, heads: bool = False
) -> Axes:
    """Draw `patch_self_attention_ratio`, with a DeprecationWarning: this name is another statistic's."""
    warnings.warn(
        "figures.patch_self_attention draws the statistic patch_self_attention_ratio and is called "
        "figures.patch_self_attention_ratio now; for patch_self_attention itself use "
        "figures.statistic(profiles, 'patch_self_attention')",
        DeprecationWarning,
        stacklevel=2,
    )
    return patch_self_attention_ratio(profiles, ax=ax, errorbar=errorbar, heads=heads)


def statistic(
    profiles: Profiles | object,
    name: str,
    *,
    ax: Axes | None = None,
    errorbar: ErrorBar | None = INTERVAL,
    heads: bool = False,
) -> Axes:
    """Draw one statistic over blocks, a line a model, and give the axes drawn on (never shown).

    Lines are the table's `center`, averaged over heads: the mean, or for unbounded ratios the geometric mean, on a
    logarithmic axis. Models of different depths share an axis of relative depth, 0 the first block, 1 the last. Models
    that lack the statistic are named under the axes, with the reason.

    Args:
        profiles: one profile or several.
        name: a name in `vitprobe.statistics.STATISTICS`.
        ax: axes to draw on; a new figure, one column of a paper wide, without. The legend stands under the axes, so
            give yours in a figure with `layout="constrained"`.
        errorbar: `("ci", 95)` for bands of the 95 % intervals, None for no band.
        heads: whether to add a thin line a head.

    Raises:
        UserError: for an unknown statistic (with the nearest), another `errorbar`, what is no profile, or a statistic
            that no model has (with the reasons).
    """
    if errorbar is not None and tuple(errorbar) != INTERVAL:
        raise UserError(
            f"errorbar={errorbar!r} is not available: profiles hold 95 % intervals; "
            f"give errorbar=('ci', 95), or None for no band"
        )
    entry = select([name])[0]
    curves, missing = read_curves(as_list(profiles), name)
    if not curves:
        reasons = "; ".join(f"{model} ({reason})" for model, reason in missing)
        raise UserError(f"{name} is undefined for every model given: {reasons}")
    with style():
        own = ax is None
        ax = new_axes() if ax is None else ax
        draw_statistic(ax, entry, curves, missing, bands=errorbar is not None, heads=heads, own=own)
    return ax
