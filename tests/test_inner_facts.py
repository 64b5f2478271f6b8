"""What is known of the images and the name of a model that stands inside others."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from helpers import assert_all_close, captured, images, message, randomize
from test_capture_by_hand import hand_made
from vitprobe.errors import UserError
from vitprobe.models.loaded import LoadedModel, with_transform
from vitprobe.models.loading import load_model
from vitprobe.profile.analysis import analyze

INCEPTION = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
TINY: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def augreg() -> nn.Module:
    """A model of timm that is normalised as Inception was, with a crop of 0.9."""
    return timm.create_model("vit_tiny_patch16_224.augreg_in21k", img_size=32, num_classes=0, depth=2).eval()


class Classifier(nn.Module):
    def __init__(self, backbone: nn.Module, name: str = "backbone") -> None:
        super().__init__()
        self.name = name
        self.add_module(name, backbone)
        self.head = nn.Flatten()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(getattr(self, self.name)(x))


def lightning_module() -> nn.Module:
    lightning = pytest.importorskip("lightning")

    class Lit(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Sequential(augreg(), nn.Linear(192, 5))

        def training_step(self, batch: Any) -> Any:
            return self.model(batch[0]).sum()

    return Lit()


def lightning_with_forward() -> nn.Module:
    lightning = pytest.importorskip("lightning")

    class Lit(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = Classifier(augreg())

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x)

    return Lit()


def lora() -> nn.Module:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(augreg(), peft.LoraConfig(target_modules=["qkv"], init_lora_weights=False))


def lightly_module() -> nn.Module:
    modules = pytest.importorskip("lightly.models.modules")
    return Classifier(modules.MaskedVisionTransformerTIMM(vit=augreg()))


WRAPPERS: dict[str, Callable[[], nn.Module]] = {
    "bare": augreg,
    "classifier": lambda: Classifier(augreg()),
    "nested": lambda: Classifier(Classifier(augreg(), "vit"), "model"),
    "sequential": lambda: nn.Sequential(augreg(), nn.Linear(192, 5)),
    "lightning": lightning_module,
    "lightning with a forward pass": lightning_with_forward,
    "PEFT": lora,
    "PEFT in a classifier": lambda: Classifier(lora()),
    "lightly": lightly_module,
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_images_and_name_are_those_of_the_model_inside(name: str) -> None:
    model = WRAPPERS[name]().eval()
    loaded = load_model(model)
    transform = loaded.transform
    assert (transform.mean, transform.std) == INCEPTION
    assert (transform.size, transform.crop_pct, transform.interpolation) == ((32, 32), 0.9, "bicubic")
    assert loaded.spec.name == loaded.spec.architecture == "vit_tiny_patch16_224"
    assert (loaded.spec.paradigm, loaded.spec.normalisation) == ("unknown", "inception")
    assert loaded.remarks == () and loaded.layout.grid == (2, 2)
    tower = next(part for part in model.modules() if isinstance(part, timm.models.VisionTransformer))
    assert loaded.anatomy.tower is tower
    assert_all_close(captured(loaded).statistics(), captured(tower).statistics())  # type: ignore[arg-type]


def transformers_models() -> dict[str, Callable[[], nn.Module]]:
    import transformers

    def peft_of(model: nn.Module) -> nn.Module:
        peft = pytest.importorskip("peft")
        with warnings.catch_warnings():  # what it asks of transformers is out of date
            warnings.simplefilter("ignore", FutureWarning)
            config = peft.LoraConfig(target_modules=["q_proj", "query"], init_lora_weights=False)
            return peft.get_peft_model(model, config)

    def classifier() -> nn.Module:
        return transformers.ViTForImageClassification(transformers.ViTConfig(**TINY, intermediate_size=64))

    text = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 32}
    vision = TINY | {"intermediate_size": 64}

    def clip() -> nn.Module:
        ids = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        return transformers.CLIPModel(transformers.CLIPConfig(vision_config=vision, text_config=text | ids))

    def siglip() -> nn.Module:
        return transformers.SiglipModel(transformers.SiglipConfig(vision_config=vision, text_config=text))

    class Own(nn.Module):
        def __init__(self, backbone: nn.Module) -> None:
            super().__init__()
            self.backbone = backbone

        def forward(self, x: Tensor) -> Tensor:
            return self.backbone(x)[0]

    class Embedding(nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.clip = model

        def forward(self, x: Tensor) -> Tensor:
            return self.clip.get_image_features(x)

    return {
        "with a head": classifier,
        "in PEFT": lambda: peft_of(classifier()),
        "in one's own": lambda: Own(classifier()),
        "CLIP": clip,
        "CLIP in one's own": lambda: Embedding(clip()),
        "SigLIP": siglip,
        "SigLIP's tower in one's own": lambda: Own(siglip().vision_model),  # type: ignore[arg-type]
    }


OF_TRANSFORMERS = transformers_models() if importlib.util.find_spec("transformers") else {}
CLIPS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


@pytest.mark.parametrize("name", OF_TRANSFORMERS)
def test_models_of_transformers(name: str) -> None:
    """What their processors do; the text tower has twice the blocks."""
    model = randomize(OF_TRANSFORMERS[name]()).eval()
    loaded = load_model(model)
    transform = loaded.transform
    expected = CLIPS if "CLIP" in name and "Sig" not in name else INCEPTION
    assert transform.mean == pytest.approx(expected[0]) and transform.std == pytest.approx(expected[1])
    assert transform.size == (32, 32) and loaded.remarks == ()
    assert len(loaded.anatomy.blocks) == 2 and loaded.anatomy.num_heads == 2
    statistics = captured(loaded).statistics()  # type: ignore[arg-type]
    assert_all_close(statistics, captured(loaded.anatomy.tower).statistics())


def open_clips(timms: bool = False) -> Any:
    pytest.importorskip("open_clip")
    from open_clip.model import CLIP, set_model_preprocess_cfg

    vision: dict[str, Any] = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
    if timms:
        vision = {"image_size": 32, "timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token"}
    text = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 5}
    model = CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text)  # type: ignore[arg-type]
    said = {"size": (32, 32), "mode": "RGB", "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "fill_color": 0}
    set_model_preprocess_cfg(model, said | {"interpolation": "bilinear", "resize_mode": "squash"})
    return model


class Embedding(nn.Module):
    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, x: Tensor) -> Tensor:
        return self.clip.encode_image(x)


@pytest.mark.parametrize("timms", [False, True])
def test_towers_of_open_clip(timms: bool) -> None:
    """Its own word on images stands on the tower, which may hold a model of timm's with a config of another kind."""
    clip = open_clips(timms).eval()
    for model in (clip, clip.visual, Embedding(clip), nn.Sequential(clip.visual)):
        loaded = load_model(model)
        transform = loaded.transform
        assert (transform.mean, transform.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
        assert (transform.interpolation, transform.crop_mode, transform.crop_pct) == ("bilinear", "squash", 1.0)
        assert len(loaded.anatomy.blocks) == (12 if timms else 2) and loaded.remarks == ()
    del clip.visual.preprocess_cfg  # as older versions have it
    assert load_model(Embedding(clip)).transform.mean == (0.1, 0.2, 0.3)


def test_defaults_are_said_and_the_advice_can_be_followed() -> None:
    model = nn.Sequential(hand_made(), nn.Identity())
    loaded = load_model(model)
    assert (loaded.transform.mean, loaded.transform.std) == IMAGENET
    assert loaded.remarks == (
        "Sequential does not say the mean, standard deviation, interpolation and crop of its images; assumed: mean "
        "(0.485, 0.456, 0.406) (ImageNet's), standard deviation (0.229, 0.224, 0.225) (ImageNet's), bicubic "
        "interpolation, a crop of 0.875; if that is wrong, set model.pretrained_cfg = dict(mean=(…), std=(…), "
        "interpolation=…, crop_pct=…) before loading",
    )
    assert with_transform(loaded, "paper", (32, 32)).remarks == ()
    numbers: Any = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    model.pretrained_cfg = dict(numbers)  # type: ignore[assignment]
    (line,) = load_model(model).remarks
    assert line.startswith("Sequential does not say the interpolation and crop of its images; assumed: bicubic")
    model.pretrained_cfg = numbers | {"interpolation": "bilinear", "crop_pct": 1.0}  # type: ignore[assignment]
    loaded = load_model(model)
    assert loaded.remarks == () and loaded.transform.mean == (0.1, 0.2, 0.3)
    assert (loaded.transform.interpolation, loaded.transform.crop_pct) == ("bilinear", 1.0)


def test_the_advice_can_be_followed_for_a_model_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.Dinov2Model(transformers.Dinov2Config(**TINY)).eval()  # it borrows its processor
    assert "Dinov2Model does not say the mean" in load_model(model).remarks[0]
    model.pretrained_cfg = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "interpolation": "bicubic", "crop_pct": 1}
    loaded = load_model(model)
    assert loaded.transform.mean == (0.1, 0.2, 0.3) and loaded.transform.size == (32, 32) and loaded.remarks == ()


