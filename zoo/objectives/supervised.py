"""Training, or fine-tuning, on labels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from vitprobe.models.loading import BUNDLED_FOLDER
from zoo.objectives.base import Objective
from zoo.recipe import Recipe


class Supervised(Objective):
    """Cross-entropy on the labels through a linear head on [cls]."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.vit = VisionTransformer(
            **recipe.architecture, num_classes=recipe.num_classes, drop_path_rate=recipe.drop_path
        )
        if recipe.start:
            weights = load_file(BUNDLED_FOLDER / f"{recipe.start}.safetensors")
            self.vit.load_state_dict(weights | self.vit.head.state_dict(prefix="head."))

    def forward(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Mean cross-entropy of the batch."""
        return F.cross_entropy(self.vit(images).float(), labels, label_smoothing=self.recipe.label_smoothing)
