"""The attention poolers of models trained with text: CLIP's, SigLIP's, CoCa's."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitprobe.aggregation.batch import TokenBatch
from vitprobe.aggregation.choices import at_least
from vitprobe.aggregation.parts import QueryAttention, mlp
from vitprobe.aggregation.queries import Queried
from vitprobe.aggregation.weighing import Tokens
from vitprobe.aggregation.weighted import WeightedPool
from vitprobe.errors import UserError
from vitprobe.layout import TokenLayout

Weights = Float[Tensor, "batch query token"]
Sums = Float[Tensor, "batch query dim"]
Vector = Float[Tensor, "batch out"]


class Clip(WeightedPool):
    """CLIP's attention pool: the mean of the layer-normed tokens attends to itself and to them, each with a position.

    4·D² + (N + 7)·D parameters for N tokens. Published: efficient-probing's `poolings/clip/attention_pool2d.py`,
    which adds a LayerNorm to timm's `AttentionPool2d`. Not as there: the grid need not be square, and `_all` works.

    Args:
        dim: D, numbers a token.
        layout: says how many tokens there are, as each has its learned position.
        tokens: "patches" or "all".
        heads: heads; they must divide D.
    """

    def __init__(self, dim: int, layout: TokenLayout | None, *, tokens: str = "patches", heads: int = 4) -> None:
        super().__init__(dim, tokens)
        if layout is None:
            raise UserError("clip learns a position for each token: say how many there are, with layout=")
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.position = nn.Parameter(torch.empty(1 + self.needs_cls + layout.num_patches, dim))
        self.attention = QueryAttention(dim, heads, ["qkv"])
        linear = self.attention.linear("qkv")
        for parameter in (self.position, linear.weight):
            nn.init.trunc_normal_(parameter, std=dim**-0.5)
        nn.init.zeros_(linear.bias)

    def keys(self, batch: TokenBatch) -> Tokens:
        """The mean, then the tokens, each with its position."""
        tokens = self.norm(batch.read(self.tokens))
        if len(self.position) != tokens.shape[1] + 1:
            raise UserError(
                f"{self.name} was made for {len(self.position) - 1} tokens, not {tokens.shape[1]}: make another, "
                f"or give images of the size it was made for"
            )
        return Tokens(torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1) + self.position)

    def token_weights(self, batch: TokenBatch, keys: Tokens) -> Weights:
        """The weights of each head for the query that the mean is."""
        return self.attention.weights(keys.values[:, 0], keys)

    def project(self, sums: Sums) -> Vector:
        """What the attention gives."""
        return self.attention.project(sums)


class Siglip(Queried):
    """SigLIP's pooling head: a learned query over the raw tokens, and an MLP with a residual but no norm before it.

    12·D² + 10·D parameters. Published: timm's `AttentionPoolLatent` with its defaults, as efficient-probing uses it.
    Its query is drawn from a normal distribution cut at two deviations of 1/√D, so its own deviation is 0.88/√D. The
    head inside SigLIP models differs: it has a LayerNorm before the MLP and draws with Xavier's rule.
    """

    def __init__(self, dim: int, *, tokens: str = "patches", heads: int = 8) -> None:
        super().__init__(dim, tokens, QueryAttention(dim, heads, ["q", "kv"]))
        std = dim**-0.5
        nn.init.trunc_normal_(self.query, std=std, a=-2 * std, b=2 * std)
        self.mlp = mlp(dim)

    def project(self, sums: Sums) -> Vector:
        """What the attention gives, and what the MLP adds to it."""
        vector = super().project(sums)
        return vector + self.mlp(vector)


class Coca(WeightedPool):
    """CoCa's attentional pooler: learned queries, several heads of them for one head of keys and values.

    196·D + 1153·D parameters. Published: `CrossAttention` of coca-pytorch, as efficient-probing uses it. As there,
    only the first query is ever read. The others are kept for their share in the norm that LARS divides by;
    `queries=1` is the same function without them.

    Args:
        dim: D, numbers a token.
        tokens: "patches" or "all".
        queries: learned queries.
        heads: heads of the query.
        head_dim: numbers a head.
    """

    def __init__(
        self, dim: int, *, tokens: str = "patches", queries: int = 196, heads: int = 8, head_dim: int = 64
    ) -> None:
        super().__init__(dim, tokens)
        for option, value in (("queries", queries), ("heads", heads), ("head_dim", head_dim)):
            at_least(option, value, 1)
        self.queries = nn.Parameter(torch.randn(queries, dim))
        self.norm = nn.LayerNorm(dim, bias=False)
        self.query = nn.Linear(dim, heads * head_dim, bias=False)
        self.key_value = nn.Linear(dim, 2 * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, dim, bias=False)
        self.head_dim = head_dim

    def token_weights(self, batch: TokenBatch, keys: Tokens) -> Weights:
        """The weights of each head of the first query."""
        query = self.query(self.norm(self.queries[0])).view(-1, self.head_dim) / self.head_dim**0.5
        return keys.products(query @ self.key_value.weight[: self.head_dim]).softmax(dim=-1)

    def project(self, sums: Sums) -> Vector:
        """The values of all heads, joined and projected."""
        return self.out((sums @ self.key_value.weight[self.head_dim :].T).flatten(1))
