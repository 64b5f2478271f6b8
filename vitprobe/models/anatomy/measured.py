"""Which of several lists of blocks a model runs on images, found by running it once on noise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from vitprobe.models.anatomy.parts import Size, first_tensor, pair, run_eagerly

_measuring: ContextVar[bool] = ContextVar("measuring", default=False)


class Watched:
    """A list of blocks and what feeds it.

    Attributes:
        first: its first block.
        embedding: the part that takes the images.
        began: the number of the call of `first` among all calls watched; None where it did not run.
        takes: height and width of what entered the embedding.
    """

    def __init__(self, first: nn.Module, embedding: nn.Module) -> None:
        self.first, self.embedding = first, embedding
        self.began: int | None = None
        self.takes: Size | None = None


def run_once(module: nn.Module, images: Tensor, watched: Sequence[Watched]) -> None:
    """Run a model on images, in eval mode and without gradients, and note which of the lists run; it stays as it was.

    A pass that raises has shown what ran before.
    """
    calls = 0

    def begins(each: Watched) -> Any:
        def hook(part: nn.Module, args: tuple[Any, ...]) -> None:
            nonlocal calls
            calls += 1
            each.began = calls if each.began is None else each.began

        return hook

    def enters(each: Watched) -> Any:
        def hook(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entering = first_tensor((*args, *kwargs.values()))
            if entering is not None and entering.ndim == 4 and each.takes is None:
                each.takes = pair(entering.shape[-2:])

        return hook

    with ExitStack() as stack:
        for each in watched:
            stack.callback(each.first.register_forward_pre_hook(begins(each)).remove)
            stack.callback(each.embedding.register_forward_pre_hook(enters(each), with_kwargs=True).remove)
        run_on(module, images, stack)


def entering(module: nn.Module, images: Tensor, part: nn.Module) -> Tensor | None:
    """What enters a part of a model first when it runs on images, as `run_once` runs it; None where nothing does."""
    seen: list[Tensor] = []

    def hook(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        came = first_tensor((*args, *kwargs.values()))
        if came is not None:
            seen.append(came.detach().clone())

    with ExitStack() as stack:
        stack.callback(part.register_forward_pre_hook(hook, with_kwargs=True).remove)
        run_on(module, images, stack)
    return seen[0] if seen else None


def run_on(module: nn.Module, images: Tensor, stack: ExitStack) -> None:
    """Run a model on images as `on_noise` runs it, without an error, until the stack ends."""
    stack.enter_context(on_noise(module))
    with suppress(Exception):  # of the model's own code: what ran before it was seen
        module(images)


def being_measured() -> bool:
    """Whether the forward pass under way is one on noise, of which captures take no notice."""
    return _measuring.get()


@contextmanager
def on_noise(module: nn.Module) -> Iterator[None]:
    """In eval mode, uncompiled, without gradients, unseen by captures; the model stays as it was."""
    training = [part for part in module.modules() if part.training]
    before = _measuring.set(True)
    module.eval()
    try:
        with ExitStack() as stack:
            run_eagerly(stack)
            stack.enter_context(torch.random.fork_rng(devices=_gpus(module)))
            stack.enter_context(torch.no_grad())
            yield
    finally:
        for part in training:
            part.training = True
        _measuring.reset(before)


def _gpus(module: nn.Module) -> list[torch.device]:
    """The GPUs that a model's weights are on, whose random numbers it may draw."""
    return list({weight.device for weight in module.parameters() if weight.device.type == "cuda"})


def noise_for(module: nn.Module, channels: int, size: Size, batch: int = 1) -> Tensor:
    """A batch of images of noise, where a model's weights are and of their precision."""
    weight = next((each for each in module.parameters() if each.is_floating_point()), torch.zeros(()))
    noise = torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(0))
    return noise.to(weight.device, weight.dtype)
