"""Vision Transformers of timm, and those built alike: blocks at `.blocks` or `.encoder.blocks`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vitprobe.errors import AttentionNotSeenError
from vitprobe.layout import TokenLayout
from vitprobe.models.anatomy.block_lists import BlockList
from vitprobe.models.anatomy.own_vit import patch_convolution
from vitprobe.models.anatomy.parts import Anatomy, Layouts, Size, first_tensor, grid_of, pair, read_images, unwrapped


def recognise(module: nn.Module) -> Anatomy | None:
    """The anatomy of a model with timm's names for its parts; None for any other."""
    trunk = _trunk(module)
    if trunk is None:
        return None
    holder: Any = getattr(trunk, "embeds", trunk)  # NaFlexVit keeps its tokens in `.embeds`
    embedding: Any = getattr(trunk, "patch_embed", getattr(trunk, "embeds", None))
    if not hasattr(embedding, "dynamic_feat_size") and not hasattr(embedding, "patch_size"):
        return None
    has_cls = getattr(holder, "cls_token", None) is not None
    num_distillation = int(getattr(holder, "dist_token", None) is not None)
    num_registers = int(getattr(trunk, "num_prefix_tokens", 0)) - int(has_cls) - num_distillation
    if num_registers < 0:
        return None

    overlapping = _overlapping(embedding)

    def layout(size: Size) -> TokenLayout:
        # The rule held for all 322 isotropic models of timm 1.0.31; `grid_size` is not asked, it may be out of date.
        if hasattr(embedding, "dynamic_feat_size"):
            grid, patch = embedding.dynamic_feat_size(size), pair(embedding.feat_ratio(as_scalar=False))
        else:
            patch = pair(embedding.patch_size)
            grid = (size[0] // patch[0], size[1] // patch[1])
            if overlapping is not None:
                patch, grid = pair(overlapping.stride), grid_of(overlapping, size)
        return TokenLayout(pair(grid), has_cls, num_distillation, num_registers, patch)

    read = read_images(layout, type(module).__name__)

    def read_naflex(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Layouts:
        images = first_tensor(args)
        if images is not None and images.ndim == 4:
            return read(args, kwargs)
        given = dict(zip(("patches", "patch_coord", "patch_valid"), args, strict=False)) | kwargs
        return tuple(_padded_grids(given, type(module).__name__, layout((0, 0))))

    size: Any = getattr(getattr(trunk, "patch_embed", None), "img_size", None)
    if size is None:
        size = (getattr(module, "pretrained_cfg", None) or {}).get("input_size", (3, 224, 224))[-2:]
    return Anatomy(
        module=module,
        blocks=tuple(trunk.blocks),  # type: ignore[arg-type]
        images_enter=embedding,
        layout=layout,
        image_size=pair(size),
        any_size=not getattr(getattr(trunk, "patch_embed", None), "strict_img_size", False),
        read_input=read_naflex if hasattr(trunk, "embeds") else read,
    )


def is_tower(module: nn.Module) -> bool:
    """Whether a model has timm's names for its parts and holds its blocks itself, or is one of timm's models."""
    own = "blocks" in module._modules or type(module).__module__.startswith("timm.models.")
    return own and recognise(module) is not None


def list_of_blocks(module: nn.Module) -> BlockList:
    """The blocks of a tower."""
    trunk: Any = _trunk(module)
    path = "blocks" if trunk is module else "encoder.blocks"
    return BlockList((path,), tuple(unwrapped(block) for block in trunk.blocks))


def _trunk(module: nn.Module) -> nn.Module | None:
    """The part with a non-empty list `.blocks`: the model or its `.encoder`."""
    for trunk in (module, getattr(module, "encoder", None)):
        blocks = getattr(trunk, "blocks", None)
        if isinstance(trunk, nn.Module) and isinstance(blocks, nn.Sequential | nn.ModuleList) and len(blocks):
            return trunk
    return None


def _overlapping(embedding: nn.Module) -> nn.Conv2d | None:
    """The convolution of an embedding like timm's that cuts patches which overlap; None where patches tile."""
    convolution = patch_convolution(embedding)
    if convolution is None or convolution.stride == convolution.kernel_size:
        return None
    return convolution if convolution.kernel_size == pair(getattr(embedding, "patch_size", 0)) else None


def _padded_grids(given: dict[str, Any], name: str, prefix: TokenLayout) -> list[TokenLayout]:
    """The layout of each image of a NaFlex batch: patches with coordinates, padded to one length.

    Args:
        given: arguments of NaFlexVit's embedding; `patch_coord` `(B, N, 2)` has (row, column) of each patch,
            `patch_valid` `(B, N)` is False for padding.
        name: what an error calls the model.
        prefix: a layout with the model's prefix tokens and patch size.

    Raises:
        AttentionNotSeenError: where the coordinates are missing or do not fill a grid row by row.
    """
    coordinates, valid = given.get("patch_coord"), given.get("patch_valid")
    if not isinstance(coordinates, Tensor):
        raise AttentionNotSeenError(
            f"{name} got patches without patch_coord; capture needs the coordinates of the patches, or images "
            f"(B, 3, H, W), to know the patch grid"
        )
    layouts = []
    for image, places in enumerate(coordinates):
        kept = torch.ones(len(places), dtype=torch.bool) if valid is None else valid[image].bool().cpu()
        count = int(kept.sum())
        places = places[: len(kept)].cpu()[:count]
        rows, columns = (int(last) + 1 for last in places.amax(dim=0)) if count else (0, 0)
        expected = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).view(-1, 2)
        if not count or not kept[:count].all() or not torch.equal(places.long(), expected):
            raise AttentionNotSeenError(
                f"image {image} of the batch that {name} got has {count} patches that do not fill a grid row by row "
                f"(dropped patches, or padding between them); capture needs whole grids, padded at the end"
            )
        layouts.append(replace(prefix, grid=(rows, columns)))
    return layouts
