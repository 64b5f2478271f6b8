"""Finding the parts of models that follow no library."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import assert_all_close, captured, images, randomize, state_of
from test_capture_by_hand import Attention, Block, HandMadeViT, hand_made
from vitprobe.hooks.capture import capture
from vitprobe.models.anatomy.find import find_anatomy
from vitprobe.models.anatomy.own_vit import recognise


class MaskedAutoencoder(HandMadeViT):
    """With MAE's own masking: patches sorted by noise, the first ones kept; a decoder behind."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder_blocks = nn.ModuleList([Block(32, 2) for _ in range(4)])

    def random_masking(self, x: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
        order = torch.rand(x.shape[:2]).argsort(dim=1)
        keep = order[:, : round(x.shape[1] * (1 - mask_ratio))]
        return x.gather(1, keep[..., None].expand(-1, -1, x.shape[-1])), order, order.argsort(dim=1)

    def forward(self, x: Tensor, mask_ratio: float = 0.75) -> Tensor:
        x = self.proj(x).flatten(2).transpose(1, 2) + self.pos_embed[:, 1:]
        x, _, _ = self.random_masking(x, mask_ratio)
        x = self.blocks(torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1), x], dim=1))
        for block in self.decoder_blocks:
            x = block(x)
        return x


def test_a_masked_autoencoder_sees_all_patches_in_their_order() -> None:
    model = randomize(MaskedAutoencoder()).eval()
    encoder = hand_made()
    encoder.load_state_dict(model.state_dict(), strict=False)
    before = state_of(model)
    attention = captured(model)
    assert len(attention) == 2 and attention.pooling_attention == []
    assert_all_close(attention.statistics(), captured(encoder).statistics(), tolerance=1e-5)
    assert state_of(model) == before and "random_masking" not in vars(model)
    assert model(images()).shape[1] == 5  # it masks again


class Chunk(nn.ModuleList):
    """DINOv2's: the blocks of one shard, their numbers kept by identities in front."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = block(x)
        return x


def test_chunks_of_blocks_are_their_blocks() -> None:
    plain = hand_made(depth=4)
    chunked = hand_made(depth=4)
    one, two, three, four = chunked.blocks
    chunked.blocks = nn.Sequential(Chunk([one, two]), Chunk([nn.Identity(), nn.Identity(), three, four]))
    assert find_anatomy(chunked).blocks == (one, two, three, four)
    assert_all_close(captured(chunked).statistics(), captured(plain).statistics(), tolerance=1e-6)


def test_lists_of_parts_are_their_attention() -> None:
    class PreNorm(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.norm, self.inner = nn.LayerNorm(32), inner

    first = [PreNorm(Attention(32, 2)) for _ in range(2)]
    model = nn.Module()
    model.layers = nn.ModuleList([nn.ModuleList([part, PreNorm(nn.Linear(32, 32))]) for part in first])
    model.to_patches = nn.Conv2d(3, 32, 8, 8)
    assert find_anatomy(model).blocks == tuple(first)
    for parts in model.layers:  # nothing is called after attention: the first
        parts[0].inner = nn.Linear(32, 32)
    assert find_anatomy(model).blocks == tuple(first)


@pytest.mark.parametrize(
    ("change", "size"),
    [
        ({}, (32, 32)),  # from its position embeddings
        ({"img_size": 48}, (48, 48)),
        ({"image_size": (32, 64)}, (32, 64)),
        ({"pos_embed": None}, (224, 224)),
    ],
)
def test_the_size_of_its_images(change: dict[str, Any], size: tuple[int, int]) -> None:
    model = hand_made()
    for name, value in change.items():
        setattr(model, name, value)
    anatomy = find_anatomy(model)
    assert anatomy.image_size == size
    assert anatomy.layout(size).grid == (size[0] // 8, size[1] // 8)


def test_a_stem_of_several_convolutions_needs_the_models_word() -> None:
    model = hand_made()
    model.proj = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 32, 4, 4))
    with pytest.raises(Exception, match="has no convolution that cuts images into patches"):
        find_anatomy(model)
    layout = recognise(hand_made()).layout((32, 32))
    with torch.no_grad(), capture(model, layout=layout) as attention:
        model(images())
    assert attention.layout == layout
