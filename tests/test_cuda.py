"""What only a GPU can show: captures, runs, the fused kernel and its memory there, against the float64 reference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from comparing import reference_of_factors
from helpers import assert_all_close, assert_close, captured, images, random_view, tiny_vit
from reference import largest_logit
from test_fused import assert_right, random_value
from vitprobe.attention.fused import attend_with_rows
from vitprobe.bench import benchmark
from vitprobe.data.batches import Batch
from vitprobe.data.prefetch import on_their_way
from vitprobe.hooks.capture import Capture
from vitprobe.layout import TokenLayout
from vitprobe.profile.analysis import analyze
from vitprobe.statistics import STATISTICS

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU here"),
    pytest.mark.xdist_group("cuda"),
]
PAPERS = ["cls_self_attention", "cls_entropy", "patch_self_attention_ratio"]
MODELS = {
    "[cls]": {},
    "registers": {"reg_tokens": 4},
    "a wide grid": {"img_size": (32, 72)},
    "80 dims": {"embed_dim": 160},
}


@pytest.fixture(autouse=True)
def _exact_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patches are embedded by a convolution, which cuDNN would do in TF32."""
    conv = getattr(torch.backends.cudnn, "conv", None)
    if hasattr(conv, "fp32_precision"):
        monkeypatch.setattr(conv, "fp32_precision", "ieee")
    else:
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def on_gpu(model: nn.Module, x: Tensor, autocast: torch.dtype | None, **options: object) -> Capture:
    with torch.autocast("cuda", autocast or torch.bfloat16, enabled=autocast is not None):
        return captured(model.cuda(), x.cuda(), **options)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_a_capture_equals_the_float64_reference(options: dict, autocast: torch.dtype | None) -> None:
    """The reference is of the queries and keys of the first block, which both captures share whatever its kernel."""
    model, x = tiny_vit(**options), images(height=32, width=options.get("img_size", (32, 32))[1])
    seen = on_gpu(model, x, autocast)[0]
    one_pass = on_gpu(model, x, autocast, keep="statistics")
    assert one_pass.kernels == {"fused"}
    assert seen.query is not None and seen.key is not None
    assert seen.query.dtype == (autocast or torch.float32)
    moved = {name: part.cpu() if isinstance(part, Tensor) else part for name, part in vars(seen).items()}
    view = type(seen)(**{name: part for name, part in moved.items() if name in seen.__dataclass_fields__})
    values = {name: value[:, 0].cpu() for name, value in one_pass.statistics().items()}
    expected = reference_of_factors(view)
    # Norms of tokens are of the kernel's output, which half precision rounds.
    rounded = {name for name in expected if STATISTICS[name].asks == "tokens"} if autocast is not None else set()
    for name in rounded:
        assert_close(values.pop(name), expected.pop(name), tolerance=2e-2)
    largest = largest_logit(view.query, view.key, view.scale, view.bias)
    assert_all_close(values, expected, max_logit=largest)


@pytest.mark.parametrize("asked", [None, PAPERS], ids=["every", "the paper's"])
def test_float32_on_a_gpu_is_float32_on_the_cpu(asked: list[str] | None) -> None:
    model, x = tiny_vit(), images()
    expected = captured(model, x, keep="statistics", statistics=asked, kernel="model").statistics()
    for kernel, ran in (("auto", {"fused"}), ("torch", {"rows"} if asked is None else {"sums"}), ("model", set())):
        attention = on_gpu(model, x, None, keep="statistics", statistics=asked, kernel=kernel)
        assert attention.kernels == ran
        values = {name: value.cpu() for name, value in attention.statistics().items()}
        assert_all_close(values, expected, tolerance=1e-3)  # the layers around attention round differently


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dims", [16, 64, 80, 96, 128])
def test_the_kernel_as_it_is_launched(dims: int, dtype: torch.dtype) -> None:
    """Blocks of the size that real calls take, over more than one of them, cut and whole."""
    for layout in (TokenLayout((14, 14), has_cls=True), TokenLayout((10, 23), has_cls=True, num_registers=4)):
        view = random_view(layout, batch=2, heads=3, dim=dims, sharpness=4.0, dtype=dtype, norms=False)
        rounding = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype]
        assert_right(view, random_value(view, dims, dtype), rounding, blocks=None)
        bias = torch.randn(1, 3, layout.num_tokens, layout.num_tokens)
        bias[..., 2] = -torch.inf
        biased = type(view)(0, view.query, view.key, view.scale, bias, layout)
        assert_right(biased, random_value(view, dims, dtype), rounding, blocks=None)


def test_memory_grows_with_tokens_and_not_with_their_square() -> None:
    def peak(side: int) -> int:
        layout = TokenLayout((side, side), has_cls=True)
        query = torch.randn(1, 4, layout.num_tokens, 64, device="cuda", dtype=torch.bfloat16)
        attend_with_rows(query, query, query, 0.125, None, layout)  # compiles
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        resting = torch.cuda.memory_allocated()
        attend_with_rows(query, query, query, 0.125, None, layout)
        return torch.cuda.max_memory_allocated() - resting

    small, large = peak(32), peak(64)
    assert large <= 4.5 * small  # four times the tokens
    assert large < 4 * 4097 * 64 * 2 * 2  # twice attention's own output


def test_a_run_on_a_gpu(tmp_path: Path) -> None:
    model, x = tiny_vit(), images(batch=7)
    here = analyze(model, x, device="cpu", statistics=PAPERS, kernel="model")
    there = analyze(model, x, device="cuda", statistics=PAPERS, batch_size=2, out=tmp_path / "run")
    assert there.manifest["kernels"] == ["fused"]
    assert there.manifest["device"].startswith("cuda")
    assert next(model.parameters()).device.type == "cpu"
    assert_close(there.table(PAPERS)["mean"], here.table(PAPERS)["mean"], tolerance=1e-3)
    small = analyze(model, x, device="cuda", statistics=PAPERS, dtype="bfloat16")
    assert_close(small.table(PAPERS)["mean"], here.table(PAPERS)["mean"], tolerance=0.1)


def test_batches_sent_ahead_are_whole() -> None:
    """Copies beside computing: each batch is what it was read as, and stays it while the next come."""
    pixels = [torch.randn(8, 3, 224, 224).pin_memory() for _ in range(6)]
    batches = [Batch(part, list(range(8)), list("abcdefgh"), list("abcdefgh")) for part in pixels]
    weight = torch.randn(224, 224, device="cuda")
    for number, batch in enumerate(on_their_way(batches, torch.device("cuda", 0))):
        product = batch.pixels @ weight
        for _ in range(20):
            product = product @ weight * 1e-2
        assert batch.pixels.is_cuda and torch.equal(batch.pixels.cpu(), pixels[number])


def test_the_benchmark_runs_on_a_gpu() -> None:
    costs = benchmark(
        "vit_tiny_patch16_224", batch_size=2, rounds=1, device="cuda", dtype="bfloat16", ways=["papers", "every"]
    )
    for cost in costs:
        assert cost.seconds > 0 and cost.memory_ratio is not None and cost.memory_ratio > 0
