"""Where models keep their parts, and token layouts checked against what they pass through their blocks."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.layers import HybridEmbed
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import nn

from vitprobe.errors import AttentionNotSeenError
from vitprobe.layout import TokenLayout
from vitprobe.models.anatomy.find import find_anatomy
from vitprobe.models.meta import on_meta

SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 0}
NAFLEX: dict[str, Any] = {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}


def token_layout(module, size=None):
    anatomy = find_anatomy(module)
    return anatomy.layout(size or anatomy.image_size)


class Inside(nn.Module):
    """A model that keeps its transformer in `.encoder`, as timm's classifiers on language models' towers do."""

    def __init__(self):
        super().__init__()
        self.encoder = VisionTransformer(**SMALL)

    def forward(self, images):
        return self.encoder(images)


# What the layout should be: [cls], distillation, registers.
MODELS = {
    "plain": (lambda: VisionTransformer(**SMALL), (True, 0, 0)),
    "registers": (lambda: VisionTransformer(**SMALL, reg_tokens=4), (True, 0, 4)),
    "registers without [cls]": (
        lambda: VisionTransformer(**SMALL, reg_tokens=3, class_token=False, global_pool="avg"),
        (False, 0, 3),
    ),
    "neither": (lambda: VisionTransformer(**SMALL, class_token=False, global_pool="avg"), (False, 0, 0)),
    "distilled": (lambda: VisionTransformerDistilled(**SMALL), (True, 1, 0)),
    "eva": (lambda: Eva(**SMALL, num_reg_tokens=4, use_rot_pos_emb=True, dynamic_img_size=True), (True, 0, 4)),
    "eva without [cls]": (lambda: Eva(**SMALL, class_token=False, global_pool="avg"), (False, 0, 0)),
    "beit": (lambda: Beit(**SMALL, use_rel_pos_bias=True), (True, 0, 0)),
    "relative positions": (lambda: VisionTransformerRelPos(**SMALL), (False, 0, 0)),
    "relative positions with [cls]": (lambda: VisionTransformerRelPos(**SMALL, class_token=True), (True, 0, 0)),
    "naflex": (lambda: NaFlexVit(NaFlexVitCfg(**NAFLEX, class_token=True, reg_tokens=2)), (True, 0, 2)),
    "naflex without [cls]": (lambda: NaFlexVit(NaFlexVitCfg(**NAFLEX, class_token=False, reg_tokens=1)), (False, 0, 1)),
    "inside": (Inside, (True, 0, 0)),
}


def tokens_in_the_first_block(module: nn.Module, image_size: tuple[int, int]) -> int:
    lengths = []
    blocks = find_anatomy(module).blocks
    with blocks[0].register_forward_pre_hook(lambda block, args: lengths.append(args[0].shape[1])), torch.no_grad():
        module.eval()(torch.zeros(1, 3, *image_size))
    (length,) = lengths
    return length


@pytest.mark.parametrize("name", MODELS)
def test_the_layout_is_what_the_model_does(name):
    make, (has_cls, distillation, registers) = MODELS[name]
    module = make()
    layout = token_layout(module, (32, 32))
    assert (layout.has_cls, layout.num_distillation, layout.num_registers) == (has_cls, distillation, registers)
    assert layout.grid == (4, 4)
    assert layout.patch_size == (8, 8)
    assert layout.num_tokens == tokens_in_the_first_block(module, (32, 32))
    if "naflex" not in name:  # which has no size of its own
        assert token_layout(module) == layout


@pytest.mark.parametrize("name", ["eva", "naflex"])
def test_another_image_size_gives_another_grid(name):
    module = MODELS[name][0]()
    layout = token_layout(module, (24, 64))
    assert layout.grid == (3, 8)
    assert layout.num_tokens == tokens_in_the_first_block(module, (24, 64))


def test_which_positions_are_patches():
    """The image changes the patches of the sequence and no prefix token."""
    module = VisionTransformer(**SMALL, reg_tokens=2).eval()
    inputs = []
    hook = module.blocks[0].register_forward_pre_hook(lambda block, args: inputs.append(args[0]))
    with hook, torch.no_grad():
        module(torch.zeros(1, 3, 32, 32))
        module(torch.ones(1, 3, 32, 32))
        spot = torch.zeros(1, 3, 32, 32)
        spot[..., 8:16, 16:24] = 1  # second row, third column
        module(spot)
    layout = token_layout(module)
    changed = (inputs[0] != inputs[1]).any(-1)[0]
    assert not changed[: layout.patches.start].any()
    assert changed[layout.patches].all()
    (place,) = (inputs[0] != inputs[2]).any(-1)[0, layout.patches].nonzero()[:, 0]
    assert layout.centers[place].tolist() == [1, 2]


def test_layout_arithmetic():
    layout = TokenLayout(grid=(2, 3), has_cls=True, num_distillation=1, num_registers=4, patch_size=(14, 7))
    assert (layout.num_prefix_tokens, layout.num_patches, layout.num_tokens) == (6, 6, 12)
    assert list(range(12))[layout.registers] == [2, 3, 4, 5]
    assert list(range(12))[layout.patches] == [6, 7, 8, 9, 10, 11]
    assert layout.centers.tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    assert layout.diagonal == pytest.approx(5**0.5)
    assert layout.diagonal == pytest.approx(torch.cdist(layout.centers, layout.centers).max().item())
    none = TokenLayout(grid=(1, 1), has_cls=False)
    assert list(range(1))[none.registers] == []
    assert none.diagonal == 0
    assert none.num_prefix_tokens == 0


def test_a_register_at_the_front_is_no_cls():
    layout = token_layout(MODELS["registers without [cls]"][0]())
    assert not layout.has_cls
    assert list(range(layout.num_tokens))[layout.registers] == [0, 1, 2]


def test_sizes():
    assert find_anatomy(VisionTransformer(**{**SMALL, "img_size": (32, 48)})).image_size == (32, 48)
    naflex = NaFlexVit(NaFlexVitCfg(**NAFLEX))
    assert find_anatomy(naflex).image_size == (224, 224)
    naflex.pretrained_cfg = {"input_size": (3, 64, 96)}  # type: ignore[assignment]
    assert find_anatomy(naflex).image_size == (64, 96)
    assert token_layout(naflex).grid == (8, 12)


def test_patches_of_a_convolutional_stem():
    backbone = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 4, 4))
    backbone.num_features = 8  # type: ignore[assignment]

    def embed(*args, img_size, patch_size, embed_dim, **options):
        return HybridEmbed(
            backbone, img_size=img_size, embed_dim=embed_dim, feature_size=(2, 2), feature_ratio=(16, 16)
        )

    module = VisionTransformer(**SMALL, embed_layer=embed)
    layout = token_layout(module, (32, 32))
    assert (layout.grid, layout.patch_size) == ((2, 2), (16, 16))
    assert layout.num_tokens == tokens_in_the_first_block(module, (32, 32))


def test_every_isotropic_family_of_timm_has_a_layout():
    """One of each that the registry or the spec names, at full size on the meta device: [cls], registers, grid."""
    expected = {
        "vit_base_patch16_224": (True, 0, (14, 14)),
        "vit_base_patch14_reg4_dinov2": (True, 4, (37, 37)),
        "vit_large_patch16_dinov3": (True, 4, (16, 16)),
        "vit_huge_patch14_gap_224": (False, 0, (16, 16)),
        "vit_base_patch16_siglip_224": (False, 0, (14, 14)),
        "aimv2_large_patch14_224": (False, 0, (16, 16)),
        "gemma4_vit_167m_enc": (False, 0, (48, 48)),
        "eva02_base_patch14_224": (True, 0, (16, 16)),
        "vit_base_patch16_clip_quickgelu_224": (True, 0, (14, 14)),
    }
    for name, (has_cls, registers, grid) in expected.items():
        with on_meta():
            layout = token_layout(timm.create_model(name))
        assert (layout.has_cls, layout.num_registers, layout.grid) == (has_cls, registers, grid), name


def test_an_empty_list_of_blocks_is_none():
    module = nn.Module()
    module.blocks = nn.ModuleList()
    with pytest.raises(AttentionNotSeenError):
        find_anatomy(module)
    module.encoder = VisionTransformer(**SMALL)
    assert find_anatomy(module).blocks == (module.encoder.blocks[0],)
