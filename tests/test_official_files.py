"""Official checkpoints that are not what they should be, and where their files come from: one line each."""

from __future__ import annotations

import gc
import hashlib
import http.server
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from helpers import message, serving
from official_layouts import save, synthesise
from vitprobe.errors import UserError
from vitprobe.models import downloads
from vitprobe.models.building import outline
from vitprobe.models.caches import address_path
from vitprobe.models.downloads import fetch_from_address, require_weights
from vitprobe.models.loading import load_model, require_loadable
from vitprobe.models.official.entries import OFFICIAL
from vitprobe.models.official.moco_v3 import require_heads
from vitprobe.models.registry import find_spec, list_models, status

TINY = {"patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3, "img_size": 32}


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def server(tmp_path):
    """Serves the files of a folder."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(folder))

        def log_message(self, format: str, *args: Any) -> None:
            seen.append(args[0])

    seen: list[str] = []
    with serving(Handler, folder=folder, seen=seen) as running:
        yield running


def shrink(monkeypatch: pytest.MonkeyPatch, name: str, **changes: Any) -> dict[str, Any]:
    """Makes an entry small for one test; its sizes."""
    arguments = OFFICIAL[name].arguments | TINY
    monkeypatch.setitem(OFFICIAL, name, replace(OFFICIAL[name], arguments=arguments, **changes))
    return arguments


def refusal(name: str | Path, path: Path | None = None, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        load_model(name, checkpoint=path, **options)
    return message(caught)


# What a load by names and shapes would not notice ---------------------------------------------------------------------


def test_moco_in_a_model_of_other_heads_is_refused(tmp_path):
    official = synthesise("mocov3_vit_s", OFFICIAL["mocov3_vit_s"].arguments)
    path = save(tmp_path / "vit-s-300ep.pth.tar", "mocov3_vit_s", official)
    state = torch.load(path, weights_only=True)["state_dict"]
    prefix = "module.base_encoder."
    bare = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    bare = {key: value for key, value in bare.items() if not key.startswith("head.")}
    timm.create_model("vit_small_patch16_224", num_classes=0).load_state_dict(bare)  # a strict load does not notice
    assert refusal(path, arch="vit_small_patch16_224") == (
        f"{path} is MoCo v3's (module.base_encoder.), whose ViT of width 384 has 12 heads; vit_small_patch16_224 has "
        f"6: give --arch mocov3_vit_s"
    )
    assert "12 heads" in refusal("dino_vit_s", path)


def test_moco_in_a_model_of_its_heads_is_taken(tmp_path):
    state = {"module.base_encoder.blocks.0.norm1.weight": torch.ones(768)}
    require_heads(state, outline("vit_base_patch16_224"), "it")
    with pytest.raises(UserError, match=r"^it is MoCo v3's .* of width 384 has 12 heads; vit_small_patch16_224 has 6"):
        require_heads(state, outline("vit_small_patch16_224"), "it")
    # Of widths that MoCo v3 does not have, nothing is known.
    sizes = {"patch_size": 4, "embed_dim": 128, "depth": 12, "num_heads": 4, "img_size": 32}
    path = save(tmp_path / "nano.pth.tar", "mocov3_vit_s", synthesise("mocov3_vit_s", sizes))
    assert load_model(path, arch="vit_nano_patch4_32").layout.has_cls


@pytest.mark.parametrize(("value", "words"), [(float("nan"), "NaN"), (1.0, "weights of its own")])
def test_a_maskfeat_with_a_final_norm_is_refused(tmp_path, monkeypatch, value, words):
    sizes = shrink(monkeypatch, "maskfeat_vit_b")
    state = synthesise("maskfeat_vit_b", sizes)
    state |= {"norm.weight": torch.full((48,), value), "norm.bias": torch.full((48,), value)}
    path = save(tmp_path / "checkpoint-799.pth", "maskfeat_vit_b", state)
    assert refusal("maskfeat_vit_b", path) == (
        f"{path} has a final norm (norm.weight: {words}), which MaskFeat was trained without: it is a conversion, not "
        f"the release; take {OFFICIAL['maskfeat_vit_b'].address}"
    )


def test_nan_in_the_weights_is_refused(tmp_path, monkeypatch):
    sizes = shrink(monkeypatch, "maskfeat_vit_b")
    state = synthesise("maskfeat_vit_b", sizes)
    state["blocks.0.attn.k.weight"][3, 4] = torch.nan
    path = save(tmp_path / "nan.pyth", "maskfeat_vit_b", state)
    assert refusal("maskfeat_vit_b", path) == (
        "the weights of maskfeat_vit_b hold NaN, first in blocks.0.attn.qkv.weight (block 0): its attention means "
        "nothing"
    )


@pytest.mark.parametrize("shape", [(52, 4), (12, 3)], ids=["heads", "window"])
def test_a_table_of_other_heads_or_window_is_refused(tmp_path, monkeypatch, shape):
    sizes = shrink(monkeypatch, "simmim_vit_b")
    state = synthesise("simmim_vit_b", sizes)
    state["encoder.rel_pos_bias.relative_position_bias_table"] = torch.randn(shape)
    path = save(tmp_path / "simmim.pth", "simmim_vit_b", state)
    assert refusal("simmim_vit_b", path) == (
        f"{path} does not fit simmim_vit_b: its rel_pos_bias.relative_position_bias_table is {shape[0]}×{shape[1]}, "
        f"needed is 52×3 (4×4 patches, 3 heads)"
    )


def test_a_fine_tuned_beit_is_refused(tmp_path, monkeypatch):
    sizes = shrink(monkeypatch, "beit_vit_b")
    state = synthesise("beit_vit_b", sizes)
    state["blocks.0.attn.relative_position_bias_table"] = state.pop("rel_pos_bias.relative_position_bias_table")
    path = save(tmp_path / "beit.pth", "beit_vit_b", state)
    assert refusal("beit_vit_b", path) == (
        f"{path} has a table of relative positions in every block: it is a fine-tuned BEiT, not beit_vit_b; give "
        f"--arch beit_base_patch16_224"
    )
    assert timm.is_model("beit_base_patch16_224")
    assert timm.is_model(OFFICIAL["beit_vit_l"].spec.architecture.partition(" ")[0])


# Another model's file -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mocov3_vit_s", "beit_vit_b", "data2vec2_vit_b", "capi_vit_l", "franca_vit_b"])
def test_another_models_file_is_refused(tmp_path, monkeypatch, name):
    sizes = shrink(monkeypatch, "mae_ft_vit_b")
    path = save(tmp_path / "mae.pth", "mae_ft_vit_b", synthesise("mae_ft_vit_b", sizes))
    shrink(monkeypatch, name)
    text = refusal(name, path)
    assert text.startswith(f"{path} does not fit {name}: ")
    assert "missing: " in text
    assert " - its keys should be " in text


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("mocov3_vit_s", "module.base_encoder.blocks.0.attn.qkv.bias"),
        ("maskfeat_vit_b", "blocks.0.attn.k.weight"),
        ("beit_vit_b", "rel_pos_bias.relative_position_bias_table"),
        ("data2vec2_vit_b", "modality_encoders.IMAGE.context_encoder.norm.weight"),
        ("capi_vit_l", "backbone.encoder.blocks.0.residual1.fn.rope.freqs"),
        ("franca_vit_b", "backbone.blocks.0.0.ls1.gamma"),
        ("ibot_vit_s", "norm.weight"),
    ],
)
def test_a_missing_key_is_refused(tmp_path, monkeypatch, name, key):
    sizes = shrink(monkeypatch, name)
    state: dict[str, Tensor] = synthesise(name, sizes)
    del state[key]
    text = refusal(name, save(tmp_path / "it.pth", name, state))
    assert "1 missing: " in text
    assert f"does not fit {name}" in text


def test_a_classifier_of_other_classes_is_kept(tmp_path, monkeypatch):
    sizes = shrink(monkeypatch, "mae_ft_vit_b")
    state = synthesise("mae_ft_vit_b", sizes)
    state |= {"head.weight": torch.randn(7, 48), "head.bias": torch.zeros(7)}
    model = load_model("mae_ft_vit_b", checkpoint=save(tmp_path / "it.pth", "mae_ft_vit_b", state))
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 7)


def test_an_image_size_that_patches_do_not_tile():
    with pytest.raises(UserError) as caught:
        require_loadable("capi_vit_l", img_size=225)
    assert message(caught) == (
        "capi_vit_l cannot take images of 225×225 pixels: it takes multiples of 14, such as 224; its own size is "
        "224×224"
    )


# Where the files come from --------------------------------------------------------------------------------------------


def serve(server: Any, monkeypatch: pytest.MonkeyPatch, name: str = "mocov3_vit_b", digest: str = "") -> Path:
    """The file of a small entry on the test's own server."""
    sizes = shrink(monkeypatch, name, address=f"{server.address}/it.pth.tar", digest=digest)
    return save(server.folder / "it.pth.tar", name, synthesise(name, sizes))


def cache() -> list[str]:
    folder = address_path("x")
    return sorted(path.name for path in folder.parent.iterdir()) if folder.parent.is_dir() else []


def test_it_is_downloaded_once(server, monkeypatch):
    path = serve(server, monkeypatch)
    spec = find_spec("mocov3_vit_b")
    assert spec is not None
    assert status(spec) == ""
    require_loadable("mocov3_vit_b")
    assert server.seen == ["HEAD /it.pth.tar HTTP/1.1"]
    model = load_model("mocov3_vit_b")
    assert model.spec is spec
    assert cache() == ["it.pth.tar"]
    assert status(spec) == "downloaded"
    assert "mocov3_vit_b" in set(list_models("downloaded")["name"])
    path.unlink()
    requests = len(server.seen)
    require_weights(spec)
    load_model("mocov3_vit_b")
    assert len(server.seen) == requests


@pytest.mark.parametrize("kind", ["md5", "sha256"])
@pytest.mark.parametrize("digits", [6, 64])
def test_the_digest_is_checked(server, monkeypatch, kind, digits):
    path = serve(server, monkeypatch)
    digest = f"{kind}:{hashlib.new(kind, path.read_bytes()).hexdigest()[:digits]}"
    monkeypatch.setitem(OFFICIAL, "mocov3_vit_b", replace(OFFICIAL["mocov3_vit_b"], digest=digest))
    assert load_model("mocov3_vit_b").layout.has_cls
    assert cache() == ["it.pth.tar"]


def test_another_file_than_published_does_not_stay(server, monkeypatch):
    path = serve(server, monkeypatch, digest="md5:000000")
    found = hashlib.md5(path.read_bytes()).hexdigest()[:6]
    assert refusal("mocov3_vit_b") == (
        f"what {server.address}/it.pth.tar gave is not the file of mocov3_vit_b: its digest is md5:{found}, published "
        f"is md5:000000; try again, or {downloads.WAY_OUT}"
    )
    assert cache() == []


def test_a_download_that_fails_leaves_nothing(server, monkeypatch):
    serve(server, monkeypatch).unlink()
    text = refusal("mocov3_vit_b")
    assert text.startswith(f"the download of {server.address}/it.pth.tar failed: HTTP Error 404")
    assert cache() == []
    gc.collect()  # an answer left open would warn here, and a warning is an error


def test_a_name_that_others_share_is_another_in_the_cache(server):
    (server.folder / "checkpoint-799.pth").write_bytes(b"content")
    address = f"{server.address}/checkpoint-799.pth"
    path = fetch_from_address(address, "it", filename="mine.pth")
    assert path.name == "mine.pth"
    assert cache() == ["mine.pth"]


def test_a_damaged_download_is_to_be_deleted(monkeypatch):
    shrink(monkeypatch, "ibot_vit_b")
    path = address_path("", OFFICIAL["ibot_vit_b"].cached_name)
    path.parent.mkdir(parents=True)
    save(path, "capi_vit_l", {"cls_token": torch.zeros(1, 1, 48)})
    text = refusal("ibot_vit_b")
    assert text.startswith(f"{path} does not fit ibot_vit_b")
    assert text.endswith(" - delete it to download it again")
    path.write_bytes(b"")
    assert refusal("ibot_vit_b") == f"{path} is empty; delete it to download it again"


BY_HAND = (
    "simmim_vit_b can only be fetched by hand (Google Drive, "
    "https://drive.google.com/file/d/1dJn6GYkwMIcoP3zqOEyW1_iQfpBi8UOw/view): give the file with --checkpoint FILE"
)
NO_SOURCE = "mae_vit_s has no public source: if you have its weights, give them with --checkpoint FILE"


@pytest.mark.parametrize(("name", "text"), [("simmim_vit_b", BY_HAND), ("mae_vit_s", NO_SOURCE)])
def test_what_no_program_can_download(name, text):
    assert refusal(name) == text
    spec = find_spec(name)
    assert spec is not None
    assert status(spec) == ("by hand" if name == "simmim_vit_b" else "no source")
    for ask in (lambda: require_weights(spec), lambda: require_loadable(name)):
        with pytest.raises(UserError) as caught:
            ask()
        assert message(caught) == text
