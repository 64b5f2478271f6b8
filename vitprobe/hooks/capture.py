"""`capture`: the attention of every block of a model, for each batch that runs through it inside a context."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitprobe.attention.view import AttentionView, concatenate_views
from vitprobe.errors import AttentionNotSeenError, UserError
from vitprobe.hooks.blocks import BlockRecord, first_tensor, hook_block
from vitprobe.hooks.interception import AttentionCall, AttentionWatcher
from vitprobe.models.tokens import (
    TokenLayout,
    find_patch_embedding,
    find_trunk,
    is_wrapper,
    token_layout,
    uncompiled,
)
from vitprobe.statistics import compute_statistics, select
from vitprobe.statistics.table import available_needs

Keep = Literal["qk", "statistics"]


def capture(
    model: object,
    *,
    keep: Keep | str = "qk",
    statistics: Sequence[str] | None = None,
    accumulate: bool = False,
) -> Capture:
    """A context in which every forward pass of `model` leaves its attention to be read.

    Works with fused kernels on, in train and eval mode, under autocast and with gradients; the numbers are of the
    weights before dropout, detached. On leaving, the model is as it was, also when the body raised.

    Args:
        model: a Vision Transformer: what `load_model` gave, or a bare `nn.Module`, compiled or not.
        keep: "qk" holds queries and keys, for maps and statistics; "statistics" holds the numbers alone, O(B·H) a
            block.
        statistics: the names to compute; all of them without.
        accumulate: append each batch to the ones before; otherwise a new forward pass replaces the last one's.

    Raises:
        AttentionNotSeenError: for a model without transformer blocks or patch embedding, or inside a wrapper that
            runs copies of it (DataParallel and its like), and during a forward pass for a block whose attention cannot
            be seen. Never is the result silently empty.
        UserError: for an unknown `keep` or statistic, for no statistic at all, or for what is no model.
    """
    if keep not in ("qk", "statistics"):
        raise UserError(
            f"keep={keep!r} is not known; choose 'qk' (maps and statistics) or 'statistics' (numbers alone)"
        )
    module = model if isinstance(model, nn.Module) else getattr(model, "module", None)
    if not isinstance(module, nn.Module):
        raise UserError(
            f"capture takes a model (what load_model returns, or a torch.nn.Module), not a {type(model).__name__}"
        )
    module = uncompiled(module)
    if is_wrapper(module):
        raise AttentionNotSeenError(
            f"{type(module).__name__} wraps the model and may run copies of it, whose attention cannot be seen; pass "
            f"model.module, and call that inside the capture"
        )
    select(statistics)
    return Capture(module, keep, statistics, accumulate)


class Capture:
    """What `capture` yields: one `AttentionView` a block by index, and the statistics of all blocks.

    Attributes:
        module: the model; of a compiled one, what it was compiled from.
        keep: "qk" or "statistics".
        layout: the token layout of the last images; None before them.
        pooling_attention: with keep="qk", the attention calls of a forward pass outside its blocks: the pooling of
            its head, from one or a few learned queries to all tokens. They are in no statistic.
        undefined: statistics that this model does not have, with the reason; filled by a forward pass.
    """

    def __init__(self, module: nn.Module, keep: Keep | str, statistics: Sequence[str] | None, accumulate: bool) -> None:
        self.module = module
        self.keep = keep
        self.layout: TokenLayout | None = None
        self.pooling_attention: list[AttentionCall] = []
        self.undefined: dict[str, str] = {}
        self._names = None if statistics is None else [statistic.name for statistic in select(statistics)]
        self._accumulate = accumulate
        self._blocks: list[nn.Module] = list(find_trunk(module).blocks)  # type: ignore[arg-type]
        token_layout(module)  # raises where the patch grid cannot be known
        self._views: list[list[AttentionView]] = [[] for _ in self._blocks]
        self._values: list[list[dict[str, Tensor]]] = [[] for _ in self._blocks]
        self._running: BlockRecord | None = None  # the block that attention calls belong to now
        self._in_forward = False  # inside a call of the model itself; forward_features alone is no such call
        self._seen: set[int] | None = None  # blocks that ran since the images came; None: no images, no pass
        self._cleanup: ExitStack | None = None

    # The context ------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Capture:
        if self._cleanup is not None:
            raise UserError(
                f"this capture of {self._model_name} is open already; open a second one with capture(model)"
            )
        with ExitStack() as stack:
            handles = [
                self.module.register_forward_pre_hook(self._forward_began),
                self.module.register_forward_hook(self._forward_ended, always_call=True),
                find_patch_embedding(self.module).register_forward_pre_hook(self._images_came, with_kwargs=True),
            ]
            for index, block in enumerate(self._blocks):
                handles += hook_block(block, index, self._in_pass, self._block_started, self._block_finished)
            for handle in handles:
                stack.callback(handle.remove)
            for module in self._blocks:
                for part in module.modules():
                    # Hand-written softmax is what a module falls back to when fused attention was switched off.
                    if getattr(part, "fused_attn", None) is False:
                        part.fused_attn = True  # type: ignore[assignment]
                        stack.callback(setattr, part, "fused_attn", False)
            stack.enter_context(AttentionWatcher(self._attention_called))
            self._cleanup = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        cleanup, self._cleanup = self._cleanup, None
        self._running, self._seen, self._in_forward = None, None, False
        if cleanup is not None:
            cleanup.close()

    # What the hooks report --------------------------------------------------------------------------------------------

    def _forward_began(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._in_forward, self._seen = True, None

    def _forward_ended(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen, self._in_forward, self._seen, self._running = self._seen, False, None, None
        if output is None:  # the forward pass raised
            return
        unseen = sorted(set(range(len(self))) - (seen or set()))
        if unseen:
            part = "patch embedding" if seen is None else f"block {unseen[0]}"
            raise AttentionNotSeenError(
                f"{self._model_name} ran, but its {part} was not seen to run; pass images through the whole model (and "
                f"of a compiled model, capture the module that it was compiled from)"
            )

    def _images_came(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _in_backward():
            return
        images = first_tensor((*args, *kwargs.values()))
        if images is None or images.ndim != 4:
            came = "no tensor" if images is None else f"patches of shape {tuple(images.shape)}"
            raise AttentionNotSeenError(
                f"{self._model_name} got {came}; capture needs a batch of images (B, 3, H, W) to know the patch grid"
            )
        size = (int(images.shape[-2]), int(images.shape[-1]))
        self.layout = token_layout(self.module, size)
        self._seen, self._running = set(), None
        if not self._accumulate:
            self.undefined = {}
            self.pooling_attention.clear()
        keep = self._complete if self._accumulate else 0  # what an aborted pass left is dropped
        for kept in (*self._views, *self._values):
            del kept[keep:]

    def _in_pass(self) -> bool:
        """Whether a block that runs now belongs to a forward pass: images came, and no checkpoint is recomputed."""
        return self._seen is not None and not _in_backward()

    def _block_started(self, record: BlockRecord) -> None:
        self._running = record

    def _attention_called(self, call: AttentionCall) -> None:
        if self._running is not None:
            self._running.calls.append(call)
        elif self._in_forward and self.keep == "qk" and not _in_backward():
            self.pooling_attention.append(call)

    def _block_finished(self, record: BlockRecord) -> None:
        self._running = None
        assert self._seen is not None  # `_in_pass` let it begin
        if record.block in self._seen:
            raise AttentionNotSeenError(
                f"{self._where(record)} ran twice in one forward pass, so it has no single attention map"
            )
        self._seen.add(record.block)
        view = self._view(record)
        for statistic in select(self._names):
            reason = statistic.undefined(view.layout, available_needs(view))
            if reason is not None:
                self.undefined[statistic.name] = reason
        if self.keep == "qk":
            self._views[record.block].append(view)
        else:
            self._values[record.block].append(compute_statistics(view, self._names))

    def _view(self, record: BlockRecord) -> AttentionView:
        """The view of a finished block, or an error that says why there is none."""
        where, calls = self._where(record), record.calls
        if not calls:
            raise AttentionNotSeenError(
                f"{where} computed no scaled-dot-product attention, so its attention cannot be seen; use a model whose "
                f"blocks call torch.nn.functional.scaled_dot_product_attention (vitprobe models)"
            )
        if len(calls) > 1 and not hasattr(self._blocks[record.block], "attns"):
            raise AttentionNotSeenError(
                f"{where} computed {len(calls)} attentions that are not heads of one (differential attention, say), so "
                f"it has no single attention map"
            )
        assert self.layout is not None  # images came before blocks ran
        tokens = self.layout.num_tokens
        for call in calls:
            if call.query.ndim != 4 or call.query.shape[-2] != tokens or call.key.shape[-2] != tokens:
                raise AttentionNotSeenError(
                    f"{where} attends with queries {tuple(call.query.shape)} and keys {tuple(call.key.shape)}, but "
                    f"global self-attention over {tokens} tokens ({self.layout.num_prefix_tokens} prefix + "
                    f"{self.layout.grid[0]}x{self.layout.grid[1]} patches) was expected; windowed and pooled attention "
                    f"and dropped patches are not supported"
                )
        expected = (calls[0].query.shape[0], tokens)

        def fitting(norms: Tensor | None) -> Tensor | None:
            """Norms of `(B, N)` tokens; a block that orders its tokens otherwise has no residual statistics."""
            return norms if norms is not None and norms.shape == expected else None

        return AttentionView(
            block=record.block,
            query=torch.cat([call.query for call in calls], dim=1) if len(calls) > 1 else calls[0].query,
            key=torch.cat([call.key for call in calls], dim=1) if len(calls) > 1 else calls[0].key,
            scale=calls[0].scale,
            bias=calls[0].bias,
            layout=self.layout,
            residual_norms=fitting(record.residual_norms),
            update_norms=fitting(record.update_norms),
            unscaled_update_norms=fitting(record.unscaled_update_norms),
            output_norms=fitting(record.output_norms),
        )

    def _where(self, record: BlockRecord) -> str:
        return f"block {record.block} ({type(self._blocks[record.block]).__name__}) of {self._model_name}"

    @property
    def _model_name(self) -> str:
        return type(self.module).__name__

    # What the user reads ----------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Blocks of the model."""
        return len(self._blocks)

    def __getitem__(self, block: int | object) -> AttentionView:
        """The view of one block (negative counts from the last), of all batches kept.

        Raises:
            UserError: before a forward pass, with keep="statistics", for what is no block of the model, or where
                batches of different grids were accumulated.
        """
        try:
            index = operator.index(block)  # type: ignore[arg-type]
        except TypeError:
            raise UserError(
                f"a block is an integer from 0 to {len(self) - 1}, not a {type(block).__name__}; "
                f"take several one by one"
            ) from None
        if not -len(self) <= index < len(self):
            raise UserError(f"{self._model_name} has blocks 0 to {len(self) - 1}, not {index}; choose one of these")
        if self.keep == "statistics":
            raise UserError("capture(keep='statistics') holds no queries and keys; use capture(keep='qk') for maps")
        return concatenate_views(self._kept(self._views[index]))

    def __iter__(self) -> Iterator[AttentionView]:
        """The blocks' views, from the first block on."""
        return (self[block] for block in range(len(self)))

    def statistics(self, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """`{name: (B, blocks, heads)}` of the statistics defined for this model; `(B, blocks, 1)` where one a block.

        Those that are not defined, such as [cls] statistics without [cls], are missing here and named with the reason
        in `.undefined`.

        Raises:
            UserError: before a forward pass, for an unknown name, or one that this capture was not asked for, or
                where none of the names is defined for this model (with the reasons).
        """
        wanted = [statistic.name for statistic in select(self._names if names is None else names)]
        for name in wanted:
            if self.keep == "statistics" and self._names is not None and name not in self._names:
                raise UserError(
                    f"{name} was not computed in this capture; name it in capture(statistics=…), or leave that out"
                )
        if self.keep == "qk":
            blocks = [[compute_statistics(view, wanted) for view in self._kept(views)] for views in self._views]
        else:
            blocks = [self._kept(values) for values in self._values]
        if all(name in self.undefined for name in wanted):
            reasons = "; ".join(f"{name} {self.undefined[name]}" for name in wanted)
            raise UserError(f"{self._model_name} has none of the statistics asked for: {reasons}")
        return {
            name: torch.stack([torch.cat([batch[name] for batch in batches]) for batches in blocks], dim=1)
            for name in wanted
            if name not in self.undefined
        }

    @property
    def _complete(self) -> int:
        """Batches that went through all blocks."""
        return min(len(kept) for kept in (self._views if self.keep == "qk" else self._values))

    def _kept(self, of_block: list[Any]) -> list[Any]:
        """What is kept of a block for each complete batch."""
        if not self._complete:
            raise UserError(
                f"no forward pass of {self._model_name} has run inside this capture; call the model inside the with"
            )
        return of_block[: self._complete]


def _in_backward() -> bool:
    """Whether autograd is running: a block that runs now is a checkpoint recomputed, seen already."""
    return torch._C._current_graph_task_id() != -1
