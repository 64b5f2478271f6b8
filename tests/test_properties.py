"""What must hold for any attention at all: hypothesis draws the layout, the sharpness and the numbers."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from helpers import TOLERANCE, assert_all_close, assert_close, random_view, tensors_of
from reference import largest_logit
from vitprobe.attention.rows import summarize_rows
from vitprobe.attention.view import AttentionView
from vitprobe.layout import TokenLayout
from vitprobe.statistics import STATISTICS, compute_statistics


def _layout(**facts: Any) -> TokenLayout:
    """A layout; beartype draws random numbers to look into its tuples, and strategies may not draw any."""
    state = random.getstate()
    try:
        return TokenLayout(**facts)
    finally:
        random.setstate(state)


layouts = st.builds(
    _layout,
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    has_cls=st.booleans(),
    num_registers=st.integers(0, 3),
    patch_size=st.sampled_from([(16, 16), (8, 16)]),
)
with_cls = layouts.filter(lambda layout: layout.has_cls)
sharpnesses = st.sampled_from([0.0, 0.3, 3.0, 30.0, 150.0])
seeds = st.integers(0, 2**16)
DISTANCES = {"attention_distance", "attention_distance_px"}  # the only ones that know where a patch is


def bound_of(view: AttentionView) -> dict[str, float]:
    return {"max_logit": largest_logit(view.query, view.key, view.scale, view.bias)}


def bias_for(view: AttentionView, seed: int) -> Tensor:
    tokens = view.layout.num_tokens
    return torch.randn(1, view.num_heads, tokens, tokens, generator=torch.Generator().manual_seed(seed))


@given(layouts, sharpnesses, seeds)
def test_permuting_patches_keeps_what_does_not_know_their_places(
    layout: TokenLayout, sharpness: float, seed: int
) -> None:
    view = random_view(layout, sharpness=sharpness, seed=seed)
    order = torch.randperm(layout.num_patches, generator=torch.Generator().manual_seed(seed))
    order = torch.cat([torch.arange(layout.num_prefix_tokens), layout.num_prefix_tokens + order])
    moved = replace(
        view,
        query=view.query[:, :, order],
        key=view.key[:, :, order],
        **{name: getattr(view, name)[:, order] for name in vars(view) if name.endswith("norms")},
    )
    assert_close(moved.probabilities(), view.probabilities()[:, :, order][..., order], **bound_of(view))
    patches = order[layout.num_prefix_tokens :] - layout.num_prefix_tokens
    assert_close(moved.patch_rows.entropy, view.patch_rows.entropy[..., patches], **bound_of(view))
    before, after = compute_statistics(view), compute_statistics(moved)
    for name in set(before) - DISTANCES:
        assert_close(after[name], before[name], **bound_of(view))


@given(layouts, sharpnesses, seeds)
def test_turning_the_grid_keeps_the_distances(layout: TokenLayout, sharpness: float, seed: int) -> None:
    """Transposing the image is a permutation of patches that keeps their distances to each other."""
    rows, columns = layout.grid
    view = random_view(layout, sharpness=sharpness, seed=seed)
    order = torch.arange(rows * columns).view(rows, columns).T.flatten()
    order = torch.cat([torch.arange(layout.num_prefix_tokens), layout.num_prefix_tokens + order])
    turned = replace(
        view, query=view.query[:, :, order], key=view.key[:, :, order], layout=replace(layout, grid=(columns, rows))
    )
    before, after = (compute_statistics(v, sorted(DISTANCES)) for v in (view, turned))
    assert_all_close(after, before, **bound_of(view))


@given(layouts, sharpnesses, seeds, st.floats(-50, 50))
def test_adding_a_constant_to_the_logits_of_a_row_changes_nothing(
    layout: TokenLayout, sharpness: float, seed: int, constant: float
) -> None:
    plain = random_view(layout, sharpness=sharpness, seed=seed)
    bias = bias_for(plain, seed)
    shift = constant * torch.randn(1, plain.num_heads, layout.num_tokens, 1)
    view, shifted = replace(plain, bias=bias), replace(plain, bias=bias + shift)
    limit = {"max_logit": max(bound_of(view)["max_logit"], bound_of(shifted)["max_logit"])}
    assert_close(shifted.probabilities(), view.probabilities(), **limit)
    assert_all_close(compute_statistics(shifted), compute_statistics(view), **limit)


@given(layouts, seeds)
def test_uniform_attention(layout: TokenLayout, seed: int) -> None:
    """Equal keys: entropy log N, each token gets 1/T, and the distance is the mean of all distances."""
    view = random_view(layout, seed=seed)
    view = replace(view, key=view.key[:, :, :1].expand_as(view.key))
    values = compute_statistics(view)
    N, T = layout.num_patches, layout.num_tokens
    apart = torch.cdist(layout.centers.double(), layout.centers.double())
    expected = {
        "patch_self_attention": 1 / T,
        "patch_self_attention_ratio": 1 / N,
        "patch_entropy": math.log(N),
        "attention_distance": apart.mean().item(),
        "cls_self_attention": 1 / T,
        "cls_self_attention_ratio": 1 / N,
        "cls_to_patches": 1 / T,
        "cls_to_registers": layout.num_registers / T,
        "cls_entropy": math.log(N),
        "patches_to_cls": 1 / T,
        "patches_to_registers": layout.num_registers / T,
        "cls_entropy_share": 1.0,
        "patch_entropy_share": 1.0,
    }
    for name in expected.keys() & values.keys():
        assert_close(values[name], np.full((2, 3), expected[name]))


@given(layouts, seeds, st.data())
def test_one_hot_attention_has_no_entropy(layout: TokenLayout, seed: int, data: st.DataObject) -> None:
    """Each row looks at one patch: entropy 0, and the distance is the distance to that patch."""
    N, prefix, T = layout.num_patches, layout.num_prefix_tokens, layout.num_tokens
    targets = torch.tensor(data.draw(st.lists(st.integers(0, N - 1), min_size=T, max_size=T)))
    bias = torch.full((T, T), -1000.0)
    bias[torch.arange(T), prefix + targets] = 0
    view = random_view(layout, seed=seed, bias=bias)
    values = compute_statistics(view)
    own = (targets[prefix:] == torch.arange(N)).double().mean().item()
    apart = (layout.centers[targets[prefix:]] - layout.centers).double().norm(dim=1).mean().item()
    expected = {"patch_entropy": 0, "patch_self_attention": own, "patch_self_attention_ratio": own}
    expected |= {"attention_distance": apart, "cls_entropy": 0, "cls_self_attention": 0, "patches_to_cls": 0}
    for name in expected.keys() & values.keys():
        assert_close(values[name], np.full((2, 3), expected[name]))
    if layout.has_cls:
        assert_close(values["cls_to_patches"], np.full((2, 3), 1 / N))


@given(layouts, sharpnesses, seeds, st.integers(1, 6000), st.booleans())
def test_row_blocks_equal_the_whole(
    layout: TokenLayout, sharpness: float, seed: int, budget: int, biased: bool
) -> None:
    view = random_view(layout, sharpness=sharpness, seed=seed)
    if biased:
        view = replace(view, bias=bias_for(view, seed))
    parts = summarize_rows(view.source, layout, layout.patches, part_bytes=budget)
    assert_all_close(tensors_of(parts), tensors_of(view.patch_rows), **bound_of(view))


@given(layouts, st.sampled_from([0.0, 0.3, 3.0, 30.0]), seeds, st.booleans())
def test_probabilities_equal_the_fused_kernel(layout: TokenLayout, sharpness: float, seed: int, biased: bool) -> None:
    view = random_view(layout, sharpness=sharpness, seed=seed)
    if biased:
        view = replace(view, bias=bias_for(view, seed))
    identity = torch.eye(layout.num_tokens).expand(2, 3, -1, -1)
    fused = F.scaled_dot_product_attention(view.query, view.key, identity, attn_mask=view.bias, scale=view.scale)
    assert_close(view.probabilities(), fused, **bound_of(view))


@given(layouts, sharpnesses, seeds, st.integers(1, 4))
def test_any_split_into_batches_gives_the_same(layout: TokenLayout, sharpness: float, seed: int, size: int) -> None:
    view = random_view(layout, batch=5, sharpness=sharpness, seed=seed)
    of_batch = [name for name in vars(view) if name in ("query", "key") or name.endswith("norms")]
    parts = [
        compute_statistics(replace(view, **{name: getattr(view, name)[start : start + size] for name in of_batch}))
        for start in range(0, 5, size)
    ]
    together = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    assert_all_close(together, compute_statistics(view), **bound_of(view))


@given(layouts, sharpnesses, seeds, st.data())
def test_masked_keys_are_as_if_they_were_not_there(
    layout: TokenLayout, sharpness: float, seed: int, data: st.DataObject
) -> None:
    """Masking the last row of the grid for all queries: their rows are those of a model without these patches."""
    rows, columns = layout.grid
    assume(rows > 1)
    view = random_view(layout, sharpness=sharpness, seed=seed, norms=False)
    kept = layout.num_tokens - columns
    mask = torch.zeros(layout.num_tokens).masked_fill(torch.arange(layout.num_tokens) >= kept, -torch.inf)
    masked = replace(view, bias=mask.expand(layout.num_tokens, -1))
    fewer = replace(
        view, query=view.query[:, :, :kept], key=view.key[:, :, :kept], layout=replace(layout, grid=(rows - 1, columns))
    )
    kept_patches = kept - layout.num_prefix_tokens
    for name in ("log_z", "log_z_patches", "entropy", "distance", "prefix_logits"):
        assert_close(
            getattr(masked.patch_rows, name)[:, :, :kept_patches], getattr(fewer.patch_rows, name), **bound_of(view)
        )
    assert (masked.probabilities()[..., kept:] == 0).all()


@given(layouts, sharpnesses, seeds, st.sampled_from([torch.float16, torch.bfloat16, torch.float32]), st.booleans())
def test_statistics_lie_within_their_declared_bounds(
    layout: TokenLayout, sharpness: float, seed: int, dtype: torch.dtype, biased: bool
) -> None:
    view = random_view(layout, sharpness=sharpness, seed=seed, dtype=dtype)
    if biased:
        view = replace(view, bias=bias_for(view, seed))
    slack = TOLERANCE * max(1.0, bound_of(view)["max_logit"] / 100)
    for name, value in compute_statistics(view).items():
        lowest, highest = STATISTICS[name].bounds(layout)
        assert not value.isnan().any(), name
        assert value.min() >= lowest - slack * max(1e-2, lowest), name
        assert value.max() <= highest + slack * max(1e-2, highest), name


@given(with_cls, sharpnesses, seeds)
def test_what_a_row_gives_adds_up(layout: TokenLayout, sharpness: float, seed: int) -> None:
    """Patches, [cls] and registers share all of the attention, and odds are shares divided."""
    view = random_view(layout, sharpness=sharpness, seed=seed)
    values = {name: value.double() for name, value in compute_statistics(view).items()}
    nothing = torch.zeros(2, 3, dtype=torch.float64)
    to_patches = layout.num_patches * values["cls_to_patches"]
    total = values["cls_self_attention"] + to_patches + values.get("cls_to_registers", nothing)
    assert_close(total, np.ones((2, 3)), **bound_of(view))
    if (to_patches > 1e-30).all():
        odds = values["cls_self_attention"] / to_patches
        assert_close(values["cls_self_attention_ratio"], odds, tolerance=2 * TOLERANCE, **bound_of(view))
    assert (values["patch_self_attention"] <= values["patch_self_attention_ratio"] + 1e-6).all()
    if layout.num_patches > 1:
        share = values["cls_entropy"] / math.log(layout.num_patches)
        assert_close(values["cls_entropy_share"], share)
