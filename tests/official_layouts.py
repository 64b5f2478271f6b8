"""Official checkpoints, synthesised: the keys and shapes of each release, and files as their authors save them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]


def synthesise(name: str, sizes: dict[str, Any], *, device: str = "cpu", seed: int = 0) -> dict[str, Tensor]:
    """A state dict in the official layout of an alias: float32, random, with what pre-training leaves behind.

    `sizes` has patch_size, embed_dim, depth and num_heads, and img_size (without it 224, Franca's 518).
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    state = {}
    for key, shape in _SHAPES[name.rpartition("_vit_")[0]](**sizes).items():
        if device == "meta":
            state[key] = torch.empty(shape, device="meta")
            continue
        draw = torch.randn(shape, generator=generator)
        if key.endswith(("norm.weight", "norm1.weight", "norm2.weight", "gamma", "gamma_1", "gamma_2")):
            state[key] = 1 + 0.2 * draw
        elif key.endswith("freqs"):
            state[key] = 3 * draw
        else:
            state[key] = draw * (2 / draw[0].numel()) ** 0.5 if draw.ndim in (2, 4) else 0.5 * draw
        if key.endswith("relative_position_index"):
            state[key] = state[key].long()
    return state


def save(path: Path, name: str, state: dict[str, Tensor]) -> Path:
    """Writes a state dict as the authors' training code does, among other things."""
    family = name.rpartition("_vit_")[0]
    momentum = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}
    if family == "capi":
        content: Any = state
    elif family == "data2vec2":
        content = {"args": None, "model": state | {"_ema": dict(state)}, "last_optimizer_state": momentum}
    else:
        holders = {"mocov3": "state_dict", "ibot": "state_dict", "maskfeat": "model_state", "franca": "teacher"}
        content = {"epoch": 300, holders.get(family, "model"): state, "optimizer": momentum}
    torch.save(content, path)
    return path


# Keys and shapes ------------------------------------------------------------------------------------------------------


def _linear(name: str, channels_in: int, channels_out: int, *, bias: bool = True) -> Shapes:
    shapes: Shapes = {f"{name}.weight": (channels_out, channels_in)}
    return shapes | ({f"{name}.bias": (channels_out,)} if bias else {})


def _norm(name: str, channels: int) -> Shapes:
    return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}


def _patches(name: str, channels: int, edge: int) -> Shapes:
    return {f"{name}.weight": (channels, 3, edge, edge), f"{name}.bias": (channels,)}


def _mlp(name: str, channels: int) -> Shapes:
    return _linear(f"{name}.fc1", channels, 4 * channels) | _linear(f"{name}.fc2", 4 * channels, channels)


def _block(name: str, channels: int, mixing: Shapes) -> Shapes:
    return (
        _norm(f"{name}.norm1", channels)
        | mixing
        | _linear(f"{name}.attn.proj", channels, channels)
        | _norm(f"{name}.norm2", channels)
        | _mlp(f"{name}.mlp", channels)
    )


