"""What attention adds to the residual stream: followed from the attention module to the addition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

# What an attention module and a drop-path are called.
_ATTENTIONS = ("attn", "attention", "self_attn", "self_attention", "mha", "msa")
_DROP_PATHS = ("drop_path1", "drop_path", "droppath", "drop_path_1")


@dataclass(frozen=True, eq=False)
class Branch:
    """An attention module of a block and the modules beside it, which the update may pass before it is added.

    Attributes:
        attention: the module; its output is the update before LayerScale or a post-norm.
        drop_path: what enters this is the update as it is added, whatever came before; None without one.
        others: the other modules of the block; none for timm's blocks, which all have a drop-path, be it an identity.
    """

    attention: nn.Module
    drop_path: nn.Module | None
    others: tuple[nn.Module, ...]


def attention_branches(block: nn.Module) -> list[Branch]:
    """The attention branches of a block; none where it adds attention and MLP in one sum, or names nothing as usual."""
    branches, of_timm = [], type(block).__module__.startswith("timm.")
    for holder in getattr(block, "attns", [block]):
        parts = dict(holder.named_children())
        attention = next((parts[name] for name in _ATTENTIONS if name in parts), None)
        drop_path = next((parts[name] for name in _DROP_PATHS if name in parts), None)
        if attention is not None:
            others = tuple(part for part in parts.values() if part not in (attention, drop_path))
            branches.append(Branch(attention, drop_path, () if of_timm else others))
    return branches


class Update:
    """What one attention branch adds to the residual stream in one run of its block.

    The output of attention passes LayerScale, post-norm or dropout, whatever they are called, until a drop-path gets
    it or the next module gets the sum with the residual. Where there is no drop-path, that sum is checked.
    """

    def __init__(self, residual: Tensor | None, keep: Callable[[Tensor], Tensor]) -> None:
        self.unscaled: Tensor | None = None
        self.added: Tensor | None = None
        self._residual = residual
        self._keep = keep
        self._passing: Tensor | None = None  # the update on its way, the very object

    def attention_ended(self, output: Any) -> None:
        """Take the output of the attention module."""
        update = tensor_of(output)
        if update is not None:
            # At once, as what comes behind may work in place.
            self.unscaled, self._passing = self._keep(update), update

    def drop_path_began(self, update: Tensor) -> None:
        """Take what enters a drop-path. One that follows no attention is the MLP's."""
        if self._passing is not None:
            self.added, self._passing = self._keep(update), None

    def other_began(self, entering: Any) -> bool:
        """Whether what enters another module of the block is the update; if not, that is taken for the sum."""
        entering = tensor_of(entering)
        if self._passing is None or entering is None:
            return False
        if entering is self._passing:
            return True
        if self._residual is not None and _is_sum(entering, self._residual, self._passing):
            self.added = self._keep(self._passing)
        self._passing = None
        return False

    def other_ended(self, output: Any) -> None:
        """Take what a module made of the update."""
        self._passing = tensor_of(output)


def _is_sum(total: Tensor, residual: Tensor, update: Tensor) -> bool:
    """Whether `total` is the sum of the other two, as far as its precision can tell."""
    if not total.shape == residual.shape == update.shape:
        return False
    rounding = 2 * max(torch.finfo(tensor.dtype).eps for tensor in (total, residual, update))
    wide = torch.promote_types(total.dtype, torch.float32)
    total, residual, update = (tensor.detach().to(wide) for tensor in (total, residual, update))
    rounding *= float(residual.norm() + update.norm())
    return bool((total - residual - update).norm() <= rounding)


def hook_branch(branch: Branch, running: Callable[[], Update | None]) -> list[RemovableHandle]:
    """Hook the modules of a branch so that they tell the update that is `running`, if one is wanted."""
    inside: list[nn.Module] = []  # the module that the update is passing now

    def ended(module: nn.Module, args: Any, output: Any) -> None:
        inside.clear()
        if (update := running()) is not None:
            update.attention_ended(output)

    def dropping(module: nn.Module, args: tuple[Any, ...]) -> None:
        if (update := running()) is not None:
            update.drop_path_began(args[0])

    def began(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        update = running()
        if update is not None and update.other_began((*args, *kwargs.values())):
            inside.append(module)

    def passed(module: nn.Module, args: Any, output: Any) -> None:
        update = running()
        if inside and inside[-1] is module and update is not None:
            inside.pop()
            update.other_ended(output)

    handles = [branch.attention.register_forward_hook(ended)]
    if branch.drop_path is not None:
        handles.append(branch.drop_path.register_forward_pre_hook(dropping))
    for other in branch.others:
        handles.append(other.register_forward_pre_hook(began, with_kwargs=True))
        handles.append(other.register_forward_hook(passed))
    return handles


def tensor_of(values: Any) -> Tensor | None:
    """The tensor that `values` is, or that comes first in it; None for anything else."""
    first = values[0] if isinstance(values, tuple | list) and values else values
    return first if isinstance(first, Tensor) else None
