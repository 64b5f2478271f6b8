"""`AttentionView`: what the attention of one block is made of, and its probabilities when asked for."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from vitprobe.attention.logits import GivenLogits, Logits, ProductLogits
from vitprobe.attention.precision import exact_float32
from vitprobe.attention.rows import RowSummary, patch_rows, summarize_rows
from vitprobe.errors import UserError
from vitprobe.layout import TokenLayout, reordered, reordered_pairs, restored


@dataclass(frozen=True, eq=False)
class AttentionView:
    """The attention of one block for one batch: its factors, O(N) memory, or its logits where a model showed only them.

    Attributes:
        block: the block's number, from 0.
        query: queries after any normalisation and rotary embedding, `(B, H, N, d)`; None where `logits` are given.
        key: keys, the same.
        scale: what the product of query and key is multiplied by.
        bias: what is added to the scaled product before the softmax, broadcastable to `(B, H, N, N)`, or None.
        layout: which of the N tokens is what; queries, keys, biases, logits and norms are in this, the model's, order.
        residual_norms: Euclidean norm of each token entering the block, `(B, N)`.
        update_norms: norm of what attention adds to each token, `(B, N)`; None where a block adds attention and MLP
            in one sum.
        unscaled_update_norms: the same before LayerScale or a post-norm.
        output_norms: norm of each token leaving the block, `(B, N)`.
        logits: what the softmax is taken of, `(B, H, N, N)`, where queries and keys are not known.
        measured: of the patch rows, what was found along with attention's output, if that was computed here.
        subtracted: in differential attention, A = A1 − λ·A2: the view of A2. This one is A1.
        subtracted_weight: λ, one number.
    """

    block: int
    query: Float[Tensor, "batch head token dim"] | None
    key: Float[Tensor, "batch head token dim"] | None
    scale: float
    bias: Float[Tensor, "*#broadcast token token"] | None
    layout: TokenLayout
    residual_norms: Float[Tensor, "batch token"] | None = None
    update_norms: Float[Tensor, "batch token"] | None = None
    unscaled_update_norms: Float[Tensor, "batch token"] | None = None
    output_norms: Float[Tensor, "batch token"] | None = None
    logits: Float[Tensor, "batch head token token"] | None = None
    measured: RowSummary | None = None
    subtracted: AttentionView | None = None
    subtracted_weight: Float[Tensor, ""] | None = None

    @classmethod
    def from_probabilities(
        cls, block: int, probabilities: Float[Tensor, "batch head token token"], layout: TokenLayout
    ) -> AttentionView:
        """A view of attention weights themselves, such as a model returned them; rows must sum to 1.

        Raises:
            UserError: for weights that are no probabilities, or of another number of tokens than the layout's.
        """
        if probabilities.shape[-1] != layout.num_tokens:
            raise UserError(
                f"the weights are over {probabilities.shape[-1]} tokens, but the layout has {layout.num_tokens}: "
                f"give the layout of these tokens"
            )
        sums = probabilities.sum(dim=-1, dtype=torch.promote_types(probabilities.dtype, torch.float32))
        if bool((probabilities < 0).any()) or bool(((sums - 1).abs() > 1e-2).any()):
            raise UserError("the weights are no probabilities: each row must be at least 0 and sum to 1")
        return cls(block, None, None, 1.0, None, layout, logits=probabilities.log())

    @property
    def shape(self) -> tuple[int, int, int]:
        """Images, heads and tokens `(B, H, N)`."""
        return self.source.shape

    @property
    def num_heads(self) -> int:
        """Heads H."""
        return self.shape[1]

    @cached_property
    def source(self) -> Logits:
        """The logits, a part at a time, of the tokens in canonical order: prefix tokens first."""
        prefix, layout = self.layout.num_prefix_tokens, self.layout
        if self.logits is not None:
            return GivenLogits(reordered_pairs(self.logits, layout), prefix)
        assert self.query is not None and self.key is not None
        query, key = reordered(self.query, layout, -2), reordered(self.key, layout, -2)
        bias = None if self.bias is None else reordered_pairs(self.bias, layout)
        return ProductLogits(query, key, self.scale, bias, prefix)

    @cached_property
    def cls_row(self) -> RowSummary:
        """Of the canonical order's first row alone, [cls] where there is one: what its weights were divided by, …"""
        if self.measured is not None and self.measured.first is not None:
            return self.measured.first
        return summarize_rows(self.source, self.layout.canonical, slice(0, 1))

    @property
    def patch_sums(self) -> RowSummary:
        """Of the patch rows: what their weights were divided by, and their weights for the prefix tokens."""
        return self.__dict__.get("patch_rows") or self._sums

    @cached_property
    def _sums(self) -> RowSummary:
        return self.measured or self._summarize_patches(entropies=False)

    @cached_property
    def patch_rows(self) -> RowSummary:
        """The same with entropies and distances, from one pass over the whole rows."""
        if self.measured is not None and self.measured.entropy is not None:
            return self.measured
        return self._summarize_patches()

    def _summarize_patches(self, *, entropies: bool = True) -> RowSummary:
        layout = self.layout.canonical
        return summarize_rows(self.source, layout, patch_rows(layout), entropies=entropies)

    def probabilities(self, head: int | None = None) -> Tensor:
        """The attention weights themselves, in float32 or wider.

        Args:
            head: one head's weights; without it all heads', which takes `4·B·H·N²` bytes.

        Returns:
            `(B, N, N)` for one head, `(B, H, N, N)` for all; rows (queries) sum to 1. Of differential attention
            A1 − λ·A2, whose rows sum to 1 − λ and which may be negative.

        Raises:
            UserError: for a head that the block does not have.
        """
        if head is None:
            view = self
        elif -self.num_heads <= head < self.num_heads:
            view = self._of_head(head % self.num_heads)
        else:
            raise UserError(
                f"block {self.block} has heads 0 to {self.num_heads - 1}, not {head}; choose one of these, or leave "
                f"head out for all"
            )
        with exact_float32(view.source.device):
            weights = view.source.whole().softmax(dim=-1)
        weights = restored(restored(weights, self.layout, -1), self.layout, -2)
        if view.subtracted is not None and view.subtracted_weight is not None:
            weights = weights - view.subtracted_weight * view.subtracted.probabilities()
        return weights if head is None else weights[:, 0]

    def _of_head(self, head: int) -> AttentionView:
        """The same with this head alone."""

        def one(tensor: Tensor | None) -> Tensor | None:
            if tensor is None or tensor.ndim < 3 or tensor.shape[-3] == 1:
                return tensor
            return tensor[..., head : head + 1, :, :]

        return replace(
            self,
            query=one(self.query),
            key=one(self.key),
            bias=one(self.bias),
            logits=one(self.logits),
            measured=None,
            subtracted=None if self.subtracted is None else self.subtracted._of_head(head),
        )

    def of_image(self, image: int, layout: TokenLayout) -> AttentionView:
        """One image of a batch padded to one length: its own tokens come first, what follows them is dropped."""
        count = layout.num_tokens

        def pairs(tensor: Tensor | None) -> Tensor | None:
            """Of what is there for each query and key."""
            if tensor is None:
                return None
            if tensor.ndim == 4 and tensor.shape[0] > 1:
                tensor = tensor[image : image + 1]
            return tensor[..., :count, :count]

        def tokens(tensor: Tensor | None) -> Tensor | None:
            """Of what is there for each token, its second-last or last axis."""
            if tensor is None:
                return None
            tensor = tensor[image : image + 1]
            return tensor[:, :count] if tensor.ndim == 2 else tensor[:, :, :count]

        return replace(
            self,
            query=tokens(self.query),
            key=tokens(self.key),
            bias=pairs(self.bias),
            logits=pairs(self.logits),
            measured=None,
            layout=layout,
            subtracted=None if self.subtracted is None else self.subtracted.of_image(image, layout),
            **{name: tokens(getattr(self, name)) for name in _NORMS},
        )


