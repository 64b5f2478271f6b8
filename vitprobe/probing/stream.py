"""Where the tokens that leave each block can be read: at the block's output, or in the model around its parts.

Own code often keeps a block as a list of parts ([attention, MLP]) whose residuals the model's forward pass adds. Then
no module returns the tokens. One pass on noise shows what enters and leaves every part, and so which part they enter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitprobe.errors import UserError
from vitprobe.hooks.updates import tensor_of
from vitprobe.models.anatomy.final_norm import find_final_norm
from vitprobe.models.anatomy.measured import noise_for, run_on
from vitprobe.models.anatomy.parts import Anatomy
from vitprobe.models.loaded import LoadedModel

# Libraries all of whose blocks return the tokens.
_WHOLE = ("timm.", "transformers.", "torchvision.", "open_clip.")
_TOLERANCE = 1e-4


@dataclass(frozen=True, eq=False)
class Reading:
    """Where the tokens after a block are read.

    Attributes:
        enters: what enters this part, without the output of `leaves` where there is none.
        leaves: what leaves this part, added to that.
    """

    enters: nn.Module | None
    leaves: nn.Module | None


def find_readings(model: LoadedModel) -> list[Reading | None]:
    """Where to read the tokens after each block; None for a block of which that could not be found.

    The model must be in eval mode; it is run once on noise unless its blocks are a library's.
    """
    blocks = model.anatomy.blocks
    whole: list[Reading | None] = [Reading(None, block) for block in blocks]
    if all(type(block).__module__.startswith(_WHOLE) for block in blocks):
        return whole
    watched = _Pass(model)
    if not watched.complete or watched.chained:
        return whole
    streams = [watched.stream_around(index) for index in range(len(blocks))]
    if any(stream is None for stream in streams) and not _are_parts(model.anatomy):
        return whole
    # What enters a block is what left the one before.
    readings: list[Reading | None] = [None if found is None else Reading(found.module, None) for found in streams[1:]]
    return [*readings, watched.end(streams) or _at_final_norm(model, watched)]


def require(reading: Reading | None, model: LoadedModel, block: int) -> Reading:
    """The reading, if it is known.

    Raises:
        UserError: where it is not.
    """
    if reading is None:
        raise UserError(
            f"the blocks of {model.spec.name} are parts whose sum its forward pass makes, and where the tokens leave "
            f"block {block} was not found: give load_model blocks and a layout where each block is a module that "
            f"returns the tokens"
        )
    return reading


@dataclass(eq=False)
class _Call:
    """One call of a part of the model: the sequences of tokens that entered and left it."""

    module: nn.Module
    began: int
    entered: Tensor
    ended: int = -1
    left: Tensor | None = None


class _Pass:
    """What entered and left the parts of a model while it ran once on two images of noise."""

    def __init__(self, model: LoadedModel) -> None:
        self._anatomy = model.anatomy
        self._clock = 0
        self.calls: list[_Call] = []
        images = noise_for(model.module, model.anatomy.channels, model.transform.size, batch=2)
        inside = {part for block in self._anatomy.blocks for part in block.modules() if part is not block}
        with ExitStack() as stack:
            for part in model.module.modules():
                if part not in inside:
                    stack.callback(part.register_forward_pre_hook(self._began, with_kwargs=True).remove)
                    stack.callback(part.register_forward_hook(self._ended).remove)
            run_on(model.module, images, stack)
        self.calls = [call for call in self.calls if call.left is not None]
        self.of_blocks = [call for block in self._anatomy.blocks for call in self.calls if call.module is block]

    @property
    def complete(self) -> bool:
        """Whether every block ran once, in order, on sequences of tokens of one shape."""
        ran = [call.module for call in self.of_blocks]
        times = [call.began for call in self.of_blocks]
        shapes = {call.entered.shape for call in self.of_blocks}
        return ran == list(self._anatomy.blocks) and times == sorted(times) and len(shapes) == 1

    @property
    def chained(self) -> bool:
        """Whether what leaves each block is what enters the next, so that blocks return the tokens."""
        pairs = list(zip(self.of_blocks, self.of_blocks[1:], strict=False))
        return bool(pairs) and all(_equal(one.left, other.entered) for one, other in pairs)

    def stream_around(self, index: int) -> _Call | None:
        """The call that the tokens enter to which a block's output is added: the block's own, or that of its norm."""
        block = self.of_blocks[index]
        before = self.of_blocks[index - 1].ended if index else -1
        norms = [c for c in self.calls if before < c.began and c.ended < block.began and _equal(c.left, block.entered)]
        behind = [call for call in self._until_next(index) if call.began > block.ended]
        for call in (block, *norms):
            if any(_adds(after.entered, call.entered, block.left) for after in behind) and self._once(call):
                return call
        return None

    def end(self, streams: Sequence[_Call | None]) -> Reading | None:
        """Where the tokens leave the last block, by the rule that holds for all blocks before it; None without one."""
        spans = [self._span(streams, index) for index in range(len(streams))]
        if len(spans) < 2 or any(stream is None for stream in streams):
            return None
        kinds = [[type(call.module) for call in span] for span in spans]
        count = min(map(len, kinds))
        if any(kind[:count] != kinds[0][:count] for kind in kinds):
            return None
        targets = [stream.entered for stream in streams[1:] if stream is not None]
        last = spans[-1]
        for first, second in _pairs(count):
            entered = [torch.zeros(()) if first is None else span[first].entered for span in spans]
            if all(
                _equal(added + span[second].left, target)  # type: ignore[operator]
                for added, span, target in zip(entered, spans, targets, strict=False)
            ):
                calls = [last[second], *([] if first is None else [last[first]])]
                if all(map(self._once, calls)):
                    return Reading(None if first is None else last[first].module, last[second].module)
        return None

    def entering(self, module: nn.Module) -> bool:
        """Whether a module got the tokens after the last block, once."""
        last = self.of_blocks[-1]
        return any(
            call.module is module and call.began > last.ended and call.entered.shape == last.entered.shape
            for call in self.calls
            if self._once(call)
        )

    def _span(self, streams: Sequence[_Call | None], index: int) -> list[_Call]:
        """The calls from where the tokens enter a block to where they enter the next, of the tokens' shape."""
        start = streams[index] or self.of_blocks[index]
        following = streams[index + 1] if index + 1 < len(streams) else None
        stop = following.began if following is not None else self._clock + 1
        shape = self.of_blocks[index].entered.shape
        return [
            call
            for call in sorted(self.calls, key=lambda each: each.began)
            if start.began <= call.began and call.ended < stop and call.entered.shape == shape == _shape(call.left)
        ]

    def _until_next(self, index: int) -> list[_Call]:
        stop = self.of_blocks[index + 1].ended if index + 1 < len(self.of_blocks) else self._clock + 1
        return [call for call in self.calls if call.began < stop]

    def _once(self, call: _Call) -> bool:
        return sum(other.module is call.module for other in self.calls) == 1

    def _began(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._clock += 1
        entering = tensor_of((*args, *kwargs.values()))
        if entering is not None and entering.ndim == 3:
            self.calls.append(_Call(module, self._clock, entering.detach().clone()))

    def _ended(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._clock += 1
        call = next((call for call in reversed(self.calls) if call.module is module and call.left is None), None)
        leaving = tensor_of(output)
        if call is not None and leaving is not None:
            call.ended, call.left = self._clock, leaving.detach().clone()


def _pairs(count: int) -> Iterator[tuple[int | None, int]]:
    """Numbers of two calls, the input of one of which may be added to the output of the other; None for no input."""
    for second in reversed(range(count)):
        yield None, second
        for first in range(second + 1):
            yield first, second


def _at_final_norm(model: LoadedModel, watched: _Pass) -> Reading | None:
    """At the norm behind the last block, where the model has one that gets the tokens."""
    try:
        norm = find_final_norm(model.anatomy, model.spec.name)
    except UserError:
        return None
    return Reading(norm, None) if watched.entering(norm) else None


def _are_parts(anatomy: Anatomy) -> bool:
    """Whether what stands for a block is a part of one, beside others in a list."""
    lists: list[Any] = [part for part in anatomy.tower.modules() if isinstance(part, nn.ModuleList | nn.ModuleDict)]
    inner = (list(one.children()) for many in lists for one in many.children() if one in lists)
    return any(
        anatomy.blocks[0] in parts
        and any(part not in anatomy.blocks and not isinstance(part, nn.Identity) for part in parts)
        for parts in inner
    )


def _adds(total: Tensor, stream: Tensor, update: Tensor | None) -> bool:
    """Whether a sequence is the stream and an update, each channel of which may be scaled."""
    if update is None or not total.shape == stream.shape == update.shape:
        return False
    added = total - stream
    scale = (added * update).sum(dim=(0, 1)) / update.square().sum(dim=(0, 1)).clamp_min(1e-30)
    return bool((scale.abs() > 0).any()) and _equal(stream + scale * update, total)


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two sequences are the same up to rounding."""
    if one is None or other is None or one.shape != other.shape:
        return False
    return bool((one - other).abs().max() <= _TOLERANCE * other.abs().max())


def _shape(tensor: Tensor | None) -> torch.Size | None:
    return None if tensor is None else tensor.shape
