"""Labelled images from torch: a DataLoader of normalised images and labels, torchvision's ImageFolder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from vitprobe.data.images import FileImages, TensorImages
from vitprobe.data.loaders import pixels_of
from vitprobe.data.parts import Part
from vitprobe.data.subsets import SubsetImages
from vitprobe.errors import UserError
from vitprobe.memory import available_memory

LABEL_KEYS = ("labels", "label", "targets", "target")
_SHARE = 0.5  # of the memory that is available, for the images of a loader


def loader_part(loader: DataLoader) -> Part:
    """The images that a DataLoader gives, read once into memory, with their labels; normalised for the model already.

    Raises:
        UserError: for batches without images or labels, images of several sizes, or more than memory holds.
    """
    room, images, labels = _SHARE * available_memory(), [], []
    for batch in loader:
        pixels = pixels_of(batch, None)
        of_batch = _labels(batch, len(pixels))
        if images and pixels.shape[1:] != images[0].shape[1:]:
            first, other = (f"{part.shape[-2]}×{part.shape[-1]}" for part in (images[0], pixels))
            raise UserError(f"the DataLoader gave images of {first} and of {other} pixels: give one size")
        images.append(pixels.float().cpu())
        labels += of_batch
        room -= images[-1].nbytes
        if room < 0:
            raise UserError(
                f"the images of the DataLoader do not fit into memory (it was left at {len(labels)}): give the data "
                f"set's folder, of which an image is read when it is needed"
            )
    if not labels:
        raise UserError("the DataLoader gave no image")
    return Part("a DataLoader", TensorImages(torch.cat(images)), labels)


def _labels(batch: Any, count: int) -> list[str]:
    """The labels in what a DataLoader gave."""
    found: Any = None
    if isinstance(batch, Mapping):
        found = next((batch[key] for key in LABEL_KEYS if key in batch), None)
    elif isinstance(batch, list | tuple) and len(batch) > 1:
        found = batch[1]
    values = found.tolist() if isinstance(found, Tensor) else found
    if isinstance(values, list | tuple) and len(values) == count and all(isinstance(v, int | str) for v in values):
        return [str(value) for value in values]
    raise UserError(
        f"the DataLoader gave no labels with its images: a batch is (images, labels), or a dict with labels under "
        f"{', '.join(map(repr, LABEL_KEYS))}; a label is a whole number or a name"
    )


def dataset_part(dataset: Dataset) -> Part:
    """The files of torchvision's ImageFolder, or of a subset of one; its own transform is left alone.

    Raises:
        UserError: for another kind of data set.
    """
    if isinstance(dataset, Subset):
        whole = dataset_part(dataset.dataset)
        positions = [int(index) for index in dataset.indices]
        images = SubsetImages(whole.images, positions, f"{len(positions)} images of {whole.images.source}")
        return Part(whole.name, images, [whole.labels[position] for position in positions])
    samples, classes = (getattr(dataset, name, None) for name in ("samples", "classes"))
    if not isinstance(samples, list) or not classes or not isinstance(samples[0][0], str):
        raise UserError(
            f"cannot read labelled images from a {type(dataset).__name__}: give torchvision's ImageFolder, or a "
            f"DataLoader of normalised images and labels"
        )
    root = Path(getattr(dataset, "root", ""))
    paths = [Path(path) for path, _ in samples]
    names = [path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix() for path in paths]
    return Part(root.name or type(dataset).__name__, FileImages(str(root), paths, names), [
        str(classes[label]) for _, label in samples
    ])  # fmt: skip
