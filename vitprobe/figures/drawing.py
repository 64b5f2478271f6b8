"""The drawing of curves on axes: lines, bands, the maximum where there is one, and limits that read the bounds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from vitprobe.figures.captions import add_below, set_axis_labels
from vitprobe.figures.curves import Curve
from vitprobe.figures.style import NOTE_SIZE, Look, looks, paradigm_look
from vitprobe.statistics import Statistic


def draw(
    ax: Axes,
    entry: Statistic,
    curves: Sequence[Curve],
    missing: Sequence[tuple[str, str]],
    *,
    bands: bool,
    heads: bool,
    own: bool,
) -> None:
    """Draw curves, maxima, axis labels, legend and note; call it inside `style()`.

    Args:
        ax: the axes to draw on.
        entry: the statistic.
        curves: one a model that has it.
        missing: name and reason of each model that has not.
        bands: whether to draw the intervals.
        heads: whether to add a thin line a head.
        own: whether the figure is ours, so that it may grow by what stands under its axes.
    """
    relative = len({curve.num_blocks for curve in curves}) > 1
    handles = []
    for curve, look in zip(curves, looks([curve.paradigm for curve in curves]), strict=True):
        if heads:
            for rows in curve.heads.values():
                ax.plot(_x(curve, rows, relative), rows["center"].to_numpy(float), color=look.color,
                        linestyle=look.linestyle, linewidth=0.5, alpha=0.4, label="_head", zorder=1.8)  # fmt: skip
        if bands and curve.no_interval is None:
            _band(ax, curve, look, relative)
        handles.append(_line(ax, curve, look, relative))

    maxima = _maxima(entry, curves)
    _set_limits(ax, entry, curves, maxima)
    _maximum_lines(ax, maxima)
    if not relative:
        ax.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    mean = "geometric mean" if any(curve.is_geometric for curve in curves) else "mean"
    unit = entry.unit if mean == "mean" else f"{mean}, {entry.unit}"
    set_axis_labels(ax, "relative depth (0 first, 1 last)" if relative else "block", f"{entry.label} ({unit})")
    height = add_below(ax, handles, _notes(curves, missing, mean, bands, heads))
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
    """Height → words of the maxima worth a line: log N of entropies, a line a number of patches, or their share's 1."""
    if entry.unit == "nats":
        return {
            high: f"log {patches}" for patches, high in sorted({(c.layout.num_patches, c.bounds[1]) for c in curves})
        }
    if entry.name.endswith("entropy_share"):
        return {curves[0].bounds[1]: "uniform over the patches"}
    return {}


def _maximum_lines(ax: Axes, maxima: dict[float, str]) -> None:
    """A dashed line each, with its words over its right end; lines too near for that share one over the highest."""
    bottom, top = ax.get_ylim()
    groups: list[list[float]] = []
    for value in sorted(maxima):
        ax.axhline(value, color="#555555", linewidth=0.8, linestyle=(0, (5, 3)), label="_maximum", zorder=1.4)
        if groups and value - groups[-1][-1] < 0.085 * (top - bottom):
            groups[-1].append(value)
        else:
            groups.append([value])
    for group in groups:
        words = ", ".join(maxima[value] for value in group)
        if len(group) == 1 and words.startswith("log"):
            words = f"{words} = {group[0]:.2f}"
        ax.annotate(
            f"maximum: {words}", xy=(1, group[-1]), xycoords=("axes fraction", "data"), xytext=(0, 1.5),
            textcoords="offset points", ha="right", va="bottom", fontsize=NOTE_SIZE, color="#444444", zorder=1.4,
        )  # fmt: skip


def _set_limits(ax: Axes, entry: Statistic, curves: Sequence[Curve], maxima: dict[float, str]) -> None:
    """Limits of y from the profiles' bounds: shares and distances from 0, entropies up to log N, ratios log-scaled.

    The axis of an entropy in nats starts under its lowest value, as the distance to the maximum is what is read off;
    but it always shows the upper quarter, lest rounding look like a trend. Signed values have an axis that shows them
    all, and 0.
    """
    if all(curve.is_ratio for curve in curves):
        ax.set_yscale("log")
        _log_ticks(ax)
        return
    if any(curve.is_signed for curve in curves):
        _signed_limits(ax)
        return
    lowest = min(curve.bounds[0] for curve in curves)
    bottom, top = ax.get_ylim()
    if entry.unit == "nats":
        lowest = max(lowest, min(bottom, 0.75 * min(maxima)))
    top = max(top, lowest + 1.05 * (ax.dataLim.y1 - lowest))  # matplotlib's own margin is nothing over a level line
    if maxima:
        top = max(maxima) + 0.1 * (max(maxima) - lowest)  # room for the words over the line
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


def _notes(
    curves: Sequence[Curve], missing: Sequence[tuple[str, str]], mean: str, bands: bool, heads: bool
) -> list[str]:
    """What a reader must know: what bands and thin lines are, and which model is left out and why."""
    notes = []
    if bands and any(curve.no_interval is None for curve in curves):
        notes.append(f"bands: 95 % interval of the {mean} over images")
    for n in sorted({curve.few for curve in curves if bands and curve.few}):
        names = ", ".join(curve.name for curve in curves if curve.few == n)
        notes.append(f"few images (n = {n}), intervals of skewed values may be too narrow: {names}")
    for reason in {curve.no_interval: None for curve in curves if bands and curve.no_interval}:
        names = ", ".join(curve.name for curve in curves if curve.no_interval == reason)
        notes.append(f"plain mean without interval ({reason}): {names}")
    unfinished = [f"{curve.name} ({curve.unfinished})" for curve in curves if curve.unfinished]
    if unfinished:
        notes.append(f"unfinished: {', '.join(unfinished)}")
    if heads and any(curve.heads for curve in curves):
        notes.append("thin lines: single heads")
    signed = [curve.name for curve in curves if curve.is_signed]
    if signed:
        notes.append(f"signed, as attention is a difference A1 − λ·A2: {', '.join(signed)}")
    if missing:
        notes.append("not shown: " + "; ".join(f"{name} ({reason})" for name, reason in missing))
    return notes
