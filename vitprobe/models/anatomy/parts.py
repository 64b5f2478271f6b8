"""`Anatomy`: what must be known of a model before its attention can be watched."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitprobe.errors import AttentionNotSeenError
from vitprobe.layout import TokenLayout

Size = tuple[int, int]
# One layout for all images of a batch or, where images of several grids were padded to one length, one for each.
Layouts = TokenLayout | tuple[TokenLayout, ...]


# What torch.compile, activation checkpointing and FSDP keep the module in that they wrap.
_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def _nothing(stack: ExitStack) -> None:
    """Most models are watched as they are."""


@dataclass(frozen=True, eq=False)
class Anatomy:
    """The parts of a Vision Transformer that capture and preprocessing deal with.

    Attributes:
        module: what is run: the model as given or, of one of images and texts, its image tower.
        blocks: its transformer blocks in the order in which they run.
        images_enter: the part whose first tensor is the batch of images.
        layout: images of `(height, width)` pixels → their tokens.
        image_size: height and width that the model was built for, in pixels.
        any_size: whether it takes other sizes as it is.
        read_input: arguments of `images_enter` (positional, by keyword) → the layouts of that batch; raises
            AttentionNotSeenError for an input whose patch grid cannot be known.
        prepare: what a capture changes for its time, such as masking switched off; the stack undoes it.
        given: whether the user said which token is what; else that is a guess from names.
        measured: whether the model has been run to see which token is what (see `order.measure_order`).
        lineage: the part of the model that holds the patch embedding and the blocks, then what holds that part, up to
            the model as it was given.
        others: other lists of blocks in the model: an expression for them, and the first block of each.
        remarks: lines that a user must read about how the blocks were chosen.
        normalizer: the class of a module by which the model normalises its images itself; "" where it does not.
    """

    module: nn.Module
    blocks: tuple[nn.Module, ...]
    images_enter: nn.Module
    layout: Callable[[Size], TokenLayout]
    image_size: Size
    any_size: bool
    read_input: Callable[[tuple[Any, ...], dict[str, Any]], Layouts]
    prepare: Callable[[ExitStack], None] = _nothing
    given: bool = False
    measured: bool = False
    lineage: tuple[nn.Module, ...] = ()
    others: tuple[tuple[str, nn.Module], ...] = ()
    remarks: tuple[str, ...] = ()
    normalizer: str = ""

    @property
    def tower(self) -> nn.Module:
        """The part of the model that holds the patch embedding and the blocks: `module`, or inside it."""
        return self.lineage[0] if self.lineage else self.module

    @property
    def width(self) -> int | None:
        """Numbers a token; None where the model does not say."""
        return self._number("embed_dim", "hidden_size", "hidden_dim", "num_features", "width", "dim", "d_model")

    @property
    def channels(self) -> int:
        """Channels of the images: what the first convolution in the part that takes them, or linear map, is for."""
        return channels_of(self.images_enter, self.layout(self.image_size).patch_size)

    @property
    def num_heads(self) -> int | None:
        """Heads of the first block's attention; None where the model does not say."""
        return self._number("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead")

    def _number(self, *names: str) -> int | None:
        """The first whole number of one of these names, in the first block from its attention on, then in the model."""
        block: Any = self.blocks[0]
        places = [*block.modules(), self.tower, getattr(self.tower, "config", None), self.module]
        found = (getattr(place, name, None) for name in names for place in places)
        return next((value for value in found if isinstance(value, int)), None)


def read_images(
    layout: Callable[[Size], TokenLayout], name: str
) -> Callable[[tuple[Any, ...], dict[str, Any]], TokenLayout]:
    """The `read_input` of a model called `name` that takes images `(B, channels, height, width)`."""

    def read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> TokenLayout:
        images = first_tensor((*args, *kwargs.values()))
        if images is None or images.ndim != 4:
            came = "no tensor" if images is None else f"a tensor of shape {tuple(images.shape)}"
            raise AttentionNotSeenError(
                f"{name} got {came}; capture needs a batch of images (B, 3, H, W) to know the patch grid"
            )
        return layout((int(images.shape[-2]), int(images.shape[-1])))

    return read


def channels_of(embedding: nn.Module, patch: Size | None = None) -> int:
    """Return the channels of the images that an embedding takes; 3 where nothing says so.

    Args:
        embedding: the part that the images enter; its first convolution says it, or its first linear map of patches.
        patch: height and width of a patch in pixels, to read a linear map by; default None: only convolutions count.
    """
    for part in embedding.modules():
        if isinstance(count := getattr(part, "in_channels", None), int) and getattr(part, "kernel_size", None):
            return count
        pixels = patch[0] * patch[1] if patch else 0
        if pixels and isinstance(count := getattr(part, "in_features", None), int) and count % pixels == 0:
            return count // pixels
    return 3


def grid_of(convolution: nn.Conv2d, size: Size) -> Size:
    """Rows and columns of what a convolution makes of an image of `size`: of patches that tile it, or overlap."""
    padding = convolution.padding if isinstance(convolution.padding, tuple) else (0, 0)
    places = zip(size, padding, convolution.kernel_size, convolution.stride, strict=True)
    rows, columns = ((side + 2 * pad - edge) // step + 1 for side, pad, edge, step in places)
    return rows, columns


def size_of(convolution: nn.Conv2d, grid: Size) -> Size:
    """The smallest image of which a convolution makes `grid` (rows, columns) of patches."""
    padding = convolution.padding if isinstance(convolution.padding, tuple) else (0, 0)
    places = zip(grid, padding, convolution.kernel_size, convolution.stride, strict=True)
    height, width = ((count - 1) * step + edge - 2 * pad for count, pad, edge, step in places)
    return height, width


def use_fused_attention(blocks: Iterable[nn.Module], stack: ExitStack) -> None:
    """Switches fused attention on where it was switched off in a timm model; the stack switches it off again."""
    for module in blocks:
        for part in module.modules():
            if getattr(part, "fused_attn", None) is False:
                part.fused_attn = True  # type: ignore[assignment]
                stack.callback(setattr, part, "fused_attn", False)


def run_eagerly(stack: ExitStack) -> None:
    """Run compiled modules as they are written, so that hooks inside them are heard; the stack ends that."""
    if "torch._dynamo" in sys.modules:  # otherwise nothing is compiled, and the import takes seconds
        stack.enter_context(torch.compiler.set_stance("force_eager"))


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside what torch.compile, activation checkpointing or FSDP wraps it in; any other module itself."""
    inner = next((module._modules[name] for name in _WRAPPED if name in module._modules), None)
    return module if inner is None else unwrapped(inner)


def first_tensor(values: Iterable[Any]) -> Tensor | None:
    """The tensor that comes first in `values`, or None."""
    return next((value for value in values if isinstance(value, Tensor)), None)


def pair(value: Any) -> Size:
    """(height, width) of a side or of a pair."""
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))
