"""The drawing of curves on axes: lines, bands, the maximum where there is one, and limits that read the bounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from vitprobe.figures.captions import add_below, set_axis_labels
from vitprobe.figures.curves import Curve
from vitprobe.figures.style import NOTE_SIZE, Look, looks, paradigm_look
from vitprobe.statistics import Statistic


@dataclass(frozen=True)
class YAxis:
    """The vertical axis.

    Attributes:
        label: its words, with the unit.
        lines: height → words of the dashed lines across the axes.
        numbered: whether the words of a line that stands alone say its height too.
        from_zero: whether it begins at the lowest bound; else just under the lowest value drawn.
        free: whether its limits follow the values alone, as no bounds are known.
    """

    label: str
    lines: Mapping[Any, str]
    numbered: bool = False
    from_zero: bool = True
    free: bool = False


def draw_statistic(
    ax: Axes,
    entry: Statistic,
    curves: Sequence[Curve],
    missing: Sequence[tuple[str, str]],
    *,
    bands: bool,
    heads: bool,
    own: bool,
) -> None:
    """Draw the curves of a statistic; `bands` for its intervals, the rest as for `draw_curves`."""
    mean = "geometric mean" if any(curve.is_geometric for curve in curves) else "mean"
    unit = entry.unit if mean == "mean" else f"{mean}, {entry.unit}"
    axis = YAxis(f"{entry.label} ({unit})", _maxima(entry, curves), numbered=True, from_zero=entry.from_zero)
    notes = _interval_notes(curves, mean) if bands else []
    signed = [curve.name for curve in curves if curve.is_signed]
    last = [f"signed, as attention is a difference A1 − λ·A2: {', '.join(signed)}"] if signed else []
    draw_curves(ax, axis, curves, missing, bands=bands, heads=heads, own=own, notes=notes, last_notes=last)


def draw_curves(
    ax: Axes,
    axis: YAxis,
    curves: Sequence[Curve],
    missing: Sequence[tuple[str, str]],
    *,
    bands: bool,
    heads: bool,
    own: bool,
    notes: Sequence[str] = (),
    last_notes: Sequence[str] = (),
) -> None:
    """Draw curves, lines across, axis labels, legend and note; call it inside `style()`.

    Args:
        ax: the axes to draw on.
        axis: the vertical axis.
        curves: one per model that has the values.
        missing: name and reason of each model that has not.
        bands: whether to draw intervals.
        heads: whether to add a thin line per head.
        own: whether the figure is ours, so that it may grow by what stands under its axes.
        notes: lines of the note before what it says of unfinished runs and heads.
        last_notes: lines after that.
    """
    relative = len({curve.num_blocks for curve in curves}) > 1
    handles = []
    for curve, look in zip(curves, looks([curve.paradigm for curve in curves]), strict=True):
        if heads:
            for rows in curve.heads.values():
                ax.plot(_x(curve, rows, relative), rows["center"].to_numpy(float), color=look.color,
                        linestyle=look.linestyle, linewidth=0.5, alpha=0.4, label="_head", zorder=1.8)  # fmt: skip
        if bands and curve.has_interval:
            _band(ax, curve, look, relative)
        handles.append(_line(ax, curve, look, relative))

    _set_limits(ax, axis, curves)
    _lines_across(ax, axis)
    if not relative:
        ax.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    set_axis_labels(ax, "relative depth (0 first, 1 last)" if relative else "block", axis.label)
    height = add_below(ax, handles, [*notes, *_run_notes(curves, heads), *last_notes, *_missing_notes(missing)])
    if own:
        ax.figure.set_size_inches(ax.figure.get_figwidth(), ax.figure.get_figheight() + height)  # pyright: ignore


def _line(ax: Axes, curve: Curve, look: Look, relative: bool) -> Line2D:
    words = paradigm_look(curve.paradigm).words
    label = f"{curve.name} ({words})" if words else curve.name
    (line,) = ax.plot(
        _x(curve, curve.rows, relative), curve.rows["center"].to_numpy(float), color=look.color, label=label,
        linestyle=look.linestyle, marker=look.marker, markerfacecolor=look.markerfacecolor, markersize=3.2,
        markeredgewidth=0.8, zorder=2.5,
    )  # fmt: skip
    return line


def _band(ax: Axes, curve: Curve, look: Look, relative: bool) -> None:
    """The interval: a band over blocks, or a bar where there is one block alone."""
    x = _x(curve, curve.rows, relative)
    low, high = curve.rows["ci_low"].to_numpy(float), curve.rows["ci_high"].to_numpy(float)
    if len(x) == 1:
        ax.vlines(x, low, high, color=look.color, linewidth=1.0, label="_interval")
    else:
        ax.fill_between(x, low, high, color=look.color, alpha=0.15, linewidth=0, label="_interval", zorder=1.6)


def _x(curve: Curve, rows: pd.DataFrame, relative: bool) -> np.ndarray:
    blocks = rows["block"].to_numpy(float)
    return blocks / max(1, curve.num_blocks - 1) if relative else blocks


def _maxima(entry: Statistic, curves: Sequence[Curve]) -> dict[float, str]:
    """Height → words of the maxima worth a line: log N of entropies, one per number of patches, or their share's 1."""
    if entry.maximum is None:
        return {}
    by_size = sorted(curves, key=lambda curve: (curve.layout.num_patches, curve.bounds[1]))
    return {curve.bounds[1]: f"maximum: {entry.maximum(curve.layout)}" for curve in by_size}


