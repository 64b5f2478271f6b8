"""Labelled images in two parts, train and test: folders of class folders, tars of that shape, or packaged digits."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from jaxtyping import Int64
from PIL import Image

from vitprobe.data.images import Images, ListImages, TarImages, digest, printable
from vitprobe.data.sources import open_images, path_of
from vitprobe.data.subsets import SubsetImages, hold
from vitprobe.errors import UserError

TEST_NAMES = ("val", "validation", "test")  # what the part to test on may be called; the first that is there
DIGITS_TEST_SHARE = 1 / 3
SHAPE = (
    "labelled data is a folder with train/ and val/ (or test/) that hold one folder a class, or train.tar and val.tar "
    "of that shape, or a pair TRAIN,TEST of such folders or tars"
)


@dataclass(frozen=True, eq=False)
class LabelledSet:
    """Images with one class each.

    Attributes:
        images: the source; its names tell the images apart.
        labels: the number of each image's class.
    """

    images: Images
    labels: Int64[np.ndarray, " image"]

    def __len__(self) -> int:
        """How many images there are, readable or not."""
        return len(self.labels)

    @property
    def ids(self) -> list[str]:
        """One distinct name an image."""
        return self.images.names

    @cached_property
    def pictures(self) -> Images:
        """The same images, decoded once into memory where they are small and of one size (see `hold`)."""
        return hold(self.images)

    def fingerprint(self) -> str:
        """sha256 over the images' fingerprint and the labels."""
        return digest([self.images.fingerprint(), self.labels.tobytes()])


@dataclass(frozen=True, eq=False)
class LabelledData:
    """What a probe is trained on, and what it is tested on.

    Attributes:
        name: what to call it in a table.
        classes: names of the classes in alphabetical order; a label is a position in it.
        train: the images to train and to select on.
        test: the images to test on.
        mirrors: whether a mirrored picture is of the same class, so that training may flip it; not so of digits.
    """

    name: str
    classes: tuple[str, ...]
    train: LabelledSet
    test: LabelledSet
    mirrors: bool = True

    @property
    def fingerprint(self) -> str:
        """sha256 over both parts and the names of the classes."""
        return digest([self.train.fingerprint(), self.test.fingerprint(), *self.classes])


def open_labelled(data: Any = None, *, seed: int = 0) -> LabelledData:
    """Labelled images in two parts.

    An image's class is the folder it lies in, below the folder or tar of its part; in a tar, folders around all
    images do not count.

    Args:
        data: None for scikit-learn's 1,797 handwritten digits, 8×8 pixels, of which a third, class by class, is drawn
            for the test; a folder with train/ and val/ (or validation/, test/; the first of these), or with tars of
            these names; one tar with train/ and val/ in it; two folders or tars, as a pair or as "TRAIN,TEST"; or a
            LabelledData (returned).
        seed: of the drawing of digits; other sets come in two parts already.

    Raises:
        UserError: for what is missing, empty or without classes, for one class only, or parts whose classes differ.
    """
    if data is None:
        return _digits(seed)
    if isinstance(data, LabelledData):
        return data
    if isinstance(data, str) and "," in data and not path_of(data).exists():
        data = data.split(",")
    if isinstance(data, list | tuple):
        if len(data) != 2 or not all(isinstance(part, str | os.PathLike) for part in data):
            raise UserError(f"labelled data was given as {len(data)} things, not as two paths: {SHAPE}")
        train, test = (path_of(part.strip() if isinstance(part, str) else part) for part in data)
        return _open_pair(f"{printable(train.name)}, {printable(test.name)}", train, test)
    if not isinstance(data, str | os.PathLike):
        raise UserError(f"cannot read labelled images from a {type(data).__name__}: {SHAPE}")
    path = path_of(data)
    name = printable(path.resolve().name)
    if path.is_dir():
        return _open_pair(name, _part(path, ("train",)), _part(path, TEST_NAMES))
    if path.is_file() and path.suffix == ".tar":
        return _open_one_tar(name, open_images(path))
    reason = "is no tar" if path.exists() else "does not exist"
    raise UserError(f"{printable(str(path))} {reason}: {SHAPE}")


def _part(folder: Path, names: Sequence[str]) -> Path:
    """The part of a data set that has one of these names: a folder or else a tar."""
    places = [folder / name for name in names] + [folder / f"{name}.tar" for name in names]
    found = next((place for place in places if place.exists()), None)
    if found is None:
        raise UserError(f"{printable(str(folder))} holds neither {names[0]}/ nor {names[0]}.tar: {SHAPE}")
    return found


