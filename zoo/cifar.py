"""CIFAR-10 from a tar of `<class>/<n>.jpg`, held in memory as one tensor, and the crops that training draws from it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
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
    """uint8 pixels → float32 with CIFAR-10's mean and standard deviation."""
    mean, std = (torch.tensor(part, device=images.device).view(1, 3, 1, 1) for part in NORMALISATIONS["cifar10"])
    return (images.float() / 255 - mean) / std


def random_resized_crop_flip(images: Tensor, scale: tuple[float, float], generator: torch.Generator) -> Tensor:
    """RandomResizedCrop and a horizontal flip of the whole batch in one resampling; `generator` lives on the CPU."""
    batch = len(images)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(batch, generator=generator) * (high - low) + low

    area, log_ratio = uniform(*scale), uniform(float(np.log(3 / 4)), float(np.log(4 / 3)))
    width = (area * log_ratio.exp()).sqrt().clamp(max=1)
    height = (area / log_ratio.exp()).sqrt().clamp(max=1)
    center_x = uniform(-1, 1) * (1 - width)
    center_y = uniform(-1, 1) * (1 - height)
    flip = torch.where(torch.rand(batch, generator=generator) < 0.5, -1.0, 1.0)
    theta = torch.zeros(batch, 2, 3)
    theta[:, 0, 0], theta[:, 0, 2] = width * flip, center_x
    theta[:, 1, 1], theta[:, 1, 2] = height, center_y
    grid = F.affine_grid(theta.to(images.device), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
