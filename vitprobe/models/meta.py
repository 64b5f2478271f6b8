"""Models on the meta device: names and shapes without memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# In place, of a tensor whose shape, precision and device they keep.
_OF_TENSORS = ("normal_", "uniform_", "erfinv_", "mul_", "add_", "clamp_", "zero_", "fill_")
_OF_INIT = ("kaiming_uniform_", "kaiming_normal_", "constant_")  # of torch.nn.init, which calls its argument "tensor"
_DRAWING = frozenset((*_OF_TENSORS, *_OF_INIT))


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
        given = kwargs or {}
        if getattr(func, "__name__", "") in _DRAWING:
            tensor = args[0] if args else given.get("tensor")
            if isinstance(tensor, Tensor) and tensor.is_meta:
                return tensor
        return func(*args, **given)
