"""The progress bar of a long command."""

from __future__ import annotations

import sys

# Plain text also in a notebook: tqdm's widget there needs ipywidgets, and warns without.
from tqdm import tqdm


def progress_bar(words: str, total: int | None, progress: bool | None, *, done: int = 0) -> tqdm:
    """A bar of images, `done` of them already; shown where asked for, by default on a terminal and in a notebook."""
    shown = (sys.stderr and sys.stderr.isatty()) or "ipykernel" in sys.modules if progress is None else progress
    return tqdm(total=total, initial=done, desc=words, unit="img", disable=not shown, dynamic_ncols=True)
