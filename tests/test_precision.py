"""The surroundings' precision changes no statistic, and comes back as it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from helpers import random_view
from vitprobe.attention import precision
from vitprobe.attention.precision import exact_float32
from vitprobe.layout import TokenLayout
from vitprobe.statistics import compute_statistics

CPU = torch.device("cpu")
LAYOUT = TokenLayout(grid=(12, 12), has_cls=True)
PER_BACKEND = hasattr(torch.backends.cuda.matmul, "fp32_precision")


@pytest.fixture(autouse=True)
def _default_precision() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("setting", ["medium", "high", "highest"])
def test_reduced_precision_products_change_nothing(setting: str) -> None:
    expected = compute_statistics(random_view(LAYOUT, dim=64))
    torch.set_float32_matmul_precision(setting)
    view = random_view(LAYOUT, dim=64)
    values, weights = compute_statistics(view), view.probabilities()
    assert torch.get_float32_matmul_precision() == setting
    torch.set_float32_matmul_precision("highest")
    assert all(torch.equal(values[name], expected[name]) for name in expected)
    assert torch.equal(weights, view.probabilities())


@pytest.mark.parametrize("setting", ["medium", "high", "highest"])
def test_products_are_exact_inside(setting: str) -> None:
    torch.set_float32_matmul_precision(setting)
    before = products()
    with exact_float32(CPU):
        assert set(products()) <= {"ieee", "highest"}
    assert products() == before and torch.get_float32_matmul_precision() == setting


def products() -> list[str]:
    """What float32 products are computed in, by the newer switches where there are any."""
    if PER_BACKEND:
        return [torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision]
    return [torch.get_float32_matmul_precision()]


@pytest.mark.skipif(not PER_BACKEND, reason="this torch has only the global switch")
@pytest.mark.parametrize("backend", ["cuda", "mkldnn"])
def test_the_newer_switches_are_respected(backend: str) -> None:
    """Once they are used, the older torch.get_float32_matmul_precision raises."""
    switch = getattr(torch.backends, backend).matmul
    before = switch.fp32_precision
    reduced = "tf32" if backend == "cuda" else "bf16"
    switch.fp32_precision = reduced
    try:
        with exact_float32(CPU):
            assert switch.fp32_precision == "ieee"
        assert switch.fp32_precision == reduced
    finally:
        switch.fp32_precision = before


def test_a_torch_with_the_global_switch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Old:
        matmul = object()

    monkeypatch.setattr(precision.torch.backends, "cuda", Old())
    monkeypatch.setattr(precision.torch.backends, "mkldnn", object())
    torch.set_float32_matmul_precision("medium")
    with exact_float32(CPU):
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == "medium"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    expected = compute_statistics(random_view(LAYOUT, dim=64))
    with torch.autocast("cpu", dtype):
        values = compute_statistics(random_view(LAYOUT, dim=64))
        weights = random_view(LAYOUT, dim=64).probabilities()
        assert torch.is_autocast_enabled("cpu")
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
    assert all(torch.equal(values[name], expected[name]) for name in expected)
    assert weights.dtype == torch.float32


def test_no_graph_is_kept_and_gradients_come_back() -> None:
    view = random_view(LAYOUT)
    view.query.requires_grad_()
    assert not any(value.requires_grad for value in compute_statistics(view).values())
    assert not view.probabilities().requires_grad
    assert torch.is_grad_enabled()


def test_settings_come_back_after_an_error() -> None:
    torch.set_float32_matmul_precision("medium")
    before = products()
    with pytest.raises(ZeroDivisionError), torch.autocast("cpu", torch.bfloat16):
        try:
            with exact_float32(CPU):
                raise ZeroDivisionError
        finally:
            assert torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()
    assert products() == before
