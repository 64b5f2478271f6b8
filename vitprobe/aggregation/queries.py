"""Learned queries over frozen tokens, and nothing after but a small matrix: EP, CAPI, AIM, CAE, SimPool."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitprobe.aggregation.batch import TokenBatch
from vitprobe.aggregation.choices import divides
from vitprobe.aggregation.parts import QueryAttention
from vitprobe.aggregation.token_norm import TokenNorm
from vitprobe.aggregation.weighing import Tokens, grouped
from vitprobe.aggregation.weighted import WeightedPool

Weights = Float[Tensor, "batch query token"]
Sums = Float[Tensor, "batch query dim"]
Vector = Float[Tensor, "batch out"]


class EfficientProbing(WeightedPool):
    """EP: Q learned queries weigh the raw tokens; query q gives the q-th group of channels of the projected sum.

    D²/d_out + Q·D parameters. Published: efficient-probing's `poolings/ep.py`, of which this is the same function.
    (Its text speaks of averaged queries and of values as they are; its code does what is done here.)

    Args:
        dim: D, numbers a token.
        tokens: "patches" or "all".
        queries: Q; it must divide D/d_out.
        d_out: how many times narrower than D the vector is.
    """

    def __init__(self, dim: int, *, tokens: str = "patches", queries: int = 32, d_out: int = 1) -> None:
        super().__init__(dim, tokens, divides("d_out", d_out, dim))
        divides("queries", queries, self.out_dim, "the width" if d_out == 1 else "the vector's width")
        self.queries = nn.Parameter(0.02 * torch.randn(queries, dim))
        self.value = nn.Linear(dim, self.out_dim, bias=False)

    def token_weights(self, batch: TokenBatch, keys: Tokens) -> Weights:
        """Of each query, the softmax over tokens of `u·x/√D`."""
        return keys.products(self.queries / self.dim**0.5).softmax(dim=-1)

    def project(self, sums: Sums) -> Vector:
        """Of each sum, its group of channels."""
        return grouped(sums, self.value.weight)


class Queried(WeightedPool):
    """One learned query's multi-head attention over the tokens.

    The query is `(1, 1, D)`, as in the published modules, so that LARS scales its steps.

    Args:
        dim: D, numbers a token.
        tokens: "patches" or "all".
        attention: of the query over the tokens.
    """

    def __init__(self, dim: int, tokens: str, attention: QueryAttention) -> None:
        super().__init__(dim, tokens)
        self.query = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.attention = attention

    def token_weights(self, batch: TokenBatch, keys: Tokens) -> Weights:
        """The weights of each head."""
        return self.attention.weights(self.query.flatten(), keys)

    def project(self, sums: Sums) -> Vector:
        """What the attention gives."""
        return self.attention.project(sums)


class Capi(Queried):
    """CAPI's probe: a learned query over the raw tokens: 2·D² + 3·D parameters.

    Published: `AttnPoolClassifier` of CAPI's `eval_classification.py`. Its query is `(D,)`, and its classifier reads
    the vector without batch normalisation. Not as there: a width that is no multiple of 64 is allowed.

    Args:
        dim: D, numbers a token.
        tokens: "patches" or "all".
        heads: heads; 0 for one for 64 channels.
    """

    normalised = False
    classifier_std = 0.02

    def __init__(self, dim: int, *, tokens: str = "patches", heads: int = 0) -> None:
        heads = heads or max(1, dim // 64)
        super().__init__(dim, tokens, QueryAttention(dim, heads, ["kv"], out=False))
        self.query = nn.Parameter(torch.empty(dim))
        linear = self.attention.linear("kv")
        for weight in (self.query, linear.weight):
            nn.init.trunc_normal_(weight, std=0.02)
        nn.init.zeros_(linear.bias)


class Aim(Queried):
    """AIM's probe: a learned query over tokens normalised over the batch: 2·D² + D parameters.

    Published: efficient-probing's `poolings/aim.py`, with its 16 heads and its batch normalisation before the
    classifier; AIM's own release has 12 heads and none.
    """

    def __init__(self, dim: int, *, tokens: str = "patches", heads: int = 16) -> None:
        super().__init__(dim, tokens, QueryAttention(dim, heads, ["k", "v"], bias=False, out=False))
        self.norm = TokenNorm(dim)

    def keys(self, batch: TokenBatch) -> Tokens:
        """The tokens as batch normalisation would leave them."""
        return self.norm(batch, self.tokens)


class Cae(Queried):
    """CAE's probe: a query, at first zero, over tokens, layer-normalised apart as keys and values.

    4·D² + 10·D parameters: q, k and v without biases, a projection with one. Published: efficient-probing's
    `poolings/cae_att.py`. As there, a fourth LayerNorm (2·D of the parameters) is never read.
    """

    def __init__(self, dim: int, *, tokens: str = "patches", heads: int = 8) -> None:
        super().__init__(dim, tokens, QueryAttention(dim, heads, bias=False))
        nn.init.zeros_(self.query)
        self.query_norm, self.key_norm, self.value_norm, self.unread_norm = (nn.LayerNorm(dim) for _ in range(4))

    def keys(self, batch: TokenBatch) -> Tokens:
        """The tokens after the norm of keys."""
        return Tokens.layer_normed(batch, self.tokens, self.key_norm)

    def values(self, batch: TokenBatch, keys: Tokens) -> Tokens:
        """The tokens after the norm of values."""
        return Tokens.layer_normed(batch, self.tokens, self.value_norm)

    def token_weights(self, batch: TokenBatch, keys: Tokens) -> Weights:
        """The weights of each head."""
        return self.attention.weights(self.query_norm(self.query).flatten(), keys)


class SimPool(WeightedPool):
    """SimPool (Psomas et al., arXiv 2309.06891): the mean of the tokens is the query, one head, values as they are.

    2·D² + 2·D parameters. Published: efficient-probing's `poolings/simpool.py`, with its defaults (no exponent).
    """

    def __init__(self, dim: int, *, tokens: str = "patches") -> None:
        super().__init__(dim, tokens)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.query, self.key = (nn.Linear(dim, dim, bias=False) for _ in range(2))

    def keys(self, batch: TokenBatch) -> Tokens:
        """The tokens after a LayerNorm."""
        return Tokens.layer_normed(batch, self.tokens, self.norm)

    def token_weights(self, batch: TokenBatch, keys: Tokens) -> Weights:
        """The softmax over tokens of their products with the projected mean."""
        query = self.query(batch.read(self.tokens).mean(dim=1)) / self.dim**0.5
        return keys.products((query @ self.key.weight)[:, None]).softmax(dim=-1)
