"""Checks of options: one line that says what came, and what would do."""

from __future__ import annotations

from collections.abc import Sequence

from vitprobe.errors import UserError


def one_of(option: str, value: str, choices: Sequence[str]) -> str:
    """The value.

    Raises:
        UserError: for one that is none of the choices.
    """
    if value not in choices:
        raise UserError(f"{option} is one of {', '.join(choices)}, not {value!r}")
    return value


def at_least(option: str, value: int | float, least: int | float) -> None:
    """Raises a UserError for a value below the least."""
    if not value >= least:
        raise UserError(f"{option} must be at least {least}, not {value}")


def divides(option: str, parts: int, whole: int, what: str = "the width") -> int:
    """The size of each part.

    Raises:
        UserError: where parts do not divide the whole; names those that do.
    """
    if parts < 1 or whole % parts:
        fitting = [str(number) for number in range(1, min(whole, 64) + 1) if whole % number == 0]
        raise UserError(f"{option}={parts} does not divide {what} {whole}: choose one of {', '.join(fitting)}")
    return whole // parts
