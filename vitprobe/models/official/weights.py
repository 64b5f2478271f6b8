"""From a file in an official layout to the module it belongs to."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from vitprobe.errors import UserError
from vitprobe.models.building import ImageSize, build, outline
from vitprobe.models.checkpoints import classifier_size, load_into, open_checkpoint
from vitprobe.models.official.checks import require_layout
from vitprobe.models.official.converters import CONVERTERS
from vitprobe.models.official.entries import LAYOUTS, OfficialCheckpoint


def load_official(
    entry: OfficialCheckpoint, path: Path, *, img_size: ImageSize = None, hint: str = "", weights_key: str | None = None
) -> tuple[nn.Module, tuple[str, ...]]:
    """An official checkpoint's architecture with the weights of a file, in train mode, and what to say of them.

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
    source = str(path)
    try:
        found = open_checkpoint(path, key=weights_key)
        state = CONVERTERS[entry.layout](found.state)
    except UserError as error:
        raise UserError(f"{error}; {hint}" if hint else str(error)) from error
    require_layout(entry, state, source)
    classes = classifier_size(state, outline(entry.spec.name, img_size=img_size))
    module = build(entry.spec.name, img_size=img_size, num_classes=classes)
    hint = (hint or f"its keys should be {LAYOUTS[entry.layout]}") + found.choice
    return module, found.remarks + load_into(module, state, source=source, hint=hint)
