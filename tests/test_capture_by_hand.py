"""Attention written by hand: softmax in Python, batched products, kernels of one's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers import (
    OwnModel,
    assert_all_close,
    assert_close,
    captured,
    images,
    message,
    random_view,
    randomize,
    state_of,
)
from reference import reference_statistics
from vitprobe.attention.view import AttentionView
from vitprobe.errors import AttentionNotSeenError, UserError
from vitprobe.hooks.capture import capture
from vitprobe.hooks.handover import hand_over
from vitprobe.layout import TokenLayout
from vitprobe.models.loading import load_model
from vitprobe.profile.analysis import analyze
from vitprobe.statistics import compute_statistics


class Attention(nn.Module):
    """As in the code of DINO, MAE and iBOT."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.attn_drop = nn.Dropout(0.5)
        self.weights: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attn = ((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5).softmax(dim=-1)
        self.weights = [attn.detach().double()]
        return self.proj((self.attn_drop(attn) @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(width), Attention(width, heads), nn.LayerNorm(width)
        self.mlp, self.scale = nn.Linear(width, width), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.scale(self.attn(self.norm1(x)))
        return x + self.mlp(self.norm2(x))


class Scale(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.25 * x


class HandMadeViT(nn.Module):
    """One's own Vision Transformer, as everybody has one."""

    def __init__(self, width: int = 32, depth: int = 2, registers: int = 0) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, 8, 8)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_tokens = nn.Parameter(torch.zeros(1, registers, width)) if registers else None
        self.pos_embed = nn.Parameter(torch.zeros(1, 17 + registers, width))
        self.blocks = nn.Sequential(*[Block(width, 2) for _ in range(depth)])
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x).flatten(2).transpose(1, 2)
        prefix = [self.cls_token] if self.register_tokens is None else [self.cls_token, self.register_tokens]
        x = torch.cat([*(token.expand(len(x), -1, -1) for token in prefix), x], dim=1) + self.pos_embed
        return self.head(self.blocks(x)[:, 0]).softmax(-1)


def hand_made(**options: int) -> HandMadeViT:
    model = randomize(HandMadeViT(**options)).eval()
    assert isinstance(model, HandMadeViT)
    return model


@pytest.mark.parametrize("keep", ["qk", "statistics"])
@pytest.mark.parametrize("registers", [0, 3])
def test_statistics_of_softmax_by_hand_are_the_references(registers: int, keep: str) -> None:
    model = hand_made(registers=registers)
    state = state_of(model)
    attention = captured(model, keep=keep)
    assert state_of(model) == state
    layout = TokenLayout((4, 4), True, 0, registers, (8, 8))
    assert attention.layout == layout and attention.anatomy.image_size == (32, 32)
    values = attention.statistics()
    assert {"patch_update_ratio", "patch_norm_max_ratio"} <= set(values)
    for index, block in enumerate(model.blocks):
        expected = reference_statistics(
            block.attn.weights[0].numpy(),
            grid=(4, 4),
            prefix=1 + registers,
            has_cls=True,
            registers=registers,
            patch_size=(8, 8),
        )
        assert set(expected) <= set(values)
        assert_all_close({name: values[name][:, index] for name in expected}, expected)


def test_a_map_by_hand_and_its_memory() -> None:
    model = hand_made()
    attention = captured(model)
    assert attention[1].query is None
    assert_close(attention[1].probabilities(), model.blocks[1].attn.weights[0], tolerance=1e-6)
    assert_close(attention[1].probabilities(head=1), model.blocks[1].attn.weights[0][:, 1], tolerance=1e-6)
    assert attention.pooling_attention == []  # the classifier's softmax is none
    two = captured(model, torch.cat([images(1, seed=1), images(1, seed=1)]))
    assert_close(two[0].probabilities()[0], two[0].probabilities()[1], tolerance=1e-6)


def test_in_train_mode_with_dropout_and_gradients_weights_are_those_before_dropout() -> None:
    model = hand_made().train()
    with capture(model, accumulate=True) as attention:
        for _ in range(2):
            model(images()).sum().backward()
    # Block 0 comes before any dropout: both runs are the same there.
    first, second = attention.statistics()["cls_entropy"][:, 0].chunk(2)
    assert_close(first, second, tolerance=1e-6)
    assert model.proj.weight.grad is not None


def test_updates_follow_what_stands_behind_attention() -> None:
    """LayerScale by any name counts; what the block adds in another way is not passed off as an update."""
    model = hand_made()
    plain = captured(model).statistics()
    for block in model.blocks:
        block.scale = Scale()
    scaled = captured(model).statistics()
    assert_close(scaled["patch_update_ratio"][:, 0], plain["patch_update_ratio"][:, 0] / 4)
    assert_close(scaled["patch_update_ratio_unscaled"][:, 0], plain["patch_update_ratio_unscaled"][:, 0])
    for block in model.blocks:  # a scale that no module shows
        block.forward = lambda x, b=block: (y := x + 0.5 * b.attn(b.norm1(x))) + b.mlp(b.norm2(y))
    assert "patch_update_ratio" in captured(model).undefined


HANDS: dict[str, Callable[..., Tensor]] = {
    "functional": lambda q, k, v: F.softmax(q @ k.mT, dim=-1) @ v,
    "torch": lambda q, k, v: torch.softmax(q @ k.mT, 3) @ v,
    "module": lambda q, k, v: torch.matmul(nn.Softmax(dim=-1)(q @ k.mT), v),
    "einsum": lambda q, k, v: torch.einsum("bhij,bhjd->bhid", (q @ k.mT).softmax(-1), v),
    "float32, then back": lambda q, k, v: (q @ k.mT).softmax(-1, dtype=torch.float32).to(q.dtype) @ v,
    "dropout": lambda q, k, v: F.dropout((q @ k.mT).softmax(-1), 0.0) @ v,
    "batched products": lambda q, k, v: torch.bmm(
        torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).softmax(-1), v.flatten(0, 1)
    ).view_as(q),
    "transposed": lambda q, k, v: (v.mT @ (q @ k.mT).softmax(-1).mT).mT,
    "masked": lambda q, k, v: (q @ k.mT).masked_fill(~torch.ones(16, 16).tril().bool(), -torch.inf).softmax(-1) @ v,
    "merged heads, fused": lambda q, k, v: F.scaled_dot_product_attention(
        q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    ).view_as(q),
}


@pytest.mark.parametrize("how", HANDS)
def test_every_way_to_write_it(how: str) -> None:
    """Weights times values are the block's own output."""
    outputs: list[tuple[Tensor, Tensor]] = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outputs.append((v, HANDS[how](q, k, v)))
        return outputs[-1][1]

    attention = captured(OwnModel(attend))
    for view, (values, output) in zip(attention, outputs, strict=True):
        assert_close(view.probabilities() @ values, output, tolerance=1e-5)
    entropy = torch.stack([torch.special.entr(view.probabilities()).sum(-1).mean(-1) for view in attention], dim=1)
    assert_close(attention.statistics()["patch_entropy"], entropy)


def test_a_softmax_beside_a_fused_kernel_is_not_the_attention() -> None:
    def gated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v) + (k @ q.mT).softmax(-1) @ v

    view = captured(OwnModel(gated))[0]
    assert view.query is not None


