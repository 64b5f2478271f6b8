"""Labelled images as their sources give them: one part with a class name an image, or two; and drawing two of one."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from vitprobe.data.images import Images
from vitprobe.data.subsets import SubsetImages
from vitprobe.errors import UserError

TEST_NAMES = ("val", "valid", "validation", "test")  # what the part to test on may be called; the first that is there
TEST_SHARE = 0.2  # of each class, where a source comes in one part


@dataclass(frozen=True, eq=False)
class Part:
    """Images with the name of each one's class.

    Attributes:
        name: what to call it.
        images: the source.
        labels: a class name an image.
    """

    name: str
    images: Images
    labels: Sequence[str]


@dataclass(frozen=True, eq=False)
class Parts:
    """What a source gives.

    Attributes:
        name: of the source.
        train: its images to train on; all of them where it comes in one part.
        test: its images to test on, if it has such.
        remarks: what a reader must know.
    """

    name: str
    train: Part
    test: Part | None = None
    remarks: Sequence[str] = ()


def test_among(source: str, names: Collection[str]) -> tuple[str | None, list[str]]:
    """Which of the parts or splits of these names is to be tested on, and what is said of others."""
    there = [name for name in TEST_NAMES if name in names]
    said = [f"{source} has {other} too, which is not used: {there[0]} is tested on" for other in there[1:]]
    return (there[0] if there else None), said


def draw_test(parts: Parts, seed: int) -> Parts:
    """One part drawn into two: a fifth of each class, at least one image of it, is for the test.

    A class of one image stays in the training part.

    Raises:
        UserError: where no class has two images.
    """
    labels, rng = np.asarray(parts.train.labels), np.random.default_rng([seed, 1])
    chosen = np.zeros(len(labels), dtype=bool)
    for name in np.unique(labels):
        members = np.flatnonzero(labels == name)
        count = max(1, round(TEST_SHARE * len(members))) if len(members) > 1 else 0
        chosen[rng.permutation(members)[:count]] = True
    if not chosen.any():
        raise UserError(f"{parts.name} comes in one part with one image a class: nothing can be drawn for the test")
    halves = []
    for name, there in (("train", ~chosen), ("test", chosen)):
        positions = np.flatnonzero(there).tolist()
        images = SubsetImages(parts.train.images, positions, f"{parts.train.images.source} ({name})")
        halves.append(Part(name, images, labels[there].tolist()))
    drawn = f"{len(halves[0].labels)} train, {len(halves[1].labels)} test, drawn by class with seed {seed}"
    said = f"{parts.name} comes in one part, so a test of {TEST_SHARE:.0%} of each class was drawn with seed {seed}"
    return Parts(f"{parts.name} ({drawn})", halves[0], halves[1], [*parts.remarks, said])
