"""The table of statistics: against the float64 reference, at extremes, and what each entry declares."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from comparing import assert_matches_reference, reference_of, reference_of_factors
from helpers import assert_all_close, assert_close, images, random_view, tiny_vit
from reference import largest_logit, reference_attention, reference_statistics
from vitprobe.attention.view import AttentionView
from vitprobe.errors import UserError
from vitprobe.hooks.capture import capture
from vitprobe.layout import TokenLayout
from vitprobe.statistics import NEEDS, STATISTICS, Statistic, compute_statistics, select


def test_the_reference_covers_exactly_the_table() -> None:
    layout = TokenLayout(grid=(2, 2), has_cls=True, num_registers=1)
    assert set(reference_of_factors(random_view(layout))) == set(STATISTICS)
    assert set(compute_statistics(random_view(layout))) == set(STATISTICS)


# Extremes ------------------------------------------------------------------------------------------------------------

LAYOUT = TokenLayout(grid=(4, 5), has_cls=True, num_distillation=1, num_registers=3, patch_size=(16, 8))


@pytest.mark.parametrize("sharpness", [0.1, 1, 10, 50, 100])
def test_error_bound_at_large_logits(sharpness: float) -> None:
    view = random_view(LAYOUT, sharpness=sharpness)
    max_logit = largest_logit(view.query, view.key, view.scale, None)
    if sharpness == 100:
        assert max_logit > 300
    assert_all_close(compute_statistics(view), reference_of_factors(view), max_logit=max_logit)


@pytest.mark.parametrize("sharpness", [1, 30])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype, sharpness: float) -> None:
    view = random_view(LAYOUT, sharpness=sharpness, dtype=dtype)
    values = compute_statistics(view)
    assert all(value.dtype == torch.float32 for value in values.values())
    max_logit = largest_logit(view.query, view.key, view.scale, None)
    assert_all_close(values, reference_of_factors(view), max_logit=max_logit)


@pytest.mark.parametrize("mass", [0.9, 0.999999, 0.999999997])
def test_cls_that_keeps_almost_everything(mass: float) -> None:
    """1 − A_00 has no correct digit here in float32; nothing may be computed from it."""
    view = random_view(LAYOUT, sharpness=4, dtype=torch.float64)
    query, key = view.query, view.key
    row = view.scale * query[:, :, :1] @ key.transpose(-1, -2)
    others = row[..., 1:].logsumexp(-1)
    wanted = others + math.log(mass / (1 - mass))  # the logit with which [cls] gets just this mass
    along = query[:, :, 0] / query[:, :, 0].square().sum(-1, keepdim=True)
    key[:, :, 0] += along * (wanted - row[..., 0]) / view.scale
    view = AttentionView(0, query.float(), key.float(), view.scale, None, LAYOUT)
    values = compute_statistics(view)
    assert_close(values["cls_self_attention"], np.full((2, 3), mass), tolerance=1e-5)
    expected = reference_of_factors(view)
    assert_all_close(values, expected, max_logit=largest_logit(view.query, view.key, view.scale, None))
    # Small values are held to the bound relative to themselves too, which the floor of 1e-2 would forgive.
    ratio = values["cls_to_patches"].double().numpy() / expected["cls_to_patches"]
    assert_close(ratio, np.ones_like(ratio))


def test_model_whose_weights_make_cls_keep_almost_everything() -> None:
    model = tiny_vit()
    with torch.no_grad():
        for block in model.blocks:
            weight, bias = block.attn.qkv.weight, block.attn.qkv.bias
            weight[32:64], bias[32:64] = weight[:32], bias[:32]  # keys like queries: each token looks at itself
            weight[:64] *= 2.5
        model.cls_token *= 3
    with torch.no_grad(), capture(model) as attention:
        model(images())
    values = attention.statistics()
    assert values["cls_self_attention"].max() > 0.999999
    assert all(value.isfinite().all() for value in values.values())
    assert_matches_reference(attention)


def test_odds_beyond_float32_are_infinite_and_all_else_stays_right() -> None:
    view = random_view(LAYOUT)
    view.key[:, :, 0] = 80 * view.query[:, :, 0]
    values = compute_statistics(view)
    assert (values["cls_self_attention"] == 1).all()
    assert values["cls_self_attention_ratio"].isinf().any()
    expected = reference_of_factors(view)
    for both in (values, expected):
        both.pop("cls_self_attention_ratio")
    assert_all_close(values, expected, max_logit=largest_logit(view.query, view.key, view.scale, None))


def test_values_lie_within_their_declared_bounds() -> None:
    for sharpness in (0, 1, 100):
        view = random_view(LAYOUT, sharpness=sharpness)
        for name, value in compute_statistics(view).items():
            lowest, highest = STATISTICS[name].bounds(LAYOUT)
            assert value.min() >= lowest - 1e-4 * max(1, abs(lowest)), name
            assert value.max() <= highest * (1 + 1e-4), name


# Definitions that need no model --------------------------------------------------------------------------------------


def test_a_row_masked_from_all_patches_has_mass_zero_there() -> None:
    layout = TokenLayout(grid=(2, 2), has_cls=True)
    causal = torch.zeros(5, 5).masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), -torch.inf)
    values = compute_statistics(random_view(layout, bias=causal))
    assert (values["cls_self_attention"] == 1).all()
    assert (values["cls_self_attention_ratio"] == torch.inf).all()
    assert (values["cls_to_patches"] == 0).all()
    assert values["cls_entropy"].isnan().all()  # 0 / 0: there is nothing to share
    for name in ("patch_self_attention", "patch_entropy", "patches_to_cls", "attention_distance"):
        assert values[name].isfinite().all(), name


def test_one_patch_has_no_entropy_share() -> None:
    layout = TokenLayout(grid=(1, 1), has_cls=True)
    view = random_view(layout)
    values = compute_statistics(view)
    assert_all_close(values, reference_of_factors(view))
    assert not {"cls_entropy_share", "patch_entropy_share"} & set(values)
    assert STATISTICS["cls_entropy_share"].undefined(layout, frozenset()) == "needs more than one patch"
    assert (values["cls_entropy"] == 0).all() and (values["patch_self_attention_ratio"] == 1).all()
    assert (values["attention_distance"] == 0).all()


def test_entropy_further_out_than_rounding_is_left_to_be_seen() -> None:
    layout = TokenLayout(grid=(2, 2), has_cls=True)
    view = random_view(layout)
    maximum = math.log(4)
    entropy = view.cls_row.entropy
    entropy[:, 0, 0], entropy[:, 1, 0], entropy[:, 2, 0] = maximum + 1e-6, maximum + 1, -1e-6
    value = compute_statistics(view, ["cls_entropy"])["cls_entropy"]
    assert_close(value, np.tile([maximum, maximum + 1, 0], (2, 1)), tolerance=1e-7)


def test_residual_statistics_by_hand() -> None:
    layout = TokenLayout(grid=(1, 3), has_cls=True)
    view = random_view(layout, batch=1)
    view = AttentionView(
        **{name: getattr(view, name) for name in ("block", "query", "key", "scale", "bias", "layout")},
        residual_norms=torch.tensor([[2.0, 1, 2, 4]]),
        update_norms=torch.tensor([[1.0, 1, 1, 1]]),
        unscaled_update_norms=torch.tensor([[4.0, 2, 2, 2]]),
        output_norms=torch.tensor([[100.0, 1, 2, 6]]),
    )
    values = {name: value.item() for name, value in compute_statistics(view).items() if not STATISTICS[name].per_head}
    assert values == pytest.approx(
        {
            "cls_update_ratio": 0.5,
            "cls_update_ratio_unscaled": 2.0,
            "patch_update_ratio": (1 + 1 / 2 + 1 / 4) / 3,
            "patch_update_ratio_unscaled": (2 + 1 + 1 / 2) / 3,
            "patch_norm_max_ratio": 3.0,
        }
    )


# The table -----------------------------------------------------------------------------------------------------------


def test_each_entry_declares_itself_in_full() -> None:
    for name, statistic in STATISTICS.items():
        assert isinstance(statistic, Statistic) and statistic.name == name and statistic.label
        assert statistic.unit in {"share", "ratio", "nats", "patches", "px"}
        assert statistic.needs <= set(NEEDS)
        lowest, highest = statistic.bounds(LAYOUT)
        assert 0 <= lowest < highest
        assert statistic.bounded == math.isfinite(highest)
        assert statistic.compute.__doc__


@pytest.mark.parametrize(
    "layout",
    [
        TokenLayout(grid=(4, 4), has_cls=True),
        TokenLayout(grid=(2, 5), has_cls=True, num_registers=3, patch_size=(8, 14)),
        TokenLayout(grid=(3, 3), has_cls=True, num_distillation=1),
        TokenLayout(grid=(1, 1), has_cls=True),
    ],
    ids=str,
)
def test_the_value_under_uniform_attention_is_what_uniform_attention_gives(layout) -> None:
    values = compute_statistics(random_view(layout, sharpness=0))
    of_attention = {name: value for name, value in values.items() if STATISTICS[name].per_head}
    assert of_attention
    for name, value in of_attention.items():
        uniform = STATISTICS[name].uniform
        assert uniform is not None, name
        assert_close(value, np.full(value.shape, uniform(layout)), tolerance=1e-6)
    assert all(statistic.uniform is None for statistic in STATISTICS.values() if not statistic.per_head)


def test_figures_and_released_names_of_the_paper() -> None:
    figures = {statistic.figure: name for name, statistic in STATISTICS.items() if statistic.figure}
    assert figures == {3: "cls_self_attention", 4: "cls_entropy", 5: "patch_self_attention_ratio"}
    released = {statistic.released_name: name for name, statistic in STATISTICS.items() if statistic.released_name}
    assert released == {
        "cls_cls_attention": "cls_self_attention",
        "cls_cls_attention_adj_for_cls": "cls_self_attention_ratio",
        "cls_pos_attention": "cls_to_patches",
        "cls_pos_entropy": "cls_entropy",
        "pos_self_attention": "patch_self_attention",
        "pos_self_attention_adj_for_cls": "patch_self_attention_ratio",
        "pos_cls_attention": "patches_to_cls",
        "pos_pos_entropy": "patch_entropy",
        "cls_magnitude": "cls_update_ratio_unscaled",
        "pos_magnitude": "patch_update_ratio_unscaled",
    }


def test_unbounded_statistics_are_the_ratios() -> None:
    assert {name for name, statistic in STATISTICS.items() if not statistic.bounded} == {
        "cls_self_attention_ratio",
        "cls_update_ratio",
        "cls_update_ratio_unscaled",
        "patch_update_ratio",
        "patch_update_ratio_unscaled",
        "patch_norm_max_ratio",
    }


def test_what_is_undefined_says_why() -> None:
    layout = TokenLayout(grid=(2, 2), has_cls=False, num_registers=1)
    view = random_view(layout, norms=False)
    values = compute_statistics(view)
    assert set(values) == {
        name for name, s in STATISTICS.items() if s.needs <= {"registers", "patches", "distribution"}
    }
    assert STATISTICS["cls_entropy"].undefined(layout, frozenset()) == "needs a [cls] token"
    assert STATISTICS["patch_update_ratio"].undefined(layout, frozenset({"residual"})) == (
        "needs an attention update that the block adds on its own, apart from its MLP's"
    )
    assert STATISTICS["cls_update_ratio"].undefined(layout, frozenset()) == (
        "needs a [cls] token and the residual stream, hooked at the block and an attention update that the block adds "
        "on its own, apart from its MLP's"
    )
    assert STATISTICS["cls_to_registers"].undefined(TokenLayout((2, 2), has_cls=True), frozenset()) == (
        "needs register tokens"
    )
    assert STATISTICS["cls_to_registers"].undefined(LAYOUT, frozenset()) is None


def test_select_keeps_the_order_of_the_table_and_takes_one_name() -> None:
    assert [s.name for s in select(["patch_entropy", "cls_entropy"])] == ["cls_entropy", "patch_entropy"]
    assert [s.name for s in select("cls_entropy")] == ["cls_entropy"]
    assert select(None) == list(STATISTICS.values())


def test_no_statistic_at_all() -> None:
    for empty in ([], ()):
        with pytest.raises(UserError) as error:
            select(empty)
        assert str(error.value) == (
            "no statistic is asked for; name at least one, or leave the argument out for all of them"
        )


def test_an_unknown_statistic_lists_the_nearest() -> None:
    with pytest.raises(UserError) as error:
        select(["cls_entrophy"])
    assert str(error.value) == (
        "there is no statistic 'cls_entrophy'; the nearest are cls_entropy, cls_entropy_share, patch_entropy"
    )
    with pytest.raises(
        UserError, match=r"there is no statistic 'zzz'; the nearest are cls_self_attention, .*max_ratio$"
    ):
        select(["zzz"])


def test_the_reference_and_the_trace_can_fail() -> None:
    """The reference notices another matrix: a transposed A, or a grid with its sides exchanged."""
    view = random_view(LAYOUT, sharpness=3)
    right = compute_statistics(view)
    A = reference_attention(view.query, view.key, view.scale, None)
    with pytest.raises(AssertionError):
        assert_close(right["patch_entropy"], reference_of(view, A.swapaxes(-1, -2), None)["patch_entropy"])
    turned = reference_statistics(A, grid=(5, 4), prefix=5, has_cls=True, registers=3, patch_size=(16, 8))
    with pytest.raises(AssertionError):
        assert_close(right["attention_distance"], turned["attention_distance"])


def test_modules_are_not_needed_for_a_view() -> None:
    """A statistic is a pure function of the view: twice the same, and the view is left as it was."""
    view = random_view(LAYOUT)
    query = view.query.clone()
    first, second = compute_statistics(view), compute_statistics(view, list(STATISTICS))
    assert all(torch.equal(first[name], second[name]) for name in STATISTICS)
    assert torch.equal(view.query, query) and not isinstance(view, nn.Module)
