"""`AttentionView`: probabilities against numpy and against torch's own kernel, rows, several batches in one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from helpers import TOLERANCE, LargestTensor, assert_all_close, assert_close, random_view, tensors_of
from reference import largest_logit, reference_attention
from vitprobe.attention.rows import PART_BYTES, summarize_rows
from vitprobe.attention.view import AttentionView, concatenate_views
from vitprobe.errors import UserError
from vitprobe.layout import TokenLayout
from vitprobe.statistics import compute_statistics

LAYOUT = TokenLayout(grid=(3, 4), has_cls=True, num_registers=2)
T = LAYOUT.num_tokens
BIAS_SHAPES = [None, (T, T), (3, T, T), (1, T, T), (1, 3, T, T), (2, 1, T, T), (2, 3, T, T)]


def view_with_bias(shape: tuple[int, ...] | None, **options) -> AttentionView:
    bias = None if shape is None else torch.randn(shape, generator=torch.Generator().manual_seed(3))
    return random_view(LAYOUT, bias=bias, **options)


# The tolerance helper itself -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [1 + 2 * TOLERANCE, 1 - 2 * TOLERANCE, np.nan, np.inf, -1.0])
def test_the_tolerance_helper_can_fail(wrong: float) -> None:
    assert_close(np.array([1.0, 1 + TOLERANCE / 2]), np.ones(2))
    with pytest.raises(AssertionError, match="is over"):
        assert_close(np.array([1.0, wrong]), np.ones(2))
    with pytest.raises(AssertionError, match="shapes"):
        assert_close(np.ones(2), np.ones((1, 2)))
    with pytest.raises(AssertionError, match="name: error"):
        assert_all_close({"name": wrong}, {"name": 1.0})
    with pytest.raises(AssertionError):
        assert_all_close({}, {"name": 1.0})


def test_the_tolerance_grows_with_the_logits_and_below_1e_2_is_absolute() -> None:
    assert_close(1 + 2 * TOLERANCE, 1.0, max_logit=300)
    assert_close(1e-2 * TOLERANCE / 2, 0.0)
    with pytest.raises(AssertionError):
        assert_close(1e-2 * TOLERANCE * 2, 0.0)


# Probabilities -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", BIAS_SHAPES)
def test_probabilities_equal_numpy_and_rows_sum_to_one(shape: tuple[int, ...] | None) -> None:
    view = view_with_bias(shape, sharpness=3)
    weights = view.probabilities()
    assert weights.shape == (2, 3, T, T) and weights.dtype == torch.float32
    assert_close(weights, reference_attention(view.query, view.key, view.scale, view.bias))
    assert_close(weights.sum(-1), np.ones((2, 3, T)), tolerance=1e-6)


@pytest.mark.parametrize("shape", BIAS_SHAPES)
def test_probabilities_equal_the_fused_kernel(shape: tuple[int, ...] | None) -> None:
    """The kernel's output for an identity of values is its attention matrix."""
    view = view_with_bias(shape, sharpness=3)
    identity = torch.eye(T).expand(2, 3, T, T)
    bias = None if view.bias is None else view.bias.expand(2, 3, T, T)
    fused = F.scaled_dot_product_attention(view.query, view.key, identity, attn_mask=bias, scale=view.scale)
    assert_close(view.probabilities(), fused)


@pytest.mark.parametrize("shape", BIAS_SHAPES)
def test_one_head_is_that_head_of_all(shape: tuple[int, ...] | None) -> None:
    view = view_with_bias(shape)
    everything = view.probabilities()
    for head in range(-3, 3):
        assert_close(view.probabilities(head=head), everything[:, head], tolerance=1e-6)


@pytest.mark.parametrize("head", [3, -4, 99])
def test_a_head_that_is_not_there(head: int) -> None:
    with pytest.raises(UserError) as error:
        random_view(LAYOUT).probabilities(head=head)
    assert str(error.value) == (f"block 0 has heads 0 to 2, not {head}; choose one of these, or leave head out for all")


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_computed_in_float32_or_wider(dtype: torch.dtype, expected: torch.dtype) -> None:
    view = random_view(LAYOUT, dtype=dtype, sharpness=5)
    assert view.probabilities().dtype == view.patch_rows.entropy.dtype == expected
    tolerance = 1e-12 if dtype == torch.float64 else TOLERANCE
    assert_close(view.probabilities(), reference_attention(view.query, view.key, view.scale, None), tolerance=tolerance)


