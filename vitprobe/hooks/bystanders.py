"""Lists of blocks that a model has besides those that are watched: which of them run."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from torch import nn

from vitprobe.models.anatomy.parts import Anatomy


class Bystanders:
    """The other lists of blocks of a model, for the message when those that were taken do not run.

    Attributes:
        ran: Python expressions for the lists that have run, of `model`.
    """

    def __init__(self, anatomy: Anatomy) -> None:
        self._others = anatomy.others
        self.ran: list[str] = []

    def watch(self, stack: ExitStack) -> None:
        """Note which lists run, until the stack ends."""
        for expression, block in self._others:

            def began(module: nn.Module, args: tuple[Any, ...], expression: str = expression) -> None:
                if expression not in self.ran:
                    self.ran.append(expression)

            stack.callback(block.register_forward_pre_hook(began).remove)

    def advice(self, name: str, block: int) -> str:
        """The line that says which blocks ran instead of the block that was to be read."""
        return (
            f"{name} ran, but not its block {block} of those that were taken; other blocks ran: choose them with "
            f"load_model(model, blocks={' or blocks='.join(self.ran)})"
        )
