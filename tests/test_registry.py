"""The table of models: every entry against timm's own config, the look-ups, and the listing without a network."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

from vitprobe.errors import UserError
from vitprobe.models import caches
from vitprobe.models.caches import address_path
from vitprobe.models.entries import ADDRESSES, BUNDLED_ARCHITECTURES, BUNDLED_CLASSES, NORMALISATIONS
from vitprobe.models.meta import on_meta
from vitprobe.models.paradigms import PARADIGMS
from vitprobe.models.registry import COLUMNS, all_specs, find_spec, list_models, nearest, status
from vitprobe.models.repositories import hub_repository

TIMM = [spec for spec in all_specs() if spec.source.startswith("timm:")]
BUNDLED = [spec for spec in all_specs() if spec.source.startswith("bundled:")]


@pytest.fixture(autouse=True)
def empty_caches(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path


def put_in_hub_cache(cache: Path, repository: str, filename: str = "model.safetensors") -> Path:
    folder = cache / "hub" / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    (snapshot / filename).write_bytes(b"")
    return snapshot / filename


@pytest.mark.parametrize("spec", TIMM, ids=lambda spec: spec.name)
def test_entry_agrees_with_timm(spec):
    tagged = spec.source.removeprefix("timm:")
    assert tagged in timm.list_pretrained(f"{spec.architecture}.*")
    config = timm.get_pretrained_cfg(tagged)
    assert config is not None
    assert config.architecture == spec.architecture
    assert (tuple(config.mean), tuple(config.std)) == NORMALISATIONS[spec.normalisation]
    assert config.license == spec.licence
    assert config.hf_hub_id == hub_repository(spec.source)
    assert config.hf_hub_filename is None
    if config.hf_hub_id is None:
        assert config.url == ADDRESSES[spec.source]


def test_entries_are_well_formed():
    seeded = {spec.name for spec in all_specs() if spec.source.startswith("seed:")}
    assert seeded == {spec.name for spec in all_specs() if spec.paradigm == "random"} == {"random_vit_nano"}
    assert {spec.name for spec in BUNDLED} | seeded == set(BUNDLED_CLASSES)
    assert len({spec.name for spec in all_specs()}) == len({spec.source for spec in all_specs()}) == len(all_specs())
    assert set(ADDRESSES) <= {spec.source for spec in all_specs()}
    for spec in all_specs():
        assert spec.paradigm in set(PARADIGMS) - {"unknown"}
        assert "_vit_" in spec.name
        assert "arXiv" in spec.citation
        assert not timm.is_model(spec.name), "an alias must not hide a model of timm's"
    for spec in BUNDLED:
        assert spec.architecture in BUNDLED_ARCHITECTURES
        assert not timm.is_model(spec.architecture)


@pytest.mark.parametrize(
    ("method", "count"),
    [
        *(("MAE", 6), ("DINO", 4), ("DINOv2", 8), ("DINOv3", 8), ("I-JEPA", 4), ("EVA-02", 5), ("CLIP", 4)),
        *(("SigLIP 2", 4), ("AIMv2", 4), ("DeiT", 6), ("DeiT III", 5), ("AugReg", 4), ("supervised", 1)),
        *(("MAE fine-tuned", 4), ("MoCo v3", 3), ("iBOT", 3), ("BEiT", 2), ("BEiT v2", 1), ("data2vec", 2)),
        *(("data2vec 2.0", 2), ("SimMIM", 1), ("MaskFeat", 2), ("CAPI", 1), ("Franca", 2)),
    ],
)
def test_every_method_is_there(method, count):
    assert sum(spec.method == method for spec in all_specs()) == count


def test_clip_is_built_with_the_activation_it_was_trained_with():
    for spec in TIMM:
        if spec.method == "CLIP":
            with on_meta():
                module = timm.create_model(spec.architecture)
            assert type(module.blocks[0].mlp.act).__name__ == "QuickGELU"


def test_find_spec():
    spec = find_spec("mae_vit_b")
    assert spec is not None
    assert spec.architecture == "vit_base_patch16_224"
    assert find_spec("vit_base_patch16_224.mae") is spec
    assert find_spec("timm:vit_base_patch16_224.mae") is spec
    assert find_spec("vit_base_patch16_224") is None
    assert find_spec("") is None


def test_nearest():
    names = [spec.name for spec in all_specs()]
    assert nearest("mae_vitb", names)[0] == "mae_vit_b"
    assert nearest("MAE_ViT_B", names)[0] == "mae_vit_b"
    assert set(nearest("so400m", names)) == {"siglip2_vit_so400m"}, "a part of a name counts where nothing is close"
    assert nearest("qqqqqq", names) == nearest("", names) == []
    assert len(nearest("vit", names)) == 5


def test_list_models():
    table = list_models()
    assert tuple(table.columns) == COLUMNS
    assert list(table["name"]) == [spec.name for spec in all_specs()]
    assert set(table["status"]) == {"bundled", "by hand", "no source", ""}
    assert list(table["name"][table["status"] == "bundled"]) == list(BUNDLED_CLASSES)


def test_list_models_filters_by_words_in_any_field():
    assert set(list_models("Registers darcet VIT_L dinov2")["name"]) == {"dinov2_vit_l_reg"}
    assert set(list_models("bundled MAE")["name"]) == {"mae_vit_nano", "mae_xavier_vit_nano", "mae_ft_vit_nano"}
    assert len(list_models("nothing_has_this")) == 0
    assert tuple(list_models("nothing_has_this").columns) == COLUMNS
    assert len(list_models("  ")) == len(all_specs())


def test_list_models_filters_by_paradigm():
    assert set(list_models(paradigm="jea")["method"]) == {"DINO", "I-JEPA", "MoCo v3"}
    assert set(list_models("nano", paradigm="MIM")["name"]) == {"mae_vit_nano", "mae_xavier_vit_nano"}
    with pytest.raises(UserError) as caught:
        list_models(paradigm="SSL")
    assert str(caught.value) == (
        "unknown paradigm 'SSL': use one of MIM, JEA, hybrid, supervised, VLM, other, random, unknown"
    )


def test_status_sees_the_hub_cache(empty_caches):
    spec = find_spec("clip_vit_b32")
    assert spec is not None
    assert status(spec) == ""
    put_in_hub_cache(empty_caches, "timm/vit_base_patch32_clip_224.openai", "pytorch_model.bin")
    assert status(spec) == "downloaded"
    assert list(list_models("downloaded")["name"]) == ["clip_vit_b32"]


def test_status_sees_the_torch_cache(empty_caches, monkeypatch):
    spec = find_spec("ijepa_vit_h")
    assert spec is not None
    path = address_path(ADDRESSES[spec.source])
    assert path == Path(torch.hub.get_dir()) / "checkpoints" / "IN1K-vit.h.14-300e.pth.tar"
    assert status(spec) == ""
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    assert status(spec) == "downloaded"
    monkeypatch.delenv("TORCH_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(empty_caches / "xdg"))
    assert address_path("https://host/a/b.pth?x=1") == empty_caches / "xdg" / "torch" / "hub" / "checkpoints" / "b.pth"
    assert status(spec) == ""


def test_hub_repository():
    assert hub_repository("hf-hub:owner/name@v1") == "owner/name@v1"
    assert hub_repository("bundled:mae_vit_nano") is None
    assert hub_repository("random") is None
    with pytest.raises(UserError, match=r"^'!!' is no repository of the Hugging Face hub: write owner/name$"):
        caches.cached_weights("!!")


def test_listing_needs_neither_torch_nor_timm():
    code = (
        "import sys; from vitprobe.models.registry import list_models; list_models('mae')\n"
        "print({'torch', 'timm'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
