"""Models of timm with random weights whose attention is peaked, as it is in trained ones."""

from __future__ import annotations

from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from helpers import randomize

TARGET_PEAK = 0.5  # the largest weight of a row, mean over rows and heads
_SAMPLED_ROWS = 64
_DRAWS = {"uniform_", "normal_", "erfinv_", "trunc_normal_", "kaiming_uniform_", "xavier_uniform_"}


class _WithoutInitialisation(TorchFunctionMode):
    """Random numbers are not drawn: for weights that are overwritten anyway, most of the time of making a model."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _DRAWS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def make_peaked(name: str, images: Tensor, depth: int | None) -> nn.Module:
    """The model `name` with random weights, queries and keys scaled until its attention to `images` is peaked.

    Args:
        name: of timm.
        images: `(1, 3, H, W)`.
        depth: how many blocks, where that is not the model's own number.
    """
    with _WithoutInitialisation():
        model = _create(name, depth)
    randomize(model).eval()
    _fit_batch_norms(model, images)
    handles = [block.register_forward_pre_hook(_sharpen, with_kwargs=True) for block in _trunk(model).blocks]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return model


def _create(name: str, depth: int | None) -> nn.Module:
    if depth is None:
        return timm.create_model(name)
    try:
        return timm.create_model(name, depth=depth)
    except AssertionError:  # it lists the key heads of each block: of the first, some between and the last
        with torch.device("meta"):
            blocks = _trunk(timm.create_model(name)).blocks
        heads = [blocks[index * (len(blocks) - 1) // (depth - 1)].attn.num_kv_heads for index in range(depth)]
        return timm.create_model(name, depth=depth, num_kv_heads=tuple(heads))


def _trunk(model: nn.Module) -> Any:
    """The part with the blocks."""
    return model if hasattr(model, "blocks") else model.encoder


def _fit_batch_norms(model: nn.Module, images: Tensor) -> None:
    """Statistics for the batch norms of a stem: without them it grows beyond float32 from layer to layer."""
    norms = [part for part in model.modules() if isinstance(part, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    if norms:
        with torch.no_grad():
            model(images)
    for norm in norms:
        norm.eval()


def _sharpen(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a block runs: scale what makes its logits so that the attention to just this input is peaked."""
    with _Calls() as calls:
        block.forward(*args, **kwargs)  # past its hooks, of which this is one
    holders = [part for part in block.modules() if hasattr(part, "attn_drop")]
    for index, holder in enumerate(holders):
        gain = _gain(*calls.seen[index * len(calls.seen) // len(holders)]) ** 0.5
        with torch.no_grad():
            for weights in _query_key_weights(holder):
                weights.mul_(gain)


class _Calls(TorchFunctionMode):
    """Notes query, key, bias and scale of each call of scaled-dot-product attention."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor, Tensor | None, float]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            query, key = args[:2]
            scale = kwargs.get("scale") or query.shape[-1] ** -0.5
            self.seen.append((query, key, kwargs.get("attn_mask"), scale))
        return func(*args, **kwargs)


def _gain(query: Tensor, key: Tensor, bias: Tensor | None, scale: float) -> float:
    """What to multiply the product of queries and keys by for rows to have `TARGET_PEAK` on average; by bisection."""
    rows = torch.linspace(0, query.shape[-2] - 1, _SAMPLED_ROWS).long()
    logits = scale * query[:, :, rows].double() @ key.double().mT
    added = 0 if bias is None else bias.double().expand(*bias.shape[:-2], query.shape[-2], -1)[..., rows, :]
    low, high = 1 / 64, 64.0
    for _ in range(20):
        middle = (low * high) ** 0.5
        peak = float((middle * logits + added).softmax(-1).amax(-1).mean())
        low, high = (middle, high) if peak < TARGET_PEAK else (low, middle)
    return middle


def _query_key_weights(holder: Any) -> list[Tensor]:
    """What an attention module's queries and keys are proportional to: gains of their norms, else projections."""
    norms = [getattr(holder, name, None) for name in ("q_norm", "k_norm")]
    if any(isinstance(norm, nn.Module) and not isinstance(norm, nn.Identity) for norm in norms):
        return [parameter for norm in norms if norm is not None for parameter in norm.parameters()]
    if getattr(holder, "q_proj", None) is not None:
        return [p for projection in (holder.q_proj, holder.k_proj) for p in projection.parameters()]
    if hasattr(holder, "in_proj"):  # of the MLP, queries, keys and values
        projection, rows = holder.in_proj, slice(holder.in_split[0], sum(holder.in_split[:3]))
    else:  # of queries, keys and values
        projection, rows = holder.qkv, slice(0, 2 * holder.qkv.out_features // 3)
    biases = [getattr(holder, name, None) for name in ("q_bias", "k_bias")]
    if projection.bias is not None:
        biases.append(projection.bias[rows])
    return [projection.weight[rows], *(bias for bias in biases if bias is not None)]
