"""What most aggregators compute: weights over tokens → weighted sums of tokens → small matrices.

A matrix that is applied to every token, and then to a weighted sum of the results, may as well be applied to the
weighted sum of the tokens: pooled first, projected after, it meets one vector instead of N. So do queries meet the
transposed key matrix instead of all keys, and a normalisation's gain and shift the query and the sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitprobe.aggregation.batch import TokenBatch, Which


@dataclass(frozen=True, eq=False)
class Tokens:
    """Tokens x, or what a normalisation would make of them: `gain·(x − its mean)/spread + shift`, or `gain·x + shift`.

    The normalised tokens themselves are never computed.

    Attributes:
        values: x, `(B, T, D)`.
        spread: what each centred token is divided by, `(B, T)`; None where tokens are not centred.
        gain: one number a channel, `(D,)`, or None for 1.
        shift: one number a channel, `(D,)`, or None for 0.
    """

    values: Float[Tensor, "batch token dim"]
    spread: Float[Tensor, "batch token"] | None = None
    gain: Float[Tensor, " dim"] | None = None
    shift: Float[Tensor, " dim"] | None = None

    @classmethod
    def layer_normed(cls, batch: TokenBatch, which: Which, norm: nn.LayerNorm) -> Tokens:
        """Tokens of a batch as a LayerNorm would leave them."""
        return cls(batch.read(which), (batch.variance(which) + norm.eps).sqrt(), norm.weight, norm.bias)

    def products(self, queries: Float[Tensor, "*batch query dim"]) -> Float[Tensor, "batch query token"]:
        """The product of each query, the same for all images or each image's own, and each token."""
        reads = queries if self.gain is None else queries * self.gain
        if self.spread is None:
            products = reads @ self.values.mT
        else:  # a query without its mean meets a token and its centred self alike
            products = (reads - reads.mean(dim=-1, keepdim=True)) @ self.values.mT / self.spread[:, None]
        return products if self.shift is None else products + (queries @ self.shift)[..., None]

    def sums(self, weights: Float[Tensor, "batch query token"]) -> Float[Tensor, "batch query dim"]:
        """The sum of tokens under each set of weights, which must sum to 1."""
        if self.spread is None:
            sums = weights @ self.values
        else:
            sums = (weights / self.spread[:, None]) @ self.values
            sums = sums - sums.mean(dim=-1, keepdim=True)
        if self.gain is not None:
            sums = sums * self.gain
        return sums if self.shift is None else sums + self.shift


def grouped(
    sums: Float[Tensor, "batch query dim"],
    matrix: Float[Tensor, "out dim"],
    bias: Float[Tensor, " out"] | None = None,
) -> Float[Tensor, "batch out"]:
    """A linear map cut into as many groups of output channels as there are sums, each applied to its own sum."""
    groups = matrix.unflatten(0, (sums.shape[1], -1))
    joined = torch.bmm(sums.transpose(0, 1).contiguous(), groups.mT).transpose(0, 1).flatten(1)
    return joined if bias is None else joined + bias
