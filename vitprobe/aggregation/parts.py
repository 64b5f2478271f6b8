"""Parts of several aggregators: the attention of one query over tokens, and the MLP of a Transformer block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitprobe.aggregation.choices import divides
from vitprobe.aggregation.weighing import Tokens, grouped

_NAMES = {"q": "query", "k": "key", "v": "value", "kv": "key_value", "qkv": "query_key_value"}


class QueryAttention(nn.Module):
    """Multi-head attention of one query, without an N×D tensor of keys or values.

    Head h weighs tokens x_n by `softmax((W_kh·x_n + b_kh)·q_h/√d) = softmax(x_n·(W_khᵀ·q_h)/√d)` and gives
    `W_vh·(Σ weight·x) + b_vh`.

    Args:
        dim: D, numbers per token.
        heads: number of heads; it must divide D.
        projections: the matrices that project query, key and value, as the published module has them: ("q", "kv") is
            one matrix for the query, and one of 2·D rows for keys and values. LARS divides by the norm of a whole
            matrix, so it matters which are one. Without "q" the query is used as it is.
        bias: whether these projections have biases. That of k cancels in the softmax.
        out: whether the heads' outputs, joined, are projected (with a bias).
    """

    def __init__(
        self, dim: int, heads: int, projections: Sequence[str] = ("q", "k", "v"), *, bias: bool = True, out: bool = True
    ) -> None:
        super().__init__()
        divides("heads", heads, dim)
        self.dim, self.heads, self.projections = dim, heads, tuple(projections)
        for letters in self.projections:
            self.add_module(_NAMES[letters], nn.Linear(dim, len(letters) * dim, bias=bias))
        self.out = nn.Linear(dim, dim) if out else nn.Identity()

    def linear(self, letters: str) -> nn.Linear:
        """Return one of the layers that project, by its letters in `projections`."""
        layer = self.get_submodule(_NAMES[letters])
        assert isinstance(layer, nn.Linear)
        return layer

    def projection(self, letter: str) -> tuple[Float[Tensor, "dim dim"], Float[Tensor, " dim"] | None]:
        """Return the weight and the bias that project the query ("q"), keys ("k"), or values ("v")."""
        letters = next(letters for letters in self.projections if letter in letters)
        layer, first = self.linear(letters), letters.index(letter) * self.dim
        rows = slice(first, first + self.dim)
        return layer.weight[rows], None if layer.bias is None else layer.bias[rows]

    def weights(self, query: Float[Tensor, "*batch dim"], keys: Tokens) -> Float[Tensor, "batch head token"]:
        """The weights of each head; the query is one for all images, or each image's own."""
        if any("q" in letters for letters in self.projections):
            query = F.linear(query, *self.projection("q"))
        heads, (weight, bias) = (self.heads, -1), self.projection("k")
        query = (query / (query.shape[-1] // self.heads) ** 0.5).unflatten(-1, heads)
        products = keys.products(torch.einsum("...he,hed->...hd", query, weight.unflatten(0, heads)))
        if bias is not None:
            products = products + (query * bias.view(heads)).sum(dim=-1)[..., None]
        return products.softmax(dim=-1)

    def project(self, sums: Float[Tensor, "batch head dim"]) -> Float[Tensor, "batch dim"]:
        """The output, from the sum of tokens under each head's weights."""
        return self.out(grouped(sums, *self.projection("v")))


def mlp(dim: int) -> nn.Sequential:
    """Two layers, four times as wide between: 8·D² + 5·D parameters."""
    return nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
