"""Batches: nothing lost, nothing replaced, whatever reads them."""

from __future__ import annotations

import io
import multiprocessing
import os
import random
import tarfile
from collections import UserDict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from vitprobe.data.batches import Batch, default_workers, iterate
from vitprobe.data.reading import Reading
from vitprobe.data.sources import open_images
from vitprobe.data.transforms import ImageTransform
from vitprobe.errors import UserError

TRANSFORM = ImageTransform("model", (8, 8), 1.0, "center", "bicubic", (0.0,) * 3, (1.0,) * 3)
WHOLE = Reading(TRANSFORM, batch_size=64, workers=0)
# from Python 3.12 on, forking warns where torch runs threads; the readers do not use what those hold
FORK = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten pictures, each of one grey that tells its number; the 3rd cut off, the 4th no image, the 8th empty."""
    for i in range(10):
        Image.new("RGB", (12, 9), (i * 20,) * 3).save(tmp_path / f"{i}.png")
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(stream, "JPEG")
    content = stream.getvalue()
    for i, bad in {3: content[: len(content) // 2], 4: b"text", 8: b""}.items():
        (tmp_path / f"{i}.png").write_bytes(bad)
    return tmp_path


GOOD, BAD = [0, 1, 2, 5, 6, 7, 9], ["3.png", "4.png", "8.png"]


def check(batches: list[Batch], good: list[int]) -> None:
    """Every good image once, in order, with its own pixels; every bad one reported once."""
    assert [i for batch in batches for i in batch.indices] == good
    for batch in batches:
        assert len(batch) == len(batch.indices) == len(batch.names) == len(batch.groups) == len(batch.pixels)
        assert batch.names == batch.groups == [f"{i}.png" for i in batch.indices]
        assert batch.pixels.dtype == torch.float32
        for i, pixels in zip(batch.indices, batch.pixels, strict=True):
            assert torch.allclose(pixels, torch.full((3, 8, 8), i * 20 / 255))
    assert sorted(name for batch in batches for name, _ in batch.skipped) == BAD
    reasons = dict(pair for batch in batches for pair in batch.skipped)
    assert "truncated" in reasons["3.png"] and reasons["8.png"] == "the file is empty"


def test_the_check_can_fail(folder):
    batches = list(iterate(open_images(folder), range(10), TRANSFORM, 10))
    batches[0].pixels[1] = batches[0].pixels[0]
    with pytest.raises(AssertionError):
        check(batches, GOOD)


@pytest.mark.parametrize("batch_size", [1, 3, 10, 64])
def test_bad_images_are_dropped_and_reported(folder, batch_size):
    batches = list(iterate(open_images(folder), range(10), TRANSFORM, batch_size))
    assert len(batches) == -(-10 // batch_size)
    check(batches, GOOD)


def test_the_order_asked_for(folder):
    order = [9, 3, 0, 8, 4, 1]
    batches = list(iterate(open_images(folder), np.array(order).tolist(), TRANSFORM, 2))
    check(batches, [9, 0, 1])
    assert [len(batch) for batch in batches] == [1, 1, 1]
    assert [batch.skipped[0][0] for batch in batches] == ["3.png", "8.png", "4.png"]


def test_a_batch_of_bad_images_alone(folder):
    batches = list(iterate(open_images(folder), [3, 4, 8], TRANSFORM, 3))
    assert len(batches) == 1 and batches[0].pixels.shape == (0, 3, 8, 8) and len(batches[0]) == 0
    assert [name for name, _ in batches[0].skipped] == BAD
    assert next(iterate(open_images(folder), [3], to_tensor, 1)).pixels.shape == (0, 3, 0, 0)


def test_nothing_asked_for(folder):
    assert list(iterate(open_images(folder), [], TRANSFORM, 4)) == []


@FORK
@pytest.mark.parametrize(("method", "workers"), [("fork", 2), ("spawn", 1)])  # to spawn takes seconds each
def test_workers_give_the_same(folder, method, workers):
    images = open_images(folder)
    images.read(0)
    check(list(iterate(images, range(10), TRANSFORM, 3, workers=workers, start_method=method)), GOOD)


@FORK
def test_workers_on_tensors_and_a_tar(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("tar") / "x.tar"
    with tarfile.open(path, "w") as tar:
        for i in range(10):
            tar.add(folder / f"{i}.png", f"{i}.png")
    images = open_images(path)
    images.read(0)
    check(list(iterate(images, range(10), TRANSFORM, 2, workers=2)), GOOD)
    pixels = torch.randn(5, 3, 8, 8)
    batches = list(iterate(open_images(pixels), range(5), TRANSFORM, 2, workers=1))
    assert torch.equal(torch.cat([batch.pixels for batch in batches]), pixels)  # not transformed again


def test_groups_follow_their_images(folder):
    images = open_images(folder, groups=[f"film {i // 5}" for i in range(10)])
    batch = next(iterate(images, [9, 3, 2], TRANSFORM, 3))
    assert (batch.names, batch.groups) == (["9.png", "2.png"], ["film 1", "film 0"])


def test_the_callers_random_numbers_are_left_alone(folder):
    torch.manual_seed(0)
    random.seed(0)
    before = torch.get_rng_state()
    list(iterate(open_images(folder), range(10), TRANSFORM, 3))
    assert torch.equal(torch.get_rng_state(), before)


def test_half_precision_tensors_come_as_float32():
    pixels = torch.randn(2, 3, 8, 8).half()
    batch = next(iterate(open_images(pixels), range(2), TRANSFORM, 2))
    assert torch.equal(batch.pixels, pixels.float()) and batch.pixels.dtype == torch.float32


def test_pinning_keeps_the_rest(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self.shape) or self)
    batch = Batch(torch.zeros(1, 3, 2, 2), [4], ["x"], ["g"], [("y", "why")])
    again = batch.pin_memory()
    assert pinned == [(1, 3, 2, 2)]
    assert (again.indices, again.names, again.groups, again.skipped) == ([4], ["x"], ["g"], [("y", "why")])


# ---------------------------------------------------------------------------------------------------------- mistakes


def to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def to_text(image: Image.Image) -> str:
    return "no tensor"


def to_bytes(image: Image.Image) -> torch.Tensor:
    return to_tensor(image).to(torch.uint8)


def to_death(image: Image.Image) -> torch.Tensor:
    os._exit(1)


def to_error(image: Image.Image) -> torch.Tensor:
    raise RuntimeError("the transform's own mistake")


def refusal(batches) -> str:
    with pytest.raises(UserError) as caught:
        list(batches)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@FORK
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_images_of_two_sizes(workers, batch_size):
    images = open_images([torch.zeros(3, 8, 8), torch.zeros(3, 8, 9)])
    assert refusal(iterate(images, range(2), TRANSFORM, batch_size, workers=workers)) == (
        "image 1 is 8×9 pixels where those before it are 8×8: "
        "give images of one size, or files and PIL images, which are resized"
    )


@FORK
@pytest.mark.parametrize("workers", [0, 1])
def test_a_transform_that_makes_no_image(folder, workers):
    images = open_images(folder)
    end = "of image 0.png: it must give a float tensor (3, height, width)"
    assert refusal(iterate(images, [0], to_text, 1, workers)) == f"the transform made a str {end}"
    assert refusal(iterate(images, [0], to_bytes, 1, workers)) == (
        f"the transform made a tensor of uint8 with the shape (3, 9, 12) {end}"
    )


@FORK
def test_leaving_early_ends_the_workers(folder):
    before = set(multiprocessing.active_children())
    batches = iterate(open_images(folder), range(10), TRANSFORM, 1, workers=1)
    next(batches)
    started = set(multiprocessing.active_children()) - before
    assert len(started) == 1
    batches.close()
    assert not started & set(multiprocessing.active_children())


@FORK
def test_a_worker_that_dies(folder):
    assert refusal(iterate(open_images(folder), range(10), to_death, 2, workers=1)) == (
        "a process that reads images died (most often memory or shared memory ran out): "
        "use fewer workers, 0 to read in the main process, or smaller batches"
    )


def test_a_transforms_own_error_is_not_hidden(folder):
    with pytest.raises(RuntimeError, match="the transform's own mistake"):
        list(iterate(open_images(folder), range(10), to_error, 2))


@pytest.mark.parametrize(("batch_size", "workers"), [(0, 0), (2, -1)])
def test_impossible_numbers(folder, batch_size, workers):
    with pytest.raises(UserError) as caught:  # at once, not when the first batch is asked for
        iterate(open_images(folder), range(10), TRANSFORM, batch_size, workers)
    assert str(caught.value) == (
        f"batch size {batch_size} with {workers} workers cannot be: at least 1, and 0 workers or more"
    )


# ------------------------------------------------------------------------------------------------- a user's DataLoader


def as_tuple(items):
    return tuple(torch.stack(part) for part in zip(*items, strict=True))


def as_tensor(items):
    return as_tuple(items)[0]


def as_dict(items):
    return {"pixel_values": as_tensor(items), "labels": as_tuple(items)[1]}


def as_images(items):
    return UserDict(images=as_tensor(items))


def as_image(items):
    return {"image": as_tensor(items).double()}


@pytest.mark.parametrize("collate", [None, as_tuple, as_tensor, as_dict, as_images, as_image])
def test_what_a_loader_may_give(collate):
    pixels = torch.randn(7, 3, 8, 8)
    loader = DataLoader(TensorDataset(pixels, torch.arange(7)), batch_size=3, collate_fn=collate)
    batches = list(open_images(loader).batches(WHOLE))
    assert [batch.indices for batch in batches] == [[0, 1, 2], [3, 4, 5], [6]]
    assert [name for batch in batches for name in batch.names] == list("0123456")
    assert all(batch.names == batch.groups and batch.skipped == [] for batch in batches)
    assert torch.equal(torch.cat([batch.pixels for batch in batches]), pixels)


def test_groups_of_a_loader():
    loader = DataLoader(TensorDataset(torch.zeros(4, 3, 2, 2)), batch_size=3)
    images = open_images(loader, groups=["a", "a", "b", "b"])
    assert [batch.groups for batch in images.batches(WHOLE)] == [["a", "a", "b"], ["b"]]


def loading(batch) -> DataLoader:
    return DataLoader([batch], batch_size=None, collate_fn=lambda given: given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("batch", "came"),
    [
        ("text", "a str"),
        ({"pixels": 1, "labels": 2}, "a dict with the keys 'pixels', 'labels'"),
        ([], "a list of nothing"),
        (("path", torch.zeros(2)), "a tuple of str, Tensor"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), "a tensor of uint8 with the shape (2, 3, 4, 4)"),
        ((torch.zeros(3, 4, 4), 1), "a tensor of float32 with the shape (3, 4, 4)"),
        ({"image": torch.zeros(2, 4, 4, 3)}, "a tensor of float32 with the shape (2, 4, 4, 3)"),
    ],
)
def test_what_a_loader_may_not_give(batch, came):
    assert refusal(open_images(loading(batch)).batches(WHOLE)) == (
        f"the DataLoader gave {came}: a batch is a float tensor (n, 3, height, width), normalised for the model, "
        f"a tuple or list that begins with it, or a dict with it under 'pixel_values', 'image', 'images'"
    )


def test_a_loader_with_images_of_two_sizes():
    loader = DataLoader([torch.zeros(2, 3, 8, 8), torch.zeros(1, 3, 4, 8)], batch_size=None)  # type: ignore[arg-type]
    assert refusal(open_images(loader).batches(WHOLE)).startswith(
        "image 2 is 4×8 pixels where those before it are 8×8: "
    )


@pytest.mark.parametrize(
    ("images", "cores", "workers"),
    [(0, 8, 0), (255, 64, 0), (256, 1, 1), (256, 2, 1), (1000, 4, 3), (10**6, 9, 8), (10**6, 128, 8)],
)
def test_how_many_workers(images, cores, workers):
    assert default_workers(images, cores) == workers


def test_workers_by_the_cores_this_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(5)), raising=False)
    assert default_workers(1000) == 4
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert default_workers(1000) == 1
