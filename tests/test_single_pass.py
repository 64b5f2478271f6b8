"""Attention's output and the statistics from one pass: both are what two passes give, and the float64 reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers import (
    SMALL,
    OwnModel,
    assert_all_close,
    assert_close,
    captured,
    images,
    message,
    random_view,
    tiny,
    tiny_vit,
)
from reference import largest_logit, reference_attention, reference_statistics
from vitprobe.attention import torch_kernels as kernels
from vitprobe.attention.torch_kernels import attend_with_normaliser
from vitprobe.attention.view import AttentionView
from vitprobe.errors import UserError
from vitprobe.hooks.calls import AttentionCall
from vitprobe.hooks.capture import capture
from vitprobe.hooks.single_pass import measure
from vitprobe.layout import TokenLayout
from vitprobe.statistics import STATISTICS, compute_statistics

PAPERS = ["cls_self_attention", "cls_entropy", "patch_self_attention_ratio"]
LAYOUT = TokenLayout((3, 4), has_cls=True, num_registers=2)


def hard_case(name: str) -> AttentionView:
    """Queries and keys for which a careless pass loses everything."""
    view = random_view(LAYOUT, norms=False)
    assert view.query is not None and view.key is not None
    query, key = view.query, view.key
    if name == "[cls] holds nearly all":
        query[:], key[:] = 0.1 * query, 0.1 * key
        query[..., 0], key[:, :, 0, 0] = 10, 1.6 / view.scale
    elif name == "one-hot rows":
        key[:] = torch.eye(15, 8)
        query[:] = 100 / view.scale * key
    elif name == "a large common offset":
        query[..., 0], key[..., 0] = 30, 1000
        query[..., 1:] *= 3
    elif name == "logits of a thousand":
        query *= 30
        key *= 30
    bias = None
    if name == "one key left":
        bias = torch.full((15, 15), -torch.inf)
        bias[torch.arange(15), 3 + torch.arange(15) % 12] = 0
    if name == "the least number as a mask":
        bias = torch.zeros(2, 1, 15, 15).masked_fill(torch.rand(2, 1, 1, 15) < 0.4, torch.finfo(torch.float32).min)
        bias[..., 0] = 0
    if name == "a bias":
        bias = torch.randn(1, 3, 15, 15)
    return AttentionView(0, query, key, view.scale, bias, LAYOUT)


HARD = [
    *("[cls] holds nearly all", "one-hot rows", "a large common offset", "logits of a thousand", "one key left"),
    *("the least number as a mask", "a bias", "nothing special"),
]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("asks", ["sums", "rows"])
@pytest.mark.parametrize("case", HARD)
def test_hard_cases(case: str, asks: str) -> None:
    view = hard_case(case)
    value = torch.randn(2, 3, 15, 8, generator=torch.Generator().manual_seed(5))
    call = AttentionCall(view.query, view.key, view.scale, view.bias, value=value)
    kernel = measure(call, LAYOUT, asks)  # type: ignore[arg-type]
    if asks == "sums" and view.bias is not None:
        assert kernel == "model" and call.output is None
        return
    assert kernel == asks and call.output is not None
    A = reference_attention(view.query, view.key, view.scale, view.bias)
    bound: dict[str, Any] = {"max_logit": largest_logit(view.query, view.key, view.scale, view.bias)}
    if case == "the least number as a mask":
        bound = {"max_logit": 100.0}  # the mask is no logit
    right = A @ value.double().numpy()
    torchs_own = F.scaled_dot_product_attention(
        view.query, view.key, value, attn_mask=view.bias, scale=view.scale
    ).double()
    worst = np.abs(torchs_own.numpy() - right).max()
    assert np.abs(call.output.double().numpy() - right).max() <= 3 * worst + 1e-6 + 1e-7 * bound["max_logit"]
    expected = reference_statistics(A, grid=(3, 4), prefix=3, has_cls=True, registers=2, patch_size=(16, 16))
    measured = AttentionView(0, view.query, view.key, view.scale, view.bias, LAYOUT, measured=call.measured)
    wanted = [name for name in expected if asks == "rows" or STATISTICS[name].asks != "rows"]
    values = compute_statistics(measured, wanted)
    for name in wanted:
        assert not values[name].isnan().any(), name
        # Where the patches' share of a row is too small even for float64, the reference is 0/0.
        known = np.isfinite(expected[name]) & (np.abs(expected[name]) < 1e38)
        assert known.any() or name == "cls_self_attention_ratio"
        assert_close(values[name][known], expected[name][known], **bound)


MODELS = {
    "plain": lambda: tiny_vit(),
    "registers": lambda: tiny_vit(reg_tokens=3),
    "no prefix": lambda: tiny_vit(class_token=False, global_pool="avg"),
    "relative positions": lambda: tiny("beit_base_patch16_224", **SMALL),
    "rotary positions": lambda: tiny("eva02_base_patch14_224", **SMALL),
    "two attentions": lambda: tiny("vit_small_patch16_18x2_224", **SMALL),
    "own": lambda: OwnModel(),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("statistics", [None, PAPERS])
def test_output_and_statistics_are_those_of_two_passes(name: str, statistics: list[str] | None) -> None:
    model = MODELS[name]()
    defined = set(captured(model).statistics())
    asked = statistics and [each for each in statistics if each in defined]
    with torch.no_grad():
        plain = model(images())
        with capture(model, keep="statistics", statistics=asked, kernel="model") as beside:
            assert torch.equal(model(images()), plain)
        with capture(model, keep="statistics", statistics=asked) as along:
            output = model(images())
    assert beside.kernels == set() and along.kernels <= {"rows", "sums", "model"}
    assert along.kernels == {"rows" if asked is None else "model" if name == "relative positions" else "sums"}
    assert_close(output, plain)
    assert_all_close(along.statistics(), beside.statistics())


def test_what_only_the_cls_row_asks_for_leaves_the_models_kernel() -> None:
    model = tiny_vit()
    with torch.no_grad():
        plain = model(images())
        with capture(model, keep="statistics", statistics=["cls_entropy"]) as attention:
            assert torch.equal(model(images()), plain)
    assert attention.kernels == {"model"}


def test_gradients_dropout_and_other_captures_leave_the_models_kernel() -> None:
    model = tiny_vit()
    with capture(model, keep="statistics") as attention:
        model(images()).sum().backward()
    assert attention.kernels == {"model"} and model.blocks[0].attn.qkv.weight.grad is not None
    dropping = tiny_vit(attn_drop_rate=0.5).train()
    assert captured(dropping, keep="statistics").kernels == {"model"}
    with torch.no_grad(), capture(model, keep="statistics") as outer, capture(model, keep="statistics") as inner:
        model(images())
    assert inner.kernels == {"model"} and outer.kernels == {"rows"}
    assert_all_close(inner.statistics(), outer.statistics())


def test_half_precision_keeps_the_models_kernel_for_whole_rows() -> None:
    model = tiny_vit()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        whole = captured(model, keep="statistics")
        sums = captured(model, keep="statistics", statistics=PAPERS)
        beside = captured(model, keep="statistics", kernel="model")
    assert whole.kernels == {"model"} and sums.kernels == {"sums"}
    # Two kernels' outputs differ by bfloat16's rounding from the second block on.
    for name in PAPERS:
        assert_close(sums.statistics()[name][:, 0], beside.statistics()[name][:, 0])


@pytest.mark.parametrize("failing", ["raises", "is gone", "gives another shape"])
def test_without_torchs_private_kernel(failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        if failing == "raises":
            raise RuntimeError("no such kernel")
        return torch.zeros(1), torch.zeros(1, 2, 3)

    class Operators:
        pass

    if failing != "is gone":
        Operators._scaled_dot_product_flash_attention_for_cpu = staticmethod(broken)  # type: ignore[attr-defined]
    model = tiny_vit()
    expected = captured(model, keep="statistics", statistics=PAPERS)
    monkeypatch.setattr(kernels, "_operators", Operators)
    attention = captured(model, keep="statistics", statistics=PAPERS)
    assert (expected.kernels, attention.kernels) == ({"sums"}, {"model"})
    assert_all_close(attention.statistics(), expected.statistics())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_kernels_logsumexp_is_that_of_the_logits(dtype: torch.dtype) -> None:
    query, key, value = (torch.randn(2, 3, 20, 16, dtype=dtype) for _ in range(3))
    found = attend_with_normaliser(query, key[:, :, 4:], value[:, :, 4:], 0.3)
    assert found is not None
    logits = 0.3 * query.double() @ key[:, :, 4:].double().mT
    assert_close(found[1], logits.logsumexp(-1))
    rounding = 2e-2 if dtype == torch.bfloat16 else 1e-4
    right = logits.softmax(-1) @ value[:, :, 4:].double()
    assert (found[0].double() - right).abs().max() <= rounding * right.abs().max()


def test_a_device_without_a_kernel() -> None:
    tensors = [torch.empty(1, 1, 2, 4, device="meta") for _ in range(3)]
    assert attend_with_normaliser(*tensors, 1.0) is None


def test_unknown_kernel() -> None:
    with pytest.raises(UserError) as error:
        capture(tiny_vit(), kernel="flash")
    assert message(error) == (
        "kernel='flash' is not known; choose 'auto' (the fastest), 'torch' (without Triton) or 'model' "
        "(the model's own)"
    )


WAYS: dict[str, Callable[..., Tensor]] = {
    "other width of values": lambda q, k, v: F.scaled_dot_product_attention(q, k, torch.cat([v, v], -1))[..., :8],
    "one key head": lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :1], v[:, :1].expand_as(v)),
}


@pytest.mark.parametrize("way", WAYS)
def test_calls_of_other_shapes(way: str) -> None:
    model = OwnModel(WAYS[way])
    with torch.no_grad():
        plain = model(images())
        with capture(model, keep="statistics") as attention:
            assert_close(model(images()), plain)
    assert attention.kernels == {"rows"}


def test_what_is_not_asked_for_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_norms(tokens: Tensor) -> Tensor:
        raise AssertionError("norms of tokens were computed")

    model, x = tiny_vit(), images()
    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr("vitprobe.hooks.blocks.token_norms", no_norms)
        with capture(model, keep="statistics", statistics=PAPERS) as attention:
            model(x)
        with pytest.raises(AssertionError, match="norms"), capture(model, keep="statistics"):
            model(x)
    assert_all_close(attention.statistics(), captured(model).statistics(PAPERS))


@pytest.mark.parametrize("statistics", [None, PAPERS])
def test_the_cls_row_comes_from_the_same_pass(statistics: list[str] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def again(*args: object, **options: object) -> None:
        raise AssertionError("rows were summarised once more")

    monkeypatch.setattr("vitprobe.attention.view.summarize_rows", again)
    model = tiny_vit(reg_tokens=2)
    with torch.no_grad(), capture(model, keep="statistics", statistics=statistics) as attention:
        model(images())
    assert attention.kernels == {"rows" if statistics is None else "sums"}
