"""`AbMilp`: attention-based multiple instance learning (Ilse et al., arXiv 1802.04712), the paper's aggregator."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitprobe.aggregation.batch import TokenBatch
from vitprobe.aggregation.choices import at_least, one_of
from vitprobe.aggregation.weighing import Tokens
from vitprobe.aggregation.weighted import WeightedPool
from vitprobe.errors import UserError

ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh}


class AbMilp(WeightedPool):
    """Each token gets a score from a small network; the vector is the sum of tokens under the softmax of the scores.

    Published: beyond_cls's `abmilp.py`. The defaults are those of the paper's command (depth 1, patches alone, no
    self-attention), not those of the script. Not as there: the table of positions is fixed (the script trains it by
    mistake), and the first patch is read where there is no [cls] before it (the script drops it).

    Args:
        dim: D, numbers a token.
        tokens: "patches" or "all" (the paper's content).
        depth: linear layers of the network; with 1, a score is one product with the token: D + 1 parameters, of which
            the bias cancels in the softmax.
        activation: between the layers, "relu" or "tanh".
        self_attention: "none"; "map": scores are of tokens after one head of self-attention; "both": so are the
            tokens that are summed.
        conditioning: "none", or "position": a fixed sine-cosine table of the grid is added to what scores are of.
    """

    def __init__(
        self,
        dim: int,
        *,
        tokens: str = "patches",
        depth: int = 1,
        activation: str = "relu",
        self_attention: str = "none",
        conditioning: str = "none",
    ) -> None:
        super().__init__(dim, tokens)
        at_least("depth", depth, 1)
        kind = ACTIVATIONS[one_of("activation", activation, list(ACTIVATIONS))]
        self.self_attention = one_of("self_attention", self_attention, ("none", "map", "both"))
        self.conditioning = one_of("conditioning", conditioning, ("none", "position"))
        if conditioning == "position" and dim % 4:
            raise UserError(f"positions are sines and cosines of row and column: the width {dim} is no multiple of 4")
        self.attention = None if self_attention == "none" else SelfAttention(dim)
        hidden = [layer for _ in range(depth - 1) for layer in (nn.Linear(dim, dim), kind())]
        self.score = nn.Sequential(*hidden, nn.Linear(dim, 1))

    def keys(self, batch: TokenBatch) -> Tokens:
        """The tokens, or what self-attention makes of them."""
        tokens = batch.read(self.tokens)
        return Tokens(tokens if self.attention is None else self.attention(tokens))

    def values(self, batch: TokenBatch, keys: Tokens) -> Tokens:
        """The tokens themselves, unless self-attention is for both."""
        return Tokens(batch.read(self.tokens)) if self.self_attention == "map" else keys

    def token_weights(self, batch: TokenBatch, keys: Tokens) -> Float[Tensor, "batch query token"]:
        """The softmax of the scores."""
        scored = keys.values
        if self.conditioning == "position":
            table = sine_cosine_table(batch.layout.grid, self.dim).to(scored)
            scored = scored + F.pad(table, (0, 0, scored.shape[1] - len(table), 0))  # [cls] has no place
        return self.score(scored).mT.softmax(dim=-1)


class SelfAttention(nn.Module):
    """One head of self-attention as wide as the tokens, without a residual and a norm: 4·D² + D parameters."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query_key_value = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim)

    def forward(self, tokens: Float[Tensor, "batch token dim"]) -> Float[Tensor, "batch token dim"]:
        """What each token gathers from all."""
        query, key, value = self.query_key_value(tokens).chunk(3, dim=-1)
        return self.out(F.scaled_dot_product_attention(query, key, value))


@cache
def sine_cosine_table(grid: tuple[int, int], dim: int) -> Float[Tensor, "patch dim"]:
    """MAE's table of positions: for the column and then the row of each patch, D/4 sines and D/4 cosines.

    A constant of the grid, float64, on the CPU: nothing that could be trained.
    """
    rows, columns = (axis.flatten() for axis in torch.meshgrid(*map(torch.arange, grid), indexing="ij"))
    frequencies = 10000 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = [place.double()[:, None] * frequencies for place in (columns, rows)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)
