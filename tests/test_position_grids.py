"""Of which grid a table of positions is: taken as it is where it fits, resampled from what it is, and said."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from vitprobe.models.checkpoints import load_into
from vitprobe.models.loading import load_model

ARCH = "vit_tiny_patch16_224"


def small(size, **options) -> VisionTransformer:
    torch.manual_seed(0)
    settings = {"img_size": size, "patch_size": 8, "embed_dim": 64, "depth": 1, "num_heads": 2, "num_classes": 0}
    model = VisionTransformer(**{**settings, **options})
    model.pretrained_cfg = {"input_size": (3, 96, 96), "architecture": "small"}  # type: ignore[assignment]
    return model


def smooth(rows: int, columns: int, dim: int = 64) -> Tensor:
    """Sines and cosines of rows and columns, as MAE has them: half of the channels each; `(patch, dim)`."""

    def waves(count: int) -> Tensor:
        turns = torch.arange(count)[:, None] * 10000.0 ** (-torch.arange(dim // 4) / (dim // 4))[None]
        return torch.cat([turns.sin(), turns.cos()], dim=1)

    down, across = waves(rows), waves(columns)
    return torch.cat([down[:, None].expand(rows, columns, -1), across[None].expand(rows, columns, -1)], dim=2).reshape(
        rows * columns, dim
    )


def with_table(model: VisionTransformer, patches: Tensor) -> dict[str, Tensor]:
    prefix = model.pos_embed.shape[1] - math.prod(model.patch_embed.grid_size)
    head = torch.randn(1, prefix, model.embed_dim, generator=torch.Generator().manual_seed(3))
    return model.state_dict() | {"pos_embed": torch.cat([head, patches[None]], dim=1)}


def noise(count: int) -> Tensor:
    return torch.randn(count, 64, generator=torch.Generator().manual_seed(5))


PREFIXES = pytest.mark.parametrize(
    "options",
    [{}, {"class_token": False, "global_pool": "avg"}, {"reg_tokens": 4}, {"reg_tokens": 4, "no_embed_class": True}],
)


@PREFIXES
@pytest.mark.parametrize("table", [noise(144), smooth(6, 24)], ids=["noise", "smooth"])
def test_a_rectangular_table_of_a_square_number_is_taken_as_it_is(options, table):
    """6×24 is as many as the architecture's own 12×12, and as a square."""
    target = small((48, 192), **options)
    state = with_table(small((48, 192), **options), table)
    assert load_into(target, state, source="it") == ()
    assert torch.equal(target.pos_embed, state["pos_embed"])
    assert not hasattr(target, "pretrained_model_args")


@PREFIXES
def test_a_square_table_is_not_taken_for_a_rectangular_one(options):
    """Of the same length: which grid it is, its neighbours tell."""
    target, source = small((48, 192), **options), small(96, **options)
    state = with_table(source, smooth(12, 12))
    assert load_into(target, state, source="it") == (
        "the 144 positions in the file look like those of a grid of 12×12, and were resampled to a grid of 6×24",
    )
    prefix = 0 if options.get("no_embed_class") else target.num_prefix_tokens
    wanted = resample_abs_pos_embed(state["pos_embed"], [6, 24], [12, 12], prefix)
    assert torch.equal(target.pos_embed, wanted)


def test_a_rectangular_table_is_seen_in_a_square_model():
    target = small(96)
    state = with_table(small((48, 192)), smooth(6, 24))
    (remark,) = load_into(target, state, source="it")
    assert (
        remark
        == "the 144 positions in the file look like those of a grid of 6×24, and were resampled to a grid of 12×12"
    )
    assert torch.equal(target.pos_embed, resample_abs_pos_embed(state["pos_embed"], [12, 12], [6, 24], 1))


@pytest.mark.parametrize("table", [noise(144), smooth(12, 12)], ids=["noise", "smooth"])
@pytest.mark.parametrize("size", [96, 64, (64, 128)])
def test_nothing_is_said_of_a_table_of_the_architectures_own_grid(table, size):
    target = small(size)
    assert load_into(target, with_table(small(96), table), source="it") == ()
    if size == 96:
        assert torch.equal(target.pos_embed[0, 1:], table)


def test_an_assumed_grid_is_said():
    target = small(96)
    assert load_into(target, with_table(small(64), noise(64)), source="it") == (
        "the 64 positions in the file were taken as those of a grid of 8×8 and resampled to a grid of 12×12",
    )


@pytest.mark.parametrize("rows", [4, 8, 16, 32])
def test_any_grid_is_seen_in_its_positions(rows):
    target = small(96)
    state = with_table(small((8 * rows, 8 * 128 // rows)), smooth(rows, 128 // rows))
    (remark,) = load_into(target, state, source="it")
    assert remark == f"the 128 positions in the file were taken as those of a grid of {rows}×{128 // rows}"
    wanted = resample_abs_pos_embed(state["pos_embed"], [12, 12], [rows, 128 // rows], 1)
    assert torch.equal(target.pos_embed, wanted)


def test_by_name_and_size(tmp_path):
    torch.manual_seed(1)
    source = timm.create_model(ARCH, num_classes=0, img_size=(112, 448))
    source.pos_embed.data.normal_()
    torch.save(source.state_dict(), path := tmp_path / "file.pth")
    model = load_model(path, arch=ARCH, img_size=(112, 448))
    assert model.layout.grid == (7, 28)
    assert torch.equal(model.module.pos_embed, source.pos_embed)
    assert model.remarks == ()
