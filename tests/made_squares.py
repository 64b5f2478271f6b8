"""Labelled pictures that are made in no time: coloured noise, a colour a class; and protocols of a few steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vitprobe.data.augment import Augmentation
from vitprobe.data.images import ListImages
from vitprobe.data.labelled import LabelledData, LabelledSet
from vitprobe.probing import Protocol

CLASSES = ("blue", "green", "red")
TRAINING = {"batch_size": 16, "seeds": 2, "learning_rates": (1e-3, 1e-2), "warmup": 0.1}
BANK = Protocol(name="bank", words="of a test", method="bank", epochs=2, augmentation=Augmentation(), **TRAINING)
CACHED = Protocol(name="cached", words="of a test", method="cached", epochs=2, **TRAINING)
KNN = Protocol(
    name="knn", words="of a test", method="knn", norms=(False, True), grid=(("k", (1, 5)), ("temperature", (0.07, 0.2)))
)
LOGISTIC = Protocol(
    name="logistic", words="of a test", method="logistic", grid=(("c", (0.01, 1.0)), ("iterations", (50.0,)))
)
METHODS = {protocol.method: protocol for protocol in (BANK, CACHED, KNN, LOGISTIC)}


def picture(label: int, seed: int, side: int = 8) -> Image.Image:
    """Noise, brighter in the colour of a class, so that some but not all are easy to tell."""
    pixels = np.random.default_rng(seed).integers(0, 200, (side, side, 3))
    pixels[..., label] += 25
    return Image.fromarray(pixels.astype(np.uint8))


def squares(train: int = 20, test: int = 8, **changes: Any) -> LabelledData:
    """So many pictures a class, in memory."""
    sets = []
    for start, count in ((0, train), (10_000, test)):
        labels = np.arange(len(CLASSES) * count, dtype=np.int64) % len(CLASSES)
        pictures = [picture(int(label), start + number) for number, label in enumerate(labels)]
        sets.append(LabelledSet(ListImages(pictures), labels))
    return LabelledData(**{"name": "squares", "classes": CLASSES, "train": sets[0], "test": sets[1]} | changes)


def write_squares(root: Path, train: int = 20, test: int = 8) -> Path:
    """The same as a folder with train/ and val/."""
    for part, start, count in (("train", 0, train), ("val", 10_000, test)):
        for number in range(len(CLASSES) * count):
            label = number % len(CLASSES)
            path = root / part / CLASSES[label] / f"{number:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(label, start + number).save(path)
    return root


def kept(folder: Path) -> dict[str, bytes]:
    """What must be the same however often a run was broken off: results and probes."""
    files = [folder / "accuracy.csv", folder / "correctness.safetensors", *(folder / "probes").glob("*")]
    return {path.name: path.read_bytes() for path in files}


def fill_disk(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Makes the disk full at the moment when the file of this name has been written and gets its name."""
    real = Path.replace

    def full(self: Path, target: Path) -> Path:
        if self.name == f".{name}.partial":
            raise OSError(28, "No space left on device")
        return real(self, target)

    monkeypatch.setattr(Path, "replace", full)
