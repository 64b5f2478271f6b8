"""`Tap`: where in a frozen model tokens are read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Tap:
    """A place at which tokens are read.

    Attributes:
        block: the block whose output is read, from 0; its number, never -1.
        norm: whether the model's final norm is applied to what was read.
    """

    block: int
    norm: bool = False

    def __str__(self) -> str:
        return f"block{self.block}" + ("+norm" if self.norm else "")
