"""How figures look: fonts and sizes for a column of a paper, and one look for each paradigm of pretraining."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

COLUMN_WIDTH = 3.4  # inches: one column of a two-column paper
AXES_HEIGHT = 2.3  # inches, with the axis labels; legend and note come on top of it

LABEL_SIZE, TICK_SIZE, LEGEND_SIZE, NOTE_SIZE = 9.0, 8.0, 8.0, 7.0  # points, at print

# One font by name, the one that ships with matplotlib: the same picture and the same embedded font on every machine.
# "sans-serif" after it is what an SVG viewer without DejaVu Sans falls back to.
STYLE: dict[Any, Any] = {
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.size": TICK_SIZE,
    "axes.labelsize": LABEL_SIZE,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "white",
    "figure.facecolor": "white",
    "figure.dpi": 150,
    "xtick.labelsize": TICK_SIZE,
    "ytick.labelsize": TICK_SIZE,
    "legend.fontsize": LEGEND_SIZE,
    "lines.linewidth": 1.2,
    "text.usetex": False,
    "pdf.fonttype": 42,  # TrueType: text stays text (journals refuse Type 3)
    "ps.fonttype": 42,
    "svg.fonttype": "none",
    "svg.hashsalt": "vitprobe",  # the same ids, hence the same bytes, each time
    "figure.max_open_warning": 0,  # a notebook cell may well draw more than 20 figures; they are closed after it
}

LineStyle = str | tuple[int, tuple[float | int, ...]]  # matplotlib's names, or (offset, dashes and gaps in line widths)

# Backends without a window or a notebook behind them: what they draw is seen only once it is saved.
_NOT_SHOWN = {"agg", "cairo", "pdf", "pgf", "ps", "svg", "template"}


@contextmanager
def style() -> Iterator[None]:
    """Context in which figures are drawn and saved; the caller's own matplotlib settings come back after it."""
    with matplotlib.rc_context(STYLE):
        yield


@dataclass(frozen=True)
class Look:
    """What one model's line looks like: every field may be given to `Axes.plot` under its own name."""

    color: str
    linestyle: LineStyle
    marker: str
    markerfacecolor: str


@dataclass(frozen=True)
class ParadigmLook:
    """What the models of one paradigm share, and the two ends of their shades."""

    words: str
    color: str
    far_color: str
    linestyle: LineStyle
    marker: str


# Okabe and Ito's vermillion, blue, bluish green and (darker, for contrast on white) reddish purple, an indigo, two
# greys. Every colour has a contrast of 3 to 1 on white; with red, green or blue cones missing (Machado et al. 2009)
# any two of the first ends lie 16 apart in CIELAB or more. Line style and marker say the same again without colour.
PARADIGMS = {
    "MIM": ParadigmLook("MIM", "#D55E00", "#6B2F00", "-", "o"),
    "JEA": ParadigmLook("JEA", "#0072B2", "#003350", (0, (4, 1.5)), "s"),
    "hybrid": ParadigmLook("hybrid", "#CC6FA3", "#6B2F52", (0, (6, 1.5, 1, 1.5)), "D"),
    "supervised": ParadigmLook("supervised", "#009E73", "#004A36", (0, (1, 1)), "^"),
    "VLM": ParadigmLook("VLM", "#4B2E83", "#8E77C4", (0, (4, 1.2, 1, 1.2, 1, 1.2)), "v"),
    "random": ParadigmLook("random weights", "#666666", "#8C8C8C", (0, (1, 2.5)), "X"),
    "unknown": ParadigmLook("", "#222222", "#757575", (0, (8, 2)), "P"),
}


def paradigm_look(paradigm: str) -> ParadigmLook:
    """The look of a paradigm; that of "unknown" for one that has none of its own."""
    return PARADIGMS.get(paradigm, PARADIGMS["unknown"])


def looks(paradigms: Sequence[str]) -> list[Look]:
    """One look a model: line style and marker by paradigm; among models of one, the shade and the marker's filling."""
    result = []
    for position, paradigm in enumerate(paradigms):
        shared = paradigm_look(paradigm)
        same = [index for index, other in enumerate(paradigms) if paradigm_look(other) is shared]
        rank = same.index(position)
        color = _blend(shared.color, shared.far_color, rank / max(1, len(same) - 1))
        result.append(Look(color, shared.linestyle, shared.marker, "white" if rank % 2 else color))
    return result


def new_axes() -> Axes:
    """Axes of a new figure one column wide; call it inside `style()`.

    Where pyplot can show figures (a notebook, a window) the figure is pyplot's: it appears under the cell or with
    `plt.show()`, as users of seaborn expect, and the notebook closes it. Where nothing can be shown (a cluster, a test)
    it is nobody's: registered with pyplot it would stay in memory for ever, unregistered it goes with its last user.
    """
    from matplotlib import pyplot  # only here: drawing on given axes and saving go without pyplot

    if matplotlib.get_backend().lower() in _NOT_SHOWN:
        return plain_axes()
    _, ax = pyplot.subplots(figsize=(COLUMN_WIDTH, AXES_HEIGHT), layout="constrained")
    return ax


def plain_axes() -> Axes:
    """Axes of a new figure one column wide that pyplot does not know; call it inside `style()`."""
    figure = Figure(figsize=(COLUMN_WIDTH, AXES_HEIGHT), layout="constrained")
    FigureCanvasAgg(figure)
    return figure.add_subplot()


def _blend(start: str, end: str, share: float) -> str:
    red, green, blue = (a + share * (b - a) for a, b in zip(to_rgb(start), to_rgb(end), strict=True))
    return to_hex((red, green, blue))
