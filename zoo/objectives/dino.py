"""DINO: the student's prototypes for one view are to be the teacher's for the other."""

from __future__ import annotations

import torch
from lightly.loss.dino_loss import DINOLoss
from lightly.models.modules.heads import DINOProjectionHead
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from zoo.augment import two_views
from zoo.objectives.momentum import MomentumObjective
from zoo.recipe import Recipe


class DINO(MomentumObjective):
    """DINO (Caron et al., arXiv 2104.14294) with two views of full size: 32 pixels leave no room for small crops."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)

        def network() -> tuple[VisionTransformer, DINOProjectionHead]:
            vit = VisionTransformer(**recipe.architecture, num_classes=0)
            head = DINOProjectionHead(
                vit.embed_dim, recipe.head_hidden, recipe.head_dim, recipe.prototypes, freeze_last_layer=1
            )
            return vit, head

        self.vit, self.head = network()
        vit, head = network()
        self.teacher, self.teacher_head = self.follow(self.vit, vit), self.follow(self.head, head)
        self.loss = DINOLoss(recipe.prototypes, teacher_temp=recipe.teacher_temperature)

    def augment(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Two views of each image, changed in colour."""
        return two_views(images, self.recipe.crop_scale, generator)

    def forward(self, views: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Cross-entropy of the student's prototypes with the teacher's for the other view."""
        student = self.head(self.vit(views)).float().chunk(2)
        with torch.no_grad():
            teacher = self.teacher_head(self.teacher(views)).float().chunk(2)
        return self.loss_between(teacher, student)

    def loss_between(self, teacher: tuple[Tensor, ...], student: tuple[Tensor, ...]) -> Tensor:
        """DINO's loss of the outputs for two views, in float32."""
        with torch.autocast(student[0].device.type, enabled=False):
            return self.loss(list(teacher), list(student))

    def after_backward(self, epoch: int) -> None:
        """The prototypes stay as they are in the first epoch."""
        self.head.cancel_last_layer_gradients(epoch)
