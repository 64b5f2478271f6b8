"""Which token is what, measured: a model is run on noise as far as its first block.

There the [cls], distillation and register tokens are the same for every image, and the patches are not. Which of them
is [cls] shows when its parameter is changed: that position changes, and no other. Patches run row by row where a change
of the image's right half changes the patches of the right half of the grid, and likewise below.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from vitprobe.errors import AttentionNotSeenError, UserError
from vitprobe.models.anatomy.own_vit import CLS, DISTILLATION, REGISTERS
from vitprobe.models.anatomy.parts import Anatomy, Layouts, Size, first_tensor
from vitprobe.models.tokens import TokenLayout

# Images → the arguments, positional and by keyword, with which the model is called on them.
Call = Callable[[Tensor], tuple[tuple[Any, ...], dict[str, Any]]]
_KINDS = {"[cls]": CLS, "distillation": DISTILLATION, "registers": REGISTERS}
_SAME = 1e-3  # a token is the same for two images if it differs by less than this share of what a patch differs by


class _FirstBlockReached(Exception):
    """Ends a forward pass of which nothing more is wanted."""


def measure_order(anatomy: Anatomy, like: Tensor, call: Call = lambda images: ((images,), {})) -> Anatomy:
    """The anatomy with the token layout that the model is seen to have; unchanged where it cannot be run on noise.

    Args:
        anatomy: where the model keeps its parts; what it changes for a capture must have been prepared.
        like: images `(B, C, H, W)` of which shape, kind of number and device are taken.
        call: how the model is called on images.

    Raises:
        AttentionNotSeenError: where tokens are the same for every image that nothing explains.
        UserError: for a layout given by the user that contradicts what is seen.
    """
    size = (int(like.shape[-2]), int(like.shape[-1]))
    expected = anatomy.layout(size)
    images = _noise(like)
    seen = _first_tokens(anatomy, call, images)
    if seen is None:
        return anatomy
    change = _difference(seen[0], seen[1])
    fixed = [place for place, by in enumerate(change.tolist()) if by <= _SAME * float(change.max())]
    if len(fixed) == len(change):  # what enters the first block depends on no image
        return anatomy
    moved = _moved_by_parameters(anatomy, call, images[:1], seen[:1], fixed) if len(fixed) > 1 else {}
    if anatomy.given:
        if len(change) != expected.num_tokens:  # the capture will say so
            return anatomy
        _require_agreement(anatomy, expected, fixed, moved)
        found = expected
    elif len(change) - len(fixed) != expected.num_patches:
        return anatomy  # another grid, or a prefix that depends on the image: nothing is known better than by name
    else:
        found = _arranged(anatomy, expected, fixed, moved)
    _require_rows(anatomy, found, seen)
    return _with(anatomy, expected, found)


def _noise(like: Tensor) -> Tensor:
    """Two images of noise; the first again with the second's right half; and with its lower half."""
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, *like.shape[1:], generator=generator)
    right, below = first.clone(), first.clone()
    right[..., like.shape[-1] // 2 :] = second[..., like.shape[-1] // 2 :]
    below[..., like.shape[-2] // 2 :, :] = second[..., like.shape[-2] // 2 :, :]
    return torch.stack([first, second, right, below]).to(like.device, like.dtype)


def _first_tokens(anatomy: Anatomy, call: Call, images: Tensor, changed: dict[str, Tensor] | None = None) -> Any:
    """`(B, T, D)` tokens that enter the first block, with some parameters changed; None where that cannot be seen."""
    came: list[Tensor | None] = []

    def take(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        came.append(first_tensor((*args, *kwargs.values())))
        raise _FirstBlockReached

    handle = anatomy.blocks[0].register_forward_pre_hook(take, with_kwargs=True, prepend=True)
    args, kwargs = call(images)
    try:
        with _undisturbed(anatomy.module, images.device):
            functional_call(anatomy.module, changed or {}, args, kwargs)
    except _FirstBlockReached:
        pass
    except Exception:  # models refuse noise, or these arguments, in ways of their own
        return None
    finally:
        handle.remove()
    tokens = came[0] if came else None
    if tokens is None or tokens.ndim != 3 or not tokens.isfinite().all():
        return None
    if tokens.shape[0] != len(images):
        tokens = tokens.transpose(0, 1)  # torch's own attention may have the sequence first
    return tokens.detach().float().clone() if tokens.shape[0] == len(images) else None


@contextmanager
def _undisturbed(module: nn.Module, device: torch.device) -> Iterator[None]:
    """In eval mode, without gradients and compilation; modes and random numbers are as before afterwards."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for part in training:
            part.training = True


def _difference(one: Tensor, other: Tensor) -> Tensor:
    """`(T,)` norms of how much each token differs."""
    return (one - other).norm(dim=-1)


def _moved_by_parameters(
    anatomy: Anatomy, call: Call, image: Tensor, tokens: Tensor, fixed: Sequence[int]
) -> dict[str, list[int]]:
    """Of each kind of token, the fixed positions that move when parameters of its usual names are changed."""
    moved: dict[str, list[int]] = {}
    for kind, names in _KINDS.items():
        changed = {
            name: value + 1 + value.abs().max()
            for name, value in anatomy.module.named_parameters()
            if name.removesuffix(".weight").rpartition(".")[2] in names and value.is_floating_point()
        }
        seen = _first_tokens(anatomy, call, image, changed) if changed else None
        if seen is not None and seen.shape == tokens.shape:
            by = _difference(seen[0], tokens[0])
            moved[kind] = [place for place in fixed if by[place] > _SAME * float(by.max())]
    return moved


def _told_apart(fixed: Sequence[int], moved: dict[str, list[int]]) -> bool:
    """Whether parameters say of each token that is the same for every image which kind it is."""
    known = [place for places in moved.values() for place in places]
    return len(moved.get("[cls]", [])) <= 1 and sorted(known) == list(fixed)


def _require_agreement(anatomy: Anatomy, given: TokenLayout, fixed: Sequence[int], moved: dict[str, list[int]]) -> None:
    """Raise `UserError` where the user's layout contradicts what was seen.

    A token that is the same for every image is no patch. One that is not may be a [cls] made of the image.
    """
    special, told = given.special, _told_apart(fixed, moved)
    right = set(fixed) <= set(special)
    if right and told:
        ends = int(given.has_cls), int(given.has_cls) + given.num_distillation
        kinds = zip(_KINDS, (special[: ends[0]], special[ends[0] : ends[1]], special[ends[1] :]), strict=True)
        right = all(set(moved.get(kind, [])) <= set(places) for kind, places in kinds)
    if right:
        return
    seen = f"of the {given.num_tokens} tokens that its first block gets, {_named(fixed)} the same for every image"
    if told:
        seen += f", so give positions={tuple(place for kind in _KINDS for place in moved.get(kind, []))} ("
        seen += ", ".join(f"{kind} at {_named(places, verb=False)}" for kind, places in moved.items() if places) + ")"
    else:
        seen += f", so give positions={tuple(fixed)} in the order [cls], distillation, registers"
    raise UserError(f"the layout given ({given}) is not that of {type(anatomy.module).__name__}: {seen}")


def _named(places: Sequence[int], *, verb: bool = True) -> str:
    words = ", ".join(map(str, places)) or "none"
    return f"{words} {'is' if len(places) <= 1 else 'are'}" if verb else words


def _arranged(
    anatomy: Anatomy, expected: TokenLayout, fixed: Sequence[int], moved: dict[str, list[int]]
) -> TokenLayout:
    """The layout with each kind of token where it was seen.

    Raises:
        AttentionNotSeenError: where that cannot be told.
    """
    if not fixed or _told_apart(fixed, moved):
        of_kind = [moved.get(kind, []) for kind in _KINDS]
        return replace(
            expected,
            has_cls=bool(of_kind[0]),
            num_distillation=len(of_kind[1]),
            num_registers=len(of_kind[2]),
            positions=tuple(place for places in of_kind for place in places),
        )
    if len(fixed) == expected.num_prefix_tokens and (len(fixed) == 1 or set(fixed) == set(expected.special)):
        # One token can be but one kind. Of several that no parameter tells apart, the model's library knows the order.
        return replace(expected, positions=tuple(fixed))
    name, count = type(anatomy.module).__name__, len(fixed)
    raise AttentionNotSeenError(
        f"{_named(fixed)} the same for every image among the tokens that the first block of {name} gets, but its "
        f"parameters do not tell which is [cls] and which is a register: say it with load_model(model, layout="
        f"vitprobe.TokenLayout(grid={expected.grid}, has_cls=True, num_registers={count - 1}, "
        f"patch_size={expected.patch_size}, positions={tuple(fixed)})), with [cls] first"
    )


def _require_rows(anatomy: Anatomy, layout: TokenLayout, seen: Tensor) -> None:
    """Raise `UserError` unless patches run row by row on the grid, as far as halves of an image can tell.

    The middle of a half decides (quartiles), as patches at its edge may overlap the other.
    """
    places = torch.arange(layout.num_patches)
    rows, columns = places // layout.grid[1], places % layout.grid[1]
    for image, half, along, count in ((2, "right", columns, layout.grid[1]), (3, "lower", rows, layout.grid[0])):
        by = _difference(seen[image], seen[0])[layout.patches].cpu()
        changed, others = by[along >= (count + 1) // 2], by[along < count // 2]
        if len(changed) and changed.quantile(0.25) <= others.quantile(0.75):
            height, width = layout.grid
            raise UserError(
                f"the patches of {type(anatomy.module).__name__} do not run row by row on a grid of {height}x{width}: "
                f"a change of an image's {half} half changes other patches than those of the {half} half; give the "
                f"right grid with load_model(model, layout=vitprobe.TokenLayout(…)); another order is not supported"
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
