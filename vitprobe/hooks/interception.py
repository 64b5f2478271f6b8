"""Seeing the calls of scaled-dot-product attention that run while a context is open, fused kernels included."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """The arguments of one call that decide its attention weights, detached: `softmax(scale·q·kᵀ + bias)`."""

    query: Tensor
    key: Tensor
    scale: float
    bias: Tensor | None


class AttentionWatcher(TorchFunctionMode):
    """While entered, hands every `F.scaled_dot_product_attention` call of this thread to `seen`, then lets it run.

    A function mode sees the call whichever kernel serves it, and wherever the function was imported from; calls that
    `seen` itself makes are not seen again.
    """

    def __init__(self, seen: Callable[[AttentionCall], None]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Torch's entry point for every overridable function."""
        if func is F.scaled_dot_product_attention:
            self.seen(read_call(*args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


def read_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> AttentionCall:
    """An `AttentionCall` from the arguments of `F.scaled_dot_product_attention` (its own names and defaults).

    Dropout is left out: the weights are those before it.
    """
    query, key = query.detach(), key.detach()
    bias = None if attn_mask is None else attn_mask.detach()
    if enable_gqa and key.shape[-3] != query.shape[-3]:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
    if key.shape[:-2] != query.shape[:-2]:  # one key head for all queries: broadcast, as the kernel does
        key = key.expand(*query.shape[:-2], *key.shape[-2:])
    if is_causal:
        bias = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if bias is not None and bias.dtype == torch.bool:
        bias = torch.zeros(bias.shape, device=bias.device).masked_fill(~bias, -torch.inf)
    if bias is not None:  # a mask of keys alone, (B, 1, 1, N), is the same for each query; no memory is taken
        bias = bias.expand(*bias.shape[:-2], query.shape[-2], key.shape[-2])
    return AttentionCall(query, key, 1 / math.sqrt(query.shape[-1]) if scale is None else scale, bias)
