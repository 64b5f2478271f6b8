"""Vision Transformers of Hugging Face transformers: an image tower with `.embeddings`, and what is particular to it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from vitprobe.errors import AttentionNotSeenError
from vitprobe.layout import TokenLayout
from vitprobe.models.anatomy import own_vit
from vitprobe.models.anatomy.parts import Anatomy, Layouts, Size, pair

# What the config of a model that works in stages has one of for each.
_OF_STAGES = ("depths", "hidden_sizes", "embed_dims", "embed_dim")
_INSTEAD = "use an isotropic Vision Transformer, such as DINOv2"


def recognise(module: nn.Module) -> Anatomy | None:
    """The anatomy of a vision model of transformers, bare or with a head around it; None for any other.

    For the time of a capture a ViTMAE sees all patches in their order, whatever noise it is given, and position
    embeddings are interpolated for images of another size than the model was built for.

    Raises:
        AttentionNotSeenError: for a model of transformers that takes no images, or works in stages.
    """
    tower = next((part for part in module.modules() if is_tower(part)), None)
    name, takes = type(module).__name__, getattr(module, "main_input_name", "pixel_values")
    if tower is None:
        if from_transformers(module) and takes != "pixel_values":
            raise AttentionNotSeenError(f"{name} of transformers takes {takes}, not images; {_INSTEAD}")
        return None
    if any(isinstance(getattr(tower.config, several, None), list | tuple) for several in _OF_STAGES):
        raise AttentionNotSeenError(
            f"{name} of transformers works in stages, on patch grids that change from one to the next, so its blocks "
            f"have no maps of one grid; {_INSTEAD}"
        )
    if takes_patches(tower):
        return _of_patches(tower)
    embeddings: Any = tower.embeddings
    # Names and order of its parts are everybody's: [cls], distillation, registers, patches.
    anatomy = own_vit.recognise(tower)
    size: Any = getattr(tower.config, "image_size", None)
    image_size = anatomy.image_size if size is None else pair(size)
    return replace(
        anatomy,
        images_enter=embeddings,
        image_size=image_size,
        any_size=True,
        prepare=_preparation(embeddings, image_size, anatomy.layout),
    )


def takes_patches(module: Any) -> bool:
    """Whether a model is given patches and the grids they are of, instead of images (SigLIP 2 "NaFlex")."""
    embeddings = getattr(module, "embeddings", None)
    return isinstance(embeddings, nn.Module) and "spatial_shapes" in inspect.signature(embeddings.forward).parameters


def _of_patches(tower: Any) -> Anatomy:
    """The anatomy of a model that is given patches, padded to one number; `spatial_shapes` `(B, 2)` has the grids."""
    side = math.isqrt(tower.config.num_patches)
    anatomy = own_vit.recognise(
        tower, TokenLayout((side, side), has_cls=False, patch_size=pair(tower.config.patch_size))
    )
    layout = anatomy.layout(anatomy.image_size)
    signature = inspect.signature(tower.embeddings.forward)

    def read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Layouts:
        shapes = signature.bind(*args, **kwargs).arguments["spatial_shapes"]
        return tuple(replace(layout, grid=pair(shape)) for shape in shapes.tolist())

    return replace(anatomy, images_enter=tower.embeddings, any_size=False, read_input=read)


def from_transformers(module: nn.Module) -> bool:
    """Whether a module's class is of transformers, or derived from one of its classes."""
    homes = ("transformers.models.", "transformers.modeling_utils")
    return any(kind.__module__.startswith(homes) for kind in type(module).__mro__)


def is_tower(module: nn.Module) -> bool:
    """Whether a module takes images: its embeddings cut them with a convolution, or are given the patches."""
    embeddings = getattr(module, "embeddings", None)
    return (
        isinstance(embeddings, nn.Module)
        and from_transformers(module)
        and (takes_patches(module) or any(isinstance(part, nn.Conv2d) for part in embeddings.modules()))
    )


def _preparation(
    embeddings: Any, image_size: Size, layout: Callable[[Size], TokenLayout]
) -> Callable[[ExitStack], None]:
    """What makes the embeddings give every patch of an image, of any size; undone by the stack."""
    signature = inspect.signature(embeddings.forward)
    masks = "noise" in signature.parameters and hasattr(embeddings.config, "mask_ratio")
    stretches = "interpolate_pos_encoding" in signature.parameters
    # Elsewhere (BEiT before version 5) the argument is there but only warns, with None as its default.
    stretches = stretches and signature.parameters["interpolate_pos_encoding"].default is False

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = signature.bind(*args, **kwargs)
        images = given.arguments["pixel_values"]
        size = pair(images.shape[-2:])
        if masks:  # patches are sorted by their noise, at a mask ratio of 0 too
            order = torch.arange(layout(size).num_patches, device=images.device)
            given.arguments["noise"] = order.expand(len(images), -1)
        if stretches and size != image_size:
            given.arguments["interpolate_pos_encoding"] = True
        return given.args, given.kwargs

    def prepare(stack: ExitStack) -> None:
        if masks:
            stack.callback(setattr, embeddings.config, "mask_ratio", embeddings.config.mask_ratio)
            embeddings.config.mask_ratio = 0.0
        if masks or stretches:
            stack.callback(embeddings.register_forward_pre_hook(before, with_kwargs=True).remove)

    return prepare
