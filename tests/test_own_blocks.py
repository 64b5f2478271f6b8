"""The tokens after each block of models whose blocks are parts that the forward pass adds, or of several classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pandas.testing import assert_frame_equal
from torch import Tensor, nn

from helpers import captured, images, message, randomize, state_of
from made_squares import KNN, squares
from test_capture_by_hand import Attention, Block, hand_made
from vitprobe.errors import UserError
from vitprobe.layout import TokenLayout
from vitprobe.models.loading import load_model
from vitprobe.probing.tap import Tap
from vitprobe.probing.tokens import FrozenModel
from vitprobe.probing.verify import verify

DEPTH = 3


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32))


class PreNorm(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(32), inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.norm(x))


class Whole(nn.Module):
    """Patches → `run` of each block's parts in turn → `end`; `after` keeps the tokens after each block."""

    def __init__(self, parts: Callable[[], list[nn.Module]], end: nn.Module | None = None) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, 32, 8, 8)
        self.layers = nn.ModuleList(nn.ModuleList(parts()) for _ in range(DEPTH))
        self.gamma = nn.Parameter(torch.linspace(0.5, 1.5, 32))
        self.norm = end if isinstance(end, nn.LayerNorm) else nn.Identity()
        self.head = nn.Linear(32, 5)
        self.after: list[Tensor] = []

    def run(self, x: Tensor, parts: Any) -> Tensor:
        attention, feed = parts
        x = attention(x) + x
        return feed(x) + x

    def forward(self, images: Tensor) -> Tensor:
        self.after.clear()
        x = self.proj(images).flatten(2).transpose(1, 2)
        for parts in self.layers:
            x = self.run(x, parts)
            self.after.append(x.clone())
        return self.head(self.norm(x).mean(dim=1))


class NormsApart(Whole):
    def run(self, x: Tensor, parts: Any) -> Tensor:
        norm1, attention, norm2, feed = parts
        x = x + attention(norm1(x))
        return x + feed(norm2(x))


class PostNorm(Whole):
    def run(self, x: Tensor, parts: Any) -> Tensor:
        attention, norm1, feed, norm2 = parts
        x = norm1(x + attention(x))
        return norm2(x + feed(x))


class Scaled(NormsApart):
    def run(self, x: Tensor, parts: Any) -> Tensor:
        norm1, attention, norm2, feed = parts
        x = x + self.gamma * attention(norm1(x))
        return x + self.gamma * feed(norm2(x))


class InPlace(Whole):
    def run(self, x: Tensor, parts: Any) -> Tensor:
        attention, feed = parts
        x += attention(x)
        x += feed(x)
        return x


class Multihead(Whole):
    def run(self, x: Tensor, parts: Any) -> Tensor:
        norm1, attention, norm2, feed = parts
        y = norm1(x)
        x = x + attention(y, y, y, need_weights=False)[0]
        return x + feed(norm2(x))


class Dictionaries(Whole):
    def __init__(self) -> None:
        super().__init__(pair)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"attention": PreNorm(Attention(32, 2)), "feed": PreNorm(mlp())}) for _ in range(DEPTH)
        )

    def run(self, x: Tensor, parts: Any) -> Tensor:
        return super().run(x, (parts["attention"], parts["feed"]))


class ListsBeside(nn.Module):
    """Norms, attentions and MLPs in a list each."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 32, 8, 8)
        self.norms1, self.norms2 = (nn.ModuleList(nn.LayerNorm(32) for _ in range(DEPTH)) for _ in range(2))
        self.attentions = nn.ModuleList(Attention(32, 2) for _ in range(DEPTH))
        self.mlps = nn.ModuleList(mlp() for _ in range(DEPTH))
        self.after: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        self.after.clear()
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        for norm1, attention, norm2, feed in zip(self.norms1, self.attentions, self.norms2, self.mlps, strict=True):
            x = x + attention(norm1(x))
            x = x + feed(norm2(x))
            self.after.append(x)
        return x.mean(dim=1)


class NoForward(nn.Module):
    """Keeps the parts of a block, which the model calls itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.feed = PreNorm(Attention(32, 2)), PreNorm(mlp())


class Keepers(Whole):
    def __init__(self) -> None:
        super().__init__(pair)
        self.layers = nn.ModuleList(NoForward() for _ in range(DEPTH))

    def run(self, x: Tensor, parts: Any) -> Tensor:
        return super().run(x, (parts.attention, parts.feed))


def pair() -> list[nn.Module]:
    return [PreNorm(Attention(32, 2)), PreNorm(mlp())]


def four() -> list[nn.Module]:
    return [nn.LayerNorm(32), Attention(32, 2), nn.LayerNorm(32), mlp()]


def post() -> list[nn.Module]:
    return [Attention(32, 2), nn.LayerNorm(32), mlp(), nn.LayerNorm(32)]


def multihead() -> list[nn.Module]:
    return [nn.LayerNorm(32), nn.MultiheadAttention(32, 2, batch_first=True), nn.LayerNorm(32), mlp()]


MODELS: dict[str, Callable[[], Any]] = {
    "a pair, pooled without a norm": lambda: Whole(pair),
    "a pair and a final norm": lambda: Whole(pair, nn.LayerNorm(32)),
    "added in place": lambda: InPlace(pair),
    "norms apart": lambda: NormsApart(four),
    "norms apart and a final norm": lambda: NormsApart(four, nn.LayerNorm(32)),
    "norms after the sums": lambda: PostNorm(post),
    "scaled by the model, with a final norm": lambda: Scaled(four, nn.LayerNorm(32)),
    "torch's multihead attention": lambda: Multihead(multihead),
    "dictionaries of parts": Dictionaries,
    "blocks without a forward pass": Keepers,
    "a list for each kind of part": ListsBeside,
}


