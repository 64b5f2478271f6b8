"""`FrozenModel`: images → the tokens of some blocks of a model that nothing is trained of."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from types import TracebackType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitprobe.aggregation.attended import patch_attention
from vitprobe.aggregation.batch import TokenBatch
from vitprobe.attention.view import AttentionView
from vitprobe.data.transforms import ImageTransform
from vitprobe.errors import UserError
from vitprobe.frozen.device import choose_device, prepared
from vitprobe.frozen.dtype import DTYPE_BOUND, ForwardDtype, choose_dtype
from vitprobe.frozen.forward import Forward, named
from vitprobe.hooks.bystanders import Bystanders
from vitprobe.hooks.capture import Capture, capture
from vitprobe.hooks.updates import tensor_of
from vitprobe.layout import TokenLayout, reordered
from vitprobe.models.anatomy.final_norm import find_final_norm
from vitprobe.models.anatomy.parts import run_eagerly, use_fused_attention
from vitprobe.models.loaded import LoadedModel
from vitprobe.models.loading import load_model
from vitprobe.probing.stream import Reading, find_readings, require
from vitprobe.probing.tap import Tap


class _LastBlockRan(Exception):
    """Ends a forward pass of which nothing more is wanted."""


class _Batch(NamedTuple):
    """The pass under way: its images, their layout, and what has been read, by block."""

    count: int
    layout: TokenLayout
    tokens: dict[int, Tensor]


class FrozenModel:
    """Inside its context: images → `{tap: TokenBatch}`, float32 tokens that probes can be trained on.

    The module is in eval mode meanwhile (no dropout, drop path or patch drop), without gradients, with fused attention;
    a pass ends after the last block that is read. Afterwards the module is as it was.

    Attributes:
        model: the model.
        taps: where tokens are read.
        attention: whether the attention inside the tapped blocks is kept too.
        device: where it runs, and where the tokens are.
    """

    def __init__(
        self,
        model: LoadedModel,
        taps: Sequence[Tap],
        *,
        attention: bool = False,
        oracles: Sequence[str] = (),
        dtype: str | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        """Checks all that can be known before an image comes.

        Args:
            model: the model.
            taps: the blocks to read, with or without the final norm.
            attention: whether aggregators want the attention inside these blocks.
            oracles: names of other models whose [cls] attention aggregators want; loaded here.
            dtype: "float32", "bfloat16" or "float16" (autocast); the weights' own precision without.
            device: "cpu", "cuda", …; a CUDA GPU where there is one without.

        Raises:
            UserError: for a block or a final norm that the model does not have, an oracle without [cls], or a dtype or
                device that cannot be had.
        """
        self.model, self.taps, self.attention = model, tuple(dict.fromkeys(taps)), attention
        self.device = choose_device(device)
        self._name, blocks = model.spec.name, model.anatomy.blocks
        for tap in self.taps:
            if not 0 <= tap.block < len(blocks):
                raise UserError(f"{self._name} has blocks 0 to {len(blocks) - 1}, not {tap.block}: choose one of these")
        self._blocks = sorted({tap.block for tap in self.taps})
        self._norm = find_final_norm(model.anatomy, self._name) if any(tap.norm for tap in self.taps) else None
        if dtype == "auto":
            raise UserError(
                "dtype='auto' is for analyze, which measures its error on statistics: give float32, bfloat16 or "
                "float16, or leave it out"
            )
        settled = choose_dtype(dtype, DTYPE_BOUND, model.module, self.device, lambda _: {})
        self._forward = Forward(model, self.device, settled)
        self._oracles = {name: _oracle(name, model, dtype, self.device) for name in oracles}
        self._batch: _Batch | None = None
        self._bystanders = Bystanders(model.anatomy)
        self._capture: Capture | None = None
        self._cleanup: ExitStack | None = None

    @property
    def forward_dtype(self) -> ForwardDtype:
        """What the forward pass runs in."""
        return self._forward.dtype

    @cached_property
    def dim(self) -> int:
        """Numbers a token; runs one image of noise through the model."""
        noise = torch.randn(
            1, self.model.anatomy.channels, *self.model.transform.size, generator=torch.Generator().manual_seed(0)
        )
        return next(iter(self(noise).values())).tokens.shape[-1]

    def __enter__(self) -> FrozenModel:
        anatomy = self.model.anatomy
        with ExitStack() as stack:
            stack.enter_context(prepared(self.model.module, self.device))
            self._bystanders.watch(stack)
            run_eagerly(stack)
            use_fused_attention(anatomy.blocks, stack)
            if self.attention:  # whose capture prepares the model itself
                blocks = tuple(anatomy.blocks[block] for block in self._blocks)
                tapped = replace(self.model, anatomy=replace(anatomy, blocks=blocks))
                self._capture = stack.enter_context(capture(tapped))
            else:
                anatomy.prepare(stack)
            readings = find_readings(self.model)
            for block in self._blocks:  # after those of the capture, which must see the last block end
                self._read_at(require(readings[block], self.model, block), block, stack)
            for oracle in self._oracles.values():
                stack.enter_context(oracle)
            self._cleanup = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        cleanup, self._cleanup, self._capture = self._cleanup, None, None
        if cleanup is not None:
            cleanup.close()

    def __call__(
        self, images: Float[Tensor, "batch channel height width"], names: Sequence[str] | None = None
    ) -> dict[Tap, TokenBatch]:
        """The tokens of a batch at each tap.

        Args:
            images: as the model's transform makes them.
            names: what an error calls them; their positions in the batch without.

        Raises:
            UserError: for images of a size that the model cannot take, tokens that are NaN or infinite (naming the
                images), or blocks whose output is no sequence of tokens.
        """
        if self._cleanup is None:
            raise UserError("a FrozenModel gives tokens inside its context: with FrozenModel(…) as frozen: frozen(x)")
        images = images.to(self.device, non_blocking=True)
        whole = self.attention or self._oracles  # an attention view is of one pass
        pieces = [self._run(images)] if whole else self._forward.in_pieces(self._run, images)
        layout, tokens = pieces[0][0], {block: _joined([of[block] for _, of in pieces]) for block in self._blocks}
        oracles = {name: self._asked(name, images) for name in self._oracles}
        return {
            tap: TokenBatch(self._read(tap, tokens, names), layout.canonical, self._attention_of(tap.block), oracles)
            for tap in self.taps
        }

    def _run(self, images: Tensor) -> tuple[TokenLayout, dict[int, Tensor]]:
        """One forward pass, as far as it is needed: which token is what, and the tokens after each block."""
        height, width = images.shape[-2:]
        layout = self.model.anatomy.layout((height, width))
        self._bystanders.ran.clear()
        tokens: dict[int, Tensor] = {}
        self._batch = _Batch(len(images), layout, tokens)
        try:
            self._forward(images)
        except _LastBlockRan:
            return layout, tokens
        finally:
            self._batch = None
        unseen = next(block for block in self._blocks if block not in tokens)
        if self._bystanders.ran:
            raise UserError(self._bystanders.advice(self._name, unseen))
        raise UserError(f"{self._name} ran, but its block {unseen} did not: its tokens cannot be read")

    def _read_at(self, reading: Reading, block: int, stack: ExitStack) -> None:
        """Hook the parts at which the tokens after a block are read, until the stack ends."""
        entered: list[Tensor] = []

        def enters(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tokens = tensor_of((*args, *kwargs.values()))
            if self._batch is None or tokens is None:  # a pass that somebody else began
                return
            if reading.leaves is None:
                self._take(block, tokens, self._batch)
            else:  # a copy, as the model may add to it in place
                entered[:] = [tokens.clone()]

        def leaves(module: nn.Module, args: Any, output: Any) -> None:
            if self._batch is not None:
                tokens = tensor_of(output)
                came = tokens + entered.pop() if entered and tokens is not None else output
                self._take(block, came, self._batch)

        if reading.enters is not None:
            stack.callback(reading.enters.register_forward_pre_hook(enters, with_kwargs=True).remove)
        if reading.leaves is not None:
            stack.callback(reading.leaves.register_forward_hook(leaves).remove)

    def _take(self, block: int, came: Any, batch: _Batch) -> None:
        """Keep the tokens after a block, and end the pass where they are the last that are read."""
        tokens = _in_order(tensor_of(came), self.model.anatomy.blocks[block], batch.count, batch.layout)
        if tokens is None:
            shape = tuple(getattr(tensor_of(came), "shape", ())) or f"a {type(came).__name__}"
            raise UserError(
                f"block {block} of {self._name} gave {shape} where (images, tokens, width) with "
                f"{batch.layout.num_tokens} tokens was expected: its tokens cannot be read"
            )
        # A copy, as later blocks may add to it in place; and not one of inference mode, on which nothing trains.
        with torch.inference_mode(False), torch.no_grad():
            batch.tokens[block] = reordered(tokens, batch.layout, 1).to(torch.float32, copy=True)
        if block == self._blocks[-1]:
            raise _LastBlockRan

    def _read(self, tap: Tap, of_blocks: dict[int, Tensor], names: Sequence[str] | None) -> Tensor:
        """The tokens of a tap, checked."""
        tokens = of_blocks[tap.block]
        if tap.norm and self._norm is not None:
            tokens = self._forward.part(self._norm, tokens)
        bad = (~tokens.isfinite().flatten(1).all(dim=1)).nonzero().flatten().tolist()
        if bad:
            raise UserError(
                f"tokens of {self._name} at {tap} are NaN or infinite for {len(bad)} of the batch's images "
                f"({named(bad, names)}): {self._forward.advice('check the weights and these images')}"
            )
        return tokens

    def _attention_of(self, block: int) -> AttentionView | None:
        if self._capture is None:
            return None
        self._capture.pooling_attention.clear()  # of the blocks that are not read
        return replace(self._capture[self._blocks.index(block)], block=block)

    def _asked(self, name: str, images: Tensor) -> Float[Tensor, "batch head patch"]:
        """Another model's [cls] attention over its patches in its last block."""
        oracle = self._oracles[name]
        (batch,) = oracle(_renormalised(images, self.model.transform, oracle.model.transform)).values()
        assert batch.attention is not None
        return patch_attention(batch.attention, slice(0, 1))[:, :, 0].float()


