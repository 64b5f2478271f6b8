"""Our Triton kernel: on a GPU where there is one, else step by step in Python through Triton's interpreter."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers import assert_all_close, assert_close, captured, images, random_view, tiny, tiny_vit
from reference import largest_logit, reference_attention, reference_statistics
from test_single_pass import HARD, hard_case
from vitprobe.attention import fused
from vitprobe.attention.fused import Blocks, attend_with_rows
from vitprobe.attention.view import AttentionView
from vitprobe.hooks.calls import AttentionCall
from vitprobe.hooks.single_pass import measure
from vitprobe.layout import TokenLayout
from vitprobe.statistics import STATISTICS, compute_statistics

pytest.importorskip("triton", reason="Triton is not installed: the fused kernel cannot run, not even step by step")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCKS = Blocks(16, 16)


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        import triton

        if not triton.knobs.runtime.interpret:
            pytest.skip("there is no GPU, and TRITON_INTERPRET was set otherwise")
        monkeypatch.setattr(fused, "_runs_on", lambda device: device.type == "cpu")
        monkeypatch.setattr(fused, "_refused", set())


def run(view: AttentionView, value: Tensor, **options: Any) -> tuple[Tensor, AttentionView]:
    """The kernel's output, and a view that holds what it measured, both on the CPU."""
    assert view.query is not None and view.key is not None
    query, key, values = (tensor.to(DEVICE) for tensor in (view.query, view.key, value))
    bias = None if view.bias is None else view.bias.to(DEVICE)
    options: dict[str, Any] = {"blocks": BLOCKS} | options
    found = attend_with_rows(query, key, values, view.scale, bias, view.layout, **options)
    assert found is not None
    return found[0].cpu(), replace(view, measured=_on_cpu(found[1]))


def _on_cpu(rows: fused.RowSummary) -> fused.RowSummary:
    known = {name: part for name, part in vars(rows).items() if part is not None}
    return fused.RowSummary(
        **{name: part.cpu() if isinstance(part, Tensor) else _on_cpu(part) for name, part in known.items()}
    )


def assert_right(view: AttentionView, value: Tensor, rounding: float = 1e-6, **options: Any) -> None:
    """Output and every statistic of attention weights are the float64 reference's, from the same q and k."""
    layout = view.layout
    output, measured = run(view, value, **options)
    A = reference_attention(view.query, view.key, view.scale, view.bias)
    largest = largest_logit(view.query, view.key, view.scale, view.bias)
    largest = 100.0 if largest > 1e30 else largest  # a mask is no logit
    right = A @ value.double().numpy()
    unit = np.abs(value.double().numpy()).max()
    error = np.abs(output.double().numpy() - right).max() / unit
    assert error <= rounding * max(1.0, largest), f"output: {error:.2e}"
    expected = reference_statistics(
        A,
        grid=layout.grid,
        prefix=layout.num_prefix_tokens,
        has_cls=layout.has_cls,
        registers=layout.num_registers,
        patch_size=layout.patch_size,
    )
    wanted = [name for name in expected if options.get("distances", True) or STATISTICS[name].asks != "rows"]
    values = compute_statistics(measured, wanted)
    for name in wanted:
        # Where the patches' share of a row is too small even for float64, the reference is 0/0.
        known = np.isfinite(expected[name]) & (np.abs(expected[name]) < 1e38)
        assert known.any() or name == "cls_self_attention_ratio"
        assert not values[name].isnan().any(), name
        assert_close(values[name][known], expected[name][known], max_logit=largest)


