"""`capture`: the attention of every block of a model, for each batch that runs through it inside a context."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Literal, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

from vitprobe.attention.view import AttentionView
from vitprobe.errors import AttentionNotSeenError, UserError
from vitprobe.hooks.blocks import BlockRecord, hook_block
from vitprobe.hooks.interception import AttentionCall, AttentionWatcher
from vitprobe.models.tokens import TokenLayout, find_trunk, token_layout
from vitprobe.statistics import compute_statistics, select
from vitprobe.statistics.table import available_needs

Keep = Literal["qk", "statistics"]


@runtime_checkable
class HasModule(Protocol):
    """What `load_model` returns, as far as a capture needs it."""

    module: nn.Module


def capture(
    model: nn.Module | HasModule,
    *,
    keep: Keep = "qk",
    statistics: Sequence[str] | None = None,
    accumulate: bool = False,
) -> Capture:
    """A context in which every forward pass of `model` leaves its attention to be read.

    Works with fused kernels on, in train and eval mode, under autocast and with gradients; the numbers are of the
    weights before dropout, detached. On leaving, the model is as it was, also when the body raised.

    Args:
        model: a Vision Transformer: what `load_model` gave, or a bare module.
        keep: "qk" holds queries and keys, for maps and statistics; "statistics" holds the numbers alone, O(B·H) a
            block.
        statistics: the names to compute (with keep="statistics"); all of them without.
        accumulate: append each batch to the ones before; otherwise a new forward pass replaces the last one's.

    Raises:
        AttentionNotSeenError: for a model without transformer blocks on entering, and during a forward pass for a
            block whose attention cannot be seen. Never is the result silently empty.
        UserError: for an unknown `keep` or statistic.
    """
    if keep not in ("qk", "statistics"):
        raise UserError(
            f"keep={keep!r} is not known; choose 'qk' (maps and statistics) or 'statistics' (numbers alone)"
        )
    select(statistics)
    return Capture(model if isinstance(model, nn.Module) else model.module, keep, statistics, accumulate)


class Capture:
    """What `capture` yields: one `AttentionView` a block by index, and the statistics of all blocks."""

    def __init__(self, module: nn.Module, keep: Keep, statistics: Sequence[str] | None, accumulate: bool) -> None:
        self.module = module
        self.keep = keep
        self.layout: TokenLayout | None = None
        self.pooling_attention: list[AttentionCall] = []
        self.undefined: dict[str, str] = {}
        self._names = statistics
        self._accumulate = accumulate
        self._blocks: list[nn.Module] = list(find_trunk(module).blocks)  # type: ignore[arg-type]
        self._views: list[list[AttentionView]] = [[] for _ in self._blocks]
        self._values: list[list[dict[str, Tensor]]] = [[] for _ in self._blocks]
        self._running: BlockRecord | None = None
        self._inside = False
        self._cleanup = ExitStack()

    # The context ------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            trunk = find_trunk(self.module)
            embedding: Any = getattr(trunk, "patch_embed", getattr(trunk, "embeds", None))
            if embedding is None:
                token_layout(self.module)  # raises, with the reason
            handles = [
                embedding.register_forward_pre_hook(self._images_came),
                self.module.register_forward_hook(self._forward_ended),
            ]
            for index, block in enumerate(self._blocks):
                handles += hook_block(block, index, self._block_started, self._block_finished)
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
        self._running, self._inside = None, False
        self._cleanup.close()

    # What the hooks report --------------------------------------------------------------------------------------------

    def _images_came(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        images = args[0]
        if images.ndim != 4:
            raise AttentionNotSeenError(
                f"{self._model_name} got patches of shape {tuple(images.shape)}; capture needs a batch of images "
                f"(B, 3, H, W) to know the patch grid"
            )
        size = (int(images.shape[-2]), int(images.shape[-1]))
        self.layout = token_layout(self.module, size)
        self._inside = True
        if not self._accumulate:
            for kept in (*self._views, *self._values):
                kept.clear()
            self.pooling_attention.clear()

    def _forward_ended(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._inside = False

    def _block_started(self, record: BlockRecord) -> None:
        self._running = record

    def _attention_called(self, call: AttentionCall) -> None:
        if self._running is not None:
            self._running.calls.append(call)
        elif self._inside:
            self.pooling_attention.append(call)

    def _block_finished(self, record: BlockRecord) -> None:
        self._running = None
        view = self._view(record)
        self.undefined = {
            statistic.name: reason
            for statistic in select(self._names)
            if (reason := statistic.undefined(view.layout, available_needs(view))) is not None
        }
        if self.keep == "qk":
            self._views[record.block].append(view)
        else:
            self._values[record.block].append(compute_statistics(view, self._names))

    def _view(self, record: BlockRecord) -> AttentionView:
        """The view of a finished block, or an error that says why there is none."""
        block = self._blocks[record.block]
        where = f"block {record.block} ({type(block).__name__}) of {self._model_name}"
        calls = record.calls
        if not calls:
            raise AttentionNotSeenError(
                f"{where} computed no scaled-dot-product attention, so its attention cannot be seen; use a model whose "
                f"blocks call torch.nn.functional.scaled_dot_product_attention (vitprobe models)"
            )
        if len(calls) > 1 and not hasattr(block, "attns"):
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
        return AttentionView(
            block=record.block,
            query=torch.cat([call.query for call in calls], dim=1) if len(calls) > 1 else calls[0].query,
            key=torch.cat([call.key for call in calls], dim=1) if len(calls) > 1 else calls[0].key,
            scale=calls[0].scale,
            bias=calls[0].bias,
            layout=self.layout,
            residual_norms=record.residual_norms,
            update_norms=record.update_norms,
            unscaled_update_norms=record.unscaled_update_norms,
            output_norms=record.output_norms,
        )

    @property
    def _model_name(self) -> str:
        return type(self.module).__name__

    # What the user reads ----------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Blocks of the model."""
        return len(self._blocks)

    def __getitem__(self, block: int) -> AttentionView:
        """The view of one block (negative counts from the last), of all batches kept.

        Raises:
            UserError: before a forward pass, with keep="statistics", for a block that the model does not have, or
                where batches of different grids were accumulated.
        """
        if not -len(self) <= block < len(self):
            raise UserError(f"{self._model_name} has blocks 0 to {len(self) - 1}, not {block}")
        if self.keep == "statistics":
            raise UserError("capture(keep='statistics') holds no queries and keys; use capture(keep='qk') for maps")
        return concatenate_views(self._require(self._views[block]))

    def statistics(self, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """`{name: (B, blocks, heads)}` of the statistics defined for this model; `(B, blocks, 1)` where one a block.

        Those that are not defined, such as [cls] statistics without [cls], are missing here and named with the reason
        in `.undefined`.

        Raises:
            UserError: before a forward pass, or for an unknown name.
        """
        wanted = [statistic.name for statistic in select(names)]
        if self.keep == "qk":
            blocks = [[compute_statistics(view, wanted) for view in self._require(views)] for views in self._views]
        else:
            blocks = [self._require(values) for values in self._values]
        return {
            name: torch.stack([torch.cat([batch[name] for batch in batches]) for batches in blocks], dim=1)
            for name in blocks[0][0]
            if name in wanted
        }

    def _require(self, kept: list[Any]) -> list[Any]:
        if not kept:
            raise UserError(
                f"no forward pass of {self._model_name} has run inside this capture; call the model inside the with"
            )
        return kept


def concatenate_views(views: list[AttentionView]) -> AttentionView:
    """One view of several batches of the same block.

    Raises:
        UserError: where their token layouts differ.
    """
    if len(views) == 1:
        return views[0]
    first = views[0]
    if any(view.layout != first.layout for view in views):
        raise UserError("batches of different patch grids were accumulated; read them with accumulate=False")

    def joined(parts: list[Tensor | None]) -> Tensor | None:
        present = [part for part in parts if part is not None]
        return torch.cat(present) if present else None

    sizes = [view.query.shape[0] for view in views]
    bias = first.bias
    if bias is not None and any(view.bias is not bias for view in views):
        shape = first.query.shape
        bias = torch.cat(
            [
                v.bias.expand(n, shape[1], shape[2], shape[2])
                for v, n in zip(views, sizes, strict=True)
                if v.bias is not None
            ]
        )
    return AttentionView(
        block=first.block,
        query=torch.cat([view.query for view in views]),
        key=torch.cat([view.key for view in views]),
        scale=first.scale,
        bias=bias,
        layout=first.layout,
        residual_norms=joined([view.residual_norms for view in views]),
        update_norms=joined([view.update_norms for view in views]),
        unscaled_update_norms=joined([view.unscaled_update_norms for view in views]),
        output_norms=joined([view.output_norms for view in views]),
    )
