"""`find_anatomy`: which way of writing a Vision Transformer a model follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from vitprobe.errors import AttentionNotSeenError
from vitprobe.models.anatomy import huggingface_vit, own_vit, timm_vit
from vitprobe.models.anatomy.parts import Anatomy, read_images
from vitprobe.models.anatomy.unsupported import why_unsupported
from vitprobe.models.tokens import TokenLayout

# Where models of images and texts keep the part for images.
_TOWERS = ("visual", "vision_model", "vision_tower", "trunk")


def find_anatomy(
    module: nn.Module, layout: TokenLayout | None = None, blocks: Sequence[nn.Module] | None = None
) -> Anatomy:
    """The anatomy of a Vision Transformer: timm's, torchvision's, open_clip's, transformers', or one's own.

    Args:
        module: the model, or one of images and texts, whose image tower is taken; compiled or not.
        layout: its tokens, where they are not found or found wrongly.
        blocks: its blocks, likewise.

    Raises:
        AttentionNotSeenError: for a model whose blocks or patch grid are not found, or whose kind of attention is not
            supported; says why and what to do.
    """
    # Of a compiled model what it was compiled from, whose forward pass the wrapper calls.
    module = image_tower(getattr(module, "_orig_mod", module))
    if isinstance(getattr(module, "module", None), nn.Module) and timm_vit.recognise(module) is None:
        raise AttentionNotSeenError(
            f"{type(module).__name__} wraps the model and may run copies of it, whose attention cannot be seen; pass "
            f"model.module, and call that inside the capture"
        )
    if blocks is None:
        reason = why_unsupported(module)
        if reason is not None:
            raise AttentionNotSeenError(reason)
        anatomy = huggingface_vit.recognise(module) or timm_vit.recognise(module)
        if anatomy is not None:
            return anatomy if layout is None else _with_layout(anatomy, layout)
    return own_vit.recognise(module, layout, blocks)


def image_tower(module: nn.Module) -> nn.Module:
    """The part of a model of images and texts that takes images; any other model itself."""
    for name in _TOWERS:
        part: Any = getattr(module, name, None)
        if isinstance(part, nn.Module):
            return image_tower(part)
    return module


def _with_layout(anatomy: Anatomy, layout: TokenLayout) -> Anatomy:
    """An anatomy with the user's word on which token is what, for images of the size that its grid is of."""
    size = anatomy.image_size
    if anatomy.layout(size).grid != layout.grid and anatomy.any_size:
        _, size = own_vit.of_given(layout, own_vit.patch_convolution(anatomy.images_enter), None)

    def of_size(asked: tuple[int, int]) -> TokenLayout:
        return own_vit.for_images(layout, anatomy.layout(asked).grid, asked)

    return replace(
        anatomy,
        layout=of_size,
        image_size=size,
        read_input=read_images(of_size, type(anatomy.module).__name__),
        given=True,
    )
