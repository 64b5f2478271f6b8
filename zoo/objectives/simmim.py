"""SimMIM: the pixels of hidden patches, by one linear layer from a ViT that sees all of their places."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lightly.models.modules.masked_vision_transformer_timm import MaskedVisionTransformerTIMM
from lightly.models.utils import get_at_index, patchify, random_grid_token_mask
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from zoo.objectives.base import Objective
from zoo.recipe import Recipe


class SimMIM(Objective):
    """SimMIM (Xie et al., arXiv 2111.09886): masked in squares of patches, L1 on the normalised image's pixels."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.vit = VisionTransformer(**recipe.architecture, num_classes=0)
        self.masked = MaskedVisionTransformerTIMM(
            self.vit, weight_initialization="skip", pos_embed_initialization="skip"
        )
        nn.init.trunc_normal_(self.masked.mask_token, std=0.02)
        self.patch_size = recipe.architecture["patch_size"]
        self.decoder = nn.Linear(self.vit.embed_dim, 3 * self.patch_size**2)

    def forward(self, views: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Mean absolute error on the hidden patches."""
        prefix = self.vit.num_prefix_tokens
        _, hidden = random_grid_token_mask(
            (len(views), self.masked.sequence_length),
            self.recipe.mask_ratio,
            self.recipe.mask_square,
            prefix,
            views.device,
        )
        tokens = get_at_index(self.masked.encode(views, idx_mask=hidden), hidden)
        return F.l1_loss(
            self.decoder(tokens).float(), get_at_index(patchify(views.float(), self.patch_size), hidden - prefix)
        )
