"""Models on the meta device: names and shapes without memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# In place, of a tensor whose shape, precision and device they keep.
_DRAWING = frozenset({"normal_", "uniform_", "erfinv_", "mul_", "add_", "clamp_", "zero_", "fill_"})


@contextmanager
def on_meta() -> Iterator[None]:
    """What is built here is on the meta device, and soon: nothing is computed of values that are not there."""
    with torch.device("meta"), _WithoutValues():
        yield


class _WithoutValues(TorchFunctionMode):
    """Leaves out what draws and scales the weights of a new model.

    On the meta device torch works that out in Python, which would take most of the time.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        drawn = getattr(func, "__name__", "") in _DRAWING
        if drawn and args and isinstance(args[0], Tensor) and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))
