"""Batches of labelled images: the crops that training draws, batched against one by one, and against torchvision."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resized_crop, to_tensor

from helpers import message
from vitprobe.data.augment import Augmentation, AugmentedImages, augment_held, draw_crops
from vitprobe.data.images import ListImages
from vitprobe.data.labelled import LabelledSet
from vitprobe.data.labelled_batches import LabelledBatch, batches, shuffled
from vitprobe.data.subsets import hold
from vitprobe.data.transforms import ImageTransform
from vitprobe.errors import UserError

TRANSFORM = ImageTransform("model", (12, 16), 1.0, "center", "bilinear", (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
# values of 0 to 255 come back exactly
PLAIN = replace(TRANSFORM, mean=(0.0, 0.0, 0.0), std=(1 / 255, 1 / 255, 1 / 255))


def noise(count: int, height: int = 20, width: int = 17, seed: int = 0) -> list[Image.Image]:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    return [Image.fromarray(picture) for picture in pixels]


def labelled(pictures: list) -> LabelledSet:
    return LabelledSet(ListImages(pictures), np.arange(len(pictures), dtype=np.int64) % 3)


def mixed_sizes(count: int) -> LabelledSet:
    return labelled([picture for i in range(count) for picture in noise(1, 20 + i % 3, 17, seed=i)])


def together(given: list[LabelledBatch]) -> Tensor:
    return torch.cat([batch.pixels for batch in given])


def test_one_crop_is_torchvisions() -> None:
    picture, augmentation = noise(1)[0], Augmentation()
    images = ListImages([picture] * 40)
    augmented = AugmentedImages(images, augmentation, TRANSFORM, seed=3, epoch=2)
    flips = 0
    for index in range(40):
        top, left, height, width, flipped = (
            part.item() for part in draw_crops(augmentation, [index], picture.height, picture.width, 3, 2)
        )
        expected = resized_crop(picture, top, left, height, width, [12, 16], InterpolationMode.BICUBIC)
        pixels = to_tensor(expected).flip(2) if flipped else to_tensor(expected)
        mean, std = (torch.tensor(part)[:, None, None] for part in (TRANSFORM.mean, TRANSFORM.std))
        torch.testing.assert_close(augmented.read(index), (pixels - mean) / std)
        flips += flipped
    assert 10 < flips < 30
    assert augmented.fingerprint() == images.fingerprint()


def test_a_batch_of_crops_is_each_picture_s_own() -> None:
    """Rounding may fall to the other side in a few values."""
    for height, width in ((12, 16), (7, 16), (12, 3), (8, 8)):
        held = hold(ListImages(noise(64, height, width)))
        assert held is not None
        one_by_one = AugmentedImages(held, Augmentation(), PLAIN, seed=1, epoch=5)
        expected = torch.stack([one_by_one.read(index) for index in range(64)])
        apart = (augment_held(held.pixels, range(64), Augmentation(), PLAIN, 1, 5) - expected).abs()
        assert apart.max() < 1.001 and (apart > 0.5).float().mean() < 5e-3


def test_the_whole_picture_unflipped_is_the_picture() -> None:
    pictures = noise(4, 12, 16)
    held = hold(ListImages(pictures))
    assert held is not None
    whole = Augmentation(scale=(1.0, 1.0), ratio=(16 / 12, 16 / 12), flip=False)
    crops = augment_held(held.pixels, range(4), whole, PLAIN, 0, 0)
    torch.testing.assert_close(crops, held.pixels.float(), rtol=0, atol=1e-3)


def test_chunks_of_a_batch_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    held = hold(ListImages(noise(10, 10, 10)))
    assert held is not None
    whole = augment_held(held.pixels, range(10), Augmentation(), TRANSFORM, 0, 0)
    monkeypatch.setattr("vitprobe.data.augment.BATCH_NUMBERS", 3 * 12 * 16 * 4)
    torch.testing.assert_close(augment_held(held.pixels, range(10), Augmentation(), TRANSFORM, 0, 0), whole)


def test_crops_are_of_the_announced_shares() -> None:
    augmentation = Augmentation(scale=(0.2, 0.6))
    crops = draw_crops(augmentation, range(4000), 200, 160, seed=0, epoch=0)
    area, ratio = crops.height * crops.width / (200 * 160), crops.width / crops.height
    assert area.min() > 0.15 and area.max() < 0.61  # a crop wider than the picture is cut
    assert abs(np.median(area) - 0.4) < 0.02
    assert ratio.min() > 0.73 and ratio.max() < 1.37 and abs(np.median(np.log(ratio))) < 0.03
    assert (crops.top >= 0).all() and (crops.top + crops.height <= 200).all()
    assert (crops.left >= 0).all() and (crops.left + crops.width <= 160).all()
    assert abs(crops.flipped.mean() - 0.5) < 0.03
    assert not draw_crops(replace(augmentation, flip=False), range(100), 20, 20, 0, 0).flipped.any()
    tiny = draw_crops(Augmentation(scale=(1e-9, 1e-9)), range(5), 3, 3, 0, 0)
    assert (tiny.height == 1).all() and (tiny.width == 1).all()


def test_a_draw_depends_on_seed_epoch_and_number() -> None:
    def drawn(*of: int) -> list[int]:
        return [part.item() for part in draw_crops(Augmentation(), [of[0]], 1000, 1000, *of[1:])]

    assert drawn(3, 0, 0) == drawn(3, 0, 0)
    assert len({tuple(drawn(*of)) for of in ((3, 0, 0), (4, 0, 0), (3, 1, 0), (3, 0, 1))}) == 4


def test_order_batch_and_workers_change_no_crop() -> None:
    for split in (labelled(noise(12, 9, 9)), labelled(noise(12)), mixed_sizes(12)):
        how: dict[str, Any] = {"augment": Augmentation(), "seed": 5, "epoch": 1}
        whole = together(list(batches(split, TRANSFORM, 12, **how)))
        order = shuffled(range(12), 0, 1)
        given = list(batches(split, TRANSFORM, 5, order=order, workers=1, **how))
        assert [len(batch.indices) for batch in given] == [5, 5, 2]
        assert [index for batch in given for index in batch.indices] == order
        torch.testing.assert_close(together(given), whole[order])
        labels = torch.cat([batch.labels for batch in given])
        assert labels.dtype == torch.int64 and labels.tolist() == split.labels[order].tolist()
        assert not torch.equal(together(list(batches(split, TRANSFORM, 12, **(how | {"epoch": 2})))), whole)


def test_large_held_pictures_go_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    split = labelled(noise(6, 10, 10))
    small = together(list(batches(split, PLAIN, 6, augment=Augmentation())))
    monkeypatch.setattr("vitprobe.data.augment.LARGEST_SIDE", 9)
    monkeypatch.setattr("vitprobe.data.labelled_batches.augment_held", None)
    large = together(list(batches(split, PLAIN, 6, augment=Augmentation())))
    assert (large - small).abs().max() < 1.001


@pytest.mark.parametrize("workers", [0, 1, None])
def test_without_augmentation_the_transform_is_the_models(workers: int | None) -> None:
    pictures = noise(7)
    for split in (labelled(pictures), LabelledSet(ListImages([*pictures, *noise(1, 30)]), np.zeros(8, np.int64))):
        given = list(batches(split, TRANSFORM, 3, order=range(7), workers=workers))
        torch.testing.assert_close(together(given), torch.stack([TRANSFORM(picture) for picture in pictures]))
        assert [batch.indices for batch in given] == [[0, 1, 2], [3, 4, 5], [6]]


@pytest.mark.parametrize("augment", [None, Augmentation()])
@pytest.mark.parametrize("sizes", ["small", "alike", "differing"])
def test_bad_images_are_dropped_and_reported(tmp_path: Path, augment: Augmentation | None, sizes: str) -> None:
    side = {"small": 8, "alike": 20, "differing": 20}[sizes]
    pictures = [noise(1, side + (i if sizes == "differing" else 0), 8)[0] for i in range(6)]
    paths = [tmp_path / f"{i}.png" for i in range(6)]
    for path, picture in zip(paths, pictures, strict=True):
        picture.save(path)
    for number in (2, 3, 4):
        paths[number].write_bytes(b"" if number == 3 else b"no picture")
    given = list(batches(labelled(paths), TRANSFORM, 2, augment=augment, workers=0))
    assert [batch.indices for batch in given] == [[0, 1], [], [5]]
    assert [batch.labels.tolist() for batch in given] == [[0, 1], [], [2]]
    assert given[1].pixels.shape == (0, 3, 12, 16)
    assert [name for batch in given for name, _ in batch.skipped] == [path.as_posix() for path in paths[2:5]]
    assert dict(given[1].skipped)[paths[3].as_posix()] == "the file is empty"


def test_shuffled() -> None:
    positions = [4, 7, 9, 11, 30]
    assert sorted(shuffled(positions, 0, 0)) == positions
    assert shuffled(range(50), 0, 0) == shuffled(range(50), 0, 0) != shuffled(range(50), 0, 1)
    assert shuffled(range(50), 1, 0) != shuffled(range(50), 0, 0)


def test_augmentation_as_json_holds_it() -> None:
    assert Augmentation(flip=False).describe() == {"scale": [0.08, 1.0], "ratio": [3 / 4, 4 / 3], "flip": False}


@pytest.mark.parametrize("augment", [None, Augmentation()])
def test_no_batch_is_smaller_than_one(augment: Augmentation | None) -> None:
    with pytest.raises(UserError) as caught:
        list(batches(labelled(noise(3)), TRANSFORM, 0, augment=augment))
    assert "batch size 0" in message(caught)
