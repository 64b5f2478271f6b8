"""A model for the time of an analysis: in eval mode, on the right device, and afterwards as it was."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from vitprobe.data.shards import SHARD_IMAGES
from vitprobe.errors import UserError
from vitprobe.layout import TokenLayout
from vitprobe.memory import available_memory

MOST_IMAGES = SHARD_IMAGES  # larger batches gain nothing
MEMORY_SHARE = 0.25  # of what is free
ACTIVATIONS = 24  # float32 tensors of (tokens, width) that are alive at once in a block, with room to spare


def choose_device(device: str | torch.device | None, local_rank: int | None = None) -> torch.device:
    """The device of this name; without one, a CUDA GPU where there is one, else the CPU.

    Of several processes on a machine, each with its `local_rank`, "cuda" gives each a GPU of its own.

    Raises:
        UserError: for a name that torch does not know, or a device that is not there.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if str(device) == "cuda" and local_rank is not None:
        device = f"cuda:{local_rank}"
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen).cpu()  # which a device without storage ("meta") cannot do
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = re.split(r"[.:\n]\s", f"{error}\n ")[0] or type(error).__name__
        raise UserError(
            f"device {device!s} cannot be used ({reason}); choose cpu, or cuda where there is a GPU"
        ) from None
    return chosen


def choose_batch_size(layout: TokenLayout, width: int, device: torch.device, processes: int = 1) -> int:
    """Images a batch that fit well into the memory that is free, 1 to `MOST_IMAGES`.

    So many `processes` share a CPU's memory; each has a GPU of its own.
    """
    image_bytes = 4 * layout.num_tokens * width * ACTIVATIONS
    free = free_memory(device) / (processes if device.type == "cpu" else 1)
    return int(max(1, min(MOST_IMAGES, MEMORY_SHARE * free // image_bytes)))


def free_memory(device: torch.device) -> int:
    """Bytes that are free on the device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()


@contextmanager
def prepared(module: nn.Module, device: torch.device) -> Iterator[None]:
    """The module in eval mode on `device`; each part's mode, and the device, come back."""
    modes = {part: part.training for part in module.modules()}
    home = next((parameter.device for parameter in module.parameters()), device)
    try:
        module.to(device).eval()
        yield
    finally:
        module.to(home)
        for part, mode in modes.items():
            part.training = mode
