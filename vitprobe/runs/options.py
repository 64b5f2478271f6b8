"""Arguments that the long commands share: checked before anything is loaded, and as a manifest holds them."""

from __future__ import annotations

from numbers import Integral
from pathlib import Path
from typing import Any

from vitprobe.data.images import printable
from vitprobe.errors import UserError
from vitprobe.models.building import pair


def check_whole(**numbers: tuple[Any, int]) -> None:
    """Returns where every number is None or a whole number of at least its least.

    Args:
        **numbers: by the argument's name, its value and the least.

    Raises:
        UserError: for the first that is not.
    """
    for name, (number, least) in numbers.items():
        if number is not None and not (isinstance(number, Integral) and int(number) >= least):
            raise UserError(f"{name} is {number!r}; it must be a whole number of at least {least}")


def check_resume(resume: bool, overwrite: bool, out: Any) -> None:
    """Returns where resuming makes sense.

    Raises:
        UserError: where it is asked for without a folder, or together with overwriting.
    """
    if resume and (overwrite or out is None):
        reason = (
            "--overwrite starts anew: give one of the two" if overwrite else "that needs its folder: give --out too"
        )
        raise UserError(f"--resume goes on with a run, and {reason}")


def size_of(img_size: Any) -> int | tuple[int, int] | None:
    """An image size as `load_model` takes it: a list, as JSON holds a pair, becomes one.

    Raises:
        UserError: for what is no size.
    """
    size = tuple(img_size) if isinstance(img_size, list) else img_size
    if size is not None:
        pair(size)
    return size


def shown_size(img_size: int | tuple[int, int] | None) -> int | list[int] | None:
    """An image size as a manifest holds it."""
    return list(img_size) if isinstance(img_size, tuple) else img_size


def shown(thing: Any) -> str | None:
    """An argument as the manifest holds it: text as it is, made printable; of anything else its type."""
    if thing is None:
        return None
    if isinstance(thing, str | Path):
        return printable(str(thing))
    return type(getattr(thing, "module", thing)).__name__