_NORMS = [field.name for field in fields(AttentionView) if field.name.endswith("_norms")]


def concatenate_views(views: list[AttentionView]) -> AttentionView:
    """One view of several batches of the same block.

    Raises:
        UserError: where their token layouts differ.
    """
    if len(views) == 1:
        return views[0]
    first = views[0]
    if any(view.layout != first.layout for view in views):
        raise UserError("these images have different patch grids and no view in common; read views(block), one by one")

    def joined(name: str) -> Tensor | None:
        parts = [getattr(view, name) for view in views]
        return None if any(part is None for part in parts) else torch.cat(parts)

    subtracted = [view.subtracted for view in views if view.subtracted is not None]
    return replace(
        first,
        query=joined("query"),
        key=joined("key"),
        bias=_joined_bias(views),
        logits=joined("logits"),
        measured=None,
        subtracted=concatenate_views(subtracted) if subtracted else None,
        **{name: joined(name) for name in _NORMS},
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
    parts = []
    for view, bias in zip(views, biases, strict=True):
        batch, heads, tokens = view.shape
        nothing = torch.zeros(1, 1, dtype=view.source.dtype, device=view.source.device)
        parts.append((nothing if bias is None else bias).expand(batch, heads, tokens, tokens))
    return torch.cat(parts)
