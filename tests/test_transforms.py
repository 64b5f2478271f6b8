"""From a picture to the tensor a model expects."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vitprobe.data.transforms import ImageTransform, model_transform
from vitprobe.errors import UserError
from vitprobe.models.meta import on_meta

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def noise(width=300, height=200) -> Image.Image:
    small = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def by_hand(image: Image.Image, resize: int, size: int, mean=MEAN, std=STD) -> torch.Tensor:
    """Shorter side to `resize` (bicubic), centre crop, normalised: Pillow and numpy alone."""
    scale = resize / min(image.size)
    sides = [resize if side == min(image.size) else int(side * scale) for side in image.size]
    image = image.resize((sides[0], sides[1]), Image.Resampling.BICUBIC)
    left, top = (round((side - size) / 2) for side in image.size)
    pixels = np.asarray(image.crop((left, top, left + size, top + size)), dtype=np.float64) / 255
    return torch.from_numpy(((pixels - mean) / std).transpose(2, 0, 1)).float()


@pytest.fixture
def tiny() -> VisionTransformer:
    return VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2)


def build(name: str, **options) -> nn.Module:
    with on_meta():
        return timm.create_model(name, **options)


def test_a_bare_model_gets_timms_defaults_at_the_size_it_was_built_for(tiny):
    assert not hasattr(tiny, "pretrained_cfg")
    transform = model_transform(tiny)
    assert transform == ImageTransform("model", (32, 32), 0.875, "center", "bicubic", MEAN, STD)
    image = noise()
    result = transform(image)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, by_hand(image, 36, 32), atol=1e-5, rtol=0)


def test_a_module_that_knows_no_size_gets_224():
    assert model_transform(nn.Linear(2, 2)).size == (224, 224)


def test_each_model_gets_what_its_config_says():
    clip = model_transform(build("vit_base_patch16_clip_224.openai"))
    assert clip.mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))
    assert (clip.size, clip.crop_pct, clip.resize) == ((224, 224), 0.9, (248, 248))
    siglip = model_transform(build("vit_base_patch16_siglip_256.webli"))
    assert (siglip.mean, siglip.std, siglip.size) == ((0.5,) * 3, (0.5,) * 3, (256, 256))


def test_a_model_built_for_another_size_than_its_config():
    assert model_transform(build("vit_tiny_patch16_224", img_size=96)).size == (96, 96)
    assert model_transform(build("vit_tiny_patch16_224", img_size=(64, 96))).size == (64, 96)
    assert model_transform(build("vit_tiny_patch16_224", img_size=96), mode="paper").size == (96, 96)


def test_the_size_of_an_encoder_within_a_model(tiny):
    holder = nn.Module()
    holder.encoder = tiny
    assert model_transform(holder).size == (32, 32)


def test_the_papers_transform_is_one_for_every_model():
    clip = model_transform(build("vit_base_patch16_clip_224.openai"), mode="paper")
    assert clip == ImageTransform("paper", (224, 224), 0.875, "center", "bicubic", MEAN, STD)
    assert clip.resize == (256, 256)
    image = noise()
    torch.testing.assert_close(clip(image), by_hand(image, 256, 224), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", range(16, 1040, 16))
def test_the_papers_shorter_side(tiny, size):
    assert model_transform(tiny, mode="paper", img_size=size).resize == (int(size * 16 / 14),) * 2


@pytest.mark.parametrize(("img_size", "expected"), [(48, (48, 48)), ((48, 64), (48, 64)), (None, (32, 32))])
@pytest.mark.parametrize("mode", ["model", "paper"])
@pytest.mark.parametrize("shape", [(300, 200), (50, 400), (10, 10)])
def test_the_result_has_the_size_asked_for(tiny, mode, img_size, expected, shape):
    result = model_transform(tiny, mode=mode, img_size=img_size)(noise(*shape))
    assert result.shape == (3, *expected)
    assert torch.isfinite(result).all()


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_the_crop_mode_of_the_config_counts(tiny, crop_mode):
    tiny.pretrained_cfg = {"crop_mode": crop_mode, "crop_pct": 1.0, "interpolation": "bilinear"}
    transform = model_transform(tiny)
    assert (transform.crop_mode, transform.interpolation, transform.resize) == (crop_mode, "bilinear", (32, 32))
    left, right = Image.new("RGB", (64, 32), "black"), Image.new("RGB", (64, 32), "black")
    left.paste((255, 255, 255), (0, 0, 8, 32))  # at the edge: cut off in "center" alone
    assert torch.equal(transform(left), transform(right)) == (crop_mode == "center")


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "I;16"])
def test_a_picture_of_any_mode(tiny, mode):
    image = Image.fromarray(np.full((40, 40), 30000, np.uint16)) if mode == "I;16" else noise().convert(mode)
    result = model_transform(tiny)(image)
    assert result.shape == (3, 32, 32)
    if mode == "I;16":
        expected = (117 / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
        torch.testing.assert_close(result[:, 5, 5], expected, atol=1e-5, rtol=0)


def test_description_is_json_and_whole(tiny):
    transform = model_transform(tiny, img_size=(48, 64))
    described = json.loads(json.dumps(transform.describe()))
    assert described == {
        "mode": "model",
        "size": [48, 64],
        "resize": [54, 73],
        "crop_pct": 0.875,
        "crop_mode": "center",
        "interpolation": "bicubic",
        "mean": list(MEAN),
        "std": list(STD),
    }


@pytest.mark.parametrize("used", [False, True])
def test_it_can_be_pickled_before_and_after_use(tiny, used):
    transform = model_transform(tiny)
    image = noise()
    expected = by_hand(image, 36, 32)
    if used:
        transform(image)
    again = pickle.loads(pickle.dumps(transform))
    assert again == transform
    torch.testing.assert_close(again(image), expected, atol=1e-5, rtol=0)


def test_an_unknown_mode(tiny):
    with pytest.raises(UserError) as caught:
        model_transform(tiny, mode="papr")
    assert str(caught.value) == (
        "there is no transform 'papr': use 'model' (what the model was trained with, from timm's config) "
        "or 'paper' (shorter side to 256 for a crop of 224, bicubic, ImageNet's mean and std)"
    )


def test_an_impossible_size(tiny):
    with pytest.raises(UserError, match=r"^an image size of 0×0 pixels cannot be: give a side of at least one patch$"):
        model_transform(tiny, img_size=0)
