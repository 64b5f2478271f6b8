"""The independent reference: the textbook definitions in float64 numpy, from the whole attention matrix."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor, nn


def reference_statistics(
    A: ndarray,
    *,
    grid: tuple[int, int],
    prefix: int,
    has_cls: bool,
    registers: int,
    patch_size: tuple[int, int],
    tokens: BlockTokens | None = None,
) -> dict[str, ndarray]:
    """`{name: (B, H)}` ((B, 1) for one number a block) of the statistics defined for attention `A` `(B, H, T, T)`.

    Written from the definitions, sums over the matrix and nothing else; shares no code with the package.
    """
    N = grid[0] * grid[1]
    patches = range(prefix, prefix + N)
    P = A[..., prefix:]  # columns: patch keys
    S = P.sum(-1)
    p = P / S[..., None]
    entropy = -np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0).sum(-1)
    diagonal = np.stack([A[:, :, t, t] for t in range(A.shape[-1])], -1)
    place = np.array([(row, column) for row in range(grid[0]) for column in range(grid[1])], float)
    apart = np.sqrt(((place[:, None] - place[None]) ** 2).sum(-1))
    distance = (p[:, :, prefix:] * apart).sum(-1).mean(-1)

    values = {
        "patch_self_attention": diagonal[..., patches].mean(-1),
        "patch_self_attention_ratio": (diagonal / S)[..., patches].mean(-1),
        "patch_entropy": entropy[..., patches].mean(-1),
        "attention_distance": distance,
        "attention_distance_px": distance * np.sqrt(patch_size[0] * patch_size[1]),
    }
    if N > 1:
        values["patch_entropy_share"] = entropy[..., patches].mean(-1) / np.log(N)
    if has_cls:
        values["cls_self_attention"] = A[:, :, 0, 0]
        values["cls_self_attention_ratio"] = A[:, :, 0, 0] / S[..., 0]
        values["cls_to_patches"] = P[:, :, 0].mean(-1)
        values["cls_entropy"] = entropy[..., 0]
        values["patches_to_cls"] = A[:, :, patches, 0].mean(-1)
        if N > 1:
            values["cls_entropy_share"] = entropy[..., 0] / np.log(N)
    if registers:
        values["patches_to_registers"] = A[:, :, patches, prefix - registers : prefix].sum(-1).mean(-1)
    if has_cls and registers:
        values["cls_to_registers"] = A[:, :, 0, prefix - registers : prefix].sum(-1)
    if tokens is not None:
        size = np.linalg.norm(tokens.output, axis=-1)[:, prefix:]
        values["patch_norm_max_ratio"] = (size.max(1) / np.median(size, axis=1))[:, None]
        for suffix, update in (("", tokens.update), ("_unscaled", tokens.unscaled_update)):
            if update is not None:
                ratio = np.linalg.norm(update, axis=-1) / np.linalg.norm(tokens.residual, axis=-1)
                values[f"patch_update_ratio{suffix}"] = ratio[:, prefix:].mean(1)[:, None]
                if has_cls:
                    values[f"cls_update_ratio{suffix}"] = ratio[:, :1]
    return values


def reference_attention(query: Tensor, key: Tensor, scale: float, bias: Tensor | None) -> ndarray:
    """`softmax(scale·q·kᵀ + bias)` in float64 from queries and keys of any precision, `(B, H, T, T)`."""
    q, k = query.double().numpy(), key.double().numpy()
    s = scale * q @ k.swapaxes(-1, -2) + (0 if bias is None else bias.double().numpy())
    e = np.exp(s - s.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def largest_logit(query: Tensor, key: Tensor, scale: float, bias: Tensor | None) -> float:
    """max |s|, which the error bound grows with."""
    q, k = query.double().numpy(), key.double().numpy()
    s = scale * q @ k.swapaxes(-1, -2) + (0 if bias is None else bias.double().numpy())
    return float(np.abs(s[np.isfinite(s)]).max())


# A model's own attention, without any capture -------------------------------------------------------------------------

PRE_NORM_BLOCKS = {"Block", "EvaBlock", "RelPosBlock", "DeepseekVitBlock"}
POST_NORM_BLOCKS = {"ResPostBlock", "ResPostRelPosBlock", "EvaBlockPostNorm"}
ONE_SUM_BLOCKS = {"ParallelScalingBlock", "DiffParallelScalingBlock"}
BLOCKS = PRE_NORM_BLOCKS | POST_NORM_BLOCKS | ONE_SUM_BLOCKS | {"Gemma4Block", "ParallelThingsBlock"}


@dataclass
class BlockTokens:
    """Tokens `(B, T, D)` around the attention of one block; the updates are None where it adds the MLP's with them."""

    residual: ndarray
    output: ndarray
    update: ndarray | None = None
    unscaled_update: ndarray | None = None


