"""`capture` sees a model in every way it may run, and gives it back untouched."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm.layers
import torch
import torch.nn.functional as F
from torch import nn

from helpers import SMALL, assert_all_close, assert_close, captured, images, state_of, tiny, tiny_vit
from vitprobe.errors import UserError
from vitprobe.hooks.capture import capture
from vitprobe.hooks.interception import AttentionWatcher
from vitprobe.statistics import STATISTICS

# The model is untouched ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", ["qk", "statistics"])
@pytest.mark.parametrize(
    "name",
    [
        "vit_base_patch16_224",
        "beit_base_patch16_224",
        "vit_small_patch16_dinov3",
        "vit_base_patch16_siglip_224",
        "vit_base_patch16_xp_224",
        "vit_small_patch16_18x2_224",
    ],
)
def test_output_is_the_same_bit_for_bit_with_fused_kernels_on(name: str, keep: str) -> None:
    model = tiny(name, **SMALL)
    before = state_of(model)
    fused = [module.fused_attn for module in model.modules() if hasattr(module, "fused_attn")]
    assert fused and all(fused)
    with torch.no_grad():
        expected = model(images())
        with capture(model, keep=keep, kernel="model") as attention:
            assert torch.equal(model(images()), expected)
            assert state_of(model) != before
        assert state_of(model) == before
        assert torch.equal(model(images()), expected)
    assert len(attention.statistics()) + len(attention.undefined) == len(STATISTICS)


def test_fused_attention_switched_off_comes_back_switched_off() -> None:
    model = tiny_vit()
    expected = captured(model).statistics()
    model.blocks[0].attn.fused_attn = False
    before = state_of(model)
    with torch.no_grad(), capture(model) as attention:
        model(images())
        assert model.blocks[0].attn.fused_attn is True
    assert state_of(model) == before
    assert [block.attn.fused_attn for block in model.blocks] == [False, True]
    assert_all_close(attention.statistics(), expected)


def test_untouched_after_an_error_in_the_body() -> None:
    model = tiny_vit()
    model.blocks[1].attn.fused_attn = False
    before = state_of(model)
    with pytest.raises(ZeroDivisionError), torch.no_grad(), capture(model):
        model(images())
        raise ZeroDivisionError
    assert state_of(model) == before


def test_untouched_after_an_error_inside_a_forward_pass() -> None:
    model = tiny_vit()
    before = state_of(model)
    with pytest.raises(AssertionError, match="height"), torch.no_grad(), capture(model):
        model(images(2, 40))
    assert state_of(model) == before
    model.blocks[1].mlp.fc1 = nn.Linear(7, 128)
    before = state_of(model)
    with pytest.raises(RuntimeError, match="shape"), torch.no_grad(), capture(model):
        model(images())
    assert state_of(model) == before


def test_untouched_after_an_error_while_entering(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_vit()
    model.blocks[1].attn.fused_attn = False
    before = state_of(model)

    def broken(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(AttentionWatcher, "__enter__", broken)
    with pytest.raises(ZeroDivisionError), capture(model):
        pass
    assert state_of(model) == before


@pytest.mark.parametrize("accumulate", [False, True])
def test_a_pass_that_fails_half_way_leaves_nothing(accumulate: bool) -> None:
    model = tiny_vit()
    good, bad = images(seed=1), images(seed=2)
    expected = captured(model, good).statistics()
    mlp = model.blocks[1].mlp

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    with torch.no_grad(), capture(model, accumulate=accumulate) as attention:
        handle = mlp.register_forward_pre_hook(fail)
        with pytest.raises(ZeroDivisionError):
            model(bad)
        handle.remove()
        F.scaled_dot_product_attention(*torch.randn(3, 1, 1, 4, 4))  # belongs to no block, though one was left running
        with pytest.raises(UserError, match="no forward pass"):
            attention[0]
        model(good)
        assert attention[0].query.shape[0] == 2
        assert_all_close(attention.statistics(), expected, tolerance=1e-9)
        handle = mlp.register_forward_pre_hook(fail)
        with pytest.raises(ZeroDivisionError):
            model(bad)
        handle.remove()
        if accumulate:
            assert attention[0].query.shape[0] == 2
            assert_all_close(attention.statistics(), expected, tolerance=1e-9)
        else:
            with pytest.raises(UserError, match="no forward pass"):
                attention.statistics()


def test_a_capture_can_be_opened_again_but_not_twice_at_once() -> None:
    model = tiny_vit()
    before = state_of(model)
    attention = capture(model)
    with torch.no_grad():
        with attention:
            model(images(2))
            with pytest.raises(UserError) as error, attention:
                pass
        with attention:
            model(images(3))
    assert str(error.value) == (
        "this capture of VisionTransformer is open already; open a second one with capture(model)"
    )
    assert attention[0].query.shape[0] == 3
    assert state_of(model) == before


# Which calls belong to which capture ----------------------------------------------------------------------------------


def test_two_captures_of_one_model() -> None:
    model = tiny_vit()
    before = state_of(model)
    with torch.no_grad(), capture(model) as outer:
        model(images(1))
        with capture(model, keep="statistics") as inner:
            model(images(2))
        assert outer[0].query.shape[0] == 2
        model(images(3))
    assert state_of(model) == before
    assert outer[0].query.shape[0] == 3
    assert inner.statistics()["cls_entropy"].shape == (2, 2, 2)
    assert_all_close(inner.statistics(), captured(model, images(2)).statistics(), tolerance=1e-9)


def test_two_models_with_their_calls_interleaved() -> None:
    first, second = tiny_vit(), tiny_vit(num_heads=4, depth=3)
    x = images()
    expected = [captured(model, x).statistics() for model in (first, second)]
    with torch.no_grad(), capture(first) as one, capture(second) as two:
        a = first.patch_embed(x)
        b = second.patch_embed(x)
        a, b = first._pos_embed(a), second._pos_embed(b)
        for index in range(3):
            if index < 2:
                a = first.blocks[index](a)
            b = second.blocks[index](b)
    assert [len(one), len(two)] == [2, 3]
    assert_all_close(one.statistics(), expected[0], tolerance=1e-9)
    assert_all_close(two.statistics(), expected[1], tolerance=1e-9)


def test_one_model_inside_another() -> None:
    """A block that consults a second model: its attention is not the first model's."""
    first, second = tiny_vit(), tiny_vit()
    expected = captured(first).statistics()
    with torch.no_grad(), capture(second) as two, capture(first) as one:
        handle = first.blocks[0].register_forward_hook(lambda *_: (second(images(1)), None)[1])
        first(images())
        handle.remove()
    assert_all_close(one.statistics(), expected, tolerance=1e-9)
    assert two[0].query.shape[0] == 1


