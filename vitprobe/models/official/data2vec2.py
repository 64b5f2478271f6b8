"""The block of data2vec 2.0 (arXiv 2212.07525): each norm follows the residual sum, `norm(x + f(x))`."""

from __future__ import annotations

from timm.models.vision_transformer import ResPostBlock
from torch import Tensor


class PostNormBlock(ResPostBlock):
    """timm's `ResPostBlock` holds the same parts but normalises before it adds: `x + norm(f(x))`."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Tokens `(B, N, D)` after attention and MLP."""
        update = self.attn(x, attn_mask=attn_mask, is_causal=is_causal)
        x = self.norm1(x + self.drop_path1(update))
        return self.norm2(x + self.drop_path2(self.mlp(x)))