def _oracle(name: str, of: LoadedModel, dtype: str | None, device: torch.device) -> FrozenModel:
    """Another model for images of such a size that its grid of patches is the same."""
    model, layout = load_model(name), of.layout
    if not model.layout.has_cls:
        raise UserError(f"{name} has no [cls] token whose attention could weigh patches: choose an oracle with one")
    if model.anatomy.channels != of.anatomy.channels:
        raise UserError(
            f"{name} takes {model.anatomy.channels} channels and {of.spec.name} {of.anatomy.channels}: choose an "
            f"oracle for the same images"
        )
    if model.layout.grid != layout.grid:
        model = load_model(name, img_size=replace(model.layout, grid=layout.grid).image_size)
    return FrozenModel(model, [Tap(len(model.anatomy.blocks) - 1)], attention=True, dtype=dtype, device=device)


def _renormalised(images: Tensor, mine: ImageTransform, other: ImageTransform) -> Tensor:
    """Images that one transform made, as if another had: its size, mean and standard deviation."""

    def column(values: tuple[float, ...]) -> Tensor:
        return torch.tensor(values, device=images.device)[:, None, None]

    images = images * column(mine.std) + column(mine.mean)
    if images.shape[-2:] != other.size:
        images = F.interpolate(images, other.size, mode="bicubic", antialias=True).clamp(0, 1)
    return (images - column(other.mean)) / column(other.std)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _in_order(tokens: Tensor | None, block: nn.Module, batch: int, layout: TokenLayout) -> Tensor | None:
    """A block's output as `(B, T, D)`; None for what cannot be that."""
    if tokens is None:
        return None
    shape, sizes = tuple(tokens.shape[:2]), (batch, layout.num_tokens)
    if tokens.ndim != 3 or shape not in (sizes, sizes[::-1]):
        return None
    # Where there are as many images as tokens, torch's attention says which of the two comes first.
    sequence_first = shape != sizes or (
        batch == layout.num_tokens
        and any(isinstance(part, nn.MultiheadAttention) and not part.batch_first for part in block.modules())
    )
    return tokens.transpose(0, 1) if sequence_first else tokens
