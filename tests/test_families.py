"""A representative of each isotropic family of timm, with each of its traits, against the float64 reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.data.naflex_transforms import patchify_image
from torch import Tensor, nn

from comparing import assert_matches_reference, reference_of
from helpers import SMALL, assert_all_close, assert_close, captured, images, tiny
from reference import BLOCKS, ONE_SUM_BLOCKS, BlockTrace, reference_attention, unfused_run
from vitprobe.hooks.capture import Capture
from vitprobe.layout import TokenLayout
from vitprobe.models.anatomy.find import find_anatomy
from vitprobe.models.anatomy.unsupported import ISOTROPIC
from vitprobe.models.meta import on_meta
from vitprobe.statistics import STATISTICS

STEM = {"img_size": 64}  # in front of the patches, so that these are of 16 or 32 px
NAFLEX = {"patch_size": 8}
GEMMA = {"img_size": 48, "patch_size": 8, "head_dim": 16, "intermediate_size": 64}
NAFLEX_ROPE = {
    **{"patch_size": 8, "attn_type": "rope", "rope_type": "axial", "pos_embed": "none"},
    **{"attn_gated": True, "num_kv_heads": 2, "qkv_fused": False},
}


def layout(prefix: str = "", grid: int = 4, patch: int = 8) -> TokenLayout:
    """`"cls dist 4"` → the layout with [cls], a distillation token and 4 registers before `grid`² patches."""
    words = prefix.split()
    registers = sum(int(word) for word in words if word.isdigit())
    return TokenLayout((grid, grid), "cls" in words, int("dist" in words), registers, (patch, patch))


# model → options, and what its layout must be
MODELS: dict[str, tuple[dict[str, Any], TokenLayout]] = {
    # vision_transformer
    "vit_base_patch16_224": (SMALL, layout("cls")),
    "vit_base_patch16_clip_quickgelu_224": (SMALL, layout("cls")),
    "vit_base_patch14_reg4_dinov2": (SMALL, layout("cls 4")),
    "vit_base_patch14_reg1_tipsv2": (SMALL, layout("cls 1")),
    "vit_medium_patch16_reg4_gap_256": (SMALL, layout("4")),
    "vit_huge_patch14_gap_224": (SMALL, layout()),
    "vit_base_patch16_siglip_224": (SMALL, layout()),
    "vit_so150m_patch16_reg4_map_256": (SMALL, layout("4")),
    "aimv2_large_patch14_224": (SMALL, layout()),
    "vit_intern300m_patch14_448": (SMALL, layout("cls")),
    "vit_base_patch16_radio_v3": (SMALL, layout("cls 7")),
    "vit_so400m_patch16_radio_v4": (SMALL, layout("cls 9")),
    "beit3_base_patch16_224": (SMALL, layout("cls")),
    "vit_base_patch16_rpn_224": (SMALL, layout()),
    "vit_base_patch16_xp_224": (SMALL, layout("cls")),
    "vit_pwee_patch16_reg1_gap_256": (SMALL, layout("1")),
    "vit_small_patch16_18x2_224": (SMALL, layout("cls")),
    # deit
    "deit3_small_patch16_224": (SMALL, layout("cls")),
    "deit_tiny_distilled_patch16_224": (SMALL, layout("cls dist")),
    # beit
    "beit_base_patch16_224": (SMALL, layout("cls")),
    "beitv2_base_patch16_224": (
        SMALL | {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True},  # as its pre-trained weights have it
        layout("cls"),
    ),
    # eva
    "vit_small_patch16_dinov3": (SMALL, layout("cls 4")),
    "vit_base_patch16_dinov3_qkvb": (SMALL, layout("cls 4")),
    "eva_giant_patch14_224": (SMALL, layout("cls")),
    "eva02_base_patch14_224": (SMALL, layout("cls")),
    "eva02_enormous_patch14_clip_224": (SMALL, layout("cls")),
    "vit_small_patch16_rope_mixed_ape_224": (SMALL, layout("cls")),
    "vit_mediumd_patch16_rope_reg1_gap_256": (SMALL, layout("1")),
    "vit_pe_core_tiny_patch16_384": (SMALL, layout("cls")),
    "vit_pe_core_gigantic_patch14_448": (SMALL, layout()),
    "vit_pe_spatial_base_patch16_512": (SMALL, layout("cls")),
    "vit_base_patch16_sapiens2": (SMALL | {"num_kv_heads": (4, 2)}, layout("cls 8")),
    "vit_giant_patch16_lingbot": (SMALL, layout("cls 4")),
    # vision_transformer_hybrid
    "vit_tiny_r_s16_p8_224": (STEM, layout("cls", 2, 32)),
    "vit_base_r50_s16_224": (STEM, layout("cls", 4, 16)),
    # vision_transformer_relpos
    "vit_relpos_small_patch16_224": (SMALL, layout()),
    "vit_relpos_medium_patch16_cls_224": (SMALL, layout("cls")),
    "vit_relpos_base_patch16_rpn_224": (SMALL, layout()),
    "vit_srelpos_small_patch16_224": (SMALL, layout()),
    # vitamin
    "vitamin_small_224": (STEM | {"embed_dim": 384, "num_heads": 4}, layout("", 4, 16)),
    # naflexvit
    "naflexvit_base_patch16_gap": (NAFLEX, layout("4")),
    "naflexvit_base_patch16_siglip": (NAFLEX, layout()),
    "naflexvit_base_patch16_par_gap": (
        NAFLEX_ROPE,
        layout("4"),
    ),
    "naflexvit_huge_patch16_radio_v4": (NAFLEX, layout("cls 9")),
    # trunk in .encoder
    "qwen3_vit_88m": ({"img_size": 64}, layout("", 4, 16)),
    "deepseek_vit_412m": (SMALL, layout()),
    "gemma4_vit_167m": (GEMMA | {"num_kv_heads": 2}, layout("", 6)),
    "gemma4_vit_167m_enc": (GEMMA, layout("", 6)),
}

DIFFERENTIAL = ["vit_dlittle_patch16_reg1_gap_256", "vit_dwee_patch16_reg1_gap_256", "vit_dpwee_patch16_reg1_gap_256"]
# What the learned query of the head attends to: patches, or all tokens.
POOLED_KEYS = {
    "vit_base_patch16_siglip_224": 16,
    "vit_so150m_patch16_reg4_map_256": 16,
    "vit_pe_core_tiny_patch16_384": 17,
    "vit_pe_core_gigantic_patch14_448": 16,
    "naflexvit_base_patch16_siglip": 16,
}
HEADS = {"vit_small_patch16_18x2_224": 8}  # two attentions of four heads
# model → image size, which it takes as it is or is built for
OTHER_SIZES = {
    "vit_base_patch16_224": ((32, 48), {"img_size": (32, 48), "patch_size": 8}),
    "vit_base_patch14_reg4_dinov2": ((48, 24), SMALL | {"dynamic_img_size": True}),
    "beit_base_patch16_224": ((48, 32), {"img_size": (48, 32), "patch_size": 8}),
    "vit_small_patch16_dinov3": ((48, 32), SMALL),  # whose `grid_size` stays that of 32 pixels
    "naflexvit_base_patch16_gap": ((24, 40), NAFLEX),
}


def attention_of(model: nn.Module) -> Any:
    """The attention of the last block."""
    trunk: Any = model if hasattr(model, "blocks") else model.encoder
    return trunk.blocks[-1].attn if hasattr(trunk.blocks[-1], "attn") else trunk.blocks[-1]


# What a representative is there for, and how one sees that it (still) has it.
TRAITS: dict[str, Callable[[Any], bool]] = {
    "beit3_base_patch16_224": lambda model: not isinstance(attention_of(model).norm, nn.Identity),
    "eva02_base_patch14_224": lambda model: attention_of(model).qkv is None,
    "vit_base_patch16_xp_224": lambda model: not isinstance(attention_of(model).q_norm, nn.Identity),
    "vit_base_patch16_sapiens2": lambda model: attention_of(model).num_kv_heads == 2 and model.rope is not None,
    "naflexvit_base_patch16_par_gap": lambda model: attention_of(model).gate is not None and model.rope is not None,
    "gemma4_vit_167m": lambda model: attention_of(model).num_kv_groups == 2,
    "vit_small_patch16_dinov3": lambda model: model.rope is not None and model.num_prefix_tokens == 5,
    "vit_small_patch16_rope_mixed_ape_224": lambda model: model.rope_mixed,
    "beitv2_base_patch16_224": lambda model: model.rel_pos_bias is not None,
    "vit_srelpos_small_patch16_224": lambda model: model.shared_rel_pos is not None,
    "vit_relpos_small_patch16_224": lambda model: model.shared_rel_pos is None,
    "deepseek_vit_412m": lambda model: not hasattr(model, "blocks"),
    "vit_base_patch14_reg4_dinov2": lambda model: not isinstance(model.blocks[0].ls1, nn.Identity),
}


def assert_blocks_equal(attention: Capture, expected: list[BlockTrace]) -> None:
    """Weights and statistics of a float64 capture against the attention and tokens of an unfused run."""
    values = attention.statistics()
    assert len(attention) == len(expected) == 2
    for view, trace in zip(attention, expected, strict=True):
        assert_close(view.probabilities(), trace.A, tolerance=1e-9)
        of_block = {key: value[:, view.block] for key, value in values.items()}
        assert_all_close(of_block, reference_of(view, trace.A, trace.tokens), tolerance=1e-8)
        assert set(of_block) | set(attention.undefined) == set(STATISTICS)


def test_each_family_is_represented() -> None:
    of = {name: family for family in ISOTROPIC for name in timm.list_models(module=family)}
    assert {of[name] for name in MODELS if name in of} == ISOTROPIC & set(timm.list_modules())
    assert len(MODELS) + len(DIFFERENTIAL) >= 45


def test_each_kind_of_attention_and_of_block_is_represented() -> None:
    with on_meta():
        blocks = [
            block
            for name, (options, _) in (MODELS | dict.fromkeys(DIFFERENTIAL, (SMALL, layout("1")))).items()
            for block in find_anatomy(tiny(name, **options)).blocks
        ]
    assert {type(block).__name__ for block in blocks} == BLOCKS
    parts = {type(part) for block in blocks for part in block.modules() if hasattr(part, "attn_drop")}
    assert {f"{kind.__module__.removeprefix('timm.')}.{kind.__name__}" for kind in parts} == {
        *("layers.attention.Attention", "layers.attention.AttentionRope", "layers.diff_attention.DiffAttention"),
        *("models.beit.Attention", "models.eva.EvaAttention", "models.gemma4_vit.Gemma4Attention"),
        "models.vision_transformer_relpos.RelPosAttention",
        *(f"models.vision_transformer.{name}" for name in ONE_SUM_BLOCKS),
    }


@pytest.mark.parametrize("name", TRAITS)
def test_each_representative_has_what_it_stands_for(name: str) -> None:
    assert TRAITS[name](tiny(name, **MODELS[name][0]))


@pytest.mark.parametrize("name", MODELS)
def test_statistics_equal_the_reference_of_the_models_own_attention(name: str) -> None:
    """In float64: the capture of the fused model against A and the tokens of an unfused run without capture."""
    options, expected_layout = MODELS[name]
    model = tiny(name, **options).double()
    x = images(2, options.get("img_size", 32)).double()
    expected = unfused_run(model, x)
    attention = captured(model, x)
    assert attention.layout == expected_layout
    assert not attention.signed
    for view, trace in zip(attention, expected, strict=True):
        assert view.layout == expected_layout
        assert view.num_heads == HEADS.get(name, 4)
        assert trace.A.max() > 0.2, "attention is not peaked: the test would see little"
    assert_blocks_equal(attention, expected)
    assert all(value.dtype == torch.float64 for value in attention.statistics().values())
    pools = [call.shape for call in attention.pooling_attention]
    assert pools == ([(1, POOLED_KEYS[name])] if name in POOLED_KEYS else [])


@pytest.mark.parametrize("name", MODELS)
def test_float32_statistics_stay_within_the_error_bound(name: str) -> None:
    options, _ = MODELS[name]
    assert_matches_reference(captured(tiny(name, **options), images(2, options.get("img_size", 32))))


@pytest.mark.parametrize("name", OTHER_SIZES)
def test_images_that_are_not_square(name: str) -> None:
    (height, width), options = OTHER_SIZES[name]
    model = tiny(name, **options).double()
    x = images(2, height, width).double()
    attention = captured(model, x)
    assert attention.layout is not None and attention.layout.grid == (height // 8, width // 8)
    assert_blocks_equal(attention, unfused_run(model, x))


def test_beit_keeps_its_bias_in_float32_under_autocast() -> None:
    model = tiny("beit_base_patch16_224", **SMALL)
    with torch.autocast("cpu", torch.bfloat16):
        attention = captured(model)
    for view in attention:
        assert view.query is not None and view.query.dtype == torch.bfloat16
        assert view.bias is not None and view.bias.dtype == torch.float32
        assert (view.bias.bfloat16() != view.bias).any()
    assert all(value.dtype == torch.float32 for value in attention.statistics().values())
    assert_matches_reference(attention)


# Differential attention: A1 − λ·A2 ------------------------------------------------------------------------------------


@torch.no_grad()
def difference_weight(module: Any, block: int) -> float:
    """λ by its definition (arXiv 2410.05258, equation 2), of block number `block`."""
    q1, k1, q2, k2 = (getattr(module, f"lambda_{name}").double() for name in ("q1", "k1", "q2", "k2"))
    return float((q1 @ k1).exp() - (q2 @ k2).exp() + 0.8 - 0.6 * math.exp(-0.3 * block))


@pytest.mark.parametrize("name", DIFFERENTIAL)
def test_differential_attention_is_a_difference(name: str) -> None:
    model = tiny(name, **SMALL).double()
    x = images().double()
    expected = unfused_run(model, x)
    attention = captured(model, x)
    assert attention.signed and attention.layout == layout("1")
    values = attention.statistics()
    linear = {"patch_self_attention", "patches_to_registers", "patch_norm_max_ratio"}
    updates = {"patch_update_ratio", "patch_update_ratio_unscaled"}
    assert set(values) == (linear if "dpwee" in name else linear | updates)
    assert "distribution" in attention.undefined["patch_entropy"]
    for view, trace in zip(attention, expected, strict=True):
        first, second = trace.A[:, 0::2], trace.A[:, 1::2]  # the unfused path has their heads in turn
        block = model.blocks[view.block]
        weight = difference_weight(getattr(block, "attn", block), view.block)
        A = first - weight * second
        assert first.max() > 0.2 and second.max() > 0.2 and abs(weight) > 0.1
        assert_close(view.probabilities(), A, tolerance=1e-5)  # λ is kept in float32
        assert_close(view.probabilities(head=1), A[:, 1], tolerance=1e-5)
        assert_close(view.probabilities().sum(-1), np.full((2, 4, 17), 1 - weight), tolerance=1e-5)
        with np.errstate(invalid="ignore", divide="ignore"):  # of entropies, which nobody asks for
            reference = reference_of(view, A, trace.tokens)
        of_block = {key: value[:, view.block] for key, value in values.items()}
        assert_all_close(of_block, {key: reference[key] for key in of_block}, tolerance=1e-5)


@pytest.mark.parametrize("name", DIFFERENTIAL)
def test_differential_attention_in_float32(name: str) -> None:
    attention = captured(tiny(name, **SMALL))
    values = attention.statistics()
    for view in attention:
        second = view.subtracted
        assert second is not None and view.subtracted_weight is not None
        matrices = [reference_attention(part.query, part.key, part.scale, part.bias) for part in (view, second)]
        A = matrices[0] - float(view.subtracted_weight) * matrices[1]
        for key, value in {
            "patch_self_attention": A[:, :, range(1, 17), range(1, 17)].mean(-1),
            "patches_to_registers": A[:, :, 1:, 0].mean(-1),
        }.items():
            assert_close(values[key][:, view.block], value)


# Images of several grids in one batch ---------------------------------------------------------------------------------

GRIDS = [(4, 4), (2, 5), (3, 3)]


def padded_batch(pictures: list[Tensor]) -> dict[str, Tensor]:
    """What NaFlexVit takes: patches of 8 px of each picture, their places, and which are not padding."""
    parts = [patchify_image(picture, (8, 8)) for picture in pictures]
    length = max(len(patches) for patches, _, _ in parts)
    batch = {
        "patches": torch.zeros(len(parts), length, parts[0][0].shape[-1]).to(parts[0][0]),
        "patch_coord": torch.zeros(len(parts), length, 2, dtype=torch.long),
        "patch_valid": torch.zeros(len(parts), length, dtype=torch.bool),
    }
    for image, (patches, coordinates, _) in enumerate(parts):
        batch["patches"][image, : len(patches)] = patches
        batch["patch_coord"][image, : len(patches)] = coordinates
        batch["patch_valid"][image, : len(patches)] = True
    return batch


@pytest.mark.parametrize("keep", ["qk", "statistics"])
@pytest.mark.parametrize(
    "name", ["naflexvit_base_patch16_gap", "naflexvit_base_patch16_siglip", "naflexvit_huge_patch16_radio_v4"]
)
def test_each_image_of_a_padded_batch_is_as_if_alone(name: str, keep: str) -> None:
    model = tiny(name, **NAFLEX).double()
    pictures = [images(1, 8 * rows, 8 * columns, seed=rows)[0].double() for rows, columns in GRIDS]
    attention = captured(model, padded_batch(pictures), keep=keep)
    values = attention.statistics()
    assert isinstance(attention.layouts, tuple) and [of.grid for of in attention.layouts] == GRIDS
    assert attention.layout is None
    for image, picture in enumerate(pictures):
        alone = captured(model, picture[None])
        own = alone.statistics()
        assert_all_close({name: value[image : image + 1] for name, value in values.items()}, own, tolerance=1e-8)
        if keep == "qk":
            for block, view in enumerate(alone):
                assert_close(attention.views(block)[image].probabilities(), view.probabilities(), tolerance=1e-9)


def test_padding_is_no_token() -> None:
    """Padded keys have no weight, padded queries are dropped: an unfused run's matrices, cut to each image's tokens."""
    model = tiny("naflexvit_base_patch16_gap", **NAFLEX).double()
    pictures = [images(1, 8 * rows, 8 * columns, seed=rows)[0].double() for rows, columns in GRIDS]
    batch = padded_batch(pictures)
    attention = captured(model, batch)
    for block, trace in enumerate(unfused_run(model, batch)):
        for image, (rows, columns) in enumerate(GRIDS):
            tokens = 4 + rows * columns
            weights = attention.views(block)[image].probabilities()
            assert weights.shape == (1, 4, tokens, tokens)
            assert_close(weights[0], trace.A[image, :, :tokens, :tokens], tolerance=1e-9)
            assert_close(weights.sum(-1), np.ones((1, 4, tokens)), tolerance=1e-9)
