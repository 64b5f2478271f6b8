"""`hand_over`: how a model whose attention no hook can see shows it itself."""

from __future__ import annotations

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function


def hand_over(query: Tensor, key: Tensor, *, scale: float | None = None, bias: Tensor | None = None) -> None:
    """Shows an attention to the captures that are open; without any, does nothing.

    For attention from a kernel of one's own: call this beside it, in the block's forward pass. It takes the place of
    whatever else is seen in that block.

    Args:
        query: queries as they enter the product, after any normalisation and rotary embedding, `(B, H, N, d)`.
        key: keys, the same; or `(B, G, N, d)` with H a multiple of G, where heads share keys.
        scale: what `q·kᵀ` is multiplied by; 1/√d by default.
        bias: what is added to that, broadcastable to `(B, H, N, N)`; True marks what may be seen where it is boolean.

    Example:
        >>> import torch
        >>> from vitprobe import hand_over
        >>> query, key, value = torch.randn(3, 2, 4, 65, 16)
        >>> def attention_of_my_kernel():
        ...     hand_over(query, key)  # beside the call of the kernel, with what it is given
        ...     return torch.nn.functional.scaled_dot_product_attention(query, key, value)
        >>> attention_of_my_kernel().shape
        torch.Size([2, 4, 65, 16])
    """
    if has_torch_function((query, key)):  # the captures' function mode
        handle_torch_function(hand_over, (query, key), query, key, scale=scale, bias=bias)
