"""`TokenBatch`: what a frozen block gave for a batch of images, from which aggregators take one vector an image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from vitprobe.attention.view import AttentionView
from vitprobe.errors import UserError
from vitprobe.layout import TokenLayout

Which = Literal["patches", "all"]


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """The tokens of a batch after one block of a frozen model.

    What several aggregators need of them (patches, variances, moments) is computed once and kept.

    Attributes:
        tokens: the block's output, all tokens, `(B, T, D)`.
        layout: which position is what.
        attention: the attention inside that block; None where nobody asked for it.
        oracles: for each other model that an aggregator names, its last block's [cls] attention over its patches,
            `(B, heads, N)`, not renormalised.
    """

    tokens: Float[Tensor, "batch token dim"]
    layout: TokenLayout
    attention: AttentionView | None = None
    oracles: Mapping[str, Float[Tensor, "batch head patch"]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def cls(self) -> Float[Tensor, "batch dim"]:
        """The [cls] token of each image."""
        self._check_cls()
        return self.tokens[:, 0]

    @cached_property
    def patches(self) -> Float[Tensor, "batch patch dim"]:
        """The patch tokens of each image, row by row of the grid; without gaps, as every product would close them."""
        return self.tokens[:, self.layout.patches].contiguous()

    @cached_property
    def cls_and_patches(self) -> Float[Tensor, "batch token dim"]:
        """[cls], then the patch tokens; no registers, no distillation token."""
        return self._cls_and_patches(self.tokens)

    def read(self, which: Which) -> Float[Tensor, "batch token dim"]:
        """The patch tokens, or with "all" [cls] before them."""
        return self.patches if which == "patches" else self.cls_and_patches

    def variance(self, which: Which) -> Float[Tensor, "batch token"]:
        """The variance of each of these tokens over its D numbers, which LayerNorm divides by."""
        if which == "patches":
            return self._variance[:, self.layout.patches]
        return self._cls_and_patches(self._variance)

    def moments(self, which: Which) -> tuple[Float[Tensor, " dim"], Float[Tensor, " dim"]]:
        """Mean and (biased) variance of each channel over these tokens of all images, which BatchNorm uses."""
        return self._patch_moments if which == "patches" else self._all_moments

    @cached_property
    def _variance(self) -> Tensor:
        return self.tokens.var(dim=-1, correction=0)

    @cached_property
    def _patch_moments(self) -> tuple[Tensor, Tensor]:
        return _moments(self.patches)

    @cached_property
    def _all_moments(self) -> tuple[Tensor, Tensor]:
        return _moments(self.cls_and_patches)

    def _check_cls(self) -> None:
        if not self.layout.has_cls:
            raise UserError("these tokens have no [cls]: read the patches")

    def _cls_and_patches(self, values: Tensor) -> Tensor:
        self._check_cls()
        if self.layout.num_prefix_tokens == 1:
            return values
        return torch.cat([values[:, :1], values[:, self.layout.patches]], dim=1)


def _moments(tokens: Tensor) -> tuple[Tensor, Tensor]:
    variance, mean = torch.var_mean(tokens, dim=(0, 1), correction=0)
    return mean, variance
