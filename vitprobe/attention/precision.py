"""Arithmetic that means what it says: float32 products computed in float32, whatever the surroundings allow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Switch autocast, gradients and reduced-precision float32 products (TF32, bf16) off for the body."""
    with ExitStack() as stack:
        stack.enter_context(_ieee_products())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(torch.no_grad())
        yield


@contextmanager
def _ieee_products() -> Iterator[None]:
    """Products of float32 matrices in float32, on a GPU and on the CPU.

    Newer versions of torch have one switch a backend. The older global one
    (`torch.set_float32_matmul_precision`) cannot be read there once somebody has used the newer ones, while these
    can always be.
    """
    backends = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    switches = [backend for backend in backends if hasattr(backend, "fp32_precision")]
    before = [switch.fp32_precision for switch in switches]
    legacy = None if switches else torch.get_float32_matmul_precision()
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        if legacy is not None:
            torch.set_float32_matmul_precision("highest")
        yield
    finally:
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision
        if legacy is not None:
            torch.set_float32_matmul_precision(legacy)