# Rows ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [LAYOUT, TokenLayout((3, 4), has_cls=False), TokenLayout((1, 1), has_cls=True)])
def test_rows_hold_what_they_say(layout: TokenLayout) -> None:
    view = random_view(layout, sharpness=4)
    prefix = layout.num_prefix_tokens
    s = (view.scale * view.query.double() @ view.key.double().mT).numpy()
    bound = {"max_logit": largest_logit(view.query, view.key, view.scale, None)}
    for rows, place in (
        (view.cls_row, slice(0, 1)),
        (view.patch_sums, layout.patches),
        (view.patch_rows, layout.patches),
    ):
        if rows is view.cls_row and not prefix:
            continue
        assert_close(rows.log_z, np.log(np.exp(s).sum(-1))[..., place], **bound)
        assert_close(rows.log_z_patches, np.log(np.exp(s[..., prefix:]).sum(-1))[..., place], **bound)
        assert_close(rows.self_logits, s.diagonal(axis1=-2, axis2=-1)[..., place], **bound)
        assert_close(rows.prefix_logits, s[..., place, :prefix], **bound)
    assert view.patch_rows.distance.shape == view.patch_rows.entropy.shape == (2, 3, layout.num_patches)
    assert view.patch_sums is view.patch_rows is view.patch_rows, "one pass serves all statistics"


@pytest.mark.parametrize("budget", [1, 500, 4_000, 10**9])
@pytest.mark.parametrize("shape", [None, (1, 3, T, T)])
def test_any_row_block_gives_the_same(budget: int, shape: tuple[int, ...] | None) -> None:
    view = view_with_bias(shape, dtype=torch.float64)
    parts = summarize_rows(view.source, view.layout, view.layout.patches, part_bytes=budget)
    assert_all_close(tensors_of(parts), tensors_of(view.patch_rows), tolerance=1e-12)


def test_no_tensor_of_all_heads_and_tokens_is_made() -> None:
    layout = TokenLayout(grid=(30, 30), has_cls=True, num_registers=4)
    view = random_view(layout, batch=2, heads=2, dim=8)
    whole = 2 * 2 * layout.num_tokens**2 * 4
    with LargestTensor() as statistics:
        compute_statistics(view)
    with LargestTensor() as probabilities:
        view.probabilities()
    assert statistics.bytes <= PART_BYTES["cpu"] < whole
    assert probabilities.bytes >= whole, "the watch sees large tensors"


def test_the_parts_follow_the_budget() -> None:
    view = random_view(TokenLayout(grid=(16, 16), has_cls=True))
    with LargestTensor() as watch:
        summarize_rows(view.source, view.layout, view.layout.patches, part_bytes=2**16)
    assert watch.bytes <= 2**16


# Several batches -----------------------------------------------------------------------------------------------------


def assert_joined_equals_parts(first: AttentionView, second: AttentionView) -> AttentionView:
    both = concatenate_views([first, second])
    parts = torch.cat([first.probabilities(), second.probabilities()])
    assert_close(both.probabilities(), parts, tolerance=1e-6)
    values, others = compute_statistics(first), compute_statistics(second)
    together = {name: np.concatenate([values[name], others[name]]) for name in values}
    assert_all_close(compute_statistics(both), together, tolerance=1e-5)
    return both


def test_one_view_is_itself() -> None:
    view = random_view(LAYOUT)
    assert concatenate_views([view]) is view


@pytest.mark.parametrize("shape", BIAS_SHAPES)
def test_two_batches_with_biases_of_their_own(shape: tuple[int, ...] | None) -> None:
    first, second = view_with_bias(shape, seed=1), random_view(LAYOUT, seed=2)
    if shape is not None:
        second = random_view(LAYOUT, seed=2, bias=torch.randn(shape))
    assert_joined_equals_parts(first, second)


def test_a_bias_of_each_image_is_that_of_its_own_image() -> None:
    first = view_with_bias((2, 1, T, T), seed=1)
    assert first.bias is not None
    both = assert_joined_equals_parts(first, random_view(LAYOUT, seed=2, bias=first.bias.clone()))
    assert both.bias is not None and both.bias.shape == (4, 3, T, T)


def test_batches_with_and_without_a_bias() -> None:
    assert_joined_equals_parts(view_with_bias((1, 3, T, T)), random_view(LAYOUT, seed=2))
    assert_joined_equals_parts(random_view(LAYOUT, seed=2), view_with_bias((1, 3, T, T)))


def test_a_bias_that_is_the_same_for_all_images_is_held_once() -> None:
    first = view_with_bias((1, 3, T, T))
    assert first.bias is not None
    second = random_view(LAYOUT, seed=2, bias=first.bias.clone())
    both = assert_joined_equals_parts(first, second)
    assert both.bias is not None and both.bias.shape == (1, 3, T, T)


def test_batches_of_other_grids_do_not_join() -> None:
    with pytest.raises(UserError) as error:
        concatenate_views([random_view(LAYOUT), random_view(TokenLayout((4, 3), has_cls=True, num_registers=2))])
    assert str(error.value) == (
        "these images have different patch grids and no view in common; read views(block), one by one"
    )


def test_norms_of_only_some_batches_are_undefined_for_all() -> None:
    both = concatenate_views([random_view(LAYOUT), random_view(LAYOUT, norms=False)])
    assert both.residual_norms is None and both.update_norms is None
    assert both.query.shape[0] == 4
