"""Parts of several aggregators: the attention of one query over tokens, and the MLP of a Transformer block."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitprobe.aggregation.choices import divides
from vitprobe.aggregation.kernel import Tokens, grouped


class QueryAttention(nn.Module):
    """Multi-head attention of one query, without an N×D tensor of keys or values.

    Head h weighs tokens x_n by `softmax((W_kh·x_n + b_kh)·q_h/√d) = softmax(x_n·(W_khᵀ·q_h)/√d)` and gives
    `W_vh·(Σ weight·x) + b_vh`.

    Args:
        dim: D, numbers a token.
        heads: heads; they must divide D.
        biases: which of the projections "q", "k", "v" have a bias. That of k cancels in the softmax.
        query: whether the query is projected.
        out: whether the heads' outputs, joined, are projected (with a bias).
    """

    def __init__(self, dim: int, heads: int, *, biases: str = "qkv", query: bool = True, out: bool = True) -> None:
        super().__init__()
        divides("heads", heads, dim)
        self.heads = heads
        self.query = nn.Linear(dim, dim, bias="q" in biases) if query else nn.Identity()
        self.key = nn.Linear(dim, dim, bias="k" in biases)
        self.value = nn.Linear(dim, dim, bias="v" in biases)
        self.out = nn.Linear(dim, dim) if out else nn.Identity()

    def weights(self, query: Float[Tensor, "*batch dim"], keys: Tokens) -> Float[Tensor, "batch head token"]:
        """The weights of each head; the query is one for all images, or each image's own."""
        query, heads = self.query(query), (self.heads, -1)
        query = (query / (query.shape[-1] // self.heads) ** 0.5).unflatten(-1, heads)
        products = keys.products(torch.einsum("...he,hed->...hd", query, self.key.weight.unflatten(0, heads)))
        if self.key.bias is not None:
            products = products + (query * self.key.bias.view(heads)).sum(dim=-1)[..., None]
        return products.softmax(dim=-1)

    def project(self, sums: Float[Tensor, "batch head dim"]) -> Float[Tensor, "batch dim"]:
        """The output, from the sum of tokens under each head's weights."""
        return self.out(grouped(sums, self.value.weight, self.value.bias))


def mlp(dim: int) -> nn.Sequential:
    """Two layers, four times as wide between: 8·D² + 5·D parameters."""
    return nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
