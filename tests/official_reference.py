"""The official architectures once more: plain functions over the keys of each release, in the precision they are given.

Written from the papers and the authors' code, and sharing nothing with the package.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

State = dict[str, Tensor]


def _norm(x: Tensor, state: State, name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def _rms(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def _linear(x: Tensor, state: State, name: str) -> Tensor:
    return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0)


def _gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def _mlp(x: Tensor, state: State, name: str) -> Tensor:
    return _linear(_gelu(_linear(x, state, f"{name}.fc1")), state, f"{name}.fc2")


def _split(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _mix(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    logits = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]) + bias
    return (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)


def _attention(x: Tensor, state: State, name: str, heads: int) -> Tensor:
    if f"{name}.q.weight" in state:
        parts = [_linear(x, state, f"{name}.{letter}") for letter in "qkv"]
    else:
        parts = list(_linear(x, state, f"{name}.qkv").chunk(3, -1))
    return _linear(_mix(*(_split(part, heads) for part in parts)), state, f"{name}.proj")


def _patches(images: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    edge = weight.shape[-1]
    cut = images.unfold(2, edge, edge).unfold(3, edge, edge)  # (B, 3, rows, columns, edge, edge)
    return torch.einsum("bcrsij,dcij->brsd", cut, weight).flatten(1, 2) + bias


def _embed(images: Tensor, state: State, prefix: str = "") -> Tensor:
    patches = _patches(images, state[f"{prefix}patch_embed.proj.weight"], state[f"{prefix}patch_embed.proj.bias"])
    return torch.cat([state[f"{prefix}cls_token"].expand(len(images), -1, -1), patches], dim=1)


def vit(state: State, images: Tensor, heads: int, depth: int, *, prefix: str = "", norm: str = "norm") -> Tensor:
    """Tokens of a plain Vision Transformer, normalised at the end where `norm` names a norm."""
    x = _embed(images, state, prefix) + state[f"{prefix}pos_embed"]
    for index in range(depth):
        block = f"{prefix}blocks.{index}"
        x = x + _attention(_norm(x, state, f"{block}.norm1"), state, f"{block}.attn", heads)
        x = x + _mlp(_norm(x, state, f"{block}.norm2"), state, f"{block}.mlp")
    return _norm(x, state, f"{prefix}{norm}") if norm else x


def mae_ft(state: State, images: Tensor, heads: int, depth: int) -> Tensor:
    """Logits of a fine-tuned MAE: the mean of the patches, normalised and classified."""
    pooled = vit(state, images, heads, depth, norm="")[:, 1:].mean(1)
    return _linear(_norm(pooled, state, "fc_norm"), state, "head")


def _relative_bias(table: Tensor, grid: int) -> Tensor:
    """The bias of each head, `(heads, tokens, tokens)`, one look-up at a time."""
    tokens = 1 + grid * grid
    bias = table.new_zeros(table.shape[1], tokens, tokens)
    for i in range(tokens):
        for j in range(tokens):
            if i == 0 and j == 0:
                row = len(table) - 1
            elif i == 0:
                row = len(table) - 3
            elif j == 0:
                row = len(table) - 2
            else:
                down = (i - 1) // grid - (j - 1) // grid + grid - 1
                right = (i - 1) % grid - (j - 1) % grid + grid - 1
                row = down * (2 * grid - 1) + right
            bias[:, i, j] = table[row]
    return bias


def beit(state: State, images: Tensor, heads: int, depth: int, *, prefix: str = "") -> Tensor:
    """Tokens of BEiT's pre-training architecture: one table of relative positions, no absolute ones."""
    x = _embed(images, state, prefix)
    grid = math.isqrt(x.shape[1] - 1)
    bias = _relative_bias(state[f"{prefix}rel_pos_bias.relative_position_bias_table"], grid)
    for index in range(depth):
        block = f"{prefix}blocks.{index}"
        q, k, v = _linear(_norm(x, state, f"{block}.norm1"), state, f"{block}.attn.qkv").chunk(3, -1)
        q, v = q + state[f"{block}.attn.q_bias"], v + state[f"{block}.attn.v_bias"]  # keys have none
        mixed = _mix(_split(q, heads), _split(k, heads), _split(v, heads), bias)
        x = x + state[f"{block}.gamma_1"] * _linear(mixed, state, f"{block}.attn.proj")
        x = x + state[f"{block}.gamma_2"] * _mlp(_norm(x, state, f"{block}.norm2"), state, f"{block}.mlp")
    return _norm(x, state, f"{prefix}norm")