def test_the_run_and_its_manifest_say_which_defaults_were_taken(tmp_path: Path) -> None:
    model = hand_made()
    out = tmp_path / "run"
    profile = analyze(model, num_images=2, out=out, workers=0, progress=False)
    (line,) = profile.remarks
    assert "HandMadeViT does not say the mean" in line
    assert line in (out / "manifest.json").read_text(encoding="utf-8").replace("\\u2026", "…")
    paper = analyze(model, num_images=2, transform="paper", workers=0, progress=False)
    assert paper.remarks == []


class Normalizing(nn.Module):
    """Takes pixels from 0 to 1, as attack benchmarks wrap their models."""

    def __init__(self, inner: nn.Module, uses: bool = True) -> None:
        super().__init__()
        self.inner, self.uses = inner, uses
        self.register_buffer("mean", torch.tensor([0.5, 0.5, 0.5]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.2, 0.2, 0.2]).view(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner((x - self.mean) / self.std if self.uses else x)


def test_a_model_that_normalizes_its_images_itself_gets_pixels() -> None:
    from torchvision.transforms import Normalize

    inner = augreg()
    for model in (nn.Sequential(Normalize((0.5,) * 3, (0.2,) * 3), inner), Normalizing(inner)):
        loaded = load_model(model)
        for transform in (loaded.transform, with_transform(loaded, "paper", (32, 32)).transform):
            assert (transform.mean, transform.std) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        (line,) = loaded.remarks
        assert "normalizes its images itself (Normaliz" in line
        expected = captured(inner, (images() - 0.5) / 0.2).statistics()
        assert_all_close(captured(loaded, images()).statistics(), expected, tolerance=1e-3)  # type: ignore[arg-type]
    idle = load_model(Normalizing(inner, uses=False))
    assert (idle.transform.mean, idle.transform.std) == INCEPTION and idle.remarks == ()


def test_a_model_that_was_loaded_here_keeps_its_name_and_paradigm_inside_another() -> None:
    loaded = load_model("mae_vit_nano")
    wrapped = nn.Sequential(loaded.module, nn.Identity())
    found = load_model(wrapped)
    assert found.spec == loaded.spec and found.spec.paradigm == "MIM"
    assert isinstance(found, LoadedModel) and found.module is wrapped
    with torch.no_grad():  # a step of training: no longer those weights
        loaded.module.blocks[3].mlp.fc1.weight.mul_(1.01)  # type: ignore[union-attr, index]
    found = load_model(wrapped)
    assert (found.spec.name, found.spec.paradigm, found.spec.source) == ("vit_nano_patch4_32", "unknown", "module")


def test_models_in_a_dictionary_are_named() -> None:
    model = nn.ModuleDict({"one": augreg(), "two": augreg()})
    with pytest.raises(UserError) as error:
        load_model(model)
    assert "model.one.blocks (2), model.two.blocks (2)" in message(error)
