"""Labelled sets: which image has which label, in every shape they come in, and what is said of those that have none."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import message
from vitprobe.data.decoding import BadImageError
from vitprobe.data.labelled import LabelledData, open_labelled
from vitprobe.data.sources import open_images
from vitprobe.data.subsets import hold
from vitprobe.errors import UserError

TREE = {"train": ["cat/a.png", "cat/b.png", "dog/a.png"], "val": ["cat/z.png", "dog/z.png"]}


def png(number: int = 0, size: tuple[int, int] = (6, 5)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, (number, 10, 20)).save(stream, "PNG")
    return stream.getvalue()


def write_folder(root: Path, names: list[str], content: Callable[[int], bytes] = png) -> Path:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content(number))
    return root


def write_tar(path: Path, names: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = len(png(number))
            tar.addfile(info, io.BytesIO(png(number)))
    return path


def write_tree(root: Path, tree: dict[str, list[str]]) -> Path:
    for part, names in tree.items():
        write_folder(root / part, names)
    return root


def assert_is_tree(data: LabelledData) -> None:
    assert data.classes == ("cat", "dog")
    assert data.train.labels.tolist() == [0, 0, 1] and data.test.labels.tolist() == [0, 1]
    assert (len(data.train), len(data.test)) == (3, 2)
    assert [np.asarray(data.train.images.read(i))[0, 0, 0] for i in range(3)] == [0, 1, 2]
    assert [name.split("/")[-2:] for name in data.test.ids] == [["cat", "z.png"], ["dog", "z.png"]]


def refusal(data, **options) -> str:
    with pytest.raises(UserError) as caught:
        open_labelled(data, **options)
    return message(caught)


@pytest.mark.parametrize("test", ["val", "valid", "validation", "test"])
def test_a_folder(tmp_path: Path, test: str) -> None:
    data = open_labelled(write_tree(tmp_path / "pets", {"train": TREE["train"], test: TREE["val"]}))
    assert_is_tree(data)
    assert data.name == "pets" and data.mirrors


def test_a_folder_of_two_tars(tmp_path: Path) -> None:
    for part, names in TREE.items():
        write_tar(tmp_path / f"{part}.tar", names)
    assert_is_tree(open_labelled(str(tmp_path)))


def test_a_pair_of_paths_in_every_way_to_write_it(tmp_path: Path) -> None:
    train, test = write_tar(tmp_path / "a_train.tar", TREE["train"]), write_folder(tmp_path / "b", TREE["val"])
    for given in ((train, test), [str(train), str(test)], f"{train},{test}", f"{train}, {test}"):
        data = open_labelled(given)
        assert_is_tree(data)
        assert data.name == "a_train.tar, b"
    assert open_labelled(data) is data


def test_a_comma_in_the_name_of_a_folder(tmp_path: Path) -> None:
    assert_is_tree(open_labelled(str(write_tree(tmp_path / "cats,dogs", TREE))))


@pytest.mark.parametrize("around", ["", "./", "data/pets/"])
def test_one_tar_with_both_parts(tmp_path: Path, around: str) -> None:
    names = [f"{around}{part}/{name}" for part, inside in TREE.items() for name in inside]
    data = open_labelled(write_tar(tmp_path / "pets.tar", names))
    assert data.classes == ("cat", "dog")
    assert data.train.labels.tolist() == [0, 0, 1] and data.test.labels.tolist() == [0, 1]
    assert np.asarray(data.test.images.read(1))[0, 0, 0] == 4
    assert data.test.images.source.endswith("val")


def test_folders_around_the_classes_of_a_tar_do_not_count(tmp_path: Path) -> None:
    pair = [
        write_tar(tmp_path / f"{part}.tar", [f"pets/{part}/{name}" for name in names]) for part, names in TREE.items()
    ]
    assert open_labelled(pair).classes == ("cat", "dog")


def test_a_tar_of_class_tars(tmp_path: Path) -> None:
    """As ImageNet's own training set is: the class is the inner tar's name."""
    inner = [write_tar(tmp_path / f"{name}.tar", ["1.png", "2.png"]) for name in ("cat", "dog")]
    with tarfile.open(tmp_path / "outer.tar", "w") as tar:
        for path in inner:
            tar.add(path, path.name)
    data = open_labelled((tmp_path / "outer.tar", write_folder(tmp_path / "val", TREE["val"])))
    assert data.classes == ("cat", "dog")
    assert [name.split(".")[0] for name in data.train.ids] == [data.classes[label] for label in data.train.labels]
    assert len(data.train) == 4


def test_deeper_folders_belong_to_the_class_above(tmp_path: Path) -> None:
    tree = {"train": ["cat/images/a.png", "dog/images/b.png"], "val": TREE["val"]}
    assert open_labelled(write_tree(tmp_path, tree)).train.labels.tolist() == [0, 1]


def test_the_fingerprint_tells_labels_and_images_apart(tmp_path: Path) -> None:
    one = open_labelled(write_tree(tmp_path / "one", TREE))
    again = open_labelled(write_tree(tmp_path / "again", TREE))
    moved = {"train": ["cat/a.png", "dog/b.png", "dog/a.png"], "val": TREE["val"]}
    other = open_labelled(write_tree(tmp_path / "other", moved))
    assert one.fingerprint == again.fingerprint != other.fingerprint
    assert one.train.fingerprint() != one.test.fingerprint()


def test_digits() -> None:
    data = open_labelled()
    assert data.classes == tuple("0123456789") and not data.mirrors
    assert (len(data.train), len(data.test)) == (1198, 599)
    assert not set(data.train.ids) & set(data.test.ids)
    assert "digits" in data.name and "seed 0" in data.name
    for part in (data.train, data.test):  # drawn by class: each has its share
        assert np.ptp(np.bincount(part.labels) / len(part)) < 0.01
    from sklearn.datasets import load_digits

    grey, labels = load_digits(return_X_y=True)
    number = int(data.test.ids[7])
    assert data.test.labels[7] == labels[number]
    picture = np.asarray(data.test.images.read(7))
    assert picture.shape == (8, 8, 3)
    np.testing.assert_array_equal(picture[..., 0], np.rint(grey[number].reshape(8, 8) * 255 / 16))


def test_the_seed_draws_the_digits() -> None:
    assert open_labelled(seed=1).test.ids != open_labelled(seed=0).test.ids == open_labelled(seed=0).test.ids
    assert open_labelled(seed=1).fingerprint != open_labelled(seed=0).fingerprint


def test_refusals(tmp_path: Path) -> None:
    one = write_tree(tmp_path / "one", {"train": ["cat/a.png", "cat/b.png"], "val": ["cat/c.png"]})
    assert refusal(one).startswith("one has one class only (cat)")
    differing = write_tree(tmp_path / "diff", {"train": ["cat/a.png", "dog/a.png"], "val": ["cat/a.png", "cow/a.png"]})
    assert "cow of diff is only in test: a probe cannot learn a class without training images" in refusal(differing)
    flat = write_tree(tmp_path / "flat", {"train": ["a.png"], "val": ["b.png"]})
    assert "a.png of" in refusal(flat) and "lies in no class folder" in refusal(flat)
    mixed = write_tree(tmp_path / "mixed", {"train": ["cat/a.png", "b.png"], "val": ["cat/b.png"]})
    assert "b.png of" in refusal(mixed)
    empty = write_tree(tmp_path / "empty", TREE)
    for path in (empty / "val").rglob("*.png"):
        path.unlink()
    assert "holds no images" in refusal(empty)
    unsplit = write_folder(tmp_path / "unsplit", ["cat/a.png", "dog/a.png"])
    assert "holds neither train/ nor train.tar" in refusal(unsplit)
    (unsplit / "train").mkdir()
    assert "holds neither val/ nor val.tar" in refusal(unsplit)
    tar = write_tar(tmp_path / "no_parts.tar", ["cat/a.png", "dog/a.png"])
    assert "holds no train/ and val/" in refusal(tar)
    assert "the same images" in refusal((tar, tar))
    assert "does not exist" in refusal(tmp_path / "nowhere")
    assert "is no tar" in refusal(one / "val" / "cat" / "c.png")
    assert "does not exist" in refusal(f"{tar},{tmp_path / 'nowhere.tar'}")
    assert "given as 3 things" in refusal(f"{tar},{tar},{tar}")
    assert "given as 1 things" in refusal([tar])
    assert "from a int" in refusal(7)
    assert "path of the images is empty" in refusal("")


def test_a_test_set_may_lack_classes_and_that_is_said(tmp_path: Path) -> None:
    many = {"train": [f"c{i}/a.png" for i in range(9)], "val": ["c3/b.png"]}
    data = open_labelled(write_tree(tmp_path / "many", many))
    assert (len(data.classes), data.test.labels.tolist()) == (9, [3])
    assert data.remarks == ("the test images of many lack 8 of its 9 classes: c0, c1, c2, c4, c5 …",)


def test_small_pictures_of_one_size_are_decoded_once(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, ["a.png", "b.png", "c.png"])
    images = open_images(folder)
    held = hold(images)
    (folder / "a.png").unlink()
    assert held is not None and held.names == images.names and held.pixels.shape == (3, 3, 5, 6)
    assert [held.read(i).getpixel((0, 0)) for i in range(3)] == [(0, 10, 20), (1, 10, 20), (2, 10, 20)]


def test_a_bad_picture_stays_bad(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, ["a.png", "b.png", "c.png"])
    (folder / "a.png").write_bytes(b"")
    held = hold(open_images(folder))
    assert held is not None
    with pytest.raises(BadImageError, match=r"a\.png: the file is empty"):
        held.read(0)
    assert held.read(2).getpixel((0, 0)) == (2, 10, 20)
    assert held.fingerprint() == open_images(folder).fingerprint()


def test_what_is_not_held(tmp_path: Path) -> None:
    images = open_images(write_folder(tmp_path / "alike", ["a.png", "b.png"]))
    assert hold(images, most_bytes=2 * 90) is not None and hold(images, most_bytes=2 * 90 - 1) is None
    sizes = open_images(write_folder(tmp_path / "sizes", ["a.png", "b.png"], lambda i: png(size=(6 + i, 5))))
    assert hold(sizes) is None
    bad = open_images(write_folder(tmp_path / "bad", ["a.png"], lambda i: b"no picture"))
    assert hold(bad) is None
    tensors = open_images(torch.zeros(2, 3, 4, 4))
    assert hold(tensors) is None
