"""`AttentionView`: what the attention of one block is made of, and its probabilities when asked for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from vitprobe.attention.precision import exact_float32
from vitprobe.attention.rows import RowSummary, summarize_rows
from vitprobe.errors import UserError
from vitprobe.models.tokens import TokenLayout


@dataclass(frozen=True, eq=False)
class AttentionView:
    """The attention of one block for one batch, held as its factors: O(N) memory instead of O(N²).

    Attributes:
        block: the block's number, from 0.
        query: queries after any normalisation and rotary embedding, `(B, H, N, d)`.
        key: keys, the same.
        scale: what the product of query and key is multiplied by.
        bias: what is added to the scaled product before the softmax, broadcastable to `(B, H, N, N)`, or None.
        layout: which of the N tokens is what.
        residual_norms: Euclidean norm of each token entering the block, `(B, N)`.
        update_norms: norm of what attention adds to each token, `(B, N)`; None where a block adds attention and MLP
            in one sum.
        unscaled_update_norms: the same before LayerScale or a post-norm.
        output_norms: norm of each token leaving the block, `(B, N)`.
    """

    block: int
    query: Float[Tensor, "batch head token dim"]
    key: Float[Tensor, "batch head token dim"]
    scale: float
    bias: Float[Tensor, "*#broadcast token token"] | None
    layout: TokenLayout
    residual_norms: Float[Tensor, "batch token"] | None = None
    update_norms: Float[Tensor, "batch token"] | None = None
    unscaled_update_norms: Float[Tensor, "batch token"] | None = None
    output_norms: Float[Tensor, "batch token"] | None = None

    @property
    def num_heads(self) -> int:
        """Heads H."""
        return self.query.shape[1]

    @cached_property
    def rows(self) -> RowSummary:
        """Normalisers, entropies, distances and prefix weights of each row: one pass over blocks of rows."""
        return summarize_rows(self.query, self.key, self.scale, self.bias, self.layout)

    def probabilities(self, head: int | None = None) -> Tensor:
        """The attention weights themselves, in float32 or wider.

        Args:
            head: one head's weights; without it all heads', which takes `4·B·H·N²` bytes.

        Returns:
            `(B, N, N)` for one head, `(B, H, N, N)` for all; rows (queries) sum to 1.

        Raises:
            UserError: for a head that the block does not have.
        """
        if head is not None and not -self.num_heads <= head < self.num_heads:
            raise UserError(
                f"block {self.block} has heads 0 to {self.num_heads - 1}, not {head}; choose one of these, or leave "
                f"head out for all"
            )
        query, key, bias = self.query, self.key, self.bias
        if head is not None:
            head %= self.num_heads
            query, key = query[:, head : head + 1], key[:, head : head + 1]
            if bias is not None and bias.ndim >= 3 and bias.shape[-3] > 1:
                bias = bias[..., head : head + 1, :, :]
        wide = torch.promote_types(query.dtype, torch.float32)
        with exact_float32(query.device):
            logits = self.scale * (query.to(wide) @ key.to(wide).transpose(-2, -1))
            if bias is not None:
                logits = logits + bias.to(wide)
            weights = logits.softmax(dim=-1)
        return weights if head is None else weights[:, 0]