MIXING = torch.eye(2).flip(0)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (lambda a, v: (a * 0.5) @ v, "is changed by mul"),
        (lambda a, v: (a.permute(0, 2, 3, 1) @ MIXING).permute(0, 3, 1, 2) @ v, "is changed by matmul"),
        (lambda a, v: F.linear(a.permute(0, 2, 3, 1), MIXING).permute(0, 3, 1, 2) @ v, "is changed by linear"),
        (lambda a, v: a.mul_(0.5) @ v, "is changed by mul_"),
        (lambda a, v: v, "multiplies no values"),
    ],
)
def test_a_softmax_that_is_no_attention_map(how: Callable[..., Tensor], reason: str) -> None:
    with pytest.raises(AttentionNotSeenError) as error:
        captured(OwnModel(lambda q, k, v: how((q @ k.mT).softmax(-1), v)))
    assert message(error) == (
        f"block 0 (OwnBlock) of OwnModel computes a softmax over 16x16, but what comes out {reason}, so it is no "
        f"attention map; if its attention is your own code, call vitprobe.hand_over(query, key, scale=…) beside it, "
        f"with (B, H, N, d) queries and keys"
    )


def test_attention_over_channels_is_not_passed_off_as_over_tokens() -> None:
    with pytest.raises(AttentionNotSeenError, match="attends from 8 queries to 8 keys, but the layout has 16 tokens"):
        captured(OwnModel(lambda q, k, v: ((q.mT @ k).softmax(-1) @ v.mT).mT))


def without_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT).exp()
    return weights @ v / weights.sum(-1, keepdim=True)


