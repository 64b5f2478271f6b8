"""Vision Transformers that follow no library: their parts are found by what nearly everybody calls them.

This finds torchvision's, open_clip's and OpenAI's too, and those of the official DINO, MAE, iBOT and DINOv2 code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from vitprobe.errors import AttentionNotSeenError, UserError
from vitprobe.layout import TokenLayout
from vitprobe.models.anatomy.block_lists import block_lists
from vitprobe.models.anatomy.parts import Anatomy, Size, grid_of, pair, read_images, size_of

CLS = ("cls_token", "class_token", "class_embedding", "cls_embedding", "cls")
DISTILLATION = ("dist_token", "distillation_token")
REGISTERS = (
    *("reg_token", "reg_tokens", "register_token", "register_tokens", "registers", "storage_tokens"),
    *("detection_tokens", "det_token", "det_tokens", "prompt_tokens"),
)
_POSITIONS = ("pos_embed", "pos_embedding", "positional_embedding", "position_embedding", "position_embeddings")
_SIZES = ("img_size", "image_size", "input_resolution")
HELP = (
    "say it with load_model(model, layout=vitprobe.TokenLayout(grid=(14, 14), has_cls=True, patch_size=(16, 16)), "
    "blocks=list(model.blocks))"
)


def recognise(
    module: nn.Module, layout: TokenLayout | None = None, blocks: Sequence[nn.Module] | None = None
) -> Anatomy:
    """The anatomy of any model that has a list of blocks and a patch convolution, or whose `layout` is given.

    Args:
        module: the model.
        layout: its tokens for the images it was built for; other sizes get the grid that its patch size makes.
        blocks: its blocks in the order in which they run, where they cannot be found.

    Raises:
        AttentionNotSeenError: where no blocks or no patch size are found; says what to write.
    """
    name = type(module).__name__
    found = list(blocks) if blocks is not None else next((each.blocks for each in block_lists(module)), ())
    if not found:
        raise AttentionNotSeenError(
            f"no list of alike transformer blocks was found in {name}, so there is no attention to capture; if it has "
            f"some, {HELP}"
        )
    convolution = patch_convolution(module)
    of_size: Callable[[Size], TokenLayout]
    if layout is not None:
        of_size, size = of_given(layout, convolution, None if convolution is None else _said_size(module, convolution))
    elif convolution is not None:
        cls, distillation, registers = (_count(module, names) for names in (CLS, DISTILLATION, REGISTERS))
        own: Any = getattr(module, "patch_size", None)
        tiles = convolution.stride == convolution.kernel_size
        patch = pair(own) if tiles and isinstance(own, int | tuple | list) else pair(convolution.stride)
        guess = TokenLayout((1, 1), cls > 0, distillation, registers, patch)
        of_size = _scaled(guess) if patch != pair(convolution.stride) else _cut(guess, convolution)
        size = _image_size(module, convolution, patch, cls + distillation + registers)
    else:
        raise AttentionNotSeenError(
            f"{name} has no convolution that cuts images into patches, so its patch grid is not known; {HELP}"
        )
    return Anatomy(
        module=module,
        blocks=tuple(found),
        images_enter=module if convolution is None else convolution,
        layout=of_size,
        image_size=size,
        any_size=True,  # it says so itself where it does not
        read_input=read_images(of_size, name),
        prepare=_all_patches(module),
        given=layout is not None,
    )


def _all_patches(module: nn.Module) -> Callable[[ExitStack], None]:
    """Switches off what MAE's code calls `random_masking`, which shuffles the patches at any mask ratio."""

    def keep_all(patches: Tensor, mask_ratio: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        batch, count = patches.shape[:2]
        order = torch.arange(count, device=patches.device).expand(batch, -1)
        return patches, torch.zeros_like(order, dtype=patches.dtype), order

    def prepare(stack: ExitStack) -> None:
        if hasattr(type(module), "random_masking"):
            module.random_masking = keep_all  # type: ignore[assignment]
            stack.callback(delattr, module, "random_masking")

    return prepare


def of_given(
    layout: TokenLayout, convolution: nn.Conv2d | None, said: Size | None
) -> tuple[Callable[[Size], TokenLayout], Size]:
    """What the user's layout means for images of each size, and the size that it is of.

    Args:
        layout: the user's word.
        convolution: what cuts images into patches, which may overlap, where that is known.
        said: height and width that the model says it takes, or None.
    """
    if convolution is None or pair(convolution.stride) != layout.patch_size:
        whole, size = _scaled(layout), layout.image_size
        return lambda asked: for_images(layout, whole(asked).grid, asked), size
    if said is None or grid_of(convolution, said) != layout.grid:
        said = size_of(convolution, layout.grid)
    return lambda asked: for_images(layout, grid_of(convolution, asked), asked), said


def _scaled(layout: TokenLayout) -> Callable[[Size], TokenLayout]:
    """Image size → `layout` with as many whole patches as fit."""

    def of_size(size: Size) -> TokenLayout:
        return layout.of_grid((size[0] // layout.patch_size[0], size[1] // layout.patch_size[1]))

    return of_size


def _cut(layout: TokenLayout, convolution: nn.Conv2d) -> Callable[[Size], TokenLayout]:
    """Image size → `layout` with the patches that the convolution cuts."""
    return lambda size: layout.of_grid(grid_of(convolution, size))


def for_images(layout: TokenLayout, grid: Size, size: Size) -> TokenLayout:
    """The user's layout for images of `size`, which make `grid` of patches.

    Raises:
        UserError: where that grid has as many patches as the layout's, and others: the layout is of other images.
    """
    if grid != layout.grid and grid[0] * grid[1] == layout.num_patches:
        raise UserError(
            f"the layout given has a grid of {layout.grid[0]}x{layout.grid[1]} patches, but images of {size[0]}×"
            f"{size[1]} pixels make {grid[0]}x{grid[1]}: give the layout with grid={grid}, or images of its grid"
        )
    return layout.of_grid(grid)


def patch_convolution(module: nn.Module) -> nn.Conv2d | None:
    """The first convolution, if its windows tile the image, or overlap and are the only ones that cut it."""
    first = next((part for part in module.modules() if isinstance(part, nn.Conv2d)), None)
    if first is None or max(first.stride) <= 1:
        return None
    if tuple(first.stride) == tuple(first.kernel_size):
        return first
    holder = next(part for part in module.modules() if first in part.children())
    alone = sum(isinstance(part, nn.Conv2d) for part in holder.modules()) == 1  # of a stem there are several
    overlaps = all(step <= edge for step, edge in zip(first.stride, first.kernel_size, strict=True))
    return first if alone and overlaps and isinstance(first.padding, tuple) else None


def embedding_of(module: nn.Module) -> nn.Module:
    """The part of a tower that the images enter, as far as it is known: its first convolution, else the tower."""
    return next((part for part in module.modules() if isinstance(part, nn.Conv2d)), module)


def _parameters(module: nn.Module, names: Sequence[str]) -> Iterator[Any]:
    """Parameters and embeddings at the top of a model or one part down, of one of these names."""
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        parts = name.removesuffix(".weight").split(".")
        if len(parts) <= 3 and parts[-1] in names:
            yield value


def _count(module: nn.Module, names: Sequence[str]) -> int:
    """Tokens that a parameter `(1, T, D)`, `(T, D)` or `(D,)` of one of these names holds; 0 without one."""
    return next((value.numel() // value.shape[-1] for value in _parameters(module, names)), 0)


def _image_size(module: nn.Module, convolution: nn.Conv2d, patch: Size, num_prefix: int) -> Size:
    """What the model says, else what its position embeddings are for, else 224 pixels."""
    said = _said_size(module, convolution)
    if said is not None:
        return said
    for value in _parameters(module, _POSITIONS):
        for count in (value.shape[-2] - num_prefix, value.shape[-2]):
            side = math.isqrt(max(count, 0))
            if side and side * side == count:
                overlaps = patch == pair(convolution.stride) != pair(convolution.kernel_size)
                return size_of(convolution, (side, side)) if overlaps else (side * patch[0], side * patch[1])
    return 224, 224


def _said_size(module: nn.Module, convolution: nn.Conv2d) -> Size | None:
    """What the model, or what holds the convolution, says of the size of its images."""
    holders = [part for part in module.modules() if part is module or convolution in part.children()]
    for value in (getattr(holder, name, None) for holder in holders for name in _SIZES):
        if isinstance(value, int | tuple | list):
            return pair(value)
    return None
