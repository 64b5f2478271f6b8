"""Which position of a token sequence is what: [cls], distillation, registers, patches on their grid."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class TokenLayout:
    """The order of tokens in a Vision Transformer: prefix tokens first, then the patches row by row.

    Attributes:
        grid: rows and columns of the patch grid, `(height, width)`.
        has_cls: whether position 0 is a [cls] token (a register at position 0 is not one).
        num_distillation: distillation tokens; they follow [cls].
        num_registers: registers; they are the last prefix tokens.
        patch_size: pixels an edge of one patch, `(height, width)`.
    """

    grid: tuple[int, int]
    has_cls: bool
    num_distillation: int = 0
    num_registers: int = 0
    patch_size: tuple[int, int] = field(default=(16, 16))

    def __str__(self) -> str:
        return f"{self.num_prefix_tokens} prefix + {self.grid[0]}x{self.grid[1]} patches"

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the image that the patches tile, in pixels."""
        return self.grid[0] * self.patch_size[0], self.grid[1] * self.patch_size[1]

    @property
    def num_prefix_tokens(self) -> int:
        """[cls], distillation and register tokens together."""
        return int(self.has_cls) + self.num_distillation + self.num_registers

    @property
    def num_patches(self) -> int:
        """Patches: rows times columns of the grid."""
        return self.grid[0] * self.grid[1]

    @property
    def num_tokens(self) -> int:
        """The length of the sequence."""
        return self.num_prefix_tokens + self.num_patches

    @property
    def patches(self) -> slice:
        """Positions of the patch tokens."""
        return slice(self.num_prefix_tokens, self.num_tokens)

    @property
    def registers(self) -> slice:
        """Positions of the registers (empty where there are none)."""
        return slice(self.num_prefix_tokens - self.num_registers, self.num_prefix_tokens)

    @cached_property
    def centers(self) -> Float[Tensor, "patch 2"]:
        """Row and column of each patch on the grid, in patches."""
        rows, columns = torch.meshgrid(torch.arange(self.grid[0]), torch.arange(self.grid[1]), indexing="ij")
        return torch.stack([rows.flatten(), columns.flatten()], dim=1).float()

    @property
    def diagonal(self) -> float:
        """The largest distance between two patches of the grid, in patches."""
        return ((self.grid[0] - 1) ** 2 + (self.grid[1] - 1) ** 2) ** 0.5
