"""Figures to files: PDF and SVG with their text as text, PNG at 300 dpi, the same bytes each time."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vitprobe.errors import UserError
from vitprobe.figures.curves import Profiles, as_list, read_curves
from vitprobe.figures.drawing import draw_statistic
from vitprobe.figures.style import plain_axes, style
from vitprobe.files import disk_errors, write_atomically
from vitprobe.statistics import STATISTICS, of_the_paper

# Format → its metadata: no date of creation, so that the same figure is the same file.
FORMATS = {"pdf": {"CreationDate": None}, "svg": {"Date": None}, "png": {}}

# Figure of the paper → its file's name without the ending, which papers include.
_STEMS = {3: "figure3_cls_self_attention", 4: "figure4_cls_entropy", 5: "figure5_patch_self_attention"}
PAPER_FIGURES = {_STEMS[each.figure]: each.name for each in of_the_paper() if each.figure is not None}


def save_figure(ax_or_figure: Axes | Figure, stem: str | Path) -> list[Path]:
    """Write `stem`.pdf, `stem`.svg and `stem`.png (300 dpi), making the folder; gives the three paths.

    Each file appears whole or not at all, and the same figure gives the same bytes.

    Raises:
        UserError: if a file cannot be written (a full disk, no permission, a file where a folder should be).
    """
    figure = ax_or_figure.figure if isinstance(ax_or_figure, Axes) else ax_or_figure
    figure = figure.canvas.figure  # of a subfigure: the whole figure
    stem = Path(stem)
    if not stem.name:
        raise UserError(f"'{stem}' names no file; give a folder and the file's name without its ending")
    _check_folder(stem.parent)
    contents = {stem.with_name(f"{stem.name}.{kind}"): _render(figure, kind) for kind in FORMATS}
    for path, content in contents.items():
        write_atomically(path, content)
    return list(contents)


def save_paper_figures(profiles: Profiles | object, out: str | Path) -> list[Path]:
    """Write Figures 3, 4 and 5 of the paper (arXiv 2412.03215) for these profiles into the folder `out` (it is made).

    Gives the paths written. A figure that none of the models has (Figures 3 and 4 without a [cls] token) is left out.

    Raises:
        UserError: if there is no profile, or a file cannot be written.
    """
    several = as_list(profiles)
    _check_folder(Path(out))  # before the drawing, which takes a second
    written = []
    for stem, name in PAPER_FIGURES.items():
        curves, missing = read_curves(several, name)
        if curves:
            with style():
                ax = plain_axes()
                draw_statistic(ax, STATISTICS[name], curves, missing, bands=True, heads=False, own=True)
            written += save_figure(ax, Path(out) / stem)
    return written


def _render(figure: Figure, kind: str) -> bytes:
    buffer = BytesIO()
    # Our own figures keep their exact width. One without a layout engine would cut off the legend under its axes.
    box = "tight" if figure.get_layout_engine() is None else None
    with style():
        figure.savefig(buffer, format=kind, dpi=300, metadata=FORMATS[kind], bbox_inches=box)
    return buffer.getvalue()


def _check_folder(folder: Path) -> None:
    """Refuse a folder that cannot be made, as it or one above it is a file."""
    with disk_errors(folder):
        for path in (folder, *folder.parents):
            if path.exists() and not path.is_dir():
                raise UserError(f"{path} is a file; give a folder")
