"""Load a file in an official layout into the module that it belongs to."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from vitprobe.errors import UserError
from vitprobe.models.building import ImageSize, build, outline
from vitprobe.models.checkpoints import classifier_size, load_into, open_checkpoint
from vitprobe.models.official.entries import OfficialCheckpoint
from vitprobe.models.official.layouts import LAYOUTS


def load_official(
    entry: OfficialCheckpoint, path: Path, *, img_size: ImageSize = None, hint: str = "", weights_key: str | None = None
) -> tuple[nn.Module, tuple[str, ...]]:
    """Load an official checkpoint's file: its architecture with these weights, in train mode, and remarks on them.

    Keeps a classifier where the file has one. Position embeddings and tables are resampled to the image size.

    Args:
        entry: what the file is.
        path: the file.
        img_size: pixels, a side or (height, width); the architecture's own by default.
        hint: what the message of a file that does not fit says to do.
        weights_key: which of several sets of weights in it.

    Raises:
        UserError: for a file that cannot be read, that is another model's, or that does not fit.
    """
    source, layout = str(path), LAYOUTS[entry.layout]
    try:
        found = open_checkpoint(path, key=weights_key)
        state = layout.convert(found.state)
    except UserError as error:
        raise UserError(f"{error}; {hint}" if hint else str(error)) from error
    layout.check(entry, state, source)
    classes = classifier_size(state, outline(entry.spec.name, img_size=img_size))
    module = build(entry.spec.name, img_size=img_size, num_classes=classes)
    hint = (hint or f"its keys should be {layout.words}") + found.choice
    return module, found.remarks + load_into(module, state, source=source, hint=hint)
