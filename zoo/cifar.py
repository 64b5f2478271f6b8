"""CIFAR-10 from a tar of `<class>/<n>.jpg`, held in memory as one tensor."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vitprobe.data.sources import open_images
from vitprobe.models.entries import NORMALISATIONS


def load_tar(path: str | Path) -> tuple[Tensor, Tensor, list[str]]:
    """All images `(n, 3, 32, 32)` uint8, their labels `(n,)`, and the class names in alphabetical order."""
    images = open_images(path)
    folders = [name.rpartition("/")[0] for name in images.names]
    classes = sorted(set(folders))
    pixels = np.stack([np.asarray(images.read(index)) for index in range(len(images))])
    labels = torch.tensor([classes.index(folder) for folder in folders])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), labels, classes


def normalize(images: Tensor) -> Tensor:
    """Pixels 0..255 → float32 with CIFAR-10's mean and standard deviation."""
    mean, std = (torch.tensor(part, device=images.device).view(1, 3, 1, 1) for part in NORMALISATIONS["cifar10"])
    return (images.float() / 255 - mean) / std
