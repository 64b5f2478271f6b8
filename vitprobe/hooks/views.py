"""From what a block showed while it ran to the view of its attention, or to the reason why there is none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vitprobe.attention.rows import join_heads
from vitprobe.attention.view import AttentionView
from vitprobe.errors import AttentionNotSeenError
from vitprobe.hooks.blocks import BlockRecord
from vitprobe.hooks.calls import AttentionCall
from vitprobe.layout import TokenLayout
from vitprobe.models.anatomy.parts import Layouts

SHOW_IT = (
    "if its attention is your own code, call vitprobe.hand_over(query, key, scale=…) beside it, with (B, H, N, d) "
    "queries and keys"
)


def views_of(
    record: BlockRecord, block: nn.Module, layouts: Layouts, batch: int, model_name: str
) -> list[AttentionView]:
    """The attention of a block that has run: one view or, where images of several grids were padded, one an image.

    Args:
        record: what the block showed.
        block: the block.
        layouts: of the images that ran through it.
        batch: how many images that were.
        model_name: what an error calls the model.

    Raises:
        AttentionNotSeenError: where no attention was seen, or one that is no map from all tokens to all tokens.
    """
    where = f"block {record.block} ({type(block).__name__}) of {model_name}"
    calls = _attention_calls(record.calls, where)
    padded = isinstance(layouts, tuple)
    longest = max(layouts, key=lambda layout: layout.num_tokens) if isinstance(layouts, tuple) else layouts
    for call in calls:
        _require_global(call, longest, padded, where)
    view = _view(record.block, calls, block, longest, batch, where)
    view = replace(view, **_fitting_norms(record, block, view))
    if not isinstance(layouts, tuple):
        return [view]
    return [view.of_image(image, layout) for image, layout in enumerate(layouts)]


def _attention_calls(calls: list[AttentionCall], where: str) -> list[AttentionCall]:
    """The calls that are the block's attention: those handed over, else of fused kernels, else softmax by hand."""
    handed_over = [call for call in calls if call.handed_over]
    fused = [call for call in calls if call.logits is None]
    applied = [call for call in calls if call.logits is not None and call.applied]
    found = handed_over or fused or applied
    if found:
        return found
    if calls:
        softmax = calls[-1]
        how = f"is changed by {softmax.changed_by}" if softmax.changed_by else "multiplies no values"
        raise AttentionNotSeenError(
            f"{where} computes a softmax over {softmax.shape[0]}x{softmax.shape[1]}, but what comes out {how}, so it "
            f"is no attention map; {SHOW_IT}"
        )
    raise AttentionNotSeenError(
        f"{where} computed no scaled-dot-product attention and no softmax, so its attention cannot be seen; {SHOW_IT}"
    )


def _require_global(call: AttentionCall, layout: TokenLayout, padded: bool, where: str) -> None:
    """Raises an AttentionNotSeenError for attention that is not over all tokens, per image and head."""
    tokens, shape = layout.num_tokens, call.shape
    if shape != (tokens, tokens) and not (padded and shape[0] == shape[1] >= tokens):
        raise AttentionNotSeenError(
            f"{where} attends from {shape[0]} queries to {shape[1]} keys, but the layout has {tokens} tokens "
            f"({layout}): a wrong layout is mended with load_model(model, layout=vitprobe.TokenLayout(…)); "
            f"windowed and pooled attention and dropped patches have no such map"
        )


def _view(
    index: int, calls: list[AttentionCall], block: nn.Module, layout: TokenLayout, batch: int, where: str
) -> AttentionView:
    """The one view of all the calls of a block."""
    views = [_view_of_call(index, call, layout, batch, where) for call in calls]
    if len(views) == 1:
        return views[0]
    weight = _difference_weight(block)
    if weight is not None and len(views) == 2:
        return replace(views[0], subtracted=views[1], subtracted_weight=weight)
    if hasattr(block, "attns"):  # parallel branches: the heads of one after those of the other
        first = views[0]
        if all(view.query is not None and view.bias is first.bias and view.scale == first.scale for view in views):
            query = torch.cat([view.query for view in views if view.query is not None], dim=1)
            key = torch.cat([view.key for view in views if view.key is not None], dim=1)
            measured = None
            if any(view.measured is not None for view in views):
                measured = join_heads([view.measured or replace(view.patch_rows, first=view.cls_row) for view in views])
            return replace(first, query=query, key=key, measured=measured)
    raise AttentionNotSeenError(
        f"{where} computed {len(views)} attentions that are not heads of one, so it has no single attention map; "
        f"{SHOW_IT}"
    )


def _view_of_call(index: int, call: AttentionCall, layout: TokenLayout, batch: int, where: str) -> AttentionView:
    def by_head(tensor: Tensor | None) -> Tensor | None:
        """`(B, H, …)` of that, or of `(B·H, …)` as batched products need it."""
        if tensor is not None and tensor.ndim == 3 and len(tensor) % batch == 0:
            tensor = tensor.unflatten(0, (batch, -1))
        if tensor is not None and (tensor.ndim != 4 or len(tensor) != batch):
            raise AttentionNotSeenError(
                f"{where} attends with a tensor of shape {tuple(tensor.shape)} for {batch} images, not (B, H, N, …): "
                f"attention within windows has no map of the image; {SHOW_IT}"
            )
        return tensor

    bias = call.bias
    if bias is not None and bias.ndim == 3 and call.query is not None and call.query.ndim == 3 and len(bias) > 1:
        bias = by_head(bias)
    query, key, logits = by_head(call.query), by_head(call.key), by_head(call.logits)
    return AttentionView(index, query, key, call.scale, bias, layout, logits=logits, measured=call.measured)


def _difference_weight(block: nn.Module) -> Tensor | None:
    """λ of a block with timm's differential attention, softmax(q1·k1ᵀ) − λ·softmax(q2·k2ᵀ); None for any other."""
    for module in block.modules():
        compute: Any = getattr(module, "_compute_lambda", None)
        if compute is not None:
            with torch.no_grad():
                weight = compute()
                return weight.to(torch.promote_types(weight.dtype, torch.float32))
    return None


def _fitting_norms(record: BlockRecord, block: nn.Module, view: AttentionView) -> dict[str, Tensor | None]:
    """The norms of the block's tokens as `(B, N)`; a block that passes on no such tokens has no residual statistics."""
    batch, _, tokens = view.shape
    tokens_first = any(isinstance(part, nn.MultiheadAttention) and not part.batch_first for part in block.modules())

    def fitting(norms: Tensor | None) -> Tensor | None:
        if norms is not None and tokens_first:
            norms = norms.T
        return norms if norms is not None and norms.shape == (batch, tokens) else None

    return {
        "residual_norms": fitting(record.residual_norms),
        "update_norms": fitting(record.update_norms),
        "unscaled_update_norms": fitting(record.unscaled_update_norms),
        "output_norms": fitting(record.output_norms),
    }
