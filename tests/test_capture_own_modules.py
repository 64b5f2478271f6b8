"""Capturing modules that are not timm's: every way to call attention, blocks of other habits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers import SMALL, OwnBlock, OwnModel, assert_all_close, assert_close, captured, tiny, tiny_vit
from vitprobe.hooks.calls import read_call
from vitprobe.statistics import STATISTICS

KEYS_MASK = torch.arange(16).view(1, 1, 1, 16) < torch.tensor([12, 16]).view(2, 1, 1, 1)
ATTENTIONS: dict[str, Callable[..., Tensor]] = {
    "plain": F.scaled_dot_product_attention,
    "scale": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.7),
    "by keyword": lambda q, k, v: F.scaled_dot_product_attention(query=q, key=k, value=v),
    "causal": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    "mask of keys": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, KEYS_MASK),
    "added row": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, torch.linspace(0, 3, 16)[None]),
    "mask of pairs": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, torch.eye(16, dtype=torch.bool)),
    "one key head": lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :1], v[:, :1]),
    "grouped keys": lambda q, k, v: F.scaled_dot_product_attention(q, k[:, 1:], v[:, 1:], enable_gqa=True),
}


@pytest.mark.parametrize("by_keyword", [True, False])
@pytest.mark.parametrize("how", ATTENTIONS)
def test_every_way_to_call_attention(how: str, by_keyword: bool) -> None:
    """What is read of a call gives its output again: weights times values."""
    outputs: list[tuple[Tensor, Tensor]] = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output = ATTENTIONS[how](q, k, v)
        shared = {"one key head": v[:, :1], "grouped keys": v[:, 1:]}.get(how, v)
        outputs.append((shared, output))
        return output

    model = OwnModel(attend, by_keyword)
    attention = captured(model)
    for view, (values, output) in zip(attention, outputs, strict=True):
        assert_close(view.probabilities() @ values, output, tolerance=1e-5)
        assert_close(view.probabilities(head=1) @ values[:, -1], output[:, 1], tolerance=1e-5)
    entropy = attention.statistics()["patch_entropy"]
    expected = [torch.special.entr(view.probabilities()).sum(-1).mean(-1) for view in attention]
    assert_close(entropy, torch.stack(expected, dim=1))
    assert "update" not in str(set(attention.statistics())) and "patch_norm_max_ratio" in attention.statistics()


def test_blocks_that_order_their_tokens_otherwise_have_no_residual_statistics() -> None:
    class TokensFirst(OwnBlock):
        def forward(self, hidden: Tensor) -> Tensor:
            return super().forward(hidden.transpose(0, 1)).transpose(0, 1)

    model = OwnModel(by_keyword=False)
    expected = captured(model).statistics()
    for index, block in enumerate(model.blocks):
        model.blocks[index] = TokensFirst(F.scaled_dot_product_attention)
        model.blocks[index].load_state_dict(block.state_dict())
    handle = model.patch_embed.register_forward_hook(lambda _, args, out: out.transpose(0, 1))
    attention = captured(model)
    handle.remove()
    assert "patch_norm_max_ratio" in attention.undefined
    expected.pop("patch_norm_max_ratio")
    assert_all_close(attention.statistics(), expected)


def test_a_block_that_passes_no_tokens_has_no_residual_statistics() -> None:
    class Wrapped(OwnBlock):
        def forward(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"hidden": super().forward(state["hidden"])}

    model = OwnModel(by_keyword=False)
    model.blocks = nn.ModuleList([Wrapped(F.scaled_dot_product_attention)])
    handle = model.patch_embed.register_forward_hook(lambda _, args, out: {"hidden": out})
    attention = captured(model)
    handle.remove()
    assert "patch_norm_max_ratio" in attention.undefined and "patch_entropy" in attention.statistics()


def test_statistics_that_only_some_blocks_have_are_undefined() -> None:
    model = tiny_vit()
    model.blocks[1].drop_path1 = None
    model.blocks[1].forward = lambda x: x + model.blocks[1].attn(x)
    attention = captured(model)
    assert "patch_update_ratio" in attention.undefined
    assert set(attention.statistics()) | set(attention.undefined) == set(STATISTICS)


def test_one_of_two_branches_that_shows_no_update() -> None:
    model = tiny("vit_small_patch16_18x2_224", **SMALL)
    assert "patch_update_ratio" in captured(model).statistics()
    branch = model.blocks[0].attns[1]
    branch.forward = lambda x: branch.ls(branch.attn(branch.norm(x)))  # goes around its drop-path
    assert "patch_update_ratio" in captured(model).undefined


def test_a_layer_scale_that_works_in_place() -> None:
    model = tiny_vit(init_values=0.1)
    expected = captured(model).statistics()
    for block in model.blocks:
        block.ls1.inplace = block.ls2.inplace = True
    assert_all_close(captured(model).statistics(), expected, tolerance=1e-6)
    assert_close(
        expected["patch_update_ratio"] < expected["patch_update_ratio_unscaled"] * 2, True + torch.zeros(2, 2, 1)
    )


def test_read_call_takes_the_kernels_own_defaults() -> None:
    q, k, v = torch.randn(3, 1, 2, 5, 16).requires_grad_()
    call = read_call(q, k, v)
    assert call.scale == 0.25 and call.bias is None
    assert not call.query.requires_grad and call.query.data_ptr() == q.data_ptr()
