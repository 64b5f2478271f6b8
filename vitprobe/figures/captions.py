"""The words around the axes: axis labels, the legend and the note, under the data so that no line is covered."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.transforms import ScaledTranslation

from vitprobe.figures.style import LABEL_SIZE, LEGEND_SIZE, NOTE_SIZE

POINTS = 72  # points an inch
_CHARACTER = 0.58  # mean width of a character in DejaVu Sans, in font sizes
_UNBROKEN = "\N{NO-BREAK SPACE}"
_GAP = 4.0  # points between the axis label, the legend and the note


def set_axis_labels(ax: Axes, x: str, y: str) -> None:
    """Label both axes; the y label is broken into lines that stand out over the axis by a little at most."""
    height = 1.2 * ax.get_window_extent().height * POINTS / ax.figure.dpi
    ax.set_xlabel(x, fontsize=LABEL_SIZE)
    ax.set_ylabel(wrap(y, height, LABEL_SIZE), fontsize=LABEL_SIZE)


def add_below(ax: Axes, handles: Sequence[Line2D], notes: Sequence[str]) -> float:
    """Put the legend and the notes under the x label, from the left end of the y labels; gives their height in inches.

    The legend has as many columns as fit. Both belong to the axes, so that they move with them.
    """
    root = ax.figure.canvas.figure  # of a subfigure: the whole figure
    root.draw_without_rendering()  # so that the layout has been made, and everything has its size
    scale = POINTS / root.dpi
    inner, outer = ax.get_window_extent(), ax.get_tightbbox()
    assert outer is not None
    left, width = (outer.x0 - inner.x0) * scale, (inner.x1 - outer.x0) * scale
    start = (outer.y0 - inner.y0) * scale - _GAP

    anchor = ax.transAxes + ScaledTranslation(left / POINTS, start / POINTS, root.dpi_scale_trans)
    labels = [wrap(str(handle.get_label()), width - 4.5 * LEGEND_SIZE, LEGEND_SIZE) for handle in handles]
    below = start
    for columns in (3, 2, 1):
        legend = ax.legend(
            handles, labels, loc="upper left", bbox_to_anchor=(0, 0), bbox_transform=anchor, ncols=columns,
            frameon=False, fontsize=LEGEND_SIZE, borderpad=0, borderaxespad=0, handlelength=3, handletextpad=0.6,
            columnspacing=1.2, labelspacing=0.35, alignment="left",
        )  # fmt: skip
        extent = legend.get_window_extent()
        if extent.width * scale <= width:
            break
    below -= extent.height * scale

    if notes:
        text = "\n".join(wrap(note, width, NOTE_SIZE) for note in notes)
        note = ax.annotate(
            text, xy=(0, 0), xycoords="axes fraction", xytext=(left, below - _GAP), textcoords="offset points",
            ha="left", va="top", fontsize=NOTE_SIZE, color="#444444", linespacing=1.25, annotation_clip=False,
        )  # fmt: skip
        note.set_gid("note")
        below -= _GAP + note.get_window_extent().height * scale
    return (start + _GAP - below) / POINTS


def wrap(text: str, width: float, size: float) -> str:
    """Break a text of this font size into lines of about `width` points at most."""
    for together in (" /", "log N"):
        text = text.replace(together, together.replace(" ", _UNBROKEN))
    lines = textwrap.wrap(text, max(8, int(width / (_CHARACTER * size))), break_on_hyphens=False)
    return "\n".join(lines).replace(_UNBROKEN, " ")
