"""Google's .npz of Vision Transformers: read as timm reads them, and nothing in them is unpickled."""

from __future__ import annotations

import io
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from numpy import ndarray
from timm.models.vision_transformer import VisionTransformer

from vitprobe.errors import UserError
from vitprobe.models.checkpoints import load_into, open_checkpoint, read_checkpoint
from vitprobe.models.loading import load_model

HEADS = 2


def small(**options) -> VisionTransformer:
    torch.manual_seed(options.pop("seed", 1))
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": HEADS, "num_classes": 0}
    model = VisionTransformer(**{**settings, **options}).eval()
    for value in model.parameters():
        torch.nn.init.normal_(value)  # biases and norms too
    return model


def in_flax(model: VisionTransformer, kind: str = "augreg", heads: int = HEADS) -> dict[str, ndarray]:
    """A model's weights in the official layout: the inverse of its reading, written plainly.

    Kinds: "augreg" (and the first files), "big_vision" (another numbering of parts), "scanned" (one array for all
    blocks).
    """
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    new = kind != "augreg"
    attention, mlp, second = (0, 0, 1) if new else (1, 3, 2)
    dim = state["norm.weight"].shape[0]
    arrays = {
        "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "pos_embedding" if new else "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
    }
    if "cls_token" in state:
        arrays["cls"] = state["cls_token"]
    if "head.weight" in state:
        arrays |= {"head/kernel": state["head.weight"].T, "head/bias": state["head.bias"]}

    def attend(fused: str, out: str, fused_queries: str = "") -> dict[str, ndarray]:
        names = ("query", "key", "value")
        weights = state[f"{fused}.weight"], state[f"{fused}.bias"]
        if fused_queries:
            weights = tuple(
                np.concatenate([state[f"{fused_queries}.{kept}"], whole])
                for kept, whole in zip(("weight", "bias"), weights, strict=True)
            )
        found = {}
        for place, name in enumerate(names):
            rows = slice(place * dim, (place + 1) * dim)
            found[f"{name}/kernel"] = weights[0][rows].T.reshape(dim, heads, dim // heads)
            found[f"{name}/bias"] = weights[1][rows].reshape(heads, dim // heads)
        found["out/kernel"] = state[f"{out}.weight"].T.reshape(heads, dim // heads, dim)
        found["out/bias"] = state[f"{out}.bias"]
        return found

    def feed(name: str) -> dict[str, ndarray]:
        return {
            f"Dense_{number}/{kept}": state[f"{name}.fc{number + 1}.{ours}"].T
            for number in range(2)
            for kept, ours in (("kernel", "weight"), ("bias", "bias"))
        }

    def normed(name: str) -> dict[str, ndarray]:
        return {"scale": state[f"{name}.weight"], "bias": state[f"{name}.bias"]}

    def put(prefix: str, part: dict[str, ndarray]) -> dict[str, ndarray]:
        return {f"{prefix}/{name}": value for name, value in part.items()}

    blocks = []
    for number in range(len(model.blocks)):
        name = f"blocks.{number}"
        blocks.append(
            put("LayerNorm_0", normed(f"{name}.norm1"))
            | put(f"MultiHeadDotProductAttention_{attention}", attend(f"{name}.attn.qkv", f"{name}.attn.proj"))
            | put(f"LayerNorm_{second}", normed(f"{name}.norm2"))
            | put(f"MlpBlock_{mlp}", feed(f"{name}.mlp"))
        )
    if kind == "scanned":
        arrays |= put("Transformer/encoderblock", {name: np.stack([b[name] for b in blocks]) for name in blocks[0]})
    else:
        for number, block in enumerate(blocks):
            arrays |= put(f"Transformer/encoderblock_{number}", block)
    if "attn_pool.latent" in state:
        pool = put("MultiHeadDotProductAttention_0", attend("attn_pool.kv", "attn_pool.proj", "attn_pool.q"))
        pool |= put("LayerNorm_0", normed("attn_pool.norm")) | put("MlpBlock_0", feed("attn_pool.mlp"))
        arrays |= put("MAPHead_0", pool | {"probe": state["attn_pool.latent"]})
    return arrays


def write(arrays: dict[str, ndarray], path: Path, root: str = "") -> Path:
    np.savez(path, **{f"{root}{name}": value for name, value in arrays.items()})
    return path


KINDS = {
    "augreg": ({}, "augreg", ""),
    "with the optimiser": ({}, "augreg", "opt/target/"),
    "with a head": ({"num_classes": 5}, "augreg", ""),
    "big_vision": ({"class_token": False, "global_pool": "avg", "fc_norm": False}, "big_vision", ""),
    "big_vision, params": ({"class_token": False, "global_pool": "avg", "fc_norm": False}, "big_vision", "params/"),
    "scanned": ({"class_token": False, "global_pool": "avg", "fc_norm": False}, "scanned", "params/"),
    "SigLIP": ({"class_token": False, "global_pool": "map"}, "big_vision", "params/img/"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_is_where_it_was_and_where_timm_has_it(kind, tmp_path):
    options, layout, root = KINDS[kind]
    source, ours, timms = (small(**options, seed=seed) for seed in (1, 2, 3))
    path = write(in_flax(source, layout), tmp_path / "B_16.npz", root)
    assert load_into(ours, read_checkpoint(path), source="it") == ()
    timms.load_pretrained(str(path))  # type: ignore[operator]
    for name, value in source.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
        assert torch.equal(timms.state_dict()[name], value), name


@pytest.mark.parametrize("size", [64, (32, 64), 24])
def test_positions_are_resampled_as_timm_does_for_these_files(size, tmp_path):
    path = write(in_flax(small()), tmp_path / "B_16.npz")
    ours, timms = small(img_size=size, seed=2), small(img_size=size, seed=3)
    found = open_checkpoint(path)
    load_into(ours, found.state, source="it", resampling=found.resampling)
    timms.load_pretrained(str(path))  # type: ignore[operator]
    assert torch.equal(ours.pos_embed, timms.pos_embed)
    assert ours.pos_embed.shape != small().pos_embed.shape


def test_a_named_architecture_at_any_size(tmp_path):
    torch.manual_seed(0)
    source = timm.create_model("vit_tiny_patch16_224", num_classes=3)
    path = write(in_flax(source, heads=3), tmp_path / "Ti_16.npz")
    model = load_model(path, arch="vit_tiny_patch16_224", img_size=96)
    assert model.layout.grid == (6, 6)
    state = model.module.state_dict()
    assert torch.equal(state["blocks.11.attn.qkv.weight"], source.state_dict()["blocks.11.attn.qkv.weight"])
    assert torch.equal(state["head.weight"], source.state_dict()["head.weight"])
    assert model.remarks == ()
    with pytest.raises(UserError, match="does not fit vit_small_patch16_224: "):
        load_model(path, arch="vit_small_patch16_224")


def test_bfloat16(tmp_path):
    """NumPy has no such number, and reads its bytes as raw data."""
    arrays = in_flax(small())
    kernel = torch.tensor(arrays["embedding/kernel"]).bfloat16()
    arrays["embedding/kernel"] = kernel.view(torch.int16).numpy().view("V2")
    state = read_checkpoint(write(arrays, tmp_path / "file.npz"))
    assert torch.equal(state["patch_embed.proj.weight"], kernel.float().permute(3, 2, 0, 1))


class Payload:
    ran = False

    def __reduce__(self):
        return setattr, (Payload, "ran", True)


def test_nothing_is_unpickled(tmp_path):
    arrays = in_flax(small())
    path = write(arrays | {"more": np.array([Payload()], dtype=object)}, tmp_path / "file.npz")
    assert refusal(path).startswith("is damaged, or holds more than numbers (Object arrays cannot be loaded")
    assert not Payload.ran
    np.load(path, allow_pickle=True)["more"]
    assert Payload.ran, "it does run where nothing stops it"


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{path} ")


def test_files_that_are_not_whole(tmp_path):
    arrays = in_flax(small())
    for missing in ("embedding/kernel", "Transformer/encoderblock_1/MlpBlock_3/Dense_0/kernel"):
        path = write({name: value for name, value in arrays.items() if name != missing}, tmp_path / "file.npz")
        said = refusal(path)
        assert said.startswith("is no Vision Transformer as Google's code writes it (no ")
        assert missing.endswith(re.search(r"\(no (.*)\)", said)[1])  # type: ignore[index]
    path = write(arrays, tmp_path / "file.npz")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "damaged" in refusal(path)
    other = write({"a": np.ones(3)}, tmp_path / "other.npz")
    assert refusal(other) == "is a zip archive that torch.save did not write"


def test_a_small_file_that_claims_much(tmp_path):
    file = io.BytesIO()
    np.save(file, np.zeros((4096, 4096), dtype=np.float32))
    path = tmp_path / "file.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("embedding/kernel.npy", file.getvalue())
    assert refusal(path) == "is damaged: its arrays would take far more than its size"
