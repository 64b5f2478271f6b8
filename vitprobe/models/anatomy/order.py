"""Which token is what, measured: a model is run on noise as far as its first block.

There the [cls], distillation and register tokens are the same for every image, and the patches are not. Which of them
is [cls] shows when its parameter is changed: that position changes, and no other. Patches run row by row where a change
of the image's right half changes the patches of the right half of the grid, and likewise below.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from vitprobe.errors import AttentionNotSeenError, UserError
from vitprobe.layout import TokenLayout
from vitprobe.models.anatomy.measured import on_noise
from vitprobe.models.anatomy.own_vit import CLS, DISTILLATION, REGISTERS
from vitprobe.models.anatomy.parts import Anatomy, Layouts, Size, first_tensor

# An image → the arguments, positional and by keyword, with which the model is called on it.
Call = Callable[[Tensor], tuple[tuple[Any, ...], dict[str, Any]]]
_KINDS = {"[cls]": CLS, "distillation": DISTILLATION, "registers": REGISTERS}
_SAME = 1e-3  # a token is the same for two images if it differs by less than this share of what a patch differs by
_LOCAL = 0.75  # a change of half an image changes at most this share of the patches, or says nothing of their places


class _FirstBlockReached(Exception):
    """Ends a forward pass of which nothing more is wanted."""


def measure_order(anatomy: Anatomy, like: Tensor, call: Call = lambda image: ((image,), {})) -> Anatomy:
    """The anatomy with the token layout that the model is seen to have; unchanged where it cannot be run on noise.

    Args:
        anatomy: where the model keeps its parts; what it changes for a capture must have been prepared.
        like: images `(B, C, H, W)` of which shape, kind of number and device are taken.
        call: how the model is called on an image `(1, C, H, W)`.

    Raises:
        AttentionNotSeenError: where several tokens are the same for every image and nothing tells which is [cls].
        UserError: for a layout given by the user that contradicts what is seen.
    """
    if like.is_meta:  # shapes without values
        return anatomy
    size = (int(like.shape[-2]), int(like.shape[-1]))
    expected = anatomy.layout(size)
    images = list(_noise(like))
    passes = [tokens for image in images if (tokens := _first_tokens(anatomy, call, image)) is not None]
    if len(passes) < len(images) or len({tokens.shape for tokens in passes}) > 1:
        return anatomy
    seen = torch.cat(passes)
    change = _difference(seen[0], seen[1])
    fixed = [place for place, by in enumerate(change.tolist()) if by <= _SAME * float(change.max())]
    if len(fixed) == len(change):  # what enters the first block depends on no image
        return anatomy
    moved = _moved_by_parameters(anatomy, call, images[0], seen[0], fixed) if len(fixed) > 1 else {}
    if anatomy.given:
        _require_agreement(type(anatomy.module).__name__, expected, size, len(change), fixed, moved)
        found = expected
    elif len(change) - len(fixed) != expected.num_patches:
        return anatomy  # another grid, or a prefix that depends on the image: nothing is known better than by name
    else:
        found = _arranged(type(anatomy.module).__name__, expected, fixed, moved)
    _require_rows(type(anatomy.module).__name__, found, seen)
    return _with(anatomy, expected, found)


def _noise(like: Tensor) -> Iterator[Tensor]:
    """Two images of noise; the first again with the second's right half; and with its lower half; `(1, C, H, W)`."""
    generator = torch.Generator().manual_seed(0)
    height, width = like.shape[-2:]
    first, second = (torch.randn(1, *like.shape[1:], generator=generator).to(like) for _ in range(2))
    yield from (first, second)
    for half in ((..., slice(width // 2, None)), (..., slice(height // 2, None), slice(None))):
        mixed = first.clone()
        mixed[half] = second[half]
        yield mixed


def _first_tokens(
    anatomy: Anatomy, call: Call, image: Tensor, changed: dict[str, Tensor] | None = None
) -> Tensor | None:
    """`(1, T, D)` tokens that enter the first block, with some parameters changed; None where that cannot be seen."""
    came: list[Tensor | None] = []

    def take(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        came.append(first_tensor((*args, *kwargs.values())))
        raise _FirstBlockReached

    args, kwargs = call(image)
    handle = anatomy.blocks[0].register_forward_pre_hook(take, with_kwargs=True, prepend=True)
    try:
        with on_noise(anatomy.module):
            if changed:
                functional_call(anatomy.module, changed, args, kwargs)
            else:
                anatomy.module(*args, **kwargs)
    except _FirstBlockReached:
        pass
    except Exception:  # models refuse noise, or these arguments, in ways of their own
        return None
    finally:
        handle.remove()
    tokens = came[0] if came else None
    if tokens is None or tokens.ndim != 3 or not tokens.isfinite().all():
        return None
    if tokens.shape[0] != 1:
        tokens = tokens.transpose(0, 1)  # torch's own attention may have the sequence first
    return tokens.detach().float().clone() if tokens.shape[0] == 1 else None


def _difference(one: Tensor, other: Tensor) -> Tensor:
    """`(T,)` norms of how much each token differs."""
    return (one - other).norm(dim=-1)


def _moved_by_parameters(
    anatomy: Anatomy, call: Call, image: Tensor, tokens: Tensor, fixed: Sequence[int]
) -> dict[str, list[int]]:
    """Of each kind of token, the fixed positions that move when parameters of its usual names are changed.

    Args:
        anatomy: where the model keeps its parts.
        call: how the model is called on an image.
        image: one image.
        tokens: `(T, D)` of that image.
        fixed: positions that are the same for every image.
    """
    moved: dict[str, list[int]] = {}
    for kind, names in _KINDS.items():
        changed = {
            name: value + 1 + value.abs().max()
            for name, value in anatomy.module.named_parameters()
            if name.removesuffix(".weight").rpartition(".")[2] in names and value.is_floating_point()
        }
        seen = _first_tokens(anatomy, call, image, changed) if changed else None
        if seen is not None and seen[0].shape == tokens.shape:
            by = _difference(seen[0], tokens)
            moved[kind] = [place for place in fixed if by[place] > _SAME * float(by.max())]
    return moved


def _told_apart(fixed: Sequence[int], moved: dict[str, list[int]]) -> bool:
    """Whether parameters say of each token that is the same for every image which kind it is."""
    known = [place for places in moved.values() for place in places]
    return len(moved.get("[cls]", [])) <= 1 and sorted(known) == list(fixed)


def _require_agreement(
    name: str, given: TokenLayout, size: Size, count: int, fixed: Sequence[int], moved: dict[str, list[int]]
) -> None:
    """Raise `UserError` where the user's layout contradicts what was seen: `count` tokens, `fixed` and `moved` of them.

    A token that is the same for every image is no patch. One that is not may be a [cls] made of the image.
    """
    if count != given.num_tokens:
        raise UserError(
            f"the layout given has {given.num_tokens} tokens ({given}), but {name} makes {count} of images of "
            f"{size[0]}×{size[1]} pixels, {len(fixed)} of them the same for every image: correct the layout, or leave "
            f"it out"
        )
    special, cls = given.special, moved.get("[cls]", [])
    right = set(fixed) <= set(special)
    if right and _told_apart(fixed, moved) and given.has_cls:  # what else counts as a register is the user's word
        right = cls == [special[0]] if cls else special[0] not in fixed
    if right:
        return
    seen = f"of the {count} tokens that its first block gets, {_named(fixed)} the same for every image"
    if _told_apart(fixed, moved):
        order = tuple(place for kind in _KINDS for place in moved.get(kind, []))
        kinds = ", ".join(f"{len(places)} {kind}" for kind, places in moved.items() if places)
        seen += f", so give positions={order} ({kinds})"
    elif fixed:
        seen += f", so give positions={tuple(fixed)} in the order [cls], distillation, registers"
    raise UserError(f"the layout given ({given}) is not that of {name}: {seen}")


def _named(places: Sequence[int]) -> str:
    return f"{', '.join(map(str, places)) or 'none'} {'is' if len(places) <= 1 else 'are'}"


def _arranged(name: str, expected: TokenLayout, fixed: Sequence[int], moved: dict[str, list[int]]) -> TokenLayout:
    """The layout with each kind of token where it was seen.

    Raises:
        AttentionNotSeenError: where that cannot be told.
    """
    if not fixed or _told_apart(fixed, moved):
        cls, distillation, registers = (moved.get(kind, []) for kind in _KINDS)
        return replace(
            expected,
            has_cls=bool(cls),
            num_distillation=len(distillation),
            num_registers=len(registers),
            positions=(*cls, *distillation, *registers),
        )
    if len(fixed) == expected.num_prefix_tokens and (len(fixed) == 1 or set(fixed) == set(expected.special)):
        # One token can be but one kind. Of several that no parameter tells apart, the model's library knows the order.
        return replace(expected, positions=tuple(fixed))
    raise AttentionNotSeenError(
        f"{_named(fixed)} the same for every image among the tokens that the first block of {name} gets, but its "
        f"parameters do not tell which is [cls] and which is a register: say it with load_model(model, "
        f"layout=vitprobe.TokenLayout(grid={expected.grid}, has_cls=True, num_registers={len(fixed) - 1}, "
        f"patch_size={expected.patch_size}, positions={tuple(fixed)})), with [cls] first"
    )


def _require_rows(name: str, layout: TokenLayout, seen: Tensor) -> None:
    """Raise `UserError` unless patches run row by row on the grid, as far as halves of an image can tell.

    The middle of a half decides (quartiles), as patches at its edge may overlap the other.
    """
    height, width = layout.grid
    places = torch.arange(layout.num_patches)
    for image, half, along, count in ((2, "right", places % width, width), (3, "lower", places // width, height)):
        by = _difference(seen[image], seen[0])[layout.patches].cpu()
        local = (by > _SAME * by.max()).float().mean() <= _LOCAL  # of tokens that nothing has mixed
        changed, others = by[along >= (count + 1) // 2], by[along < count // 2]
        if local and len(others) and changed.quantile(0.25) <= others.quantile(0.75):
            raise UserError(
                f"the patches of {name} do not run row by row on a grid of {height}x{width}: a change of an image's "
                f"{half} half changes other patches than those of the {half} half; give the right grid with "
                f"load_model(model, layout=vitprobe.TokenLayout(…)); another order is not supported"
            )


def _with(anatomy: Anatomy, expected: TokenLayout, found: TokenLayout) -> Anatomy:
    """The anatomy with what was found in place of what was expected, for images of every size."""
    if found == expected:
        return replace(anatomy, measured=True)

    def arranged(layout: TokenLayout) -> TokenLayout:
        return replace(found.of_grid(layout.grid), patch_size=layout.patch_size)

    def of_size(size: Size) -> TokenLayout:
        return arranged(anatomy.layout(size))

    def read_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Layouts:
        layouts = anatomy.read_input(args, kwargs)
        return tuple(map(arranged, layouts)) if isinstance(layouts, tuple) else arranged(layouts)

    return replace(anatomy, layout=of_size, read_input=read_input, measured=True)
