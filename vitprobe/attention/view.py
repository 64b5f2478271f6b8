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


def concatenate_views(views: list[AttentionView]) -> AttentionView:
    """One view of several batches of the same block.

    Raises:
        UserError: where their token layouts differ.
    """
    if len(views) == 1:
        return views[0]
    first = views[0]
    if any(view.layout != first.layout for view in views):
        raise UserError("batches of different patch grids were accumulated; read them with accumulate=False")

    def joined(parts: list[Tensor | None]) -> Tensor | None:
        present = [part for part in parts if part is not None]
        return torch.cat(present) if len(present) == len(parts) else None

    return AttentionView(
        block=first.block,
        query=torch.cat([view.query for view in views]),
        key=torch.cat([view.key for view in views]),
        scale=first.scale,
        bias=_joined_bias(views),
        layout=first.layout,
        residual_norms=joined([view.residual_norms for view in views]),
        update_norms=joined([view.update_norms for view in views]),
        unscaled_update_norms=joined([view.unscaled_update_norms for view in views]),
        output_norms=joined([view.output_norms for view in views]),
    )


def _joined_bias(views: list[AttentionView]) -> Tensor | None:
    """The bias of all batches together. One that is the same for each image is held once."""
    biases = [view.bias for view in views]
    first = biases[0]
    if all(bias is None for bias in biases):
        return None
    if first is not None and (first.ndim < 4 or first.shape[0] == 1):  # the same for each image of its batch
        same = [bias is not None and bias.shape == first.shape and torch.equal(bias, first) for bias in biases]
        if all(same):
            return first
    nothing = views[0].query.new_zeros(1, 1)
    parts = []
    for view, bias in zip(views, biases, strict=True):
        batch, heads, tokens, _ = view.query.shape
        parts.append((nothing if bias is None else bias).expand(batch, heads, tokens, tokens))
    return torch.cat(parts)