def test_what_nobody_can_see_is_handed_over() -> None:
    with pytest.raises(AttentionNotSeenError) as error:
        captured(OwnModel(without_softmax))
    assert message(error) == (
        "block 0 (OwnBlock) of OwnModel computed no scaled-dot-product attention and no softmax, so its attention "
        "cannot be seen; if its attention is your own code, call vitprobe.hand_over(query, key, scale=…) beside it, "
        "with (B, H, N, d) queries and keys"
    )

    def shown(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        hand_over(q, k[:, :1], scale=1.0)  # heads that share a key
        return without_softmax(q, k[:, :1], v)

    model = OwnModel(shown)
    with torch.no_grad():
        model(images())  # without a capture it does nothing
        with capture(model) as outer, capture(model) as inner:
            model(images())
    fused = OwnModel(lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :1], v, scale=1.0))
    fused.load_state_dict(model.state_dict())
    for attention in (outer, inner):
        assert_all_close(attention.statistics(), captured(fused).statistics())


def test_handing_over_takes_the_place_of_what_is_seen() -> None:
    def both(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        hand_over(q, k, bias=torch.eye(16, dtype=torch.bool))
        return F.scaled_dot_product_attention(q, k, v)

    assert_close(captured(OwnModel(both))[0].probabilities(), torch.eye(16).expand(2, 2, 16, 16))


class Nested(nn.Module):
    """Blocks as lists of attention and MLP, patches without a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(192, 32)
        self.layers = nn.ModuleList([nn.ModuleList([Attention(32, 2), nn.Linear(32, 32)]) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(F.unfold(x, 8, stride=8).mT)
        for attention, mlp in self.layers:  # type: ignore[misc]
            x = x + attention(x)
            x = x + mlp(x)
        return x


def test_a_layout_that_cannot_be_found_is_given() -> None:
    model = randomize(Nested()).eval()
    with pytest.raises(AttentionNotSeenError) as error:
        load_model(model)
    assert message(error) == (
        "Nested has no convolution that cuts images into patches, so its patch grid is not known; say it with "
        "load_model(model, layout=vitprobe.TokenLayout(grid=(14, 14), has_cls=True, patch_size=(16, 16)), "
        "blocks=list(model.blocks))"
    )
    loaded = load_model(model, layout=TokenLayout((4, 4), has_cls=False, patch_size=(8, 8)))
    assert loaded.transform.size == (32, 32)
    attention = captured(loaded)  # type: ignore[arg-type]
    assert_close(attention[1].probabilities(), model.layers[1][0].weights[0], tolerance=1e-6)  # type: ignore[index,union-attr]
    assert "patch_update_ratio" in attention.undefined  # such a block shows no sum
    profile = analyze(loaded, num_images=2)
    assert profile.num_blocks == 2 and profile.layout.grid == (4, 4)
    blocks = [pair[0] for pair in model.layers]  # type: ignore[index]
    with torch.no_grad(), capture(model, layout=loaded.layout, blocks=blocks[1:]) as one:
        model(images())
    assert len(one) == 1


def test_a_layout_that_contradicts_the_tokens() -> None:
    model = hand_made()
    wrong = TokenLayout((4, 4), has_cls=False, patch_size=(8, 8))
    with pytest.raises(UserError) as error, torch.no_grad(), capture(model, layout=wrong):
        model(images())
    assert str(error.value) == (
        "the layout given has 16 tokens (0 prefix + 4x4 patches), but HandMadeViT makes 17 of images of 32×32 pixels, "
        "1 of them the same for every image: correct the layout, or leave it out"
    )


def test_a_view_of_probabilities() -> None:
    view = random_view(TokenLayout((3, 4), has_cls=True, num_registers=2), norms=False)
    weights = view.probabilities()
    again = AttentionView.from_probabilities(0, weights, view.layout)
    assert_all_close(compute_statistics(again), compute_statistics(view))
    with pytest.raises(UserError, match="each row must be at least 0 and sum to 1"):
        AttentionView.from_probabilities(0, weights - 0.1, view.layout)
    with pytest.raises(UserError, match="over 15 tokens, but the layout has 14"):
        AttentionView.from_probabilities(0, weights, TokenLayout((3, 4), has_cls=True, num_registers=1))
    one_hot = torch.eye(15).expand(2, 3, 15, 15)
    values = compute_statistics(AttentionView.from_probabilities(0, one_hot, view.layout))
    assert (values["patch_entropy"] == 0).all() and (values["patch_self_attention"] == 1).all()
