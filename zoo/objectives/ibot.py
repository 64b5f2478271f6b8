"""iBOT: DINO on [cls], and the same on the patches that were hidden from the student."""

from __future__ import annotations

import torch
from lightly.loss.ibot_loss import IBOTPatchLoss
from lightly.models.modules.masked_vision_transformer_timm import MaskedVisionTransformerTIMM
from lightly.models.utils import random_block_mask
from torch import Tensor

from zoo.objectives.dino import DINO
from zoo.recipe import Recipe


class IBOT(DINO):
    """iBOT (Zhou et al., arXiv 2111.07832): one head for [cls] and patches, half of the views masked in blocks."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.masked = MaskedVisionTransformerTIMM(
            self.vit, weight_initialization="skip", pos_embed_initialization="skip"
        )
        self.patch_loss = IBOTPatchLoss(recipe.prototypes, teacher_temp=recipe.teacher_temperature)

    def forward(self, views: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Sum of the cross-entropies of [cls] with the other view's and of hidden patches with the same patches'."""
        grid, prefix = self.vit.patch_embed.grid_size, self.vit.num_prefix_tokens
        hidden = random_block_mask((len(views), *grid), device=views.device)
        patches = hidden.flatten(1)
        everywhere = torch.cat([patches.new_zeros(len(views), prefix), patches], 1)
        student = self.masked.encode(views, mask=everywhere)
        student_cls = self.head(student[:, 0]).float().chunk(2)
        student_patches = self.head(student[:, prefix:][patches]).float()
        with torch.no_grad():
            teacher = self.teacher.forward_features(views)
            teacher_cls = self.teacher_head(teacher[:, 0]).float().chunk(2)
            teacher_patches = self.teacher_head(teacher[:, prefix:][patches]).float()
        return self.loss_between(teacher_cls, student_cls) + self.patch_loss(teacher_patches, student_patches, hidden)
