"""Hooks on one transformer block: which block is running, and what it does to the residual stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vitprobe.hooks.interception import AttentionCall


class BlockRecord:
    """What one run of one block showed: its attention calls and the norms of its tokens, `(B, N)` each."""

    def __init__(self, block: int, residual: Tensor | None) -> None:
        self.block = block
        self.calls: list[AttentionCall] = []
        self.residual_norms = None if residual is None else token_norms(residual)
        self.output_norms: Tensor | None = None
        self._updates = _BranchSum()
        self._unscaled_updates = _BranchSum()

    def attention_ended(self, output: Tensor) -> None:
        """Take the output of an attention module: a branch's update before LayerScale or a post-norm."""
        self._unscaled_updates.add(output)

    def drop_path_began(self, update: Tensor) -> None:
        """Take what enters a drop-path: the update as it is added. One that follows no attention is the MLP's."""
        if self._updates.count < self._unscaled_updates.count:
            self._updates.add(update)

    @property
    def update_norms(self) -> Tensor | None:
        """Norms of what attention adds to the residual stream, all branches together; None if that was not seen."""
        return self._updates.norms if self._updates.count == self._unscaled_updates.count else None

    @property
    def unscaled_update_norms(self) -> Tensor | None:
        """The same before LayerScale."""
        return self._unscaled_updates.norms


class _BranchSum:
    """What a block's attention branches add together, and the norms of that.

    The norms are taken at once: what comes behind (a LayerScale, say) may work in place.
    """

    def __init__(self) -> None:
        self.count = 0
        self.norms: Tensor | None = None
        self._total: Tensor | None = None

    def add(self, update: Tensor) -> None:
        self._total = update.detach() if self._total is None else self._total + update.detach()
        self.norms = token_norms(self._total)
        self.count += 1


def token_norms(tokens: Tensor) -> Tensor:
    """Euclidean norm of each token, `(B, …, D)` → `(B, N)`, in float32 or wider."""
    wide = torch.promote_types(tokens.dtype, torch.float32)
    return torch.linalg.vector_norm(tokens.detach().to(wide), dim=-1).flatten(1)


def attention_branches(block: Any) -> list[tuple[nn.Module, nn.Module]]:
    """The (attention, drop-path) pairs of a timm block; none for a block that adds attention and MLP in one sum."""
    holders = block.attns if hasattr(block, "attns") else [block]
    pairs = []
    for holder in holders:
        attention = getattr(holder, "attn", None)
        drop_path = getattr(holder, "drop_path1", getattr(holder, "drop_path", None))
        if attention is not None and drop_path is not None:
            pairs.append((attention, drop_path))
    return pairs


def hook_block(
    block: nn.Module,
    index: int,
    wanted: Callable[[], bool],
    started: Callable[[BlockRecord], None],
    finished: Callable[[BlockRecord], None],
) -> list[RemovableHandle]:
    """Hook `block` so that `started` and `finished` get the record of each of its runs that is `wanted`.

    What attention adds to the residual stream is the input of the drop-path behind it, whether LayerScale, a bare
    gamma or a post-norm came before: timm's blocks all have one, be it an identity.
    """
    running: list[BlockRecord] = []  # the record of the run under way, if that is wanted

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        running.clear()  # an aborted run is left behind here
        if wanted():
            running.append(BlockRecord(index, first_tensor((*args, *kwargs.values()))))
            started(running[0])

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if running:
            record = running.pop()
            tokens = first_tensor(output)
            record.output_norms = None if tokens is None else token_norms(tokens)
            finished(record)

    def after_attention(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        update = first_tensor(output)
        if running and update is not None:
            running[0].attention_ended(update)

    def before_drop_path(module: nn.Module, args: tuple[Any, ...]) -> None:
        if running:
            running[0].drop_path_began(args[0])

    handles = [block.register_forward_pre_hook(before, with_kwargs=True), block.register_forward_hook(after)]
    for attention, drop_path in attention_branches(block):
        handles.append(attention.register_forward_hook(after_attention))
        handles.append(drop_path.register_forward_pre_hook(before_drop_path))
    return handles


def first_tensor(values: Any) -> Tensor | None:
    """The tensor that `values` is, or that comes first in it; None for anything else."""
    first = values[0] if isinstance(values, tuple | list) and values else values
    return first if isinstance(first, Tensor) else None
