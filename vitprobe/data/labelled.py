"""Labelled images in two parts, train and test, from all that holds some; packaged digits where nothing is given."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from jaxtyping import Int64
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from vitprobe.data.bands import Wanted
from vitprobe.data.images import Images, ListImages, digest, printable
from vitprobe.data.labelled_hub import hub_parts, webdataset_parts
from vitprobe.data.labelled_tables import TABLES, table_parts
from vitprobe.data.labelled_torch import dataset_part, loader_part
from vitprobe.data.looking import look_at
from vitprobe.data.parts import TEST_NAMES, Part, Parts, draw_test, test_among
from vitprobe.data.sources import open_images, path_of
from vitprobe.data.subsets import HeldImages, SubsetImages, hold
from vitprobe.errors import UserError

DIGITS_TEST_SHARE = 1 / 3
SHAPE = (
    "labelled data is a folder with train/ and val/ (or test/) that hold one folder a class, or train.tar and val.tar "
    "of that shape, a table (.csv) of files and labels, hfds:NAME, wds:DIR, or a pair TRAIN,TEST of such"
)
_READERS = {"hfds:": hub_parts, "hfids:": hub_parts, "wds:": webdataset_parts}


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
    def held(self) -> HeldImages | None:
        """The same images decoded once into memory; None unless they are small and of one size (see `hold`)."""
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
        remarks: what a reader must know of how the two parts were made.
    """

    name: str
    classes: tuple[str, ...]
    train: LabelledSet
    test: LabelledSet
    mirrors: bool = True
    remarks: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """sha256 over both parts and the names of the classes."""
        return digest([self.train.fingerprint(), self.test.fingerprint(), *self.classes])

    @property
    def normalised(self) -> bool:
        """Whether the images are tensors that are normalised already."""
        return self.train.images.normalised or self.test.images.normalised

    def for_model(self, wanted: Wanted) -> LabelledData:
        """The same data with the channels that a model takes.

        Raises:
            UserError: for tensors of another number of channels.
        """
        train, test = (replace(part, images=part.images.for_model(wanted)) for part in (self.train, self.test))
        return replace(self, train=train, test=test)

    def look_at(self, model: str) -> list[str]:
        """Remarks on both parts, as `vitprobe.data.looking.look_at`."""
        parts = [part.images for part in (self.train, self.test)]
        return list(dict.fromkeys(remark for images in parts for remark in look_at(images, model)))


def open_labelled(data: Any = None, *, seed: int = 0) -> LabelledData:
    """Labelled images in two parts.

    Of folders and tars an image's class is the folder it lies in, below the folder or tar of its part; in a tar,
    folders around all images do not count. What comes in one part is drawn into two, class by class.

    Args:
        data: None for scikit-learn's 1,797 handwritten digits, 8×8 pixels, of which a third, class by class, is drawn
            for the test; a folder with train/ and val/ (or valid/, validation/, test/; the first of these), or with
            tars of these names; one tar with train/ and val/ in it; a table (.csv, .tsv) with columns of files, labels
            and, where there are parts, splits; "hfds:NAME", "hfids:NAME" or "wds:DIR", with "#SPLIT" for one split;
            torchvision's ImageFolder; a DataLoader of (images, labels), normalised for the model; two of these, as a
            pair or, of paths, as "TRAIN,TEST"; or a LabelledData (returned).
        seed: of the drawing of what comes in one part.

    Raises:
        UserError: for what is missing, empty or without classes, for one class only, or a class in the test that the
            training part lacks.
    """
    if data is None:
        return _digits(seed)
    if isinstance(data, LabelledData):
        return data
    if isinstance(data, str) and (pair := _split_pair(data)) is not None:
        data = pair
    if isinstance(data, list | tuple):
        if len(data) != 2 or not all(isinstance(part, str | os.PathLike | DataLoader | Dataset) for part in data):
            raise UserError(f"labelled data was given as {len(data)} things, not as two paths: {SHAPE}")
        parts = [_one_part(part.strip() if isinstance(part, str) else part) for part in data]
        return _labelled(Parts(f"{parts[0].name}, {parts[1].name}", parts[0], parts[1]), seed)
    return _labelled(_parts(data), seed)