def _lines_across(ax: Axes, axis: YAxis) -> None:
    """A dashed line each, with its words over its right end; lines too near for that share one over the highest."""
    bottom, top = ax.get_ylim()
    groups: list[list[float]] = []
    for value in sorted(axis.lines):
        ax.axhline(value, color="#555555", linewidth=0.8, linestyle=(0, (5, 3)), label="_maximum", zorder=1.4)
        if groups and value - groups[-1][-1] < 0.085 * (top - bottom):
            groups[-1].append(value)
        else:
            groups.append([value])
    for group in groups:
        first, *others = (axis.lines[value] for value in group)
        words = ", ".join([first, *(other.removeprefix("maximum: ") for other in others)])
        if len(group) == 1 and axis.numbered and group[0] != 1:  # of a share's 1 there is nothing to add
            words = f"{words} = {group[0]:.2f}"
        ax.annotate(
            words, xy=(1, group[-1]), xycoords=("axes fraction", "data"), xytext=(0, 1.5),
            textcoords="offset points", ha="right", va="bottom", fontsize=NOTE_SIZE, color="#444444", zorder=1.4,
        )  # fmt: skip


def _set_limits(ax: Axes, axis: YAxis, curves: Sequence[Curve]) -> None:
    """Limits of y from the profiles' bounds: shares and distances from 0, entropies up to log N, ratios log-scaled.

    The axis of an entropy in nats starts under its lowest value, as the distance to the maximum is what is read off;
    but it always shows the upper quarter, lest rounding look like a trend. Signed values have an axis that shows them
    all, and 0.
    """
    if axis.free:
        return
    if all(curve.is_ratio for curve in curves):
        ax.set_yscale("log")
        _log_ticks(ax)
        return
    if any(curve.is_signed for curve in curves):
        _signed_limits(ax)
        return
    lowest = min(curve.bounds[0] for curve in curves)
    bottom, top = ax.get_ylim()
    if not axis.from_zero:
        lowest = max(lowest, min(bottom, 0.75 * min(curve.bounds[1] for curve in curves)))
    top = max(top, lowest + 1.05 * (ax.dataLim.y1 - lowest))  # matplotlib's own margin is nothing over a level line
    if axis.lines:
        top = max(top, max(axis.lines) + 0.1 * (max(axis.lines) - lowest))  # room for the words over the line
    if top <= lowest:  # a single patch, where every entropy and distance is 0
        top = lowest + 1.0
    ax.set_ylim(lowest, top)


def _signed_limits(ax: Axes) -> None:
    """All that is drawn, and 0 with a line where values lie below it."""
    bottom, top = min(ax.dataLim.y0, 0.0), max(ax.dataLim.y1, 0.0)
    room = 0.05 * (top - bottom) or 1.0
    ax.set_ylim(bottom - room * (bottom < 0), top + room)
    if bottom < 0:
        ax.axhline(0, color="#555555", linewidth=0.8, label="_zero", zorder=1.4)


def _log_ticks(ax: Axes) -> None:
    """Plain numbers at the ticks of a logarithmic axis that spans little; a long one keeps its powers of ten."""
    bottom, top = ax.get_ylim()
    decades = np.log10(top / bottom)
    if decades < 2.5:
        ax.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]) if decades < 1 else LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())


def _interval_notes(curves: Sequence[Curve], mean: str) -> list[str]:
    """What bands are, and which of them are doubtful or missing."""
    notes = []
    if any(curve.has_interval for curve in curves):
        notes.append(f"bands: 95 % interval of the {mean} over images")
    for n in sorted({curve.few for curve in curves if curve.few}):
        names = ", ".join(curve.name for curve in curves if curve.few == n)
        notes.append(f"few images (n = {n}), intervals of skewed values may be too narrow: {names}")
    for reason in {curve.no_interval: None for curve in curves if curve.no_interval}:
        names = ", ".join(curve.name for curve in curves if curve.no_interval == reason)
        notes.append(f"plain mean without interval ({reason}): {names}")
    return notes


def _run_notes(curves: Sequence[Curve], heads: bool) -> list[str]:
    """Which runs are not complete, and what thin lines are."""
    notes = []
    unfinished = [f"{curve.name} ({curve.unfinished})" for curve in curves if curve.unfinished]
    if unfinished:
        notes.append(f"unfinished: {', '.join(unfinished)}")
    if heads and any(curve.heads for curve in curves):
        notes.append("thin lines: single heads")
    return notes


def _missing_notes(missing: Sequence[tuple[str, str]]) -> list[str]:
    return ["not shown: " + "; ".join(f"{name} ({reason})" for name, reason in missing)] if missing else []
