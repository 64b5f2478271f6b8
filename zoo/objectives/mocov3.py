"""MoCo v3: an image's two views agree, against the other images of the batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lightly.models.modules.heads import MoCoProjectionHead
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from zoo.augment import two_views
from zoo.objectives.initial import fixed_position_embedding, xavier_weights
from zoo.objectives.momentum import MomentumObjective
from zoo.recipe import Recipe


class MoCoV3(MomentumObjective):
    """MoCo v3 (Chen et al., arXiv 2104.02057): a random patch projection that stays, a momentum encoder.

    The loss is ours: lightly's NT-Xent is SimCLR's (or MoCo's with a queue), which takes negatives from both views.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)

        def encoder() -> tuple[VisionTransformer, MoCoProjectionHead]:
            vit = VisionTransformer(**recipe.architecture, num_classes=0)
            return vit, MoCoProjectionHead(vit.embed_dim, recipe.head_hidden, recipe.head_dim, 3, batch_norm=True)

        self.vit, self.projector = encoder()
        self.predictor = MoCoProjectionHead(recipe.head_dim, recipe.head_hidden, recipe.head_dim, 2, batch_norm=True)
        xavier_weights(self.vit)
        fixed_position_embedding(self.vit)
        self.vit.patch_embed.requires_grad_(False)
        vit, projector = encoder()
        self.momentum_vit = self.follow(self.vit, vit)
        self.momentum_projector = self.follow(self.projector, projector)

    def augment(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Two views of each image, changed in colour."""
        return two_views(images, self.recipe.crop_scale, generator)

    def forward(self, views: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Cross-entropy, in both directions, of finding an image's other view among those of the batch."""

        def by_view(encoder: nn.Module, *heads: nn.Module) -> list[Tensor]:
            parts = list(encoder(views).chunk(2))
            for head in heads:  # whose batch norms see one view at a time, as in the paper's code
                parts = [head(part) for part in parts]
            return [F.normalize(part.float(), dim=1) for part in parts]

        queries = by_view(self.vit, self.projector, self.predictor)
        with torch.no_grad():
            keys = by_view(self.momentum_vit, self.momentum_projector)
        temperature, same = self.recipe.temperature, torch.arange(len(queries[0]), device=views.device)
        with torch.autocast(views.device.type, enabled=False):
            one, other = (
                F.cross_entropy(query @ key.T / temperature, same)
                for query, key in zip(queries, reversed(keys), strict=True)
            )
        return 2 * temperature * (one + other)
