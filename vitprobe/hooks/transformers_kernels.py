"""Attention that transformers gives to a kernel of its own or of the user's: shown where the kernel is called."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from vitprobe.hooks.handover import hand_over
from vitprobe.models.anatomy.transformers_vit import from_transformers

# What changes the weights beyond scale and mask: a call with any of these is not handed over, so the capture says that
# it saw no attention.
_OTHER_WAYS = ("softcap", "s_aux", "position_bias", "sliding_window", "is_causal")


def watch_kernels(stack: ExitStack, module: nn.Module) -> None:
    """Until `stack` closes, every attention function that transformers knows hands over its queries and keys.

    "eager" and "sdpa" are left alone: their softmax and their `F.scaled_dot_product_attention` are seen as they are.
    Nothing happens for a model that is not of transformers.
    """
    modeling: Any = sys.modules.get("transformers.modeling_utils")
    if modeling is None or not any(from_transformers(part) for part in module.modules()):
        return
    functions = modeling.ALL_ATTENTION_FUNCTIONS
    for name in list(functions):
        function = functions[name]
        if name != "sdpa" and not hasattr(function, "hands_over"):  # a capture around this one may have seen to it
            functions[name] = _handing_over(function)
            stack.callback(_restore, functions, name, function)


def _restore(functions: Any, name: str, function: Callable[..., Any]) -> None:
    """Take our entry away; write one only where there was one beside those that all of transformers share."""
    del functions[name]
    if functions.get(name) is not function:
        functions[name] = function


def _handing_over(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        if all(kwargs.get(way) is None or kwargs[way] is False for way in _OTHER_WAYS):
            mask = args[0] if args else kwargs.get("attention_mask")
            hand_over(query, key, scale=kwargs.get("scaling"), bias=_bias(mask, query, key))
        return function(module, query, key, value, *args, **kwargs)

    attend.hands_over = True  # type: ignore[attr-defined]
    return attend


def _bias(mask: Any, query: Tensor, key: Tensor) -> Tensor | None:
    """A mask in any of the forms that kernels take, as one that is broadcastable to `(B, H, N, N)`."""
    if isinstance(mask, Tensor):
        # (B, N) of flash attention says which keys are there.
        return mask.bool()[:, None, None, :] if mask.ndim == 2 else mask
    if mask is None:
        return None
    from torch.nn.attention.flex_attention import create_mask  # it is a BlockMask

    batch, heads, tokens, _ = query.shape
    return create_mask(mask.mask_mod, batch, heads, tokens, key.shape[-2], device=str(query.device))
