"""What every source of images does when it is told how to be read: its batches, how many, what it cannot heed."""

from __future__ import annotations

from collections.abc import Generator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from vitprobe.data.bands import Wanted
from vitprobe.data.images import Images
from vitprobe.data.reading import Reading
from vitprobe.data.shards import Share
from vitprobe.data.sources import open_images
from vitprobe.data.streams import Sample, StreamImages

PIXELS = torch.arange(150).view(-1, 1, 1, 1).expand(-1, 3, 2, 2).float()


class Pictures(StreamImages):
    """A stream of 150 pictures in two parts, each of the shade that is its number."""

    def samples(self, part: int) -> Generator[Sample, None, None]:
        for number in range(100) if part == 0 else range(100, 150):
            Image.new("RGB", (2, 2), (number,) * 3).save(file := BytesIO(), "PNG")
            yield Sample(str(number), file.getvalue())

    def fingerprint(self) -> str:
        return ""


def to_tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float()


SOURCES = {
    "tensor": lambda: open_images(PIXELS),
    "loader": lambda: open_images(DataLoader(list(PIXELS), batch_size=40)),
    "stream": lambda: Pictures("a stream", 2, None),
}


def shades(images: Images, reading: Reading, share: Share | None = None) -> list[int]:
    return [int(pixel) for batch in images.batches(reading, share) for pixel in batch.pixels[:, 0, 0, 0]]


@pytest.mark.parametrize("source", SOURCES)
def test_all_images_come_once_in_their_order(source: str) -> None:
    images, reading = SOURCES[source](), Reading(to_tensor, 16, workers=0)
    for share in (None, Share()):
        assert shades(images, reading, share) == list(range(150))
        assert images.total(reading, share) in (150, None)
    assert images.unheeded(Reading(to_tensor, 16)) == []


@pytest.mark.parametrize("source", SOURCES)
def test_a_number_of_images_is_what_comes_and_what_is_announced(source: str) -> None:
    images, reading = SOURCES[source](), Reading(to_tensor, 16, num_images=70, seed=3, workers=0)
    found = shades(images, reading, Share())
    assert len(set(found)) == len(found) == images.total(reading) == images.total(reading, Share()) == 70
    if images.listed:  # drawn
        assert found == np.random.default_rng(3).permutation(150)[:70].tolist()
    else:  # the first ones
        assert found == list(range(70))


def test_a_listed_source_may_be_shuffled_whole_and_shared() -> None:
    images, reading = open_images(PIXELS), Reading(to_tensor, 16, shuffled=True, seed=1, workers=0)
    order = np.random.default_rng(1).permutation(150).tolist()
    assert shades(images, reading) == order
    share = Share(1, 2)
    assert shades(images, reading, share) == order[64:128] and images.total(reading, share) == 64


def test_what_a_source_is_and_what_it_leaves_unheeded() -> None:
    asked = Reading(to_tensor, 16, num_images=9, workers=2)
    said = {name: make() for name, make in SOURCES.items()}
    assert {name: (of.listed, of.streamed, of.resumable) for name, of in said.items()} == {
        "tensor": (True, False, True),
        "loader": (False, False, False),
        "stream": (False, True, True),
    }
    assert {name: of.unheeded(asked) for name, of in said.items()} == {
        "tensor": [],
        "loader": ["workers are those of the DataLoader (num_workers)"],
        "stream": ["a stream is a stream, of which the first 9 images are taken"],
    }


@pytest.mark.parametrize("source", SOURCES)
def test_other_groups_leave_the_source_as_it_was(source: str) -> None:
    images, reading = SOURCES[source](), Reading(to_tensor, 16, num_images=4, workers=0)
    again = images.regrouped(lambda name: f"of {int(name) // 2}")
    (batch,) = again.batches(reading, Share())
    assert batch.groups == [f"of {int(name) // 2}" for name in batch.names]
    (before,) = images.batches(reading, Share())
    assert before.groups == before.names == batch.names


def test_other_groups_of_a_stack_hold_for_any_channels(tmp_path: Path) -> None:
    np.save(tmp_path / "stack.npy", np.zeros((5, 40, 20), np.uint8))
    images = open_images(tmp_path / "stack.npy")
    again = images.regrouped(lambda name: f"film {name}")
    assert again.groups == ["film 0", "film 1", "film 2", "film 3", "film 4"] and images.groups == images.names
    assert again.for_model(Wanted(5)).groups == ["film 0"]  # one image of five channels