def _vit(
    prefix: str, patch_size: int, embed_dim: int, depth: int, num_heads: int, img_size: int = 224, norm: str = "norm"
) -> Shapes:
    shapes: Shapes = {
        f"{prefix}cls_token": (1, 1, embed_dim),
        f"{prefix}pos_embed": (1, (img_size // patch_size) ** 2 + 1, embed_dim),
    }
    shapes |= _patches(f"{prefix}patch_embed.proj", embed_dim, patch_size)
    for index in range(depth):
        name = f"{prefix}blocks.{index}"
        shapes |= _block(name, embed_dim, _linear(f"{name}.attn.qkv", embed_dim, 3 * embed_dim))
    return shapes | (_norm(f"{prefix}{norm}", embed_dim) if norm else {})


def _mae_ft(embed_dim: int, global_pool: str = "avg", **sizes: Any) -> Shapes:
    return _vit("", embed_dim=embed_dim, norm="fc_norm", **sizes) | _linear("head", embed_dim, 1000)


def _mae(embed_dim: int, **sizes: Any) -> Shapes:
    shapes = _vit("", embed_dim=embed_dim, **sizes) | _linear("decoder_embed", embed_dim, 16)
    return shapes | {"mask_token": (1, 1, 16), "decoder_pos_embed": (1, 5, 16)} | _norm("decoder_norm", 16)


def _mocov3(embed_dim: int, **sizes: Any) -> Shapes:
    shapes = _linear("module.predictor.0", 16, 24, bias=False)
    for encoder in ("module.base_encoder.", "module.momentum_encoder."):
        shapes |= _vit(encoder, embed_dim=embed_dim, **sizes)
        shapes |= _linear(f"{encoder}head.0", embed_dim, 24, bias=False) | {f"{encoder}head.1.running_mean": (24,)}
    return shapes


def _ibot(embed_dim: int, **sizes: Any) -> Shapes:
    return _vit("", embed_dim=embed_dim, **sizes) | {"masked_embed": (1, embed_dim)}


def _maskfeat(embed_dim: int, depth: int, **sizes: Any) -> Shapes:
    shapes = _vit("", embed_dim=embed_dim, depth=depth, norm="", **sizes)
    for index in range(depth):
        for part in ("weight", "bias"):
            out, *rest = shapes.pop(f"blocks.{index}.attn.qkv.{part}")
            shapes |= {f"blocks.{index}.attn.{letter}.{part}": (out // 3, *rest) for letter in "qkv"}
    head = _norm("pred_head.transforms.0.0", embed_dim) | _linear("pred_head.projections.0", embed_dim, 108)
    return shapes | head | {"mask_token": (1, 1, embed_dim), "hogs.0.weight_x": (3, 1, 3, 3)}


def _shared(
    prefix: str,
    patch_size: int,
    embed_dim: int,
    depth: int,
    num_heads: int,
    img_size: int = 224,
    init_values: float = 0.1,
) -> Shapes:
    grid = img_size // patch_size
    table = ((2 * grid - 1) ** 2 + 3, num_heads)
    shapes: Shapes = {
        f"{prefix}cls_token": (1, 1, embed_dim),
        f"{prefix}mask_token": (1, 1, embed_dim),
        f"{prefix}rel_pos_bias.relative_position_bias_table": table,
        f"{prefix}rel_pos_bias.relative_position_index": (grid**2 + 1, grid**2 + 1),
    }
    shapes |= _patches(f"{prefix}patch_embed.proj", embed_dim, patch_size)
    for index in range(depth):
        name = f"{prefix}blocks.{index}"
        mixing = _linear(f"{name}.attn.qkv", embed_dim, 3 * embed_dim, bias=False)
        mixing |= {f"{name}.attn.q_bias": (embed_dim,), f"{name}.attn.v_bias": (embed_dim,)}
        shapes |= {f"{name}.gamma_1": (embed_dim,), f"{name}.gamma_2": (embed_dim,)} | _block(name, embed_dim, mixing)
    return shapes | _norm(f"{prefix}norm", embed_dim)


def _beit(embed_dim: int, **sizes: Any) -> Shapes:
    return _shared("", embed_dim=embed_dim, **sizes) | _linear("lm_head", embed_dim, 40)


def _beitv2(embed_dim: int, **sizes: Any) -> Shapes:
    extra = _linear("cls_pt_layers.0.attn.proj", embed_dim, embed_dim) | _norm("cls_pt_norm", embed_dim)
    return _beit(embed_dim=embed_dim, **sizes) | extra


def _simmim(embed_dim: int, **sizes: Any) -> Shapes:
    return _shared("encoder.", embed_dim=embed_dim, **sizes) | {"decoder.0.weight": (768, embed_dim, 1, 1)}


def _data2vec2(patch_size: int, embed_dim: int, depth: int, num_heads: int, img_size: int = 224) -> Shapes:
    image = "modality_encoders.IMAGE."
    shapes: Shapes = {
        f"{image}extra_tokens": (1, 1, embed_dim),
        f"{image}fixed_positional_encoder.positions": (1, (img_size // patch_size) ** 2, embed_dim),
        f"{image}decoder.blocks.0.0.weight": (16, 4, 3, 3),
    }
    shapes |= _patches(f"{image}local_encoder.proj", embed_dim, patch_size)
    shapes |= _norm(f"{image}context_encoder.norm", embed_dim)
    for index in range(depth):
        name = f"blocks.{index}"
        shapes |= _block(name, embed_dim, _linear(f"{name}.attn.qkv", embed_dim, 3 * embed_dim))
    return shapes


def _capi(patch_size: int, embed_dim: int, depth: int, num_heads: int, img_size: int = 224) -> Shapes:
    shapes: Shapes = {"backbone.registers": (1, 16, embed_dim), "backbone.mask_token": (1, embed_dim)}
    shapes |= _patches("backbone.patch_embed", embed_dim, patch_size)
    for part, blocks in (("encoder", depth), ("decoder", 1)):
        for index in range(blocks):
            name = f"backbone.{part}.blocks.{index}"
            for projection in ("q_proj", "k_proj", "v_proj", "proj"):
                shapes |= _linear(f"{name}.residual1.fn.{projection}", embed_dim, embed_dim, bias=False)
            shapes[f"{name}.residual1.fn.rope.freqs"] = (2, embed_dim // num_heads)
            shapes[f"{name}.residual1.norm.weight"] = shapes[f"{name}.residual2.norm.weight"] = (embed_dim,)
            shapes |= _linear(f"{name}.residual2.fn.fc1", embed_dim, 4 * embed_dim, bias=False)
            shapes |= _linear(f"{name}.residual2.fn.fc2", 4 * embed_dim, embed_dim, bias=False)
    return shapes


def _franca(embed_dim: int, depth: int, img_size: int = 518, mlp_ratio: float = 0.0, **sizes: Any) -> Shapes:
    hidden = (int(4 * embed_dim * 2 / 3) + 7) // 8 * 8
    shapes: Shapes = {"dino_head.mlp.0.weight": (8, embed_dim), "backbone.mask_token": (1, embed_dim)}
    chunk = -(-depth // 4)
    for name, shape in _vit("", embed_dim=embed_dim, depth=depth, img_size=img_size, **sizes).items():
        if ".mlp." not in name:
            shapes[f"backbone.{_chunked(name, chunk)}"] = shape
    for index in range(depth):
        name = f"backbone.{_chunked(f'blocks.{index}', chunk)}"
        shapes |= {f"{name}.ls1.gamma": (embed_dim,), f"{name}.ls2.gamma": (embed_dim,)}
        shapes |= _linear(f"{name}.mlp.w12", embed_dim, 2 * hidden) | _linear(f"{name}.mlp.w3", hidden, embed_dim)
    return shapes


def _chunked(name: str, chunk: int) -> str:
    if not name.startswith("blocks."):
        return name
    _, index, *rest = name.split(".")
    return ".".join(["blocks", str(int(index) // chunk), index, *rest])


_SHAPES: dict[str, Callable[..., Shapes]] = {
    "mae_ft": _mae_ft,
    "mae": _mae,
    "mocov3": _mocov3,
    "ibot": _ibot,
    "maskfeat": _maskfeat,
    "beit": _beit,
    "beitv2": _beitv2,
    "data2vec": _beit,
    "simmim": _simmim,
    "data2vec2": _data2vec2,
    "capi": _capi,
    "franca": _franca,
}
