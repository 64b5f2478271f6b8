"""The architectures of the official checkpoints: timm's parts where they fit, our own where they do not."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from timm.layers.mlp import SwiGLUPacked
from timm.layers.patch_embed import PatchEmbed
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vitprobe.models.configs import describe_images
from vitprobe.models.official.capi import CapiEncoder
from vitprobe.models.official.data2vec2 import PostNormBlock
from vitprobe.models.official.entries import OfficialCheckpoint


def create_official(
    entry: OfficialCheckpoint, img_size: tuple[int, int] | None = None, *, num_classes: int = 0, **options: Any
) -> nn.Module:
    """The architecture of an official checkpoint, with random weights.

    Args:
        entry: the checkpoint.
        img_size: height and width of its images, in pixels; the architecture's own by default.
        num_classes: of its classifier; 0 for none.
        options: arguments of the constructor that replace the entry's.
    """
    arguments = entry.arguments | options
    if img_size is not None:
        arguments["img_size"] = img_size
    if entry.layout != "capi":  # which has no classifier
        arguments["num_classes"] = num_classes
    module = _BUILDERS[entry.layout](**arguments)
    describe_images(module, entry.spec.name, entry.spec.normalisation, crop_pct=entry.crop_pct, num_classes=num_classes)
    return module


def _patches_with_bias(**arguments: Any) -> PatchEmbed:
    """timm leaves the bias out where a norm follows the embedding; data2vec 2.0 has both."""
    arguments["bias"] = True
    return PatchEmbed(**arguments)


_beit = partial(Beit, use_abs_pos_emb=False, use_rel_pos_bias=False, use_shared_rel_pos_bias=True, global_pool="token")
_SWIGLU: Any = SwiGLUPacked  # timm makes it with functools.partial, and asks for a class
_BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "plain": VisionTransformer,
    "moco-v3": VisionTransformer,
    "maskfeat": partial(VisionTransformer, final_norm=False),
    "beit": _beit,
    "simmim": _beit,
    "data2vec2": partial(
        VisionTransformer,
        block_fn=PostNormBlock,
        embed_layer=_patches_with_bias,
        no_embed_class=True,
        pre_norm=True,
        final_norm=False,
    ),
    "capi": CapiEncoder,
    "franca": partial(VisionTransformer, img_size=518, mlp_layer=_SWIGLU, act_layer=nn.SiLU, init_values=1e-5),
}