def tokens(model: nn.Module, read: Any = range(DEPTH), attention: bool = False, **options: Any) -> dict[int, Tensor]:
    loaded = load_model(model, **options)
    with FrozenModel(loaded, [Tap(block) for block in read], attention=attention, device="cpu") as frozen:
        return {tap.block: batch.tokens for tap, batch in frozen(images(3)).items()}


@pytest.mark.parametrize("name", MODELS)
def test_tokens_of_blocks_that_are_parts(name: str) -> None:
    model = randomize(MODELS[name]()).eval()
    before = state_of(model)
    with torch.no_grad():
        model(images(3))
    expected = list(model.after)
    assert len(captured(model)) == DEPTH
    # The first alone, where the pass ends early; the last with its attention; all.
    for read, attention in (([0], False), ([DEPTH - 1], True), (range(DEPTH), False)):
        found = tokens(model, read, attention)
        assert list(found) == list(read)
        for block in read:
            torch.testing.assert_close(found[block], expected[block], rtol=1e-5, atol=1e-5)
    assert state_of(model) == before


def test_where_the_tokens_leave_the_last_block_may_stay_unknown() -> None:
    """The model scales what it adds and has no final norm: only what enters the next block can be read."""
    model = randomize(Scaled(four)).eval()
    with torch.no_grad():
        model(images(3))
    expected = list(model.after)
    for block in (0, 1):
        torch.testing.assert_close(tokens(model, [block])[block], expected[block])
    with pytest.raises(UserError) as error:
        tokens(model, [2])
    assert message(error).startswith("the blocks of Scaled are parts whose sum its forward pass makes")

    class Returning(nn.Module):
        """As the message says: a module that returns the tokens."""

        def __init__(self, parts: Any) -> None:
            super().__init__()
            self.parts = nn.ModuleList(parts)

        def forward(self, x: Tensor) -> Tensor:
            return model.run(x, self.parts)

    blocks = [Returning(parts) for parts in model.layers]
    mended = nn.Sequential(nn.Conv2d(3, 32, 8, 8), nn.Flatten(2), Transposed(), *blocks)
    mended[0].load_state_dict(model.proj.state_dict())
    found = tokens(mended, [2], blocks=blocks, layout=TokenLayout((4, 4), has_cls=False, patch_size=(8, 8)))
    torch.testing.assert_close(found[2], expected[2])


class Transposed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


class OtherBlock(Block):
    """Of another class, as the mixture-of-experts blocks of some models are."""


class LastBlock(Block):
    """Of a third class."""


@pytest.mark.parametrize("given", [False, True])
def test_blocks_of_several_classes(given: bool) -> None:
    model = hand_made(depth=3)
    for number, kind in ((1, OtherBlock), (2, LastBlock)):
        block = kind(32, 2)
        block.load_state_dict(model.blocks[number].state_dict())
        model.blocks[number] = block.eval()
    plain = hand_made(depth=3)
    options: dict[str, Any] = {"blocks": list(model.blocks)} if given else {}
    expected, found = tokens(plain), tokens(model, **options)
    assert load_model(model, **options).anatomy.blocks == tuple(model.blocks)
    for block in range(3):
        torch.testing.assert_close(found[block], expected[block])
    maps, own = captured(plain).statistics(), captured(model).statistics()
    assert set(maps) == set(own)
    torch.testing.assert_close(own["patch_entropy"], maps["patch_entropy"])


class AttentionBlock(nn.Module):
    """Called after attention, and returns the tokens; the model adds to them between blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.feed = PreNorm(Attention(32, 2)), PreNorm(mlp())

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.feed(x)


def test_whole_blocks_are_read_at_their_output() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch_embed = nn.Conv2d(3, 32, 8, 8)
            self.blocks = nn.ModuleList(AttentionBlock() for _ in range(DEPTH))
            self.pos_embed = nn.Parameter(torch.zeros(1, 16, 32))
            self.after: list[Tensor] = []

        def forward(self, images: Tensor) -> Tensor:
            self.after.clear()
            x = self.patch_embed(images).flatten(2).transpose(1, 2)
            for block in self.blocks:
                x = block(x + self.pos_embed)
                self.after.append(x)
            return x

    model = randomize(Positions()).eval()
    with torch.no_grad():
        model(images(3))
    expected = list(model.after)
    for block, found in tokens(model).items():
        torch.testing.assert_close(found, expected[block])


class AsModules(nn.Module):
    """A `Whole` whose blocks are modules that return the tokens."""

    def __init__(self, model: Whole) -> None:
        super().__init__()
        self.proj, self.norm, self.head = model.proj, model.norm, model.head
        self.blocks = nn.ModuleList(AttentionBlock() for _ in range(DEPTH))
        for block, (attention, feed) in zip(self.blocks, model.layers, strict=True):
            block.attention, block.feed = attention, feed

    def forward(self, images: Tensor) -> Tensor:
        x = self.proj(images).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(dim=1))


def test_verify_of_blocks_that_are_parts_is_that_of_whole_blocks() -> None:
    model, data = randomize(Whole(pair, nn.LayerNorm(32))).eval(), squares(6, 4)
    results = [
        verify(each, data, ["gap"], protocol=KNN, blocks=[0, -1], device="cpu", workers=0, progress=False)
        for each in (model, AsModules(model).eval())
    ]
    first, second = (result.table().drop(columns=["model", "weights"]) for result in results)
    assert len(first) >= 4  # two blocks, with and without the norm
    assert_frame_equal(first, second)
