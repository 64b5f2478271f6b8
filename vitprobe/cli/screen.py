"""What the command line prints: tables and paragraphs for a terminal."""

from __future__ import annotations

import shutil
import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vitprobe.profile.profile import Profile

FEW_IMAGES = "few images (n = {n}): intervals of skewed values may be too narrow (docs/intervals.md)"


def profile_table(profile: Profile) -> str:
    """Three main statistics of each block with their intervals, for the screen."""
    from vitprobe.profile.intervals import FEW
    from vitprobe.statistics import STATISTICS

    headings = {name: entry.heading for name, entry in STATISTICS.items() if entry.heading is not None}
    # The first three that a run has are printed; all are in summary.csv.
    shown = [name for name in headings if name in profile.statistics][:3] or profile.statistics[:3]
    table = profile.table(shown)
    table = table[table["head"].isna()]
    columns = {"block": [str(block) for block in range(profile.num_blocks)]}
    for name in shown:
        rows = table[table["statistic"] == name]
        cells = zip(rows["center"], rows["ci_low"], rows["ci_high"], rows["interval"] != "none", strict=True)
        about = " (geometric mean)" if "geometric mean" in set(rows["about"]) else ""
        columns[headings.get(name, name) + about] = [
            f"{center:.4f} [{low:.4f}, {high:.4f}]" if known else f"{center:.4f}" for center, low, high, known in cells
        ]
    images = profile.unfinished or f"{profile.num_images} image{'s' * (profile.num_images != 1)}"
    if profile.num_groups != profile.num_images:
        images += f" in {profile.num_groups} independent groups"
    title = f"{profile.name} ({profile.paradigm}), {images}; mean over heads [95 % interval]"
    few = f"\n{FEW_IMAGES.format(n=profile.num_groups)}" if 2 <= profile.num_groups < FEW else ""
    return f"{title}\n{aligned(columns)}{few}"


def aligned(columns: dict[str, list[str]]) -> str:
    """Columns of text under their headings."""
    widths = [max(map(len, (heading, *cells))) for heading, cells in columns.items()]
    rows = [list(columns), *zip(*columns.values(), strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def wrapped(lines: list[str]) -> str:
    """The first line, and the others indented under it, within the terminal."""
    width = min(shutil.get_terminal_size().columns, 110)
    indents = ["", *["  "] * (len(lines) - 1)]
    return "\n".join(
        textwrap.fill(line, width, initial_indent=indent, subsequent_indent=f"{indent}  ")
        for line, indent in zip(lines, indents, strict=True)
    )


def settled_lines(profile: Profile) -> list[str]:
    """In which precision it ran, where that was asked for, and why it stopped, where the data decided that."""
    from vitprobe.frozen.dtype import dtype_line
    from vitprobe.profile.stopping import stopping_line

    stopping = profile.manifest.get("stopping")
    lines = [dtype_line(profile.manifest["forward_dtype"]), None if stopping is None else stopping_line(stopping)]
    return [line for line in lines if line is not None]
