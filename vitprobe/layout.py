"""Which position of a token sequence is what: [cls], distillation, registers, patches on their grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from vitprobe.errors import UserError


@dataclass(frozen=True)
class TokenLayout:
    """Where each kind of token stands in the sequence of a Vision Transformer; patches run row by row.

    By default [cls] comes first, then distillation tokens, registers, and the patches. `positions` says any other
    order: `TokenLayout((14, 14), has_cls=True, positions=(-1,))` has [cls] behind its patches.

    Attributes:
        grid: `(height, width)`, rows and columns of the patch grid.
        has_cls: whether one token is [cls] (a register at position 0 is not one).
        num_distillation: number of distillation tokens, default 0.
        num_registers: number of registers, default 0; detection and prompt tokens count as registers.
        patch_size: `(height, width)` in pixels from one patch to the next, default (16, 16).
        positions: positions of [cls], the distillation tokens and the registers, in this order; negative ones count
            from the end. Default None: they come first, in this order. Patches take the remaining positions.

    Example:
        >>> layout = TokenLayout((14, 14), has_cls=True, num_registers=4)
        >>> layout.num_tokens, layout.patches, layout.image_size
        (201, slice(5, 201, None), (224, 224))
        >>> print(TokenLayout((14, 14), has_cls=True, positions=(-1,)))
        [cls] at 196 + 14x14 patches
    """

    grid: tuple[int, int]
    has_cls: bool
    num_distillation: int = 0
    num_registers: int = 0
    patch_size: tuple[int, int] = field(default=(16, 16))
    positions: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Bring `positions` into the one form of each order, which holds for every grid.

        Raises:
            UserError: where `positions` names not each of these tokens once.
        """
        if self.positions is None:
            return
        found = tuple(position + self.num_tokens * (position < 0) for position in self.positions)
        each_once = len(set(found)) == len(found) == self.num_prefix_tokens
        if not each_once or not all(0 <= place < self.num_tokens for place in found):
            raise UserError(
                f"positions={tuple(self.positions)} of a layout names each of its {self.num_prefix_tokens} [cls], "
                f"distillation and register tokens once, from 0 to {self.num_tokens - 1} or negative from the end"
            )
        patches = sorted(set(range(self.num_tokens)) - set(found))
        behind = patches[-1] if patches else self.num_tokens
        found = tuple(place - self.num_tokens * (place > behind) for place in found)
        object.__setattr__(self, "positions", None if found == tuple(range(len(found))) else found)

    def __str__(self) -> str:
        if self.positions is None:
            return f"{self.num_prefix_tokens} prefix + {self.grid[0]}x{self.grid[1]} patches"
        return f"{self.described} + {self.grid[0]}x{self.grid[1]} patches"

    @property
    def described(self) -> str:
        """Where each kind of token but patches stands, in words: "[cls] at 0, registers at 17 to 21"."""
        kinds = (
            ("[cls]", [0] if self.has_cls else []),
            ("distillation", range(int(self.has_cls), int(self.has_cls) + self.num_distillation)),
            ("registers", range(self.num_prefix_tokens - self.num_registers, self.num_prefix_tokens)),
        )
        return ", ".join(f"{kind} at {_ranges([self.special[of] for of in which])}" for kind, which in kinds if which)

    @property
    def num_prefix_tokens(self) -> int:
        """[cls], distillation and register tokens together, wherever they stand."""
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
    def special(self) -> tuple[int, ...]:
        """Positions, from 0, of [cls], the distillation tokens and the registers, in this order."""
        if self.positions is None:
            return tuple(range(self.num_prefix_tokens))
        return tuple(position + self.num_tokens * (position < 0) for position in self.positions)

    @property
    def cls(self) -> int:
        """Position of [cls].

        Raises:
            UserError: where there is none.
        """
        if not self.has_cls:
            raise UserError("these tokens have no [cls]: read the patches")
        return self.special[0]

    @property
    def patches(self) -> slice | list[int]:
        """Positions of the patch tokens, to index an axis of tokens with."""
        if self.positions is None:
            return slice(self.num_prefix_tokens, self.num_tokens)
        return _index(sorted(set(range(self.num_tokens)) - set(self.special)))

    @property
    def registers(self) -> slice | list[int]:
        """Positions of the registers (none where there are none), to index an axis of tokens with."""
        return _index(sorted(self.special[self.num_prefix_tokens - self.num_registers :]))

    def of_grid(self, grid: tuple[int, int]) -> TokenLayout:
        """The same order of tokens for another grid of patches.

        Raises:
            UserError: where a [cls], distillation or register token stands among the patches, so that its place in
                another grid is not known.
        """
        if grid != self.grid and self.positions is not None:
            patches = self.patches
            if isinstance(patches, list):
                raise UserError(
                    f"the layout has tokens among its {self.grid[0]}x{self.grid[1]} patches ({self.described}), so "
                    f"where they stand among {grid[0]}x{grid[1]} is not known: give the layout of this grid"
                )
        return replace(self, grid=grid)

    @property
    def canonical(self) -> TokenLayout:
        """The layout of the same tokens in the order [cls], distillation, registers, patches."""
        return self if self.positions is None else replace(self, positions=None)

    @cached_property
    def order(self) -> Tensor | None:
        """`(T,)` where each token of the canonical order stands; None where they stand in it."""
        if self.positions is None:
            return None
        patches = sorted(set(range(self.num_tokens)) - set(self.special))
        return torch.tensor([*self.special, *patches])

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the image that the patches tile, in pixels (patches that overlap reach beyond it)."""
        return self.grid[0] * self.patch_size[0], self.grid[1] * self.patch_size[1]

    @cached_property
    def centers(self) -> Float[Tensor, "patch 2"]:
        """Row and column of each patch on the grid, in patches."""
        rows, columns = torch.meshgrid(torch.arange(self.grid[0]), torch.arange(self.grid[1]), indexing="ij")
        return torch.stack([rows.flatten(), columns.flatten()], dim=1).float()

    @property
    def diagonal(self) -> float:
        """The largest distance between two patches of the grid, in patches."""
        return ((self.grid[0] - 1) ** 2 + (self.grid[1] - 1) ** 2) ** 0.5


def layout_from(described: dict) -> TokenLayout:
    """The layout that a manifest holds, as `dataclasses.asdict` and JSON wrote it."""
    tuples = {name: tuple(value) for name, value in described.items() if isinstance(value, list)}
    return TokenLayout(**{**described, **tuples})


def reordered(tensor: Tensor, layout: TokenLayout, dim: int) -> Tensor:
    """A tensor whose axis `dim` runs over a model's tokens, in canonical order along that axis."""
    return tensor if layout.order is None else tensor.index_select(dim, layout.order.to(tensor.device))


def reordered_pairs(tensor: Tensor, layout: TokenLayout) -> Tensor:
    """`(…, N, N)` of each query and key in canonical order; an axis of length 1, which is broadcast, stays."""
    for dim in (-2, -1):
        if tensor.shape[dim] > 1:
            tensor = reordered(tensor, layout, dim)
    return tensor


def restored(tensor: Tensor, layout: TokenLayout, dim: int) -> Tensor:
    """The inverse of `reordered`: from the canonical order to the model's."""
    return tensor if layout.order is None else tensor.index_select(dim, layout.order.argsort().to(tensor.device))


def _index(positions: list[int]) -> slice | list[int]:
    """A slice where positions follow each other, which makes views instead of copies."""
    if not positions:
        return slice(0, 0)
    whole = positions == list(range(positions[0], positions[-1] + 1))
    return slice(positions[0], positions[-1] + 1) if whole else positions


def _ranges(positions: Sequence[int]) -> str:
    """Positions in words: "0", "17 to 21"."""
    index = _index(sorted(positions))
    if isinstance(index, list):
        return ", ".join(map(str, index))
    return str(index.start) if index.stop - index.start == 1 else f"{index.start} to {index.stop - 1}"