def test_attention_outside_the_model_is_ignored() -> None:
    model = tiny("vit_base_patch16_siglip_224", **SMALL)
    x = torch.randn(2, 4, 17, 8)
    with torch.no_grad(), capture(model) as attention:
        F.scaled_dot_product_attention(x, x, x)
        with pytest.raises(UserError, match="no forward pass"):
            attention.statistics()
        model.forward_features(images())
        F.scaled_dot_product_attention(x, x, x)
    assert attention.pooling_attention == []
    assert_all_close(attention.statistics(), captured(model).statistics(), tolerance=1e-9)


def test_attention_after_a_pass_that_failed_in_the_head_is_ignored() -> None:
    model = tiny_vit()
    model.head = nn.Linear(7, 5)
    x = torch.randn(2, 4, 17, 8)
    with torch.no_grad(), capture(model) as attention:
        with pytest.raises(RuntimeError, match="shape"):
            model(images())
        F.scaled_dot_product_attention(x, x, x)
        model.blocks[0](torch.randn(1, 17, 32))
    assert attention.pooling_attention == []
    assert attention[0].query.shape[0] == 2, "all blocks ran before the head failed"


def test_parts_called_on_their_own_are_ignored() -> None:
    model = tiny_vit()
    tokens = torch.randn(1, 17, 32)
    with torch.no_grad(), capture(model) as attention:
        model.blocks[0].attn(tokens)
        model.blocks[0].drop_path1(tokens)
        model.blocks[0](tokens)
        model(images())
        model.blocks[0](tokens)
        model.blocks[0].attn(tokens)
    assert attention[0].query.shape[0] == 2
    assert_all_close(attention.statistics(), captured(model).statistics(), tolerance=1e-9)


@pytest.mark.parametrize("name", ["vit_base_patch16_siglip_224", "vit_pe_core_tiny_patch16_384"])
def test_pooling_attention_is_kept_apart(name: str) -> None:
    model = tiny(name, **SMALL)
    attention = captured(model)
    (call,) = attention.pooling_attention
    assert call.query.shape[-2] == 1 and call.key.shape[-2] == attention[0].layout.num_tokens
    assert all(view.query.shape[-2] == call.key.shape[-2] for view in attention)
    assert captured(model, keep="statistics").pooling_attention == []
    with torch.no_grad(), capture(model, accumulate=True) as both:
        model(images()), model(images())
    assert len(both.pooling_attention) == 2


