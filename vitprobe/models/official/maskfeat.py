"""MaskFeat: a Vision Transformer without a final norm, its queries, keys and values in separate projections."""

from __future__ import annotations

import re
from functools import partial

import torch
from timm.models.vision_transformer import VisionTransformer

from vitprobe.errors import UserError
from vitprobe.models.official.entries import OfficialCheckpoint
from vitprobe.models.official.layout import Layout, State, without


def convert(state: State) -> State:
    """Return the encoder, with queries, keys and values in one projection where the file keeps them apart."""
    state = without(state, "mask_token", "pred_head.", "hogs.")
    fused: State = {}
    for name, value in state.items():
        parts = re.fullmatch(r"(blocks\.\d+\.attn\.)([qkv])(\.weight|\.bias)", name)
        if parts is None:
            fused[name] = value
            continue
        apart = [state.get(f"{parts[1]}{letter}{parts[3]}") for letter in "qkv"]
        together = [tensor for tensor in apart if tensor is not None]
        if len(together) == len(apart):
            fused[f"{parts[1]}qkv{parts[3]}"] = torch.cat(together)
        else:
            fused[name] = value
    return fused


def check(entry: OfficialCheckpoint, state: State, source: str) -> None:
    """Raise `UserError` for weights with a final norm, which the release does not have."""
    norm = state.get("norm.weight")
    if norm is None:
        return
    kind = "NaN" if torch.isnan(norm).any() else "weights of its own"
    raise UserError(
        f"{source} has a final norm (norm.weight: {kind}), which MaskFeat was trained without: it is a conversion, not "
        f"the release; take {entry.address}"
    )


LAYOUT = Layout(
    words=(
        "timm's names without norm., its queries, keys and values maybe apart (attn.q, attn.k, attn.v), beside "
        "pred_head. and mask_token"
    ),
    convert=convert,
    build=partial(VisionTransformer, final_norm=False),
    check=check,
)
