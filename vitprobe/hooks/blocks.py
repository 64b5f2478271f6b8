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

    def __init__(self, block: int, residual: Tensor) -> None:
        self.block = block
        self.calls: list[AttentionCall] = []
        self.residual_norms = token_norms(residual)
        self.output_norms: Tensor | None = None
        self._updates: list[Tensor] = []
        self._unscaled_updates: list[Tensor] = []

    def attention_ended(self, output: Tensor) -> None:
        """Take the output of an attention module: a branch's update before LayerScale or a post-norm."""
        self._unscaled_updates.append(output.detach())

    def drop_path_began(self, update: Tensor) -> None:
        """Take what enters a drop-path: the update as it is added. One that follows no attention is the MLP's."""
        if len(self._updates) < len(self._unscaled_updates):
            self._updates.append(update.detach())

    @property
    def update_norms(self) -> Tensor | None:
        """Norms of what attention adds to the residual stream, all branches together; None if that was not seen."""
        return token_norms(torch.stack(self._updates).sum(dim=0)) if self._updates else None

    @property
    def unscaled_update_norms(self) -> Tensor | None:
        """The same before LayerScale."""
        return token_norms(torch.stack(self._unscaled_updates).sum(dim=0)) if self._unscaled_updates else None


def token_norms(tokens: Tensor) -> Tensor:
    """Euclidean norm of each token, `(B, …, D)` → `(B, N)`, in float32 or wider."""
    wide = torch.promote_types(tokens.dtype, torch.float32)
    return torch.linalg.vector_norm(tokens.detach().to(wide), dim=-1).flatten(1)


def attention_branches(block: Any) -> list[tuple[nn.Module, nn.Module]]:
    """The (attention, drop-path) pairs of a timm block; none for a block that adds attention and MLP in one sum."""
    holders = block.attns if hasattr(block, "attns") else [block]
    pairs = [(getattr(h, "attn", None), getattr(h, "drop_path1", getattr(h, "drop_path", None))) for h in holders]
    return [pair for pair in pairs if pair[0] is not None and pair[1] is not None]


def hook_block(
    block: nn.Module,
    index: int,
    started: Callable[[BlockRecord], None],
    finished: Callable[[BlockRecord], None],
) -> list[RemovableHandle]:
    """Hook `block` so that `started` and `finished` are called with the record of each of its runs.

    What attention adds to the residual stream is the input of the drop-path behind it, whether LayerScale, a bare
    gamma or a post-norm came before: timm's blocks all have one, be it an identity.
    """
    running: list[BlockRecord] = []  # the run under way; a stack so that an aborted run is simply left behind

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        running.append(BlockRecord(index, args[0] if args else kwargs["x"]))
        started(running[-1])

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        record = running.pop()
        running.clear()
        record.output_norms = token_norms(_first(output))
        finished(record)

    def after_attention(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        running[-1].attention_ended(_first(output))

    def before_drop_path(module: nn.Module, args: tuple[Any, ...]) -> None:
        running[-1].drop_path_began(args[0])

    handles = [block.register_forward_pre_hook(before, with_kwargs=True), block.register_forward_hook(after)]
    for attention, drop_path in attention_branches(block):
        handles.append(attention.register_forward_hook(after_attention))
        handles.append(drop_path.register_forward_pre_hook(before_drop_path))
    return handles


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
