"""A look at a source before it is read: whether a model can take it, and what a reader must know of it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import PurePosixPath

import numpy as np

from vitprobe.data.decoding import BadChannelsError, BadImageError, FileFacts, file_facts
from vitprobe.data.images import Images
from vitprobe.errors import UserError

LOOKED_AT = 64  # files at most, evenly over the source
_TRIED = 8  # images whose channels are looked at, where the first does not fit
_PLAIN = (".jpg", ".jpeg", ".bmp")  # one picture of 8 bits
_DARK = 0.25  # of the range; below, a picture of more than 8 bits looks nearly black


def look_at(images: Images, name: str) -> list[str]:
    """Remarks on what was left out of a source, on files of several pictures, and on pictures nearly black.

    Args:
        images: the source, for a model.
        name: the model's, for the message.

    Raises:
        UserError: where no image has channels that the model takes.
    """
    if not images.listed:
        return []
    _require_channels(images, name)
    facts = _facts(images)
    return [*images.left_out.describe(), *_frames(images, facts), *_depth(images, facts)]


def _require_channels(images: Images, name: str) -> None:
    reason = ""
    for index in _evenly(len(images), _TRIED):
        try:
            images.read(index)
            return
        except BadChannelsError as error:
            reason = str(error)
        except BadImageError:
            return  # the run skips and names it
    channels = images.wanted.channels
    raise UserError(
        f"{name} takes images of {channels} channel{'s' * (channels > 1)}, and those of {images.source} are others "
        f"({reason}): give --data of {channels} channel{'s' * (channels > 1)} (.npy, TIFF, tensors)"
    )


def _facts(images: Images) -> dict[int, FileFacts]:
    """The facts of some files, by position."""
    found = {}
    for index in _evenly(len(images), LOOKED_AT):
        if PurePosixPath(images.names[index]).suffix.lower() not in _PLAIN:
            with suppress(BadImageError):
                file = images.open(index)
                if file is not None:
                    with file:
                        found[index] = file_facts(file)
    return found


def _frames(images: Images, facts: dict[int, FileFacts]) -> list[str]:
    several = [index for index, fact in facts.items() if fact.frames > 1]
    if not several or images.wanted.channels not in (1, 3):  # pages may be bands
        return []
    first = several[0]
    return [
        f"{_of(len(several), images)} hold several pictures, of which the first is taken: {images.names[first]} has "
        f"{facts[first].frames}"
    ]


def _depth(images: Images, facts: dict[int, FileFacts]) -> list[str]:
    wide = {index: fact for index, fact in facts.items() if fact.largest is not None}
    largest = max((fact.largest or 0 for fact in wide.values()), default=1)
    if largest >= _DARK or images.wanted.stored:
        return []
    bits = max(fact.bits for fact in wide.values())
    values = f"{largest * 65535:.0f} of 65535" if bits <= 16 else f"{largest:.3g} of 1"
    return [
        f"the {bits}-bit pictures of {images.source} reach {values}, so the model sees them nearly black: save them "
        f"over the whole range, or give --mean and --std of the values in the files"
    ]


def _of(count: int, images: Images) -> str:
    looked = "" if len(images) <= LOOKED_AT else f"at least {count} of the {len(images)}"
    return f"{looked or count} files of {images.source}"


def _evenly(count: int, most: int) -> list[int]:
    """Up to so many positions, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(int)).tolist()
