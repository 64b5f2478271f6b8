"""timm as installed: every isotropic model is seen, every other refused, and what is new to us fails here."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re

import pytest
import timm
import timm.layers
import torch
from torch import nn

from helpers import captured, message
from reference import BLOCKS, ONE_SUM_BLOCKS
from vitprobe.errors import AttentionNotSeenError
from vitprobe.hooks.capture import Capture, capture
from vitprobe.models.anatomy.unsupported import CONVOLUTIONAL, ISOTROPIC, REASONS
from vitprobe.models.meta import on_meta

DIFFERENTIAL = {
    "vit_dlittle_patch16_reg1_gap_256",
    "vit_dpwee_patch16_reg1_gap_256",
    "vit_dwee_patch16_reg1_gap_256",
}
# What computes attention, or anything with a softmax, in timm's layers and in the modules of isotropic models.
ATTENTION_CLASSES = {
    "timm.layers.attention": {"Attention", "AttentionRope"},
    "timm.layers.attention2d": {"Attention2d", "MultiQueryAttention2d", "MultiQueryAttentionV2"},
    "timm.layers.attention_pool": {"AttentionPoolLatent", "AttentionPoolPrr"},
    "timm.layers.attention_pool2d": {"AttentionPool2d", "RotAttentionPool2d"},
    "timm.layers.bottleneck_attn": {"BottleneckAttn"},
    "timm.layers.diff_attention": {"DiffAttention"},
    "timm.layers.global_context": {"GlobalContext"},
    "timm.layers.halo_attn": {"HaloAttn"},
    "timm.layers.lambda_layer": {"LambdaLayer"},
    "timm.layers.ml_decoder": {"TransformerDecoderLayerOptimal"},
    "timm.layers.non_local_attn": {"NonLocalAttn"},
    "timm.layers.other_pool": {"SimPool1d", "SimPool2d"},
    "timm.layers.selective_kernel": {"SelectiveKernelAttn"},
    "timm.layers.split_attn": {"RadixSoftmax", "SplitAttn"},
    "timm.models.beit": {"Attention"},
    "timm.models.eva": {"EvaAttention"},
    "timm.models.gemma4_vit": {"Gemma4Attention"},
    "timm.models.vision_transformer": {"DiffParallelScalingBlock", "ParallelScalingBlock"},
    "timm.models.vision_transformer_relpos": {"RelPosAttention"},
}
ATTENDS = re.compile("scaled_dot_product_attention|softmax|fused_attn|MultiheadAttention")


# What a release of timm may add ---------------------------------------------------------------------------------------


def test_every_family_of_timm_is_known() -> None:
    known = [ISOTROPIC, CONVOLUTIONAL, frozenset(REASONS)]
    families, everything = set(timm.list_modules()), frozenset.union(*known)
    assert families <= everything, (
        f"timm {timm.__version__} has families that vitprobe does not know: {sorted(families - everything)}. See how "
        f"their models attend, enter each in vitprobe/models/anatomy/unsupported.py (ISOTROPIC, CONVOLUTIONAL or "
        f"REASONS), give an isotropic one a representative in tests/test_families.py, and run benchmarks.coverage and "
        f"benchmarks.families again"
    )
    assert everything <= families, (
        f"timm {timm.__version__} no longer has the families {sorted(everything - families)}: take them out of "
        f"vitprobe/models/anatomy/unsupported.py"
    )
    assert sum(map(len, known)) == len(everything), "a family is entered twice"


def test_every_attention_class_of_timm_is_known() -> None:
    modules = [f"timm.layers.{found.name}" for found in pkgutil.iter_modules(timm.layers.__path__)]
    modules += [f"timm.models.{family}" for family in ISOTROPIC]
    found = {name: classes for name in modules if (classes := attention_classes(source(name)))}
    assert found == ATTENTION_CLASSES, (
        f"timm {timm.__version__} computes attention in other classes than vitprobe was checked with. New: "
        f"{difference(found, ATTENTION_CLASSES)}; gone: {difference(ATTENTION_CLASSES, found)}. For a new one that an "
        f"isotropic model uses, add a model with it to tests/test_families.py, which compares it with its unfused path "
        f"(is the map really the softmax of what the kernel gets?), then enter it in ATTENTION_CLASSES here"
    )


def test_convolutional_families_have_no_attention_of_their_own() -> None:
    for family in CONVOLUTIONAL:
        assert not attention_classes(source(f"timm.models.{family}")), family


def test_a_new_attention_class_would_be_noticed() -> None:
    attends = "class New(nn.Module):\n    def forward(self, x):\n        return x.softmax(dim=-1)\n"
    assert attention_classes(f"class Mlp(nn.Module):\n    pass\n\n\n{attends}") == {"New"}


def source(module: str) -> str:
    return inspect.getsource(importlib.import_module(module))


def attention_classes(text: str) -> set[str]:
    """The classes in the source of a module that compute attention or a softmax."""
    classes = [node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]
    lines = text.splitlines()
    return {node.name for node in classes if ATTENDS.search("\n".join(lines[node.lineno - 1 : node.end_lineno]))}


def difference(left: dict[str, set[str]], right: dict[str, set[str]]) -> list[str]:
    return sorted(f"{module}.{name}" for module, names in left.items() for name in names - right.get(module, set()))


# Every model, on the meta device: no weights, no arithmetic -----------------------------------------------------------


def outlined(name: str, **options: int) -> nn.Module:
    with on_meta():
        return timm.create_model(name, **options).eval()


def captured_on_meta(name: str, **options: int) -> Capture:
    model = outlined(name, **options)
    return captured(model, torch.empty(1, *model.pretrained_cfg["input_size"], device="meta"))


def captured_at_two_blocks(name: str) -> Capture:
    """The blocks of a model are all alike, so that two of them will do where the depth is free to choose."""
    try:
        return captured_on_meta(name, depth=2)
    except AssertionError:  # some architectures list a setting for each block
        return captured_on_meta(name)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(ISOTROPIC))
def test_every_isotropic_model_of_timm_is_seen(family: str) -> None:
    """Each of its 322 models (timm 1.0.31): N == prefix + H·W in each block, which the capture itself insists on."""
    for name in timm.list_models(module=family):
        attention = captured_at_two_blocks(name)
        assert attention.signed == (name in DIFFERENTIAL), name
        for view in attention:
            assert view.shape[2] == view.layout.num_prefix_tokens + view.layout.num_patches, name
            assert view.residual_norms is not None and view.output_norms is not None, name
            assert (view.update_norms is None) == (view.unscaled_update_norms is None), name
            kind = type(attention.anatomy.blocks[view.block]).__name__
            assert (view.update_norms is None) == (kind in ONE_SUM_BLOCKS), name
            assert kind in BLOCKS, (
                f"{name} has blocks of a class that vitprobe was not checked with, {kind}: add a representative to "
                f"tests/test_families.py, and how its update is found to tests/reference.py"
            )


@pytest.mark.parametrize("family", sorted(REASONS))
def test_every_other_family_of_timm_is_refused_on_entering(family: str) -> None:
    name = timm.list_models(module=family)[0]
    with pytest.raises(AttentionNotSeenError) as error:
        capture(outlined(name))
    text = message(error)
    assert text.startswith(f"{name} (") and "cannot be captured: " in text
    assert text.endswith("; use an isotropic Vision Transformer (vitprobe models)")
    assert "newer than this vitprobe" not in text


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(CONVOLUTIONAL | set(REASONS)))
def test_every_other_model_of_timm_is_refused_on_entering(family: str) -> None:
    for name in timm.list_models(module=family):
        with pytest.raises(AttentionNotSeenError, match="cannot be captured: "):
            capture(outlined(name))


def test_a_family_that_is_newer_than_we_are_is_refused() -> None:
    class Newer(nn.Module):
        pass

    Newer.__module__ = "timm.models.newer"
    with pytest.raises(AttentionNotSeenError) as error:
        capture(Newer())
    assert message(error) == (
        "Newer (Newer) cannot be captured: timm's family newer is newer than this vitprobe, which does not know it; "
        "use an isotropic Vision Transformer (vitprobe models)"
    )
