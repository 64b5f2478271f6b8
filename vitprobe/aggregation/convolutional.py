"""Aggregators that come from convolutional networks: CBAM and DOLG. Any grid will do, square or not."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitprobe.aggregation.base import Aggregator
from vitprobe.aggregation.batch import TokenBatch

Vector = Float[Tensor, "batch out"]
Weights = Float[Tensor, "batch query patch"]


class Cbam(Aggregator):
    """CBAM (Woo et al., arXiv 1807.06521): a gate a channel, a gate a patch, the patches added again, ReLU, mean.

    D²/8 + 100 parameters. Published: timm's CBAM, as efficient-probing's `poolings/cbam.py` uses it. Its 1×1
    convolutions are linear layers here: the same numbers. Not as there: the grid need not be square.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        hidden = max(1, int(dim / 16 + 0.5))
        self.channel = nn.Sequential(nn.Linear(dim, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, dim, bias=False))
        self.spatial = nn.Sequential(nn.Conv2d(2, 1, 7, padding=3, bias=False), nn.BatchNorm2d(1))

    def forward(self, batch: TokenBatch) -> Vector:
        """The mean of what the gates leave."""
        gated, gate = self._gates(batch)
        return F.relu(gated * gate + batch.patches).mean(dim=1)

    def weights(self, batch: TokenBatch) -> Weights:
        """The gate of each patch, 0 to 1: these do not sum to 1."""
        return self._gates(batch)[1].mT

    def _gates(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """The patches under the gates of their channels `(B, N, D)`, and the gates of patches `(B, N, 1)`."""
        patches = batch.patches
        channels = self.channel(patches.mean(dim=1)) + self.channel(patches.amax(dim=1))
        gated = patches * channels.sigmoid()[:, None]
        picture = torch.stack([gated.mean(dim=-1), gated.amax(dim=-1)], dim=1).unflatten(-1, batch.layout.grid)
        return gated, self.spatial(picture).flatten(2).mT.sigmoid()


class Dolg(Aggregator):
    """DOLG's local branch (Yang et al., arXiv 2108.02927): projected tokens of length 1, weighted, mean.

    D² + 4·D + 1 parameters. Published: efficient-probing's `poolings/dolg/dolg.py`, without atrous pooling. Its 1×1
    convolutions are linear layers here: the same numbers. Not as there: `_all` works, and the grid need not be square.
    """

    def __init__(self, dim: int, *, tokens: str = "patches") -> None:
        super().__init__(dim, tokens)
        self.projection, self.norm, self.score = nn.Linear(dim, dim), nn.BatchNorm1d(dim), nn.Linear(dim, 1)
        for layer in (self.projection, self.score):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out")

    def forward(self, batch: TokenBatch) -> Vector:
        """The mean of the weighted tokens of length 1."""
        projected, weights = self._projected(batch)
        return (weights @ F.normalize(projected, dim=-1))[:, 0] / projected.shape[1]

    def weights(self, batch: TokenBatch) -> Weights:
        """What each patch is multiplied by, above 0: these do not sum to 1."""
        return self._projected(batch)[1][..., -batch.layout.num_patches :]

    def _projected(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """The projected tokens `(B, T, D)` and their weights `(B, 1, T)`."""
        projected = self.norm(self.projection(batch.read(self.tokens)).mT).mT
        return projected, F.softplus(self.score(projected.relu())).mT
