"""torch's fused attention kernels that also tell what each row's weights were divided by.

Their operators are private to torch: this is the one place that calls them, and it does without where they are missing
or refuse.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

_operators = torch.ops.aten


def attend_with_normaliser(
    query: Float[Tensor, "batch head row dim"],
    key: Float[Tensor, "batch head key dim"],
    value: Float[Tensor, "batch head key dim"],
    scale: float,
) -> tuple[Tensor, Float[Tensor, "batch head row"]] | None:
    """Attention's output `(B, H, R, d)` and the logsumexp of each row's logits, float32; None without such a kernel."""
    try:
        if query.device.type == "cpu":
            output, log_z = _operators._scaled_dot_product_flash_attention_for_cpu(query, key, value, scale=scale)
        elif query.device.type == "cuda" and query.dtype in (torch.float16, torch.bfloat16):
            output, log_z = _operators._scaled_dot_product_flash_attention(query, key, value, scale=scale)[:2]
        elif query.device.type == "cuda":
            output, log_z = _operators._scaled_dot_product_efficient_attention(
                query, key, value, None, True, scale=scale
            )[:2]
        else:
            return None
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return None
    log_z = log_z[..., : query.shape[2]]  # some kernels pad it
    expected = query.shape[:3]
    if log_z.shape != expected or log_z.dtype not in (torch.float32, torch.float64):
        return None
    return output, log_z
