"""Google's own files of Vision Transformers: NumPy archives that their JAX code wrote (vit_jax, augreg, big_vision)."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, cat

from vitprobe.models.pickles import BadFileError, one_line

# How timm resamples the tables of positions in these files.
RESAMPLING = {"interpolation": "bilinear", "antialias": False}
_ROOTS = ("", "opt/target/", "params/", "params/img/")
_MOST = 64  # times the file's size that its arrays may take


def is_archive(names: list[str]) -> bool:
    """Whether the records of a zip archive are those of Google's Vision Transformers."""
    return any(re.match(r"(opt/target/|params/|params/img/)?(embedding/kernel|Transformer/)", name) for name in names)


def read_archive(path: Path) -> dict[str, Tensor]:
    """The weights in such a file, under timm's names; nothing in it is unpickled.

    Raises:
        BadFileError: for a damaged file, arrays of objects, or arrays of another layout.
    """
    arrays = _arrays(path)
    root = next((root for root in _ROOTS if f"{root}embedding/kernel" in arrays), "")
    arrays = {name.removeprefix(root): array for name, array in arrays.items() if name.startswith(root)}
    try:
        return _translated(arrays)
    except (KeyError, ValueError, IndexError, RuntimeError) as error:
        reason = f"no {error.args[0]}" if isinstance(error, KeyError) else error
        raise BadFileError(f"is no Vision Transformer as Google's code writes it ({one_line(reason)})") from error


def _arrays(path: Path) -> dict[str, Tensor]:
    found = {}
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(info.file_size for info in archive.infolist()) > _MOST * path.stat().st_size:
                raise BadFileError("is damaged: its arrays would take far more than its size")
            for info in archive.infolist():
                name = info.filename.removesuffix(".npy")
                with archive.open(info) as file:
                    array = np.lib.format.read_array(file, allow_pickle=False)
                if array.dtype.kind in "fV":
                    found[name] = _tensor(array)
    except BadFileError:
        raise
    except Exception as error:  # damage shows in many ways
        raise BadFileError(f"is damaged, or holds more than numbers ({one_line(error)})") from error
    return found


def _tensor(array: np.ndarray) -> Tensor:
    array = np.array(array, order="C")  # in memory of its own, which torch may write to
    if array.dtype.kind == "V":  # NumPy's word for numbers that it does not know: bfloat16
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).float()
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="))).float()


def _translated(arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    scanned = "Transformer/encoderblock/LayerNorm_0/scale" in arrays  # one array for all blocks
    big_vision = scanned or "pos_embedding" in arrays
    positions = arrays["pos_embedding" if big_vision else "Transformer/posembed_input/pos_embedding"]
    found = {
        "patch_embed.proj.weight": _kernel(arrays["embedding/kernel"]),
        "patch_embed.proj.bias": arrays["embedding/bias"],
        "pos_embed": positions,
        "norm.weight": arrays["Transformer/encoder_norm/scale"],
        "norm.bias": arrays["Transformer/encoder_norm/bias"],
    }
    if "cls" in arrays:
        found["cls_token"] = arrays["cls"]
    if "head/kernel" in arrays:
        found |= {"head.weight": _kernel(arrays["head/kernel"]), "head.bias": arrays["head/bias"]}
    found |= _stem(arrays)
    if "MAPHead_0/probe" in arrays:
        found |= {f"attn_pool.{name}": value for name, value in _pooling(_part(arrays, "MAPHead_0/")).items()}
    if scanned:
        stacked = _part(arrays, "Transformer/encoderblock/")
        depth = len(stacked["LayerNorm_0/scale"])
        blocks = [{name: value[number] for name, value in stacked.items()} for number in range(depth)]
    else:
        numbers = {int(match[1]) for name in arrays if (match := re.match(r"Transformer/encoderblock_(\d+)/", name))}
        blocks = [_part(arrays, f"Transformer/encoderblock_{number}/") for number in range(len(numbers))]
    for number, block in enumerate(blocks):
        named = _block(block, *((0, 0, 1) if big_vision else (1, 3, 2)))
        found |= {f"blocks.{number}.{name}": value for name, value in named.items()}
    return found


def _block(block: Mapping[str, Tensor], attention: int, mlp: int, norm: int) -> dict[str, Tensor]:
    heads = _part(block, f"MultiHeadDotProductAttention_{attention}/")
    return {
        **_norm("norm1", _part(block, "LayerNorm_0/")),
        "attn.qkv.weight": cat([heads[f"{name}/kernel"].flatten(1).T for name in ("query", "key", "value")]),
        "attn.qkv.bias": cat([heads[f"{name}/bias"].flatten() for name in ("query", "key", "value")]),
        "attn.proj.weight": heads["out/kernel"].flatten(0, 1).T,
        "attn.proj.bias": heads["out/bias"],
        **_norm("norm2", _part(block, f"LayerNorm_{norm}/")),
        **_mlp(_part(block, f"MlpBlock_{mlp}/")),
    }


def _pooling(part: Mapping[str, Tensor]) -> dict[str, Tensor]:
    heads = _part(part, "MultiHeadDotProductAttention_0/")
    return {
        "latent": part["probe"],
        "q.weight": heads["query/kernel"].flatten(1).T,
        "q.bias": heads["query/bias"].flatten(),
        "kv.weight": cat([heads[f"{name}/kernel"].flatten(1).T for name in ("key", "value")]),
        "kv.bias": cat([heads[f"{name}/bias"].flatten() for name in ("key", "value")]),
        "proj.weight": heads["out/kernel"].flatten(0, 1).T,
        "proj.bias": heads["out/bias"],
        **_norm("norm", _part(part, "LayerNorm_0/")),
        **_mlp(_part(part, "MlpBlock_0/")),
    }


def _stem(arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The convolutions before the patches of a hybrid, under timm's names; nothing for a pure Vision Transformer."""
    if "conv_root/kernel" not in arrays:
        return {}
    stages = any(name.startswith("block1/") for name in arrays)
    root = "patch_embed.backbone." + ("stem." if stages else "")
    found = {f"{root}conv.weight": _kernel(arrays["conv_root/kernel"])}
    found |= _norm(f"{root}norm", _part(arrays, "gn_root/"))
    for name, value in arrays.items():
        match = re.match(r"block(\d+)/unit(\d+)/(conv|gn)(\d|_proj)/(kernel|scale|bias)$", name)
        if match is None:
            continue
        kind, kept = {"conv": "conv", "gn": "norm"}[match[3]], "bias" if match[5] == "bias" else "weight"
        part = f"downsample.{kind}" if match[4] == "_proj" else f"{kind}{match[4]}"
        place = f"patch_embed.backbone.stages.{int(match[1]) - 1}.blocks.{int(match[2]) - 1}.{part}.{kept}"
        found[place] = _kernel(value) if match[5] == "kernel" else value.flatten()
    return found


def _norm(name: str, part: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{name}.weight": part["scale"].flatten(), f"{name}.bias": part["bias"].flatten()}


def _mlp(part: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        f"mlp.fc{number + 1}.{kept}": _kernel(part[f"Dense_{number}/{name}"])
        for number in range(2)
        for name, kept in (("kernel", "weight"), ("bias", "bias"))
    }


def _kernel(array: Tensor) -> Tensor:
    """Inputs and outputs exchanged: height, width, in, out → out, in, height, width; in, out → out, in."""
    return array.permute(3, 2, 0, 1) if array.ndim == 4 else array.T if array.ndim == 2 else array


def _part(arrays: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}
