"""The tokens after each block of models whose blocks are parts that the forward pass adds, or of several classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import captured, images, message, randomize, state_of
from test_capture_by_hand import Attention, Block, hand_made
from vitprobe.errors import UserError
from vitprobe.models.loading import load_model
from vitprobe.models.tokens import TokenLayout
from vitprobe.probing.tap import Tap
from vitprobe.probing.tokens import FrozenModel

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


class ListsBeside(Whole):
    """Norms, attentions and MLPs in a list each."""

    def __init__(self) -> None:
        super().__init__(lambda: [])
        del self.layers
        self.norms1, self.norms2 = (nn.ModuleList(nn.LayerNorm(32) for _ in range(DEPTH)) for _ in range(2))
        self.attentions = nn.ModuleList(Attention(32, 2) for _ in range(DEPTH))
        self.mlps = nn.ModuleList(mlp() for _ in range(DEPTH))

    @property
    def layers(self) -> Any:  # type: ignore[override]
        return zip(self.norms1, self.attentions, self.norms2, self.mlps, strict=True)

    @layers.deleter
    def layers(self) -> None:
        del self._modules["layers"]

    @layers.setter
    def layers(self, value: Any) -> None:
        raise AttributeError  # nn.Module keeps it instead

    run = NormsApart.run


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


MODELS: dict[str, Callable[[], Whole]] = {
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
}


def tokens(model: nn.Module, blocks: Any = range(DEPTH), attention: bool = False, **options: Any) -> dict[int, Tensor]:
    loaded = load_model(model, **options)
    with FrozenModel(loaded, [Tap(block) for block in blocks], attention=attention, device="cpu") as frozen:
        return {tap.block: batch.tokens for tap, batch in frozen(images(3)).items()}


@pytest.mark.parametrize("name", MODELS)
def test_tokens_of_blocks_that_are_parts(name: str) -> None:
    model = randomize(MODELS[name]()).eval()
    before = state_of(model)
    with torch.no_grad():
        model(images(3))
    expected = list(model.after)
    assert len(captured(model)) == DEPTH
    for attention in (False, True):
        for block in range(DEPTH):  # alone, so that the pass may end early
            torch.testing.assert_close(tokens(model, [block], attention)[block], expected[block], rtol=1e-5, atol=1e-5)
    found = tokens(model)
    assert set(found) == set(range(DEPTH))
    for block in range(DEPTH):
        torch.testing.assert_close(found[block], expected[block], rtol=1e-5, atol=1e-5)
    assert state_of(model) == before