def data2vec2(state: State, images: Tensor, heads: int, depth: int) -> Tensor:
    """Tokens of data2vec 2.0: positions on patches alone, a norm before the blocks, norms after the sums."""
    image = "modality_encoders.IMAGE."
    patches = _patches(images, state[f"{image}local_encoder.proj.weight"], state[f"{image}local_encoder.proj.bias"])
    patches = patches + state[f"{image}fixed_positional_encoder.positions"]
    x = torch.cat([state[f"{image}extra_tokens"].expand(len(images), -1, -1), patches], dim=1)
    x = _norm(x, state, f"{image}context_encoder.norm")
    for index in range(depth):
        block = f"blocks.{index}"
        x = _norm(x + _attention(x, state, f"{block}.attn", heads), state, f"{block}.norm1")
        x = _norm(x + _mlp(x, state, f"{block}.mlp"), state, f"{block}.norm2")
    return x


def franca(state: State, images: Tensor, heads: int, depth: int) -> Tensor:
    """Tokens of Franca: LayerScale, and a SwiGLU in place of the MLP."""
    chunk = -(-depth // 4)
    x = _embed(images, state, "backbone.") + state["backbone.pos_embed"]
    for index in range(depth):
        block = f"backbone.blocks.{index // chunk}.{index}"
        update = _attention(_norm(x, state, f"{block}.norm1"), state, f"{block}.attn", heads)
        x = x + update * state[f"{block}.ls1.gamma"]
        gate, value = _linear(_norm(x, state, f"{block}.norm2"), state, f"{block}.mlp.w12").chunk(2, -1)
        x = x + _linear(gate * gate.sigmoid() * value, state, f"{block}.mlp.w3") * state[f"{block}.ls2.gamma"]
    return _norm(x, state, "backbone.norm")


def _corner_walk(count: int) -> list[tuple[float, float]]:
    """Where CAPI puts its registers: evenly along the edge of the unit square."""
    side = count // 4
    places = []
    for index in range(count):
        along = index % side / side
        places.append([(along, 0), (1, along), (1 - along, 1), (0, 1 - along)][index // side])
    return places


def capi(state: State, images: Tensor, heads: int, depth: int) -> Tensor:
    """Tokens of CAPI's encoder: 16 registers at the edge, rotary positions for every token."""
    patches = _patches(images, state["backbone.patch_embed.weight"], state["backbone.patch_embed.bias"])
    edge = state["backbone.patch_embed.weight"].shape[-1]
    rows, columns = images.shape[-2] // edge, images.shape[-1] // edge
    places = [(r / max(rows - 1, 1), c / max(columns - 1, 1)) for r in range(rows) for c in range(columns)]
    far = (max(place[0] for place in places), max(place[1] for place in places))
    places = [(r * far[0], c * far[1]) for r, c in _corner_walk(16)] + places
    x = torch.cat([state["backbone.registers"].expand(len(images), -1, -1), patches], dim=1)
    positions = torch.tensor(places, dtype=x.dtype)

    def turn(z: Tensor, freqs: Tensor) -> Tensor:
        angle = positions[:, :1] * freqs[0] + positions[:, 1:] * freqs[1]
        half = z.shape[-1] // 2
        partner = torch.cat([-z[..., half:], z[..., :half]], dim=-1)
        return z * angle.cos() + partner * angle.sin()

    for index in range(depth):
        block = f"backbone.encoder.blocks.{index}"
        attention = f"{block}.residual1.fn"
        y = _rms(x) * state[f"{block}.residual1.norm.weight"]
        q, k, v = (_split(_linear(y, state, f"{attention}.{letter}_proj"), heads) for letter in "qkv")
        freqs = state[f"{attention}.rope.freqs"]
        x = x + _linear(_mix(turn(q, freqs), turn(k, freqs), v), state, f"{attention}.proj")
        x = x + _mlp(_rms(x) * state[f"{block}.residual2.norm.weight"], state, f"{block}.residual2.fn")
    return _rms(x)
