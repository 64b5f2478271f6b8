"""What every method has: the ViT to be shipped, the views it trains on, the loss, what follows a step."""

from __future__ import annotations

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from zoo.augment import random_resized_crop_flip
from zoo.cifar import normalize
from zoo.recipe import Recipe


class Objective(nn.Module):
    """One method; `forward(views, labels, generator)` gives the loss, with `views` from `augment`."""

    vit: VisionTransformer

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe

    def augment(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """uint8 images → normalised views, the first view of every image before the second of any."""
        return random_resized_crop_flip(normalize(images), self.recipe.crop_scale, generator)

    def after_backward(self, epoch: int) -> None:
        """What is done to the gradients of a step in `epoch` (from 0)."""

    def after_step(self, step: int, steps: int) -> None:
        """What follows a step of the optimizer, the `step`-th (from 0) of `steps` in all."""
