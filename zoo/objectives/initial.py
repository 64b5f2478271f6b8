"""How a ViT begins, where a method's paper departs from timm's default."""

from __future__ import annotations

import math

from timm.models.vision_transformer import VisionTransformer
from torch import nn


def xavier_weights(vit: VisionTransformer) -> None:
    """Xavier-uniform matrices; query, key and value are three of them, and the patch projection is one."""
    for name, module in vit.named_modules():
        if isinstance(module, nn.Linear):
            rows = module.out_features // (3 if name.endswith("qkv") else 1)
            bound = math.sqrt(6 / (rows + module.in_features))
            nn.init.uniform_(module.weight, -bound, bound)
    nn.init.xavier_uniform_(vit.patch_embed.proj.weight.data.flatten(1))
    nn.init.zeros_(vit.patch_embed.proj.bias)


def fixed_position_embedding(vit: VisionTransformer) -> None:
    """The 2-D sine-cosine table, zero for [cls], which is not trained."""
    # Here, so that MAE, which has a table of its own, does without lightly.
    from lightly.models.utils import initialize_2d_sine_cosine_positional_embedding

    assert vit.pos_embed is not None
    initialize_2d_sine_cosine_positional_embedding(vit.pos_embed, num_prefix_tokens=vit.num_prefix_tokens)