def has_loader(data: Any) -> bool:
    """Whether labelled data comes from a DataLoader, whose order only it knows."""
    return any(isinstance(part, DataLoader) for part in (data if isinstance(data, list | tuple) else [data]))


def _split_pair(data: str) -> list[str] | None:
    """The two halves of "TRAIN,TEST"; None for one source. A comma in braces belongs to the names of tars."""
    if data.startswith(tuple(_READERS)):
        pieces = [""]
        depth = 0
        for character in data:
            depth += {"{": 1, "}": -1}.get(character, 0)
            if character == "," and not depth:
                pieces.append("")
            else:
                pieces[-1] += character
        return pieces if len(pieces) > 1 else None
    return data.split(",") if "," in data and not path_of(data).exists() else None


def _parts(data: Any) -> Parts:
    """The two parts of one source, or its only one."""
    if isinstance(data, DataLoader | Dataset):
        part = _one_part(data)
        return Parts(part.name, part)
    if not isinstance(data, str | os.PathLike):
        raise UserError(f"cannot read labelled images from a {type(data).__name__}: {SHAPE}")
    if isinstance(data, str) and (reader := _reader(data)) is not None:
        return reader(data)
    path = path_of(data)
    name = printable(path.resolve().name)
    if path.is_dir():
        train, test = _place(path, ("train",)), _place(path, TEST_NAMES)
        others = [other for other in TEST_NAMES if other != test.stem and (path / other).exists()]
        said = [f"{name} has {other}/ too, which is not used: {test.name} is tested on" for other in others]
        return Parts(name, _one_part(train), _one_part(test), said)
    if path.is_file() and path.suffix.lower() in TABLES:
        return table_parts(path)
    if path.is_file() and path.suffix == ".tar":
        return _parts_of_tar(name, open_images(path))
    reason = "is no tar and no table" if path.exists() else "does not exist"
    raise UserError(f"{printable(str(path))} {reason}: {SHAPE}")


def _reader(data: str) -> Any:
    return next((reader for prefix, reader in _READERS.items() if data.startswith(prefix)), None)


def _one_part(data: Any) -> Part:
    """All images of one source."""
    if isinstance(data, DataLoader):
        return loader_part(data)
    if isinstance(data, Dataset):
        return dataset_part(data)
    path = None if _reader(data if isinstance(data, str) else "") else path_of(data)
    if path is None or path.suffix.lower() in TABLES:
        parts = table_parts(path) if path is not None else _parts(data)
        if parts.test is not None:
            raise UserError(f"{parts.name} has two parts of its own: give it alone, or one split of it (#SPLIT)")
        return parts.train
    images = open_images(path)
    return Part(printable(path.name), images, _classes(images, _folders(images, shared=path.is_dir())))


def _place(folder: Path, names: Sequence[str]) -> Path:
    """The part of a data set that has one of these names: a folder or else a tar."""
    places = [folder / name for name in names] + [folder / f"{name}.tar" for name in names]
    found = next((place for place in places if place.exists()), None)
    if found is None:
        raise UserError(f"{printable(str(folder))} holds neither {names[0]}/ nor {names[0]}.tar: {SHAPE}")
    return found


def _parts_of_tar(name: str, images: Images) -> Parts:
    """A tar with both parts in it."""
    folders = _folders(images, shared=False)
    tops = {folder[0] for folder in folders if folder}
    test_name, said = test_among(name, tops)
    if "train" not in tops or test_name is None:
        raise UserError(f"{images.source} holds no train/ and val/ (or test/): {SHAPE}")
    train, test = (_below(images, folders, top) for top in ("train", test_name))
    return Parts(name, train, test, said)