# The ways a model runs ------------------------------------------------------------------------------------------------


def test_train_mode_sees_the_weights_before_dropout() -> None:
    model = tiny_vit(attn_drop_rate=0.5, drop_path_rate=0.5, proj_drop_rate=0.5)
    expected = captured(model)[0]
    model.train()
    attention = captured(model)
    assert model.training and all(module.training for module in model.modules())
    assert_close(attention[0].probabilities(), expected.probabilities(), tolerance=1e-9)
    assert (attention[1].probabilities() != captured(model)[1].probabilities()).any(), "dropout is on"


def test_autocast() -> None:
    model = tiny_vit()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(images())
        with capture(model) as attention:
            output = model(images())
        values = attention.statistics()
    assert torch.equal(output, expected)
    assert {view.query.dtype for view in attention} == {torch.bfloat16}
    assert {value.dtype for value in values.values()} == {torch.float32}
    assert_all_close(values, captured(model).statistics(), tolerance=0.1)  # near the float32 model's


@pytest.mark.parametrize("keep", ["qk", "statistics"])
def test_gradients_flow_and_are_the_same(keep: str) -> None:
    model = tiny_vit().train()
    other = copy.deepcopy(model)
    other(images()).square().sum().backward()
    with capture(model, keep=keep) as attention:
        model(images()).square().sum().backward()
    for (name, parameter), twin in zip(model.named_parameters(), other.parameters(), strict=True):
        assert parameter.grad is not None and twin.grad is not None, name
        assert torch.equal(parameter.grad, twin.grad), name
    assert not any(value.requires_grad for value in attention.statistics().values())
    if keep == "qk":
        assert not attention[0].query.requires_grad


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("call", ["__call__", "forward_features"])
def test_recomputed_checkpoints_are_not_seen_twice(reentrant: bool, call: str) -> None:
    model = tiny_vit(depth=3).train()
    expected = captured(model).statistics()
    runs = []
    model.blocks[0].register_forward_pre_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    model.set_grad_checkpointing(True)
    default = timm.layers.use_reentrant_ckpt()
    timm.layers.set_reentrant_ckpt(reentrant)
    try:
        with capture(model) as attention:
            getattr(model, call)(images().requires_grad_()).sum().backward()
    finally:
        timm.layers.set_reentrant_ckpt(default)
    assert len(runs) == 2, "the block ran, and was recomputed"
    assert model.blocks[0].attn.qkv.weight.grad is not None
    assert attention[0].query.shape[0] == 2 and attention.pooling_attention == []
    assert_all_close(attention.statistics(), expected, tolerance=1e-6)


def test_inference_mode() -> None:
    model = tiny_vit()
    with torch.inference_mode(), capture(model) as attention:
        model(images())
    expected = captured(model).statistics()
    assert_all_close(attention.statistics(), expected, tolerance=1e-9)
    assert_close(attention[1].probabilities().sum(-1), torch.ones(2, 2, 17))


def test_forward_features_and_intermediates() -> None:
    model = tiny_vit()
    expected = captured(model).statistics()
    with torch.no_grad(), capture(model) as attention:
        model.forward_features(images())
        assert_all_close(attention.statistics(), expected, tolerance=1e-9)
        model.forward_intermediates(images(3))
        assert attention[1].query.shape[0] == 3


def test_float64_stays_float64() -> None:
    values = captured(tiny_vit().double(), images().double()).statistics()
    assert {value.dtype for value in values.values()} == {torch.float64}


def test_a_model_held_by_another_object() -> None:
    class Loaded:
        module = tiny_vit()

    with torch.no_grad(), capture(Loaded()) as attention:
        Loaded.module(images())
    assert attention.module is Loaded.module and attention[0].query.shape[0] == 2


@pytest.mark.slow  # the compiler alone takes half a minute to import
def test_a_compiled_model_is_seen() -> None:
    model = tiny_vit()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(images())
        for given in (model, compiled):
            with capture(given) as attention:
                compiled(images())
            assert attention.module is model
            assert_all_close(attention.statistics(), captured(model).statistics(), tolerance=1e-6)
            with capture(given, keep="statistics") as numbers:
                compiled(images())
            assert_all_close(numbers.statistics(), attention.statistics(), tolerance=1e-5)
