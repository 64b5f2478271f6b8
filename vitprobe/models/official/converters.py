"""From the keys of an official release to those of the module that is built for it: pure functions, one a layout.

What a converter does not know it passes on, so that the load which follows names it.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from torch import Tensor, cat

State = dict[str, Tensor]
_IMAGE = "modality_encoders.IMAGE."


def from_plain(state: State) -> State:
    """MAE and iBOT: timm's names; iBOT's token for masked patches goes."""
    return _without(state, "masked_embed")


def from_moco_v3(state: State) -> State:
    """MoCo v3: the base encoder; not its projection head, the momentum encoder or the predictor."""
    return _without(_part(state, "module.base_encoder."), "head.")


def from_maskfeat(state: State) -> State:
    """MaskFeat: queries, keys and values become one projection where the file keeps them apart."""
    state = _without(state, "mask_token", "pred_head.", "hogs.")
    fused: State = {}
    for name, value in state.items():
        parts = re.fullmatch(r"(blocks\.\d+\.attn\.)([qkv])(\.weight|\.bias)", name)
        if parts is None:
            fused[name] = value
            continue
        apart = [state.get(f"{parts[1]}{letter}{parts[3]}") for letter in "qkv"]
        together = [tensor for tensor in apart if tensor is not None]
        if len(together) == len(apart):
            fused[f"{parts[1]}qkv{parts[3]}"] = cat(together)
        else:
            fused[name] = value
    return fused


def from_beit(state: State) -> State:
    """BEiT, BEiT v2 and data2vec: the encoder without the prediction heads; the index of positions is rebuilt."""
    state = _without(state, "mask_token", "lm_head.", "cls_pt_")
    return {name: value for name, value in state.items() if not name.endswith("relative_position_index")}


def from_simmim(state: State) -> State:
    """SimMIM: BEiT's encoder behind "encoder."; not the decoder."""
    return from_beit(_part(state, "encoder."))


def from_data2vec2(state: State) -> State:
    """data2vec 2.0: the image encoder's stem and the shared blocks; not the decoder."""
    names = {
        f"{_IMAGE}extra_tokens": "cls_token",
        f"{_IMAGE}fixed_positional_encoder.positions": "pos_embed",
        f"{_IMAGE}local_encoder.proj.weight": "patch_embed.proj.weight",
        f"{_IMAGE}local_encoder.proj.bias": "patch_embed.proj.bias",
        f"{_IMAGE}context_encoder.norm.weight": "norm_pre.weight",
        f"{_IMAGE}context_encoder.norm.bias": "norm_pre.bias",
    }
    return {names.get(name, name): value for name, value in _without(state, f"{_IMAGE}decoder.", "_ema").items()}


def from_capi(state: State) -> State:
    """CAPI: the encoder under the names of `CapiEncoder`; not the decoder."""
    state = _without(_part(state, "backbone."), "mask_token", "decoder.")
    parts = {"residual1.norm": "norm1", "residual1.fn": "attn", "residual2.norm": "norm2", "residual2.fn": "mlp"}
    renamed: State = {}
    for name, value in state.items():
        name = name.removeprefix("encoder.")
        for old, new in parts.items():
            name = name.replace(f".{old}.", f".{new}.")
        name = "reg_token" if name == "registers" else re.sub(r"^patch_embed\.(?!proj\.)", "patch_embed.proj.", name)
        renamed[name] = value
    return renamed


def from_franca(state: State) -> State:
    """Franca: the teacher's backbone, its blocks out of their chunks, its SwiGLU under timm's names."""
    state = {name.removeprefix("module."): value for name, value in state.items()}
    state = _without(_part(state, "backbone."), "mask_token", "dino_head.", "ibot_head.", "rasa_head.")
    renamed: State = {}
    for name, value in state.items():
        name = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name)
        renamed[name.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")] = value
    return renamed


CONVERTERS: dict[str, Callable[[State], State]] = {
    "plain": from_plain,
    "moco-v3": from_moco_v3,
    "maskfeat": from_maskfeat,
    "beit": from_beit,
    "simmim": from_simmim,
    "data2vec2": from_data2vec2,
    "capi": from_capi,
    "franca": from_franca,
}


def _part(state: State, prefix: str) -> State:
    """What lies behind a prefix, without it; everything where nothing does."""
    part = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
    return part or state


def _without(state: State, *prefixes: str) -> State:
    return {name: value for name, value in state.items() if not name.startswith(prefixes)}