def _below(images: Images, folders: list[tuple[str, ...]], top: str) -> Part:
    """The images below one folder of a tar."""
    positions = [position for position, folder in enumerate(folders) if folder[:1] == (top,)]
    subset = SubsetImages(images, positions, f"{images.source}/{top}")
    return Part(top, subset, _classes(subset, [folders[position][1:] for position in positions]))


def _folders(images: Images, *, shared: bool) -> list[tuple[str, ...]]:
    """The folders around each image; those that all images share are left out (of a tar) unless `shared`."""
    folders = [PurePosixPath(name).parts[:-1] for name in images.names]
    while not shared and len({folder[:1] for folder in folders}) == 1 and min(map(len, folders)) > 1:
        folders = [folder[1:] for folder in folders]
    return folders


def _classes(images: Images, folders: list[tuple[str, ...]]) -> list[str]:
    """The class of each image by the folders around it."""
    if () in folders:
        image = images.names[folders.index(())]
        raise UserError(f"{image} of {images.source} lies in no class folder, so it has no label: {SHAPE}")
    # ImageNet's own tar for training holds one tar a class
    return [folder[0].removesuffix(".tar") for folder in folders]


def _labelled(parts: Parts, seed: int, mirrors: bool = True) -> LabelledData:
    """Two parts with the classes that their images have.

    Raises:
        UserError: as `open_labelled`.
    """
    if parts.test is None:
        parts = draw_test(parts, seed)
        assert parts.test is not None
    train, test = parts.train, parts.test
    classes = sorted(set(train.labels))
    remarks = [*parts.remarks, *_differences(parts.name, set(train.labels), set(test.labels))]
    if len(classes) == 1:
        raise UserError(f"{parts.name} has one class only ({classes[0]}): a probe tells at least two apart")
    number = {name: label for label, name in enumerate(classes)}
    sets = [
        LabelledSet(part.images, np.array([number[name] for name in part.labels], np.int64)) for part in (train, test)
    ]
    if sets[0].fingerprint() == sets[1].fingerprint():
        if not train.images.normalised:  # of tensors anybody may have made a try-out
            raise UserError(f"train and test of {parts.name} are the same images: give others to test on")
        remarks.append(f"train and test of {parts.name} are the same images: accuracy is that of images learned from")
    return LabelledData(parts.name, tuple(classes), sets[0], sets[1], mirrors, tuple(remarks))


def _differences(name: str, train: set[str], test: set[str]) -> list[str]:
    """What is said of classes without a test image.

    Raises:
        UserError: for classes that no training image has.
    """

    def some(classes: set[str]) -> str:
        return ", ".join(sorted(classes)[:5]) + (" …" if len(classes) > 5 else "")

    if test - train:
        raise UserError(
            f"{some(test - train)} of {name} {'is' if len(test - train) == 1 else 'are'} only in test: a probe cannot "
            f"learn a class without training images; add some, or take it out of the test"
        )
    missing = train - test
    return [f"the test images of {name} lack {len(missing)} of its {len(train)} classes: {some(missing)}"] * any(
        missing
    )


def _digits(seed: int) -> LabelledData:
    """scikit-learn's handwritten digits, drawn into two parts."""
    from sklearn.datasets import load_digits  # only here: it takes a second to import
    from sklearn.model_selection import train_test_split

    grey, labels = load_digits(return_X_y=True)
    shades = np.rint(grey.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)  # they come as 0 to 16
    images = ListImages([Image.fromarray(shade) for shade in shades])
    positions = train_test_split(range(len(labels)), test_size=DIGITS_TEST_SHARE, stratify=labels, random_state=seed)
    train, test = (
        Part(
            use,
            SubsetImages(images, sorted(part), f"scikit-learn's digits ({use})"),
            [str(labels[i]) for i in sorted(part)],
        )
        for part, use in zip(positions, ("train", "test"), strict=True)
    )
    name = (
        f"scikit-learn's digits ({len(train.labels)} train, {len(test.labels)} test, drawn by class with seed {seed})"
    )
    return _labelled(Parts(name, train, test), seed, mirrors=False)
