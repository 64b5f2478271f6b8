"""What a call of an attention function says of its weights, for each function that computes attention."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitprobe.attention.rows import RowSummary
from vitprobe.hooks.handover import hand_over


@dataclass(eq=False)
class AttentionCall:
    """What decides the attention weights of one call, detached: `softmax(scale·q·kᵀ + bias)`, or `softmax(logits)`.

    Attributes:
        query: `(…, N, d)`, or None where only logits were seen.
        key: `(…, M, d)`.
        scale: what their product is multiplied by.
        bias: what is added to it, or None.
        logits: `(…, N, M)` of a softmax called by hand.
        handed_over: whether the model showed it itself.
        applied: of a softmax, whether its output went into a product (with the values) unchanged.
        changed_by: of a softmax, the first function that changed its output.
        value: values of `F.scaled_dot_product_attention`, whose output may be computed here; None of other calls.
        dropout: share of the weights that are dropped.
        needs_gradient: whether autograd follows it.
        output: what the call gives, where that was computed here instead of by the model's kernel.
        measured: what was found of the patch rows along with that.
    """

    query: Tensor | None
    key: Tensor | None
    scale: float = 1.0
    bias: Tensor | None = None
    logits: Tensor | None = None
    handed_over: bool = False
    applied: bool = True
    changed_by: str = ""
    value: Tensor | None = None
    dropout: float = 0.0
    needs_gradient: bool = False
    output: Tensor | None = None
    measured: RowSummary | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Queries and keys `(N, M)`."""
        if self.logits is not None:
            return self.logits.shape[-2], self.logits.shape[-1]
        assert self.query is not None and self.key is not None
        return self.query.shape[-2], self.key.shape[-2]

    def take_output(self) -> Tensor:
        """The output that was computed here: the model's from then on, as the MLP should not wait for its memory."""
        output, self.output = self.output, None
        assert output is not None
        return output

    def release(self) -> None:
        """Lets go of all that was measured, for the same reason; queries and keys keep their shapes alone."""
        self.value = self.bias = None
        if self.query is not None and self.key is not None:
            self.query, self.key = (of.new_zeros(()).expand(of.shape) for of in (self.query, self.key))


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
    """Of `F.scaled_dot_product_attention` (its own names and defaults).

    Dropout is left out: the weights are those before it.
    """
    if key.shape[-3] != query.shape[-3] and enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
    if key.shape[:-2] != query.shape[:-2]:  # one key head for all queries: broadcast, as the kernel does
        key = key.expand(*query.shape[:-2], *key.shape[-2:])
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    bias = None if attn_mask is None else _additive(attn_mask, allowed=True)
    if bias is not None:  # a mask of keys alone, (B, 1, 1, N), is the same for each query; no memory is taken
        bias = bias.expand(*bias.shape[:-2], query.shape[-2], key.shape[-2])
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    followed = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    return AttentionCall(
        query.detach(),
        key.detach(),
        scale,
        bias,
        value=value.detach(),
        dropout=dropout_p,
        needs_gradient=followed,
    )


def read_hand_over(
    query: Tensor, key: Tensor, *, scale: float | None = None, bias: Tensor | None = None
) -> AttentionCall:
    """Of `hand_over`."""
    call = read_call(query, key, key, attn_mask=bias, scale=scale, enable_gqa=True)
    call.handed_over, call.value = True, None
    return call


_MULTI_HEAD = inspect.signature(F.multi_head_attention_forward)


def read_multi_head(*args: Any, **kwargs: Any) -> AttentionCall:
    """Of `F.multi_head_attention_forward`, which `nn.MultiheadAttention` calls: projects queries and keys once more."""
    given = _MULTI_HEAD.bind(*args, **kwargs)
    given.apply_defaults()
    known = given.arguments
    query, key, heads = known["query"].detach(), known["key"].detach(), known["num_heads"]
    if query.ndim == 2:  # one image without a batch
        query, key = query[:, None], key[:, None]
    width = query.shape[-1]
    if known["use_separate_proj_weight"]:
        weights = known["q_proj_weight"], known["k_proj_weight"]
    else:
        weights = known["in_proj_weight"][:width], known["in_proj_weight"][width : 2 * width]
    biases = (None, None) if known["in_proj_bias"] is None else known["in_proj_bias"].split(width)[:2]
    with torch.no_grad():
        query = F.linear(query, weights[0], biases[0])
        key = F.linear(key, weights[1], biases[1])
    extra = [] if known["bias_k"] is None else [known["bias_k"].detach().expand(1, key.shape[1], width)]
    extra += [key.new_zeros(1, key.shape[1], width)] if known["add_zero_attn"] else []
    # One key more than there are tokens, which a later check names.
    key = torch.cat([key, *extra]) if extra else key

    def split(tokens: Tensor) -> Tensor:
        """`(N, B, D)` → `(B, H, N, d)`."""
        return tokens.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)

    bias = None
    mask, padding = known["attn_mask"], known["key_padding_mask"]
    if mask is not None:
        bias = _additive(mask, allowed=False)
        bias = bias.unflatten(0, (-1, heads)) if bias.ndim == 3 else bias
    if padding is not None:
        hidden = _additive(padding, allowed=False)[:, None, None, :]
        bias = hidden.expand(-1, -1, query.shape[0], -1) if bias is None else bias + hidden
    return AttentionCall(split(query), split(key), 1 / math.sqrt(width // heads), bias)


def read_softmax(*args: Any, **kwargs: Any) -> AttentionCall | None:
    """Of any softmax over the last of at least three axes, if that can be attention; None otherwise.

    Its output must still be seen to be applied: `applied` is False.
    """
    logits = args[0] if args else kwargs.get("input", kwargs.get("self"))
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    if not isinstance(logits, Tensor) or logits.ndim < 3 or dim not in (-1, logits.ndim - 1):
        return None
    return AttentionCall(None, None, logits=logits.detach(), applied=False)


READERS: dict[Any, Any] = {
    F.scaled_dot_product_attention: read_call,
    F.multi_head_attention_forward: read_multi_head,
    hand_over: read_hand_over,
}
SOFTMAXES = {F.softmax, torch.softmax, torch.special.softmax, Tensor.softmax}


def _additive(mask: Tensor, *, allowed: bool) -> Tensor:
    """A mask as what is added to the logits; a boolean one says where a key is `allowed` (or is not)."""
    mask = mask.detach()
    if mask.dtype != torch.bool:
        return mask
    hidden = ~mask if allowed else mask
    return torch.zeros(mask.shape, device=mask.device).masked_fill(hidden, -torch.inf)
