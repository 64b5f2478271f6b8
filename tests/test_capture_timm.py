"""Every model of timm that has transformer blocks, on the meta device: no weights, no arithmetic."""

from __future__ import annotations

import pytest
import timm
import torch

from helpers import captured
from vitprobe.errors import AttentionNotSeenError
from vitprobe.hooks.capture import Capture

ISOTROPIC_FAMILIES = [
    "beit",
    "deepseek_vit",
    "deit",
    "eva",
    "gemma4_vit",
    "naflexvit",
    "qwen3_vit",
    "vision_transformer",
    "vision_transformer_hybrid",
    "vision_transformer_relpos",
    "vitamin",
]
OTHER_FAMILIES_WITH_BLOCKS = [
    "cait",
    "convit",
    "crossvit",
    "hiera",
    "hieradet_sam2",
    "tnt",
    "vision_transformer_sam",
    "xcit",
]
DIFFERENTIAL = {
    "vit_dlittle_patch16_reg1_gap_256",
    "vit_dpwee_patch16_reg1_gap_256",
    "vit_dwee_patch16_reg1_gap_256",
}


def captured_on_meta(name: str, **options: int) -> Capture:
    with torch.device("meta"):
        model = timm.create_model(name, **options).eval()
    return captured(model, torch.empty(1, *model.pretrained_cfg["input_size"], device="meta"))


def captured_at_two_blocks(name: str) -> Capture:
    """The blocks of a model are all alike, so that two of them will do where the depth is free to choose."""
    try:
        return captured_on_meta(name, depth=2)
    except AssertionError:  # some architectures list a setting for each block
        return captured_on_meta(name)


@pytest.mark.slow
@pytest.mark.parametrize("family", ISOTROPIC_FAMILIES)
def test_every_isotropic_model_of_timm_is_seen(family: str) -> None:
    """Each of its 322 models (timm 1.0.31): N == prefix + H·W in each block, which the capture itself insists on."""
    if family not in timm.list_modules():
        pytest.skip(f"this timm has no {family}")
    refused = set()
    for name in timm.list_models(module=family):
        try:
            attention = captured_at_two_blocks(name)
        except AttentionNotSeenError:
            refused.add(name)
            continue
        for view in attention:
            assert view.query.shape[-2] == view.layout.num_prefix_tokens + view.layout.num_patches, name
            assert view.residual_norms is not None and view.output_norms is not None, name
            assert (view.update_norms is None) == (view.unscaled_update_norms is None), name
            kind = type(attention.anatomy.blocks[view.block]).__name__
            in_one_sum = kind == "ParallelScalingBlock"  # attention and MLP in one projection
            assert (view.update_norms is None) == in_one_sum, name
    assert refused <= DIFFERENTIAL


@pytest.mark.slow
@pytest.mark.parametrize("family", OTHER_FAMILIES_WITH_BLOCKS)
def test_every_other_model_of_timm_with_blocks_says_why_it_is_not_seen(family: str) -> None:
    for name in timm.list_models(module=family):
        with pytest.raises(AttentionNotSeenError):
            captured_on_meta(name)
