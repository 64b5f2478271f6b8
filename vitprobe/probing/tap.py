"""`Tap`: where in a frozen model tokens are read."""

from __future__ import annotations

import re
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

    @classmethod
    def parse(cls, text: str) -> Tap:
        """Return the tap of a text such as `block11+norm`, as `str` writes it.

        Raises:
            ValueError: for another text.
        """
        match = re.fullmatch(r"block(\d+)(\+norm)?", text)
        if match is None:
            raise ValueError(f"{text!r} is no tap such as block11 or block11+norm")
        return cls(int(match[1]), match[2] is not None)

    def __str__(self) -> str:
        return f"block{self.block}" + ("+norm" if self.norm else "")
