"""Random views of a batch of images, each image with its own draw, in a few tensor operations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vitprobe.data.augment import Augmentation, crop_sides
from zoo.cifar import normalize

# Of RGB in luminance (ITU-R BT.601), and to luminance and two colour differences (YIQ), where a hue is an angle.
GREY = (0.299, 0.587, 0.114)
TO_YIQ = (GREY, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))


def random_resized_crop_flip(images: Tensor, scale: tuple[float, float], generator: torch.Generator) -> Tensor:
    """The crops that probes are trained with, of the whole batch in one resampling; `generator` lives on the CPU."""
    batch = len(images)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(batch, generator=generator) * (high - low) + low

    area, ratio = uniform(0, 1), uniform(0, 1)
    sides = crop_sides(Augmentation(scale), area.double().numpy(), ratio.double().numpy())
    height, width = (torch.from_numpy(side).float().clamp(max=1) for side in sides)
    center_x = uniform(-1, 1) * (1 - width)
    center_y = uniform(-1, 1) * (1 - height)
    flip = torch.where(torch.rand(batch, generator=generator) < 0.5, -1.0, 1.0)
    theta = torch.zeros(batch, 2, 3)
    theta[:, 0, 0], theta[:, 0, 2] = width * flip, center_x
    theta[:, 1, 1], theta[:, 1, 2] = height, center_y
    grid = F.affine_grid(theta.to(images.device), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def color_jitter(images: Tensor, generator: torch.Generator) -> Tensor:
    """Brightness, contrast, saturation and hue of four images in five, then a fifth of all turned grey; pixels 0..1.

    The strengths are those of MoCo v3 (0.4, 0.4, 0.2, 0.1). Hue turns in YIQ, where it is a rotation, not in HSV.
    """
    batch, device = len(images), images.device

    def uniform(low: float, high: float) -> Tensor:
        return (torch.rand(batch, generator=generator) * (high - low) + low).to(device).view(batch, 1, 1, 1)

    jittered = uniform(0, 1) < 0.8
    grey_only = uniform(0, 1) < 0.2
    grey = torch.tensor(GREY, device=device).view(1, 3, 1, 1)
    x = images * uniform(0.6, 1.4)
    mean = (x * grey).sum(1, keepdim=True).mean((2, 3), keepdim=True)
    x = mean + (x - mean) * uniform(0.6, 1.4)
    saturation, angle = uniform(0.8, 1.2).flatten(), uniform(-0.1, 0.1).flatten() * 2 * torch.pi
    turn = torch.zeros(batch, 3, 3, device=device)
    turn[:, 0, 0] = 1
    turn[:, 1, 1] = turn[:, 2, 2] = saturation * angle.cos()
    turn[:, 1, 2], turn[:, 2, 1] = -saturation * angle.sin(), saturation * angle.sin()
    to_yiq = torch.tensor(TO_YIQ, device=device)
    x = torch.einsum("bij,bjhw->bihw", to_yiq.inverse() @ turn @ to_yiq, x)
    x = torch.where(jittered, x.clamp(0, 1), images)
    return torch.where(grey_only, (x * grey).sum(1, keepdim=True), x)


def two_views(images: Tensor, scale: tuple[float, float], generator: torch.Generator) -> Tensor:
    """uint8 images → normalised views `(2·batch, 3, 32, 32)`, the first of every image before the second of any.

    MoCo v3's (BYOL's) augmentation: crop, flip, colours; a fifth of the second views is solarised. No blur: 32 pixels
    have nothing to spare (SimCLR leaves it out on CIFAR-10 too).
    """
    views = []
    for solarised_share in (0.0, 0.2):
        view = color_jitter(random_resized_crop_flip(images.float() / 255, scale, generator), generator)
        solarised = (torch.rand(len(images), generator=generator) < solarised_share).to(images.device)
        view = torch.where(solarised.view(-1, 1, 1, 1) & (view >= 0.5), 1 - view, view)
        views.append(view)
    return normalize(torch.cat(views) * 255)
