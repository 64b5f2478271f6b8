"""I-JEPA: from one part of an image, the tokens that a momentum encoder gives to other parts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lightly.data.ijepa_collate import IJEPAMaskCollator
from lightly.models.modules.ijepa_timm import IJEPAPredictorTIMM
from lightly.models.modules.masked_vision_transformer_timm import MaskedVisionTransformerTIMM
from lightly.models.utils import apply_masks
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from zoo.objectives.initial import fixed_position_embedding
from zoo.objectives.momentum import MomentumObjective
from zoo.recipe import Recipe


class Blocks(IJEPAMaskCollator):
    """lightly's blocks, whose sizes are drawn from a generator that a resumed run finds as an unbroken one does."""

    def __init__(self, grid: tuple[int, int]) -> None:
        super().__init__(
            grid,
            patch_size=1,
            enc_mask_scale=(0.85, 1.0),
            pred_mask_scale=(0.15, 0.2),
            aspect_ratio=(0.75, 1.5),
            nenc=1,
            npred=4,
        )
        self.generator = torch.Generator()

    def step(self) -> int:
        """A seed for the sizes of a batch."""
        return int(torch.randint(2**31, (), generator=self.generator))


class IJEPA(MomentumObjective):
    """I-JEPA (Assran et al., arXiv 2301.08243): no [cls], no change of colour; four blocks from one context."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.vit = VisionTransformer(**recipe.architecture, num_classes=0)
        fixed_position_embedding(self.vit)
        self.context = MaskedVisionTransformerTIMM(
            self.vit, weight_initialization="skip", pos_embed_initialization="skip"
        )
        self.target = self.follow(self.vit, VisionTransformer(**recipe.architecture, num_classes=0))
        self.predictor = IJEPAPredictorTIMM(
            self.vit.patch_embed.num_patches,
            recipe.decoder_depth,
            self.vit.embed_dim,
            recipe.decoder_dim,
            recipe.decoder_heads,
        )
        self.blocks = Blocks(self.vit.patch_embed.grid_size)

    def forward(self, views: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Smooth L1 distance of the predicted tokens from the momentum encoder's, each normalised."""
        self.blocks.generator = generator
        _, contexts, targets = self.blocks(list(range(len(views))))
        context, targets = contexts[0].to(views.device), [target.to(views.device) for target in targets]
        predicted = self.predictor(self.context.encode(views, idx_keep=context), [context], targets)
        with torch.no_grad():
            tokens = self.target.forward_features(views).float()
            wanted = apply_masks(F.layer_norm(tokens, tokens.shape[-1:]), targets)
        return F.smooth_l1_loss(predicted.float(), wanted)
