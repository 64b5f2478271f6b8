"""Peak memory of a forward pass, read in a process of its own for each way."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitprobe.bench.timing import time_of
from vitprobe.bench.ways import WAYS, set_up

_GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**16), "MKL_DISABLE_FAST_MM": "1"}  # of glibc and of Intel's library


def peak_memory(*setting: Any) -> float | None:
    """Bytes that one pass takes at its peak above the model at rest, from a fresh process; None where unreadable."""
    return in_a_fresh_process(_peak_in_this_process, *setting)


def in_a_fresh_process(function: Callable[..., float | None], *arguments: Any) -> float | None:
    """What a function gives in a process of its own, whose memory goes back to the system as soon as it is freed.

    Otherwise what an allocator keeps for later would count, and differ from run to run by more than what is measured.
    """
    with _environment(_GIVE_BACK), multiprocessing.get_context("spawn").Pool(1) as pool:  # read at its start
        return pool.apply(function, arguments)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """These variables in the environment, which processes that start meanwhile inherit."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _peak_in_this_process(
    model: str,
    img_size: int | tuple[int, int] | None,
    batch_size: int,
    device: str,
    dtype: str | None,
    of: str,
    way: str,
) -> float | None:
    """The peak of `way`, with the model that the way `of` is measured with."""
    return peak_of(*set_up(model, img_size, batch_size, device, of), way, dtype)


def peak_of(module: nn.Module, images: Tensor, way: str, dtype: str | None = None) -> float | None:
    """Bytes that one pass takes at its peak above the model at rest, in this process; None where unreadable."""
    time_of(WAYS[way], module, images[:1], dtype)  # libraries that load on first use
    if images.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        resting = torch.cuda.memory_allocated()
        time_of(WAYS[way], module, images, dtype)
        return float(torch.cuda.max_memory_allocated() - resting)
    resting = _status("VmRSS")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    except OSError:
        return None
    time_of(WAYS[way], module, images, dtype)
    peak = _status("VmHWM")
    return None if resting is None or peak is None else float(peak - resting)


def _status(field: str) -> int | None:
    """Bytes of a field of this process's status; None where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), None)
