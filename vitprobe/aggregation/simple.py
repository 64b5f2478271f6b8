"""Aggregators without weights to learn that read nothing but tokens: [cls], means, maxima, the middle of the grid."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from vitprobe.aggregation.base import Aggregator
from vitprobe.aggregation.batch import TokenBatch
from vitprobe.aggregation.choices import at_least
from vitprobe.aggregation.weighing import Tokens
from vitprobe.aggregation.weighted import WeightedPool
from vitprobe.errors import UserError
from vitprobe.layout import TokenLayout

Vector = Float[Tensor, "batch out"]
Weights = Float[Tensor, "batch query patch"]


class Cls(Aggregator):
    """The [cls] token."""

    needs_cls = True

    def forward(self, batch: TokenBatch) -> Vector:
        """The [cls] token, `(B, D)`."""
        return batch.cls


class Gap(WeightedPool):
    """The mean of the patch tokens."""

    def token_weights(self, batch: TokenBatch, keys: Tokens) -> Weights:
        """1/N for each of N patches."""
        return batch.tokens.new_full((len(batch), 1, batch.layout.num_patches), 1 / batch.layout.num_patches)


class ClsGap(Gap):
    """[cls], and after it the mean of the patch tokens: twice the width."""

    needs_cls = True

    def __init__(self, dim: int) -> None:
        super().__init__(dim, out_dim=2 * dim)

    def forward(self, batch: TokenBatch) -> Vector:
        """Both, `(B, 2·D)`."""
        return torch.cat([batch.cls, super().forward(batch)], dim=1)


class Max(Aggregator):
    """The largest number of each channel over the patches."""

    def forward(self, batch: TokenBatch) -> Vector:
        """The largest of each channel, `(B, D)`."""
        return batch.patches.amax(dim=1)

    def weights(self, batch: TokenBatch) -> Weights:
        """The share of channels whose largest number each patch has."""
        best = batch.patches.argmax(dim=1)
        shares = batch.tokens.new_zeros(len(batch), batch.layout.num_patches)
        return shares.scatter_add_(1, best, torch.full_like(best, 1 / self.dim, dtype=shares.dtype))[:, None]


class Gem(Aggregator):
    """The generalised mean of the patches (Radenović et al., arXiv 1711.02512): `(mean of x^p)^(1/p)` of each channel.

    p is fixed. As there, x is first raised to a small number above 0: what is negative counts as nothing.
    """

    def __init__(self, dim: int, *, p: float = 3.0, least: float = 1e-6) -> None:
        super().__init__(dim)
        at_least("p", p, 1)
        self.p, self.least = p, least

    def forward(self, batch: TokenBatch) -> Vector:
        """The generalised mean of each channel, `(B, D)`."""
        return self._powers(batch).mean(dim=1).pow(1 / self.p)

    def weights(self, batch: TokenBatch) -> Weights:
        """Each patch's share of the sum of powers, mean over channels."""
        powers = self._powers(batch)
        return (powers / powers.sum(dim=1, keepdim=True)).mean(dim=-1)[:, None]

    def _powers(self, batch: TokenBatch) -> Tensor:
        return batch.patches.clamp(min=self.least).pow(self.p)


class Center(WeightedPool):
    """The mean of the `size × size` patches in the middle of the grid; if need be, half a patch up or left.

    Published: `cp1` to `cp4` of beyond_cls. Not as there: the grid need not be square, and on a side of an odd number
    of patches an odd window lies in the middle (the script's lies one patch up and left).
    """

    def __init__(self, dim: int, size: int) -> None:
        super().__init__(dim)
        self.size = size

    def check(self, layout: TokenLayout, model: str) -> None:
        """Also that the grid is as large as the window."""
        super().check(layout, model)
        if min(layout.grid) < self.size:
            raise UserError(
                f"{self.name} reads {self.size}x{self.size} patches, {model} has {layout.grid[0]}x{layout.grid[1]}: "
                f"leave it out, or give larger images"
            )

    def window(self, layout: TokenLayout) -> list[slice]:
        """Of each row of the window, the patches' numbers, 0 to N − 1."""
        self.check(layout, "the model")
        (height, width), size = layout.grid, self.size
        top, left = (height - size) // 2, (width - size) // 2
        starts = [row * width + left for row in range(top, top + size)]
        return [slice(start, start + size) for start in starts]

    def token_weights(self, batch: TokenBatch, keys: Tokens) -> Weights:
        """1/size² in the window, 0 elsewhere."""
        weights = batch.tokens.new_zeros(len(batch), 1, batch.layout.num_patches)
        for row in self.window(batch.layout):
            weights[..., row] = 1 / self.size**2
        return weights
