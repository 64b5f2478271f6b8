"""NaFlexVit's batches of images with grids of their own, padded to one length."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from helpers import assert_close, captured, message, tiny
from vitprobe.errors import AttentionNotSeenError, UserError
from vitprobe.hooks.capture import capture
from vitprobe.layout import TokenLayout


def naflex(**options: int) -> nn.Module:
    return tiny("naflexvit_base_patch16_gap", patch_size=8, **options)


def patches_of(*grids: tuple[int, int]) -> dict[str, Tensor]:
    """A batch of random images of these grids, as NaFlexVit takes it."""
    generator = torch.Generator().manual_seed(3)
    longest = max(rows * columns for rows, columns in grids)
    batch = {
        "patches": torch.randn(len(grids), longest, 192, generator=generator),
        "patch_coord": torch.zeros(len(grids), longest, 2, dtype=torch.long),
        "patch_valid": torch.zeros(len(grids), longest, dtype=torch.bool),
    }
    for image, (rows, columns) in enumerate(grids):
        places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        batch["patch_coord"][image, : len(places)] = places
        batch["patch_valid"][image, : len(places)] = True
    return batch


def alone(batch: dict[str, Tensor], image: int) -> dict[str, Tensor]:
    count = int(batch["patch_valid"][image].sum())
    return {name: value[image : image + 1, :count] for name, value in batch.items()}


@pytest.mark.parametrize("keep", ["qk", "statistics"])
def test_padding_changes_no_statistic(keep: str) -> None:
    """Padded queries and keys are dropped: each image has the values that it has alone."""
    model, batch = naflex(), patches_of((4, 4), (2, 5), (3, 3))
    together = captured(model, batch, keep=keep).statistics()
    for image in range(3):
        expected = captured(model, alone(batch, image)).statistics()
        assert set(together) == set(expected) and "patch_update_ratio" in together
        for name in expected:
            assert_close(together[name][image : image + 1], expected[name], tolerance=1e-4)


def test_images_of_one_grid_are_one_view_and_others_are_not() -> None:
    attention = captured(naflex(), patches_of((2, 5), (4, 4)))
    registers = attention.views(0)[0].layout.num_registers
    assert [view.layout.grid for view in attention.views(0)] == [(2, 5), (4, 4)]
    assert [view.probabilities().shape[-1] for view in attention.views(1)] == [10 + registers, 16 + registers]
    assert attention.layout is None and isinstance(attention.layouts, tuple)
    with pytest.raises(UserError) as error:
        attention[0]
    assert message(error) == (
        "these images have different patch grids and no view in common; read views(block), one by one"
    )
    attention = captured(naflex(), patches_of((2, 5), (2, 5)))
    assert isinstance(attention.layout, TokenLayout) and attention[0].probabilities().shape[0] == 2


def test_patches_whose_grid_cannot_be_known() -> None:
    model, batch = naflex(), patches_of((4, 4), (2, 5))
    batch["patch_valid"][1, 3] = False  # padding between patches
    with pytest.raises(AttentionNotSeenError) as error, torch.no_grad(), capture(model):
        model(batch)
    assert message(error).startswith(
        "image 1 of the batch that NaFlexVit got has 9 patches that do not fill a grid row by row"
    )
    batch = patches_of((4, 4))
    with pytest.raises(AttentionNotSeenError, match="got patches without patch_coord"), capture(model):
        model.embeds(batch["patches"])