@dataclass
class BlockTrace:
    """What one block did in an unfused run: its attention matrices, one an attention, and its tokens."""

    attention: list[ndarray] = field(default_factory=list)
    tokens: BlockTokens | None = None

    @property
    def A(self) -> ndarray:
        return np.concatenate(self.attention, axis=1)


def unfused_run(model: nn.Module, images: Tensor) -> list[BlockTrace]:
    """Run `model` with hand-written softmax (timm's unfused path) and read A where it enters the attention dropout."""
    blocks = list((model if hasattr(model, "blocks") else model.encoder).blocks)
    traces = [BlockTrace() for _ in blocks]
    handles = []
    for block, trace in zip(blocks, traces, strict=True):
        for name, module in block.named_modules():
            if name.endswith("attn_drop"):
                handles.append(
                    module.register_forward_pre_hook(
                        lambda _, args, trace=trace: trace.attention.append(_array(args[0]))
                    )
                )
        handles += watch_tokens(block, trace)
    try:
        with torch.no_grad(), unfused(model):
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return traces


@contextmanager
def unfused(model: nn.Module) -> Iterator[None]:
    """Fused kernels off for the body."""
    fused = {module: module.fused_attn for module in model.modules() if hasattr(module, "fused_attn")}
    try:
        for module in fused:
            module.fused_attn = False
        yield
    finally:
        for module, flag in fused.items():
            module.fused_attn = flag


def watch_tokens(block: nn.Module, trace: BlockTrace) -> list:
    """Hook the tokens around the attention of a block, by what the source of its class says."""
    kind = type(block).__name__
    seen: dict[str, list[ndarray]] = {}

    def note(name: str, module: nn.Module, *, entering: bool = False):
        if entering:
            return module.register_forward_pre_hook(lambda _, a: seen.setdefault(name, []).append(_array(a[0])))
        return module.register_forward_hook(lambda _, a, out: seen.setdefault(name, []).append(_array(out)))

    def finish(module: nn.Module, args: tuple, output: Tensor) -> None:
        residual, output = _array(args[0]), _array(output)
        update = unscaled = None
        if kind in PRE_NORM_BLOCKS:  # x + update enters the MLP's norm
            update, unscaled = seen["mlp_input"][0] - residual, seen["attn"][0]
        elif kind in POST_NORM_BLOCKS:  # x + norm1(attn(x))
            update, unscaled = seen["norm1"][0], seen["attn"][0]
        elif kind == "Gemma4Block":  # x + norm2(attn(norm1(x)))
            update, unscaled = seen["norm2"][0], seen["attn"][0]
        elif kind == "ParallelThingsBlock":  # x + Σ branches
            update, unscaled = sum(seen["branch"]), sum(seen["attn"])
        else:
            assert kind in ONE_SUM_BLOCKS, kind  # x + projection of attention and MLP together
        trace.tokens = BlockTokens(residual, output, update, unscaled)

    handles = [block.register_forward_hook(finish)]
    if hasattr(block, "attns"):
        for branch in block.attns:
            handles += [note("branch", branch), note("attn", branch.attn)]
    elif hasattr(block, "attn"):
        handles += [note("attn", block.attn), note("norm1", block.norm1), note("norm2", block.norm2)]
        handles.append(note("mlp_input", block.norm2, entering=True))
    return handles


def _array(tensor: Tensor) -> ndarray:
    return tensor.detach().double().numpy().copy()
