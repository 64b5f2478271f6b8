"""Aggregators without weights to learn that weigh patches by attention: the block's own, or another model's."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from vitprobe.aggregation.batch import TokenBatch
from vitprobe.aggregation.choices import one_of
from vitprobe.aggregation.simple import Center
from vitprobe.aggregation.weighing import Tokens
from vitprobe.aggregation.weighted import WeightedPool
from vitprobe.attention.logits import Part
from vitprobe.attention.precision import exact_float32
from vitprobe.attention.view import AttentionView
from vitprobe.errors import UserError

Weights = Float[Tensor, "batch query patch"]
SCALES = ("sum", "paper")


def patch_attention(view: AttentionView, rows: slice) -> Float[Tensor, "batch head row patch"]:
    """The attention weights that some rows (queries) give to the patches; the N×N matrix is never formed.

    Args:
        view: the attention of a block.
        rows: positions of the queries, in canonical order.
    """
    logits = view.source
    batch, heads, tokens = logits.shape
    count = len(range(*rows.indices(tokens)))
    with exact_float32(logits.device):
        buffer = torch.empty(batch * heads * count * (tokens - logits.prefix), dtype=logits.dtype, device=logits.device)
        patches = logits.patches(Part(slice(0, batch), slice(0, heads), rows), buffer)
        weights = torch.cat([logits.prefixes(rows), patches], dim=-1).softmax(dim=-1)[..., logits.prefix :]
    if view.subtracted is not None and view.subtracted_weight is not None:
        weights = weights - view.subtracted_weight * patch_attention(view.subtracted, rows)
    return weights


def _renormalised(weights: Float[Tensor, "batch patch"], batch: TokenBatch) -> Weights:
    """As one set of weights that sum to 1."""
    return (weights / weights.sum(dim=-1, keepdim=True)).to(batch.tokens.dtype)[:, None]


def _averaged(weights: Float[Tensor, "batch patch"], batch: TokenBatch) -> Weights:
    """As one set of weights, for the mean over patches instead of the sum."""
    return (weights / weights.shape[-1]).to(batch.tokens.dtype)[:, None]


class CenterAttention(Center):
    """What the patches in the middle of the grid attend to: their attention to patches, mean over heads, renormalised.

    Published: `ca1` to `ca4` of beyond_cls. There the vector is the mean of the weighted tokens, not their sum: N
    times shorter, which matters beside the 1e-6 that a probe's normalisation adds to variances.

    Args:
        dim: numbers per token.
        size: patches on a side of the window.
        scale: "sum": the weights of an image sum to 1; "paper": as published, `w / (Σw + 1e-6) / N`.
    """

    needs_attention = True

    def __init__(self, dim: int, size: int, *, scale: str = "sum") -> None:
        super().__init__(dim, size)
        self.scale = one_of("scale", scale, SCALES)

    def token_weights(self, batch: TokenBatch, keys: Tokens) -> Weights:
        """Mean over the window's patches and over heads, renormalised over the patches."""
        view, first = self.attention_of(batch), batch.layout.num_prefix_tokens
        rows = [patch_attention(view, slice(first + row.start, first + row.stop)) for row in self.window(batch.layout)]
        weights = torch.cat(rows, dim=2).mean(dim=(1, 2))
        if self.scale == "sum":
            return _renormalised(weights, batch)
        return _averaged(weights / (weights.sum(dim=-1, keepdim=True) + 1e-6), batch)


class ClsAttention(WeightedPool):
    """What [cls] attends to: its attention to the patches, mean over heads, renormalised: `attn-mn` of beyond_cls."""

    needs_cls = True
    needs_attention = True

    def token_weights(self, batch: TokenBatch, keys: Tokens) -> Weights:
        """The [cls] row over the patches, mean over heads, renormalised."""
        return _renormalised(self._rows(batch).mean(dim=1), batch)

    def _rows(self, batch: TokenBatch) -> Float[Tensor, "batch head patch"]:
        """What [cls] gives the patches, of each head."""
        self.check(batch.layout, "the model")
        return patch_attention(self.attention_of(batch), slice(0, 1))[:, :, 0]


class ClsAttentionMinEntropy(ClsAttention):
    """What the most decided head of [cls] attends to: of each image, the head with the lowest entropy over patches.

    Published: `attn-lcte` of beyond_cls. Not as there: the entropy is exact (the script adds 1e-6 inside it).
    """

    def token_weights(self, batch: TokenBatch, keys: Tokens) -> Weights:
        """That head's [cls] row over the patches, renormalised."""
        rows, view = self._rows(batch), self.attention_of(batch)
        if view.subtracted is not None:
            raise UserError(
                f"{self.name} needs attention that is a distribution, which the difference A1 − λ·A2 is not: "
                f"leave it out"
            )
        entropy = view.cls_row.entropy
        assert entropy is not None
        head = entropy[..., 0].argmin(dim=1)
        return _renormalised(rows[torch.arange(len(rows), device=rows.device), head], batch)


class Oracle(WeightedPool):
    """What another model's [cls] attends to in its last block, mean over heads, renormalised over the patches.

    Published: `dino` of beyond_cls, with `vit_base_patch16_224.dino` for the other model. There the weights are not
    renormalised, and the vector is the mean of the weighted tokens, not their sum.

    Args:
        dim: numbers per token.
        model: the other model's name.
        renormalise: whether the weights of an image sum to 1. If not, they sum to what [cls] gives to patches.
        scale: "sum": the vector is the weighted sum of tokens; "paper": as published, `w / N`, where `renormalise`
            means nothing.
    """

    def __init__(self, dim: int, model: str, *, renormalise: bool = True, scale: str = "sum") -> None:
        super().__init__(dim)
        self.oracle, self.renormalise, self.scale = model, renormalise, one_of("scale", scale, SCALES)

    def token_weights(self, batch: TokenBatch, keys: Tokens) -> Weights:
        """The other model's [cls] row over the patches, mean over heads."""
        if self.oracle not in batch.oracles:
            raise UserError(
                f"{self.name} reads the [cls] attention of {self.oracle}: give it to TokenBatch in oracles="
            )
        weights = batch.oracles[self.oracle].mean(dim=1)
        if weights.shape[1] != batch.layout.num_patches:
            raise UserError(
                f"{self.oracle} has {weights.shape[1]} patches, the model {batch.layout.num_patches}: "
                f"choose an oracle with the same grid"
            )
        if self.scale == "paper":
            return _averaged(weights, batch)
        return _renormalised(weights, batch) if self.renormalise else weights.to(batch.tokens.dtype)[:, None]
