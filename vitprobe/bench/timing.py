"""Seconds of a forward pass, each way paired with the plain one."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from vitprobe.bench.ways import WAYS

PASSES = {"cuda": 10}  # forward passes that are timed together, where one alone is over in milliseconds


def pairs(
    module: nn.Module, images: Tensor, way: str, rounds: int, dtype: str | None
) -> tuple[list[float], list[float]]:
    """Seconds of the plain forward pass and of this way, round by round."""
    seconds: dict[str, list[float]] = {"plain": [], "this": []}
    runs = {"plain": WAYS["plain"], "this": WAYS[way]}
    for turn in range(rounds + 1):
        for name in ("plain", "this") if turn % 2 else ("this", "plain"):
            elapsed = time_of(runs[name], module, images, dtype)
            if turn:  # the first warms up
                seconds[name].append(elapsed)
    return seconds["plain"], seconds["this"]


def time_of(run: Callable[[nn.Module, Tensor], None], module: nn.Module, images: Tensor, dtype: str | None) -> float:
    """Return the seconds of one pass; `dtype` is that of autocast, None for none."""
    passes = PASSES.get(images.device.type, 1)
    _synchronize(images)
    began = time.perf_counter()
    with torch.inference_mode(), _autocast(images, dtype):
        for _ in range(passes):
            run(module, images)
    _synchronize(images)
    return (time.perf_counter() - began) / passes


def _synchronize(images: Tensor) -> None:
    if images.device.type == "cuda":
        torch.cuda.synchronize()


def _autocast(images: Tensor, dtype: str | None) -> AbstractContextManager[Any]:
    if dtype is None:
        return nullcontext()
    return torch.autocast(images.device.type, getattr(torch, dtype))
