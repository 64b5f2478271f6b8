"""Writing a run's files so that a kill or a full disk leaves each one whole or absent."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vitprobe.errors import UserError

PARTIAL = ".partial"


def partial_of(path: Path) -> Path:
    """What a file is called while it is being written."""
    return path.with_name(f".{path.name}{PARTIAL}")


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path` through a temporary file beside it.

    Raises:
        UserError: where the disk is full or the place is not writable; nothing is left of the file then.
    """
    partial = partial_of(path)
    with disk_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def free_bytes(folder: Path) -> int:
    """What the disk has free on which a folder is, or would be made."""
    folder = folder.absolute()
    return shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the errors of a disk that takes no more, or no files of ours, into one line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"the disk is full, so {path} could not be written; free some space or choose another folder (--out)"
            ) from None
        raise UserError(
            f"{path} could not be written ({error.strerror or error}); choose another folder (--out)"
        ) from None
