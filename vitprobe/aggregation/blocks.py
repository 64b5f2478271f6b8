"""Aggregators that are whole Transformer blocks: V-JEPA's, CaiT's, and one ViT block."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitprobe.aggregation.base import Aggregator
from vitprobe.aggregation.batch import TokenBatch
from vitprobe.aggregation.choices import divides
from vitprobe.aggregation.parts import QueryAttention, mlp
from vitprobe.aggregation.queries import Queried
from vitprobe.aggregation.weighing import Tokens

Weights = Float[Tensor, "batch query token"]
Sums = Float[Tensor, "batch query dim"]
Vector = Float[Tensor, "batch out"]


class VJepa(Queried):
    """V-JEPA's attentive probe: a learned query attends to the layer-normed tokens, then an MLP; both with residuals.

    12·D² + 14·D parameters. Published: V-JEPA's `AttentivePooler`, with efficient-probing's 16 heads (its own default
    is 12).
    """

    def __init__(self, dim: int, *, tokens: str = "patches", heads: int = 16) -> None:
        super().__init__(dim, tokens, QueryAttention(dim, heads, ["q", "kv"]))
        self.norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mlp = mlp(dim)
        nn.init.trunc_normal_(self.query, std=0.02)
        narrower = (self.attention.out, self.mlp[2])  # what is added to the residual, as in that model's blocks
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02 / (2**0.5 if layer in narrower else 1))
                nn.init.zeros_(layer.bias)

    def keys(self, batch: TokenBatch) -> Tokens:
        """The tokens after a LayerNorm."""
        return Tokens.layer_normed(batch, self.tokens, self.norm)

    def project(self, sums: Sums) -> Vector:
        """The query, what the attention adds to it, what the MLP adds to that."""
        vector = self.query.flatten() + super().project(sums)
        return vector + self.mlp(self.mlp_norm(vector))


class Cait(Queried):
    """CaiT's class attention (Touvron et al., arXiv 2103.17239): a learned [cls] attends to itself and the tokens.

    One block with LayerScale and an MLP, and a LayerNorm at its end: 12·D² + 18·D parameters. Published:
    efficient-probing's `CAPooling`: CaiT's block, but one instead of two.
    """

    def __init__(self, dim: int, *, tokens: str = "patches", heads: int = 4, scale: float = 1e-5) -> None:
        super().__init__(dim, tokens, QueryAttention(dim, heads))
        nn.init.trunc_normal_(self.query, std=0.02)
        self.norm, self.mlp_norm = (nn.LayerNorm(dim, eps=1e-6) for _ in range(2))
        self.mlp, self.end_norm = mlp(dim), nn.LayerNorm(dim)
        self.scale, self.mlp_scale = (nn.Parameter(torch.full((dim,), scale)) for _ in range(2))

    def keys(self, batch: TokenBatch) -> Tokens:
        """The learned [cls] and the tokens, after a LayerNorm."""
        own = self.query.expand(len(batch), -1, -1)
        return Tokens(self.norm(torch.cat([own, batch.read(self.tokens)], dim=1)))

    def token_weights(self, batch: TokenBatch, keys: Tokens) -> Weights:
        """The weights of each head."""
        return self.attention.weights(self.norm(self.query).flatten(), keys)

    def project(self, sums: Sums) -> Vector:
        """The learned [cls] with what attention and MLP add, normed."""
        vector = self.query.flatten() + self.scale * super().project(sums)
        return self.end_norm(vector + self.mlp_scale * self.mlp(self.mlp_norm(vector)))


class VitBlock(Aggregator):
    """One more ViT block on the tokens, then their mean: 12·D² + 10·D parameters (q, k and v without biases).

    Published: efficient-probing's `DinoViTBlockPooling`, DINOv2's block without LayerScale.

    Args:
        dim: D, numbers a token.
        tokens: "patches", or "all" for [cls] and the patches.
        heads: heads; they must divide D.
    """

    def __init__(self, dim: int, *, tokens: str = "patches", heads: int = 8) -> None:
        super().__init__(dim, tokens)
        divides("heads", heads, dim)
        self.heads = heads
        self.norm, self.mlp_norm, self.mlp = nn.LayerNorm(dim), nn.LayerNorm(dim), mlp(dim)
        self.query_key_value, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)

    def forward(self, batch: TokenBatch) -> Vector:
        """The mean of the block's output."""
        tokens = batch.read(self.tokens)
        query, key, value = self._query_key_value(tokens)
        attended = F.scaled_dot_product_attention(query, key, value)
        tokens = tokens + self.out(attended.transpose(1, 2).flatten(2))
        return (tokens + self.mlp(self.mlp_norm(tokens))).mean(dim=1)

    def weights(self, batch: TokenBatch) -> Float[Tensor, "batch query patch"]:
        """What the tokens on average attend to, one set of weights a head."""
        query, key, _ = self._query_key_value(batch.read(self.tokens))
        attention = (query @ key.mT / key.shape[-1] ** 0.5).softmax(dim=-1)
        return attention.mean(dim=2)[..., -batch.layout.num_patches :]

    def _query_key_value(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Each `(B, heads, T, D/heads)`."""
        query_key_value = self.query_key_value(self.norm(tokens)).unflatten(-1, (3, self.heads, -1))
        return query_key_value.permute(2, 0, 3, 1, 4).unbind(0)