def _open_pair(name: str, train: Path, test: Path) -> LabelledData:
    parts = [(images := open_images(path), _folders(images)) for path in (train, test)]
    return _labelled(name, parts[0], parts[1])


def _open_one_tar(name: str, images: Images) -> LabelledData:
    """A tar with both parts in it."""
    folders = _folders(images)
    tops = {folder[0] for folder in folders if folder}
    test_name = next((name for name in TEST_NAMES if name in tops), None)
    if "train" not in tops or test_name is None:
        raise UserError(f"{images.source} holds no train/ and val/ (or test/): {SHAPE}")
    train, test = (_below(images, folders, top) for top in ("train", test_name))
    return _labelled(name, train, test)


def _below(images: Images, folders: list[tuple[str, ...]], top: str) -> tuple[Images, list[tuple[str, ...]]]:
    """The images below one folder of a tar, and the folders in which they lie there."""
    positions = [position for position, folder in enumerate(folders) if folder[:1] == (top,)]
    subset = SubsetImages(images, positions, f"{images.source}/{top}")
    return subset, [folders[position][1:] for position in positions]


def _folders(images: Images) -> list[tuple[str, ...]]:
    """The folders around each image; in a tar without those that all images share."""
    folders = [PurePosixPath(name).parts[:-1] for name in images.names]
    while isinstance(images, TarImages) and len({folder[:1] for folder in folders}) == 1 and min(map(len, folders)) > 1:
        folders = [folder[1:] for folder in folders]
    return folders


def _labelled(
    name: str,
    train: tuple[Images, list[tuple[str, ...]]],
    test: tuple[Images, list[tuple[str, ...]]],
    mirrors: bool = True,
) -> LabelledData:
    """Two parts with the classes that their images' folders name.

    Raises:
        UserError: as `open_labelled`.
    """
    for images, folders in (train, test):
        if () in folders:
            image = images.names[folders.index(())]
            raise UserError(f"{image} of {images.source} lies in no class folder, so it has no label: {SHAPE}")
    # ImageNet's own tar for training holds one tar a class
    named = [[folder[0].removesuffix(".tar") for folder in folders] for _, folders in (train, test)]
    classes = sorted(set(named[0]))
    _require_same(name, set(named[0]), set(named[1]))
    if len(classes) == 1:
        raise UserError(f"{name} has one class only ({classes[0]}): a probe tells at least two apart")
    number = {name: label for label, name in enumerate(classes)}
    sets = [
        LabelledSet(images, np.array([number[name] for name in names], np.int64))
        for (images, _), names in zip((train, test), named, strict=True)
    ]
    if sets[0].fingerprint() == sets[1].fingerprint():
        raise UserError(f"train and test of {name} are the same images: give others to test on")
    return LabelledData(name, tuple(classes), sets[0], sets[1], mirrors)


def _require_same(name: str, train: set[str], test: set[str]) -> None:
    """Raises a UserError where the classes of the two parts differ."""
    if train == test:
        return
    only = [
        f"{', '.join(sorted(there)[:5])}{' …' if len(there) > 5 else ''} only in {part}"
        for there, part in ((train - test, "train"), (test - train, "test"))
        if there
    ]
    raise UserError(f"the classes of {name} differ between train and test: {'; '.join(only)}; mend the folders")


def _digits(seed: int) -> LabelledData:
    """scikit-learn's handwritten digits, drawn into two parts."""
    from sklearn.datasets import load_digits  # only here: it takes a second to import
    from sklearn.model_selection import train_test_split

    grey, labels = load_digits(return_X_y=True)
    shades = np.rint(grey.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)  # they come as 0 to 16
    images = ListImages([Image.fromarray(shade) for shade in shades])
    positions = train_test_split(range(len(labels)), test_size=DIGITS_TEST_SHARE, stratify=labels, random_state=seed)
    train, test = (
        (
            SubsetImages(images, sorted(part), f"scikit-learn's digits ({use})"),
            [(str(labels[i]),) for i in sorted(part)],
        )
        for part, use in zip(positions, ("train", "test"), strict=True)
    )
    name = f"scikit-learn's digits ({len(train[1])} train, {len(test[1])} test, drawn by class with seed {seed})"
    return _labelled(name, train, test, mirrors=False)
