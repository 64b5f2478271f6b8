"""Hooks on one transformer block: which block is running, and what it does to the residual stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vitprobe.hooks.calls import AttentionCall
from vitprobe.hooks.updates import Update, attention_branches, hook_branch, tensor_of


class BlockRecord:
    """What one run of one block showed: its attention calls and the norms of its tokens, `(B, N)` each."""

    def __init__(self, block: int, residual: Tensor | None, num_branches: int, checked: bool) -> None:
        self.block = block
        self.calls: list[AttentionCall] = []
        self.residual_norms = None if residual is None else token_norms(residual)
        self.output_norms: Tensor | None = None
        # Of several branches the updates are added first. Of one, its norms are all that is kept.
        self._several = num_branches > 1
        keep = torch.clone if self._several else token_norms
        # A copy of the residual, as the block may add to it in place.
        before = residual.detach().clone() if checked and residual is not None else None
        self.updates = [Update(before, keep) for _ in range(num_branches)]

    @property
    def update_norms(self) -> Tensor | None:
        """Norms of what attention adds to the residual stream, all branches together; None if that was not seen."""
        return self._norms([update.added for update in self.updates])

    @property
    def unscaled_update_norms(self) -> Tensor | None:
        """The same before LayerScale."""
        return self._norms([update.unscaled for update in self.updates])

    def _norms(self, updates: list[Tensor | None]) -> Tensor | None:
        seen = [update for update in updates if update is not None]
        if not seen or len(seen) < len(updates):
            return None
        return token_norms(torch.stack(seen).sum(dim=0)) if self._several else seen[0]


def token_norms(tokens: Tensor) -> Tensor:
    """Euclidean norm of each token, `(B, …, D)` → `(B, N)`, in float32 or wider."""
    wide = torch.promote_types(tokens.dtype, torch.float32)
    return torch.linalg.vector_norm(tokens.detach().to(wide), dim=-1).flatten(1)


def hook_block(
    block: nn.Module,
    index: int,
    wanted: Callable[[], bool],
    started: Callable[[BlockRecord], None],
    finished: Callable[[BlockRecord], None],
    *,
    norms: bool = True,
) -> list[RemovableHandle]:
    """Hook `block` so that `started` and `finished` get the record of each of its runs that is `wanted`.

    Without `norms`, which cost a pass over the tokens each, the records hold attention calls alone.
    """
    running: list[BlockRecord] = []  # the record of the run under way, if that is wanted
    branches = attention_branches(block) if norms else []
    checked = any(branch.others for branch in branches)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        running.clear()  # an aborted run is left behind here
        if wanted():
            residual = tensor_of((*args, *kwargs.values())) if norms else None
            running.append(BlockRecord(index, residual, len(branches), checked))
            started(running[0])

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if running:
            record = running.pop()
            tokens = tensor_of(output) if norms else None
            record.output_norms = None if tokens is None else token_norms(tokens)
            finished(record)

    handles = [block.register_forward_pre_hook(before, with_kwargs=True), block.register_forward_hook(after)]
    for number, branch in enumerate(branches):
        handles += hook_branch(branch, lambda number=number: running[0].updates[number] if running else None)
    return handles
