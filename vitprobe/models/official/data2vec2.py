"""data2vec 2.0 (arXiv 2212.07525): norms that follow the residual sums, `norm(x + f(x))`, and no final norm."""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from torch import Tensor

from vitprobe.models.official.layout import Layout, State, without

_IMAGE = "modality_encoders.IMAGE."
_STEM = {
    f"{_IMAGE}extra_tokens": "cls_token",
    f"{_IMAGE}fixed_positional_encoder.positions": "pos_embed",
    f"{_IMAGE}local_encoder.proj.weight": "patch_embed.proj.weight",
    f"{_IMAGE}local_encoder.proj.bias": "patch_embed.proj.bias",
    f"{_IMAGE}context_encoder.norm.weight": "norm_pre.weight",
    f"{_IMAGE}context_encoder.norm.bias": "norm_pre.bias",
}


class PostNormBlock(ResPostBlock):
    """timm's `ResPostBlock` holds the same parts but normalises before it adds: `x + norm(f(x))`."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Return the tokens `(B, N, D)` after attention and MLP."""
        update = self.attn(x, attn_mask=attn_mask, is_causal=is_causal)
        x = self.norm1(x + self.drop_path1(update))
        return self.norm2(x + self.drop_path2(self.mlp(x)))


def _patches_with_bias(**arguments: Any) -> PatchEmbed:
    """timm leaves the bias out where a norm follows the embedding; data2vec 2.0 has both."""
    arguments["bias"] = True
    return PatchEmbed(**arguments)


def convert(state: State) -> State:
    """Return the stem of the image encoder and the shared blocks, without the decoder."""
    return {_STEM.get(name, name): value for name, value in without(state, f"{_IMAGE}decoder.", "_ema").items()}


LAYOUT = Layout(
    words=f"blocks.0.attn.qkv.weight … beside {_IMAGE}",
    convert=convert,
    build=partial(
        VisionTransformer,
        block_fn=PostNormBlock,
        embed_layer=_patches_with_bias,
        no_embed_class=True,
        pre_norm=True,
        final_norm=False,
    ),
)
