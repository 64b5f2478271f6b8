"""Arithmetic that means what it says: float32 products computed in float32, whatever the surroundings allow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Switch autocast, gradients and reduced-precision float32 products (TF32, bf16x) off for the body."""
    precision = torch.get_float32_matmul_precision()
    if precision != "highest":
        torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False), torch.no_grad():
            yield
    finally:
        if precision != "highest":
            torch.set_float32_matmul_precision(precision)
