"""`capture`: the attention of every block of a model, for each batch that runs through it inside a context."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from vitprobe.attention.view import AttentionView, concatenate_views
from vitprobe.errors import AttentionNotSeenError, UserError
from vitprobe.hooks.blocks import BlockRecord, hook_block
from vitprobe.hooks.bystanders import Bystanders
from vitprobe.hooks.calls import AttentionCall
from vitprobe.hooks.interception import AttentionWatcher
from vitprobe.hooks.single_pass import measure
from vitprobe.hooks.transformers_kernels import watch_kernels
from vitprobe.hooks.views import views_of
from vitprobe.layout import TokenLayout
from vitprobe.models.anatomy.copies import why_copy
from vitprobe.models.anatomy.find import find_anatomy
from vitprobe.models.anatomy.measured import being_measured
from vitprobe.models.anatomy.order import measure_order
from vitprobe.models.anatomy.parts import Anatomy, Layouts, first_tensor, run_eagerly, use_fused_attention
from vitprobe.statistics import compute_statistics, select
from vitprobe.statistics.computing import available_needs
from vitprobe.statistics.table import Asks

Keep = Literal["qk", "statistics"]
Kernel = Literal["auto", "torch", "model"]


def capture(
    model: object,
    *,
    keep: Keep | str = "qk",
    statistics: Sequence[str] | None = None,
    accumulate: bool = False,
    layout: TokenLayout | None = None,
    blocks: Sequence[nn.Module] | None = None,
    kernel: Kernel | str = "auto",
) -> Capture:
    """A context in which every forward pass of `model` leaves its attention to be read.

    Works with fused kernels on, in train and eval mode, under autocast and with gradients; the numbers are of the
    weights before dropout, detached. What torch.compile compiled runs uncompiled meanwhile. On leaving, the model is as
    it was, also when the body raised.

    Args:
        model: a Vision Transformer: what `load_model` gave, or a bare `nn.Module`, compiled or not.
        keep: "qk" holds queries and keys, for maps and statistics (of a model that calls softmax by hand its N×N
            logits); "statistics" holds the numbers alone, O(B·H) a block.
        statistics: the names to compute; all of them without.
        accumulate: append each batch to the ones before; otherwise a new forward pass replaces the last one's.
        layout: which token is what, for a bare module of which that is not found.
        blocks: the transformer blocks in the order in which they run, likewise.
        kernel: with keep="statistics", "auto" computes attention's output along with the statistics where that saves a
            pass (it differs from the model's own by rounding); "torch" does so without the Triton kernel that "auto"
            takes on a GPU; "model" leaves every call to the model.

    Raises:
        AttentionNotSeenError: for a model whose blocks or patch grid are not found, of an unsupported kind, or inside
            a wrapper that runs copies of it (DataParallel and its like), and during a forward pass for a block whose
            attention cannot be seen. Never is the result silently empty.
        UserError: for an unknown `keep` or statistic, for no statistic at all, for what is no model, or for a layout
            that contradicts it.

    Example:
        >>> import torch
        >>> from vitprobe import capture, load_model
        >>> model = load_model("mae_vit_nano")
        >>> with torch.no_grad(), capture(model) as attention:
        ...     output = model.module(torch.randn(2, 3, 32, 32))
        >>> attention.statistics()["cls_entropy"].shape  # image, block, head
        torch.Size([2, 12, 4])
        >>> attention[0].query.shape  # image, head, token, dimension
        torch.Size([2, 4, 65, 32])
    """
    if keep not in ("qk", "statistics"):
        raise UserError(
            f"keep={keep!r} is not known; choose 'qk' (maps and statistics) or 'statistics' (numbers alone)"
        )
    known = getattr(model, "anatomy", None)  # of a LoadedModel
    if not isinstance(known, Anatomy):
        module = model if isinstance(model, nn.Module) else getattr(model, "module", None)
        if not isinstance(module, nn.Module):
            kind = type(model).__name__
            raise UserError(
                why_copy(model)
                or f"capture takes a model (what load_model returns, or a torch.nn.Module), not a {kind}"
            )
        known = find_anatomy(module, layout, blocks)
    elif layout is not None or blocks is not None:
        raise UserError("layout and blocks are for a bare module: give them to load_model(module, …) instead")
    check_kernel(kernel)
    select(statistics)
    return Capture(known, keep, statistics, accumulate, kernel)


def check_kernel(kernel: str) -> None:
    """Returns where a kernel is known.

    Raises:
        UserError: where it is not.
    """
    if kernel not in get_args(Kernel):
        raise UserError(
            f"kernel={kernel!r} is not known; choose 'auto' (the fastest), 'torch' (without Triton) or 'model' (the "
            f"model's own)"
        )


class Capture:
    """What `capture` yields: one `AttentionView` a block by index, and the statistics of all blocks.

    Attributes:
        module: the model; of a compiled one, what it was compiled from; of one of images and texts, its image tower.
        anatomy: where it keeps its parts.
        keep: "qk" or "statistics".
        layouts: the token layout of the last images; one for each of them where they were padded; None before.
        pooling_attention: with keep="qk", the attention calls of a forward pass outside its blocks: the pooling of
            its head, from one or a few learned queries to all tokens. They are in no statistic.
        undefined: statistics that this model does not have, with the reason; filled by a forward pass.
        kernels: which kernels gave attention's output: "fused", "rows", "sums" or "model" (see
            `hooks.single_pass.measure`).
        signed: whether its attention is a difference A1 − λ·A2, whose weights may be negative (differential attention).
    """

    def __init__(
        self,
        anatomy: Anatomy,
        keep: Keep | str,
        statistics: Sequence[str] | None,
        accumulate: bool,
        kernel: Kernel | str = "auto",
    ) -> None:
        self.anatomy = anatomy
        self.module = anatomy.module
        self.keep = keep
        self.layouts: Layouts | None = None
        self.pooling_attention: list[AttentionCall] = []
        self.undefined: dict[str, str] = {}
        self.signed = False
        self._names = None if statistics is None else [statistic.name for statistic in select(statistics)]
        self._accumulate = accumulate
        self._kernel = kernel
        self.kernels: set[str] = set()
        asked = {statistic.asks for statistic in select(self._names)}
        # The dearest, which comes last.
        self._asks: Asks = next(asks for asks in reversed(get_args(Asks)) if asks in asked)
        self._norms = keep == "qk" or any(statistic.needs & {"residual", "update"} for statistic in select(self._names))
        self._blocks = anatomy.blocks
        self._batch = 0  # images in the last forward pass
        # Of each block, for each forward pass: its views, or the values of its views.
        self._kept: list[list[list[Any]]] = [[] for _ in self._blocks]
        self._running: BlockRecord | None = None  # the block that attention calls belong to now
        self._in_forward = False  # inside a call of the model itself; forward_features alone is no such call
        self._called: tuple[tuple[Any, ...], dict[str, Any]] | None = None  # how the model was called
        self._seen: set[int] | None = None  # blocks that ran since the images came; None: no images, no pass
        self._cleanup: ExitStack | None = None
        self._watcher = AttentionWatcher(_untraced(self._attention_called))
        self._bystanders = Bystanders(anatomy)

    # The context ------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Capture:
        if self._cleanup is not None:
            raise UserError(
                f"this capture of {self._model_name} is open already; open a second one with capture(model)"
            )
        with ExitStack() as stack:
            handles = [
                self.module.register_forward_pre_hook(self._forward_began, with_kwargs=True),
                self.module.register_forward_hook(self._forward_ended, always_call=True),
                self.anatomy.images_enter.register_forward_pre_hook(self._images_came, with_kwargs=True),
            ]
            for index, block in enumerate(self._blocks):
                handles += hook_block(
                    block,
                    index,
                    self._in_pass,
                    _untraced(self._block_started),
                    _untraced(self._block_finished),
                    norms=self._norms,
                )
            for handle in handles:
                stack.callback(handle.remove)
            self._bystanders.watch(stack)
            run_eagerly(stack)
            # Hand-written softmax is what a module falls back to when fused attention was switched off.
            use_fused_attention(self._blocks, stack)
            self.anatomy.prepare(stack)
            watch_kernels(stack, self.module)
            stack.enter_context(self._watcher)
            self._cleanup = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        cleanup, self._cleanup = self._cleanup, None
        self._running, self._seen, self._in_forward = None, None, False
        if cleanup is not None:
            cleanup.close()

    # What the hooks report --------------------------------------------------------------------------------------------

    def _forward_began(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if being_measured():
            return
        self._in_forward, self._seen, self._called = True, None, (args, kwargs)
        self._bystanders.ran.clear()

    def _forward_ended(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if being_measured():
            return
        seen, self._in_forward, self._seen, self._running = self._seen, False, None, None
        self._called = None
        if output is None:  # the forward pass raised
            return
        unseen = sorted(set(range(len(self))) - (seen or set()))
        if unseen:
            if self._bystanders.ran:
                raise AttentionNotSeenError(self._bystanders.advice(self._model_name, unseen[0]))
            part = "patch embedding" if seen is None else f"block {unseen[0]}"
            raise AttentionNotSeenError(
                f"{self._model_name} ran, but its {part} was not seen to run; pass images through the whole model (and "
                f"of a compiled model, capture the module that it was compiled from)"
            )

    def _images_came(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _in_backward() or being_measured():
            return
        images = first_tensor((*args, *kwargs.values()))
        if not self.anatomy.measured and images is not None and images.ndim == 4 and images.is_floating_point():
            _untraced(self._measure_order)(images)
        self.layouts = self.anatomy.read_input(args, kwargs)
        self._batch = 0 if images is None else len(images)
        self._seen, self._running = set(), None
        if not self._accumulate:
            self.undefined = {}
            self.pooling_attention.clear()
        keep = self._complete if self._accumulate else 0  # what an aborted pass left is dropped
        for kept in self._kept:
            del kept[keep:]

    def _measure_order(self, images: Tensor) -> None:
        """See which token is what, once, by running the model on noise as far as its first block."""
        args, kwargs = self._called or ((images,), {})

        def call(noise: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
            def swapped(value: Any) -> Any:
                return noise if isinstance(value, Tensor) and value.shape == images.shape else value

            return tuple(map(swapped, args)), {name: swapped(value) for name, value in kwargs.items()}

        # Where it cannot be measured, names are what there is: it is not tried again.
        self.anatomy = replace(measure_order(self.anatomy, images, call), measured=True)

    def _in_pass(self) -> bool:
        """Whether a block that runs now belongs to a forward pass: images came, and no checkpoint is recomputed."""
        return self._seen is not None and not _in_backward() and not being_measured()

    def _block_started(self, record: BlockRecord) -> None:
        self._running = record

    def _attention_called(self, call: AttentionCall) -> bool:
        """Take an attention call; whether it belongs to a block."""
        if self._running is not None:
            self._running.calls.append(call)
            if self.keep == "statistics" and self._kernel != "model" and isinstance(self.layouts, TokenLayout):
                self.kernels.add(measure(call, self.layouts, self._asks, self._kernel))
                if call.measured is not None:
                    call.release()
            return True
        if self._in_forward and self.keep == "qk" and call.logits is None and not _in_backward():
            self.pooling_attention.append(call)
        return False

    def _block_finished(self, record: BlockRecord) -> None:
        self._running = None
        assert self._seen is not None  # `_in_pass` let it begin
        if record.block in self._seen:
            raise AttentionNotSeenError(
                f"{self._where(record)} ran twice in one forward pass, so it has no single attention map"
            )
        self._seen.add(record.block)
        assert self.layouts is not None  # images came before blocks ran
        views = views_of(record, self._blocks[record.block], self.layouts, self._batch, self._model_name)
        self._watcher.forget()
        self.signed = views[0].subtracted is not None
        for statistic in select(self._names):
            reason = statistic.undefined(views[0].layout, available_needs(views[0]), self.signed)
            if reason is not None:
                self.undefined[statistic.name] = reason
        if self.keep == "statistics":
            self._kept[record.block].append([compute_statistics(view, self._names) for view in views])
        else:
            self._kept[record.block].append(views)

    def _where(self, record: BlockRecord) -> str:
        return f"block {record.block} ({type(self._blocks[record.block]).__name__}) of {self._model_name}"

    @property
    def _model_name(self) -> str:
        return type(self.module).__name__

    # What the user reads ----------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Blocks of the model."""
        return len(self._blocks)

    @property
    def layout(self) -> TokenLayout | None:
        """The token layout that the last images have in common; None before them, or where their grids differ."""
        layouts = self.layouts if isinstance(self.layouts, tuple) else (self.layouts,)
        return layouts[0] if len(set(layouts)) == 1 else None

    def __getitem__(self, block: int | object) -> AttentionView:
        """The view of one block (negative counts from the last), of all batches kept.

        Raises:
            UserError: before a forward pass, with keep="statistics", for what is no block of the model, or where
                the images have different patch grids.
        """
        return concatenate_views(self.views(block))

    def views(self, block: int | object) -> list[AttentionView]:
        """The views of one block, one for each batch kept; of images of different grids in one batch, one for each.

        Raises:
            UserError: before a forward pass, with keep="statistics", or for what is no block of the model.
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
        return self._complete_of(self._kept[index])

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
        blocks = [self._complete_of(kept) for kept in self._kept]
        if self.keep == "qk":
            blocks = [[compute_statistics(view, wanted) for view in views] for views in blocks]
        if all(name in self.undefined for name in wanted):
            reasons = "; ".join(f"{name} {self.undefined[name]}" for name in wanted)
            raise UserError(f"{self._model_name} has none of the statistics asked for: {reasons}")
        return {
            name: torch.stack([_joined([batch[name] for batch in batches]) for batches in blocks], dim=1)
            for name in wanted
            if name not in self.undefined
        }

    @property
    def _complete(self) -> int:
        """Forward passes that went through all blocks."""
        return min(len(kept) for kept in self._kept)

    def _complete_of(self, of_block: list[list[Any]]) -> list[Any]:
        """What is kept of a block for each complete forward pass, one after the other."""
        if not self._complete:
            raise UserError(
                f"no forward pass of {self._model_name} has run inside this capture; call the model inside the with"
            )
        return [one for of_pass in of_block[: self._complete] for one in of_pass]


def _joined(values: list[Tensor]) -> Tensor:
    """Of all batches; of one without a copy, which on a GPU would be a kernel for each statistic and block."""
    return values[0] if len(values) == 1 else torch.cat(values)


def _untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that torch.compile, where it is in use, leaves out of a model's graph and runs as it is."""
    return torch.compiler.disable(function) if "torch._dynamo" in sys.modules else function


def _in_backward() -> bool:
    """Whether autograd is running: a block that runs now is a checkpoint recomputed, seen already."""
    return torch._C._current_graph_task_id() != -1
