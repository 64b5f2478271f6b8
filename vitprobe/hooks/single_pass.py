"""Attention's output and what the statistics ask of its rows, from one pass instead of two."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.overrides import has_torch_function

from vitprobe.attention.fused import attend_with_rows
from vitprobe.attention.logits import ProductLogits
from vitprobe.attention.precision import exact_float32
from vitprobe.attention.rows import RowSummary, merge_prefix, patch_rows, summarize_rows
from vitprobe.attention.torch_kernels import attend_with_normaliser
from vitprobe.hooks.calls import AttentionCall
from vitprobe.layout import TokenLayout, reordered, reordered_pairs, restored
from vitprobe.statistics.table import Asks


def measure(call: AttentionCall, layout: TokenLayout, asks: Asks, kernel: str = "auto") -> str:
    """Gives a call its output and the sums or rows that its statistics ask for, where one pass serves both.

    Args:
        call: of `F.scaled_dot_product_attention`; gets `output` and `measured`.
        layout: the tokens it should be over.
        asks: the dearest that the statistics ask for.
        kernel: "auto", or "torch" to do without Triton.

    Returns:
        Which kernel ran: "fused" (ours for a GPU, see `attention.fused`), "rows" (ours: every weight once, for the
        output and the statistics), "sums" (torch's fused kernel over the patches, with its logsumexp, the prefix
        merged), or "model" (the model's own call goes on, and the statistics are computed beside it).
    """
    query, key, value = call.query, call.key, call.value
    if query is None or key is None or value is None or not _eligible(call, query, value, layout):
        return "model"
    if layout.order is not None:
        return _measure_reordered(call, query, key, value, layout, asks, kernel)
    if kernel == "auto" and asks in ("sums", "rows"):
        found = attend_with_rows(query, key, value, call.scale, call.bias, layout, distances=asks == "rows")
        if found is not None:
            call.output, call.measured = found
            return "fused"
    if asks == "rows" and query.dtype in (torch.float32, torch.float64):
        _measure_rows(call, query, key, value, layout)
        return "rows"
    if asks == "sums" and call.bias is None and _measure_sums(call, query, key, value, layout):
        return "sums"
    return "model"


def _measure_reordered(
    call: AttentionCall, query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout, asks: Asks, kernel: str
) -> str:
    """The same of a call whose prefix tokens stand elsewhere: on its tokens in canonical order."""
    inner = replace(
        call,
        query=reordered(query, layout, -2),
        key=reordered(key, layout, -2),
        value=reordered(value, layout, -2),
        bias=None if call.bias is None else reordered_pairs(call.bias, layout),
    )
    ran = measure(inner, layout.canonical, asks, kernel)
    call.measured = inner.measured
    call.output = None if inner.output is None else restored(inner.output, layout, -2)
    return ran


def _eligible(call: AttentionCall, query: Tensor, value: Tensor, layout: TokenLayout) -> bool:
    """Whether the output may be computed here: nothing else wants to see the call, and no gradient."""
    tokens = layout.num_tokens
    return (
        query.ndim == 4
        and call.shape == (tokens, tokens)
        and value.shape[:3] == query.shape[:3]
        and call.dropout == 0
        and not query.is_meta
        and not call.needs_gradient
        and not has_torch_function((query,))  # a capture around this one
    )


def _measure_rows(call: AttentionCall, query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout) -> None:
    batch, heads, tokens, _ = query.shape
    prefix = layout.num_prefix_tokens
    logits = ProductLogits(query, key, call.scale, call.bias, prefix)
    # Laid out as torch's kernel does it, so that joining the heads behind it is no copy.
    output = query.new_empty(batch, tokens, heads, value.shape[-1]).transpose(1, 2)
    value = value.contiguous()  # once for both passes; products of strided values are slow
    first = summarize_rows(logits, layout, slice(0, prefix), value=value, output=output) if prefix else None
    patches = summarize_rows(logits, layout, patch_rows(layout), value=value, output=output)
    call.measured, call.output = replace(patches, first=first), output


def _measure_sums(call: AttentionCall, query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout) -> bool:
    """Whether torch has a kernel that gives the sums along with the output."""
    prefix, patches = layout.num_prefix_tokens, patch_rows(layout)
    found = attend_with_normaliser(query, key[:, :, prefix:], value[:, :, prefix:], call.scale)
    if found is None:
        return False
    output, log_z_patches = found
    with exact_float32(query.device):
        logits = ProductLogits(query, key, call.scale, None, prefix)
        everything = slice(0, layout.num_tokens)
        prefix_logits = logits.prefixes(everything)
        log_z = torch.logaddexp(log_z_patches, prefix_logits.logsumexp(dim=-1))
        merged = output.to(logits.dtype)
        merge_prefix(merged, value, log_z_patches, log_z, prefix_logits)
        call.output = merged.to(query.dtype)
        of_patches = log_z_patches[:, :, patches]
        # Two products round differently; no weight exceeds the sum that it is a part of.
        own = torch.minimum(logits.own()[:, :, patches], of_patches)
        first = summarize_rows(logits, layout, slice(0, 1)) if layout.has_cls else None
        call.measured = RowSummary(log_z[:, :, patches], of_patches, own, prefix_logits[:, :, patches], first=first)
    return True