def random_value(view: AttentionView, dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    batch, heads, tokens = view.shape
    return torch.randn(batch, heads, tokens, dim, generator=torch.Generator().manual_seed(5)).to(dtype)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:divide by zero:RuntimeWarning")
@pytest.mark.parametrize("case", HARD)
def test_hard_cases(case: str) -> None:
    view = hard_case(case)
    assert_right(view, random_value(view, 8))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("mass", [30.0, 300.0])
def test_cls_with_nearly_all_of_every_row_over_several_blocks(mass: float) -> None:
    layout = TokenLayout((7, 6), has_cls=True)
    view = random_view(layout, batch=1, heads=1, dim=16, norms=False)
    assert view.query is not None and view.key is not None
    view.query[..., 0], view.key[..., 0] = 4.0, 0.0
    view.key[:, :, 0, 0] = mass
    value = random_value(view, 16)
    assert_right(view, value)
    _, measured = run(view, value)
    assert measured.measured is not None and measured.measured.first is not None
    of_patches = torch.exp(measured.measured.log_z_patches - measured.measured.log_z)
    assert (of_patches < 1e-6).all()  # [cls] holds more than 0.999999 of each row


LAYOUTS = {
    "one block": TokenLayout((3, 5), has_cls=True),
    "whole blocks": TokenLayout((4, 8), has_cls=False),
    "cut blocks": TokenLayout((7, 5), has_cls=True, num_registers=4),
    "a wide grid": TokenLayout((2, 23), has_cls=False, num_registers=1),
    "more prefix tokens than a block": TokenLayout((2, 3), has_cls=True, num_registers=17),
    "one patch": TokenLayout((1, 1), has_cls=True),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(layout: TokenLayout) -> None:
    view = random_view(layout, batch=1, heads=2, dim=16, sharpness=4.0, norms=False)
    assert_right(view, random_value(view, 16))


@pytest.mark.parametrize("dims", [(4, 4), (32, 48), (80, 80), (96, 96), (128, 128)])
def test_widths_of_heads(dims: tuple[int, int]) -> None:
    view = random_view(LAYOUTS["cut blocks"], batch=1, heads=1, dim=dims[0], sharpness=2.0, norms=False)
    assert_right(view, random_value(view, dims[1]))


@pytest.mark.parametrize("blocks", [Blocks(16, 32), Blocks(32, 16), Blocks(64, 64), None])
def test_sizes_of_blocks(blocks: Blocks | None) -> None:
    view = random_view(LAYOUTS["cut blocks"], batch=1, heads=1, dim=16, sharpness=4.0, norms=False)
    assert_right(view, random_value(view, 16), blocks=blocks)


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
def test_half_precision_has_float32_sums(dtype: torch.dtype, rounding: float) -> None:
    """Its products of rounded queries and keys are exact, and so are the statistics."""
    view = random_view(LAYOUTS["cut blocks"], batch=2, heads=2, dim=32, sharpness=4.0, dtype=dtype, norms=False)
    value = random_value(view, 32, dtype)
    assert_right(view, value, rounding)
    assert run(view, value)[0].dtype == dtype


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_biases_of_every_form_and_masks() -> None:
    layout = LAYOUTS["a wide grid"]
    view = random_view(layout, batch=2, heads=1, dim=4, norms=False)
    tokens = layout.num_tokens
    generator = torch.Generator().manual_seed(3)
    keys = torch.zeros(2, 1, 1, tokens).masked_fill(torch.rand(2, 1, 1, tokens, generator=generator) < 0.5, -torch.inf)
    keys[..., 0], keys[..., -1] = 0, 0
    one_left = torch.full((tokens, tokens), -torch.inf)
    one_left[torch.arange(tokens), layout.num_prefix_tokens + torch.arange(tokens) % layout.num_patches] = 0
    for bias in (
        torch.randn(2, 1, tokens, tokens, generator=generator),
        torch.randn(1, tokens, tokens, generator=generator),
        torch.randn(1, 1, tokens, tokens, generator=generator).half().mT,
        keys.expand(2, 1, tokens, tokens),
        keys.clamp(min=torch.finfo(torch.float32).min).expand(2, 1, tokens, tokens),
        one_left,
    ):
        assert_right(replace(view, bias=bias), random_value(view, 16))


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # the interpreter's numpy: log 0 is meant
def test_rows_masked_from_all_patches_have_no_entropy() -> None:
    layout = TokenLayout((4, 5), has_cls=True)
    view = random_view(layout, batch=1, heads=1, dim=16, norms=False)
    bias = torch.zeros(21, 21)
    bias[5, 1:], bias[7] = -torch.inf, -torch.inf
    output, measured = run(replace(view, bias=bias), random_value(view, 16))
    rows = measured.measured
    assert rows is not None and rows.entropy is not None and rows.distance is not None
    nowhere = torch.tensor([row in (4, 6) for row in range(20)])
    for part in (rows.entropy, rows.distance):
        assert torch.equal(part[0, 0].isnan(), nowhere)
    assert torch.equal(rows.log_z_patches[0, 0] == -torch.inf, nowhere)
    assert torch.equal(output[0, 0, 5], random_value(view, 16)[0, 0, 0])  # it looks at [cls] alone
    assert (output[0, 0, 7] == 0).all()


def test_strided_inputs_and_the_layout_of_the_output() -> None:
    layout = LAYOUTS["cut blocks"]
    tokens = layout.num_tokens
    qkv = torch.randn(1, tokens, 3, 2, 16, generator=torch.Generator().manual_seed(0)).permute(2, 0, 3, 1, 4)
    view = AttentionView(0, qkv[0], qkv[1], 0.25, None, layout)
    assert_right(view, qkv[2])
    query, key = qkv[0].mT.contiguous().mT, qkv[1][:, :1].expand(1, 2, -1, -1)
    assert_right(AttentionView(0, query, key, 0.25, None, layout), qkv[2])
    assert run(view, qkv[2])[0].transpose(1, 2).is_contiguous()


def test_without_distances_there_are_the_sums_and_the_first_row() -> None:
    view = random_view(LAYOUTS["cut blocks"], batch=1, heads=2, dim=16, norms=False)
    assert_right(view, random_value(view, 16), distances=False)
    rows = run(view, random_value(view, 16), distances=False)[1].measured
    assert rows is not None and rows.entropy is None and rows.distance is None
    assert rows.first is not None and rows.first.entropy is not None


@pytest.mark.parametrize("name", ["cls", "registers", "relative positions"])
@pytest.mark.parametrize("asked", [None, ["cls_self_attention", "cls_entropy", "patch_self_attention_ratio"]])
def test_a_capture_takes_it(name: str, asked: list[str] | None) -> None:
    model = {
        "cls": tiny_vit,
        "registers": lambda: tiny_vit(reg_tokens=2),
        "relative positions": lambda: tiny("beit_base_patch16_224", img_size=48),
    }[name]().to(DEVICE)
    x = images(height=48 if name == "relative positions" else 32).to(DEVICE)
    fusing = captured(model, x, keep="statistics", statistics=asked)
    beside = captured(model, x, keep="statistics", statistics=asked, kernel="model")
    without = captured(model, x, keep="statistics", statistics=asked, kernel="torch")
    assert fusing.kernels == {"fused"} and "fused" not in without.kernels | beside.kernels
    expected = {statistic: value.cpu() for statistic, value in beside.statistics().items()}
    assert_all_close({statistic: value.cpu() for statistic, value in fusing.statistics().items()}, expected)


def test_what_it_is_not_for(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = LAYOUTS["one block"]

    def takes(query: Tensor, value: Tensor | None = None) -> bool:
        query, value = query.to(DEVICE), (query if value is None else value).to(DEVICE)
        return attend_with_rows(query, query, value, 1.0, None, layout) is not None

    plain = torch.randn(1, 1, 16, 16)
    assert takes(plain)
    assert not takes(plain.double())
    assert not takes(plain, plain.half())
    assert not takes(torch.randn(1, 1, 16, 144))
    with torch.autocast(DEVICE, torch.bfloat16):  # as torch's own attention, which rounds them all alike
        assert takes(plain, plain.half())
    call = AttentionCall(plain.to(DEVICE), plain.to(DEVICE), value=plain.to(DEVICE))
    assert measure(call, layout, "rows") == "fused"
    assert measure(call, layout, "rows", "torch") == "rows"
    monkeypatch.undo()
    if DEVICE == "cpu":
        assert not takes(plain)
    monkeypatch.setattr(fused, "find_spec", lambda name: None)
    fused._has_triton.cache_clear()
    try:
        assert not takes(plain) and not fused._has_triton()
    finally:
        fused._has_triton.cache_clear()


def test_where_triton_fails_a_warning_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    triton_rows = importlib.import_module("vitprobe.attention.triton_rows")
    plain, layout = torch.randn(1, 1, 16, 24).to(DEVICE), LAYOUTS["one block"]
    monkeypatch.setattr(fused, "_refused", set())
    errors = [torch.OutOfMemoryError("out of memory"), RuntimeError("no C compiler\nwas found")]

    class Broken:
        def __getitem__(self, grid: object) -> object:
            raise errors[0]

    monkeypatch.setattr(triton_rows, "attend", Broken())
    with pytest.raises(torch.OutOfMemoryError):
        attend_with_rows(plain, plain, plain, 1.0, None, layout)
    del errors[0]
    with pytest.warns(RuntimeWarning, match=r"does not run on .*, so slower ones do its work: RuntimeError: no C comp"):
        assert attend_with_rows(plain, plain, plain, 1.0, None, layout) is None
    errors.clear()  # an IndexError, were it tried again
    assert attend_with_rows(plain, plain, plain, 1.0, None, layout) is None


@pytest.mark.slow
def test_it_compiles_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    """The interpreter runs much that the compiler refuses."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    script = Path(__file__).with_name("compile_fused.py")
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 6 and all(line.endswith("bytes, fits") for line in lines), done.stdout
