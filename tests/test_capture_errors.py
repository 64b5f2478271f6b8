"""A capture is never silent: each error names the model, the module and the mend, in one line."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F

from helpers import OwnModel, captured, message, state_of, tiny, tiny_vit
from vitprobe.errors import AttentionNotSeenError, UserError
from vitprobe.hooks.capture import capture


def test_no_forward_pass_yet() -> None:
    for keep in ("qk", "statistics"):
        with capture(tiny_vit(), keep=keep) as attention, pytest.raises(UserError) as error:
            attention.statistics()
        assert message(error) == (
            "no forward pass of VisionTransformer has run inside this capture; call the model inside the with"
        )
    with capture(tiny_vit()) as attention, pytest.raises(UserError, match="no forward pass"):
        attention[0]


def test_a_block_that_is_not_there() -> None:
    attention = captured(tiny_vit())
    for block in (2, -3):
        with pytest.raises(UserError) as error:
            attention[block]
        assert message(error) == f"VisionTransformer has blocks 0 to 1, not {block}; choose one of these"


def test_what_is_no_block() -> None:
    attention = captured(tiny_vit())
    assert attention[np.int64(1)].block == attention[-1].block == 1
    for wrong, kind in ((slice(0, 2), "slice"), ("a", "str"), (1.0, "float"), (None, "NoneType")):
        with pytest.raises(UserError) as error:
            attention[wrong]
        assert message(error) == f"a block is an integer from 0 to 1, not a {kind}; take several one by one"


@pytest.mark.parametrize("keep", ["qk", "statistics"])
def test_statistics_that_the_model_has_none_of(keep: str) -> None:
    asked = ["cls_entropy", "patches_to_registers"]
    expected = (
        "VisionTransformer has none of the statistics asked for: cls_entropy needs a [cls] token; "
        "patches_to_registers needs register tokens"
    )
    model = tiny_vit(class_token=False, global_pool="avg")
    with pytest.raises(UserError) as error:
        captured(model, keep=keep, statistics=asked).statistics()
    assert message(error) == expected
    attention = captured(model, keep=keep)
    with pytest.raises(UserError) as error:
        attention.statistics(asked)
    assert message(error) == expected
    assert list(attention.statistics([*asked, "patch_entropy"])) == ["patch_entropy"]


def test_no_statistic_asked_for() -> None:
    for empty in ([], ()):
        with pytest.raises(UserError, match="no statistic is asked for; name at least one"):
            capture(tiny_vit(), statistics=empty)
    with pytest.raises(UserError, match="no statistic is asked for; name at least one"):
        captured(tiny_vit()).statistics([])
    assert list(captured(tiny_vit(), statistics="cls_entropy").statistics()) == ["cls_entropy"]


def test_a_wrapper_that_runs_copies_of_the_model() -> None:
    with pytest.raises(AttentionNotSeenError) as error:
        capture(torch.nn.DataParallel(tiny_vit()))
    assert message(error) == (
        "DataParallel wraps the model and may run copies of it, whose attention cannot be seen; pass model.module, and "
        "call that inside the capture"
    )


def test_maps_of_a_capture_that_keeps_statistics() -> None:
    with pytest.raises(UserError) as error:
        captured(tiny_vit(), keep="statistics")[0]
    assert message(error) == "capture(keep='statistics') holds no queries and keys; use capture(keep='qk') for maps"


def test_unknown_words() -> None:
    with pytest.raises(UserError) as error:
        capture(tiny_vit(), keep="maps")
    assert message(error) == (
        "keep='maps' is not known; choose 'qk' (maps and statistics) or 'statistics' (numbers alone)"
    )
    with pytest.raises(UserError) as error:
        capture(tiny_vit(), statistics=["cls_self"])
    assert message(error).startswith("there is no statistic 'cls_self'; the nearest are cls_")
    with pytest.raises(UserError, match="there is no statistic 'cls_self'"):
        captured(tiny_vit()).statistics(["cls_self"])


def test_what_is_no_model() -> None:
    for wrong, kind in (("vit_base_patch16_224", "str"), (None, "NoneType")):
        with pytest.raises(UserError) as error:
            capture(wrong)
        assert message(error) == (
            f"capture takes a model (what load_model returns, or a torch.nn.Module), not a {kind}"
        )


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224", "mixer_s32_224", "hiera_tiny_224"])
def test_models_without_isotropic_blocks_are_refused_on_entering(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(AttentionNotSeenError, match=type(model).__name__) as error:
        capture(model)
    assert "isotropic Vision Transformer" in message(error)


@pytest.mark.parametrize(
    ("name", "module", "reason"),
    [
        ("xcit_nano_12_p16_224", "XCABlock", "attends with queries (1, 4, 32, 196)"),
        ("cait_xxs24_224", "LayerScaleBlock", "computed no scaled-dot-product attention"),
        ("convit_tiny", "Block", "computed no scaled-dot-product attention"),
        ("samvit_base_patch16_224", "Block", "attends with queries (12, 196, 64)"),
        ("vit_dpwee_patch16_reg1_gap_256", "DiffParallelScalingBlock", "computed 2 attentions"),
        ("vit_dwee_patch16_reg1_gap_256", "Block", "(differential attention, say)"),
    ],
)
def test_attention_that_cannot_be_seen_names_the_model_and_the_module(name: str, module: str, reason: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name).eval()
    before = state_of(model)
    height, width = model.pretrained_cfg["input_size"][1:]
    with pytest.raises(AttentionNotSeenError) as error, torch.no_grad(), capture(model):
        model(torch.empty(1, 3, height, width, device="meta"))
    assert message(error).startswith(f"block 0 ({module}) of {type(model).__name__} ")
    assert reason in message(error)
    assert state_of(model) == before


def test_dropped_patches() -> None:
    model = tiny_vit(patch_drop_rate=0.5)
    assert captured(model)[0].query.shape[-2] == 17
    with pytest.raises(AttentionNotSeenError) as error:
        captured(model.train())
    assert message(error) == (
        "block 0 (Block) of VisionTransformer attends with queries (2, 2, 9, 16) and keys (2, 2, 9, 16), but global "
        "self-attention over 17 tokens (1 prefix + 4x4 patches) was expected; windowed and pooled attention and "
        "dropped patches are not supported"
    )


def test_hand_written_attention() -> None:
    model = OwnModel(lambda q, k, v: (q @ k.mT).softmax(-1) @ v)
    with pytest.raises(AttentionNotSeenError) as error:
        captured(model)
    assert message(error).startswith("block 0 (OwnBlock) of OwnModel computed no scaled-dot-product attention, so its ")


def test_fewer_keys_or_fewer_queries_than_tokens() -> None:
    attend = F.scaled_dot_product_attention
    fewer_keys = OwnModel(lambda q, k, v: attend(q, k[:, :, ::2], v[:, :, ::2]))
    fewer_queries = OwnModel(lambda q, k, v: attend(q[:, :, ::2], k, v).repeat_interleave(2, dim=2))
    no_heads = OwnModel(lambda q, k, v: attend(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)).view_as(q))
    for model, shapes in (
        (fewer_keys, "queries (2, 2, 16, 8) and keys (2, 2, 8, 8)"),
        (fewer_queries, "queries (2, 2, 8, 8) and keys (2, 2, 16, 8)"),
        (no_heads, "queries (4, 16, 8) and keys (4, 16, 8)"),
    ):
        with pytest.raises(AttentionNotSeenError) as error:
            captured(model)
        assert message(error).startswith(f"block 0 (OwnBlock) of OwnModel attends with {shapes}, but global ")


def test_patches_instead_of_images() -> None:
    model = tiny("naflexvit_base_patch16_gap", patch_size=8)
    coordinates = torch.cartesian_prod(torch.arange(4), torch.arange(4)).expand(1, -1, -1)
    patches = {
        "patches": torch.randn(1, 16, 192),
        "patch_coord": coordinates,
        "patch_valid": torch.ones(1, 16, dtype=torch.bool),
    }
    with pytest.raises(AttentionNotSeenError) as error, torch.no_grad(), capture(model):
        model(patches)
    assert message(error) == (
        "NaFlexVit got patches of shape (1, 16, 192); capture needs a batch of images (B, 3, H, W) to know the patch "
        "grid"
    )


def test_a_patch_embedding_that_gets_no_tensor() -> None:
    model = OwnModel()
    model.patch_embed.forward = lambda x: torch.zeros(2, 16, 16)
    with pytest.raises(AttentionNotSeenError, match="OwnModel got no tensor; capture needs a batch of images"):
        captured(model, [1, 2])  # type: ignore[arg-type]


def test_a_model_that_leaves_its_patch_embedding_or_a_block_out() -> None:
    model = OwnModel()
    model.forward = lambda x: model.blocks[1](model.blocks[0](torch.zeros(2, 16, 16)))
    with pytest.raises(AttentionNotSeenError) as error:
        captured(model)
    assert message(error) == (
        "OwnModel ran, but its patch embedding was not seen to run; pass images through the whole model (and of a "
        "compiled model, capture the module that it was compiled from)"
    )
    model.forward = lambda x: model.blocks[0](model.patch_embed(x))
    with pytest.raises(AttentionNotSeenError, match="OwnModel ran, but its block 1 was not seen to run; pass images"):
        captured(model)


def test_a_block_that_runs_twice() -> None:
    model = OwnModel()
    model.forward = lambda x: model.blocks[1](model.blocks[0](model.blocks[0](model.patch_embed(x))))
    with pytest.raises(AttentionNotSeenError) as error:
        captured(model)
    assert message(error) == (
        "block 0 (OwnBlock) of OwnModel ran twice in one forward pass, so it has no single attention map"
    )
