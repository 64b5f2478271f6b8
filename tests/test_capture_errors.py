"""A capture is never silent: each error names the model, the module and the mend, in one line."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F

from helpers import OwnModel, captured, message, tiny_vit
from vitprobe.errors import AttentionNotSeenError, UserError
from vitprobe.hooks.capture import capture
from vitprobe.models.meta import on_meta


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


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("resnet18", "(ResNet) cannot be captured: it has no attention between tokens"),
        ("swin_tiny_patch4_window7_224", "(SwinTransformer) cannot be captured: its tokens attend within windows"),
        ("xcit_nano_12_p16_224", "(Xcit) cannot be captured: it attends from channel to channel"),
        ("cait_xxs24_224", "(Cait) cannot be captured: it mixes the heads of its attention weights after the softmax"),
        ("convit_tiny", "(ConVit) cannot be captured: it blends the softmax of its early blocks with a map of"),
        ("samvit_base_patch16_224", "(VisionTransformerSAM) cannot be captured: its tokens attend within windows"),
        ("hiera_tiny_224", "(Hiera) cannot be captured: tokens of its early stages attend within windows"),
        ("levit_128s", "(LevitDistilled) cannot be captured: the number of tokens changes from stage to stage"),
        ("mobilevit_xxs", "(ByobNet) cannot be captured: its tokens are pixels of feature maps between convolutions"),
        ("mixer_s32_224", "(MlpMixer) cannot be captured: it mixes tokens with a fixed linear map"),
    ],
)
def test_families_that_are_not_isotropic_are_refused_on_entering_with_the_reason(name: str, reason: str) -> None:
    with on_meta():
        model = timm.create_model(name)
    with pytest.raises(AttentionNotSeenError) as error:
        capture(model)
    assert message(error).startswith(f"{name} {reason}")
    assert message(error).endswith("; use an isotropic Vision Transformer (vitprobe models)")


def test_a_family_that_is_newer_than_vitprobe() -> None:
    kind = type("Novel", (torch.nn.Module,), {"__module__": "timm.models.novel_vit"})
    with pytest.raises(AttentionNotSeenError) as error:
        capture(kind())
    assert "Novel (Novel) cannot be captured: timm's family novel_vit is newer than this vitprobe" in message(error)


def test_dropped_patches() -> None:
    model = tiny_vit(patch_drop_rate=0.5)
    assert captured(model)[0].query.shape[-2] == 17
    with pytest.raises(AttentionNotSeenError) as error:
        captured(model.train())
    assert message(error) == (
        "block 0 (Block) of VisionTransformer attends from 9 queries to 9 keys, but the layout has 17 tokens (1 prefix "
        "+ 4x4 patches): a wrong layout is mended with load_model(model, layout=vitprobe.TokenLayout(…)); windowed and "
        "pooled attention and dropped patches have no such map"
    )


def test_fewer_keys_or_fewer_queries_than_tokens() -> None:
    attend = F.scaled_dot_product_attention
    fewer_keys = OwnModel(lambda q, k, v: attend(q, k[:, :, ::2], v[:, :, ::2]))
    fewer_queries = OwnModel(lambda q, k, v: attend(q[:, :, ::2], k, v).repeat_interleave(2, dim=2))
    for model, counts in ((fewer_keys, "from 16 queries to 8 keys"), (fewer_queries, "from 8 queries to 16 keys")):
        with pytest.raises(AttentionNotSeenError) as error:
            captured(model)
        assert message(error).startswith(f"block 0 (OwnBlock) of OwnModel attends {counts}, but the layout has 16 ")


def test_windows_as_long_as_the_layout() -> None:
    """Four windows an image, each of as many tokens as the layout has: only the batch gives them away."""
    attend = F.scaled_dot_product_attention
    model = OwnModel(lambda q, k, v: attend(*(t.repeat(4, 1, 1, 1) for t in (q, k, v)))[: len(q)])
    with pytest.raises(AttentionNotSeenError) as error:
        captured(model)
    assert message(error).startswith(
        "block 0 (OwnBlock) of OwnModel attends with a tensor of shape (8, 2, 16, 8) for 2 images, not (B, H, N, …): "
        "attention within windows has no map of the image; "
    )


@pytest.mark.parametrize("model", [torch.nn.Linear(1, 1), torch.nn.Sequential(), torch.nn.ModuleList()])
def test_models_without_blocks(model: torch.nn.Module) -> None:
    with pytest.raises(AttentionNotSeenError) as error:
        capture(model)
    assert message(error).startswith(
        f"no list of alike transformer blocks was found in {type(model).__name__}, so there is no attention to "
        f"capture; if it has some, say it with load_model(model, layout=vitprobe.TokenLayout("
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
