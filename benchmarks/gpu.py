"""On a GPU: the CUDA tests, what seeing attention costs in bfloat16, and the fused kernel beside torch's own.

    python -m benchmarks.gpu --out gpu.json           # all of it; prints the tables of docs/performance.md
    python -m benchmarks.gpu --out gpu.json --tune    # tries ways to cut the kernel's work too

Whole models are measured as `vitprobe bench` does it: forward passes in pairs, in turning order, random weights, under
autocast to bfloat16, and `torch.cuda.max_memory_allocated` above the model at rest. At the smaller batches a fast GPU
waits for Python; at the larger ones it is busy. The kernel alone is timed with CUDA events, as the median of many.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics as numbers
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from vitprobe.attention.fused import Blocks, _launch, attend_with_rows, suitable_blocks
from vitprobe.bench import PAPERS, pairs, peak_of
from vitprobe.hooks.capture import capture
from vitprobe.layout import TokenLayout
from vitprobe.models.loading import load_model

# Model, pixels a side, the batch sizes of the CPU's table and ones that keep a GPU busy.
SETTINGS = (
    ("vit_base_patch16_224", 224, (8, 64)),
    ("vit_base_patch16_224", 448, (2, 32)),
    ("vit_small_patch16_224", 1024, (1, 16)),
)
TARGETS = {"papers": (1.05, 1.05, 1.05), "every": (1.10, 1.10, 1.15)}
ROUNDS = 15
# Images, heads, side of the grid, dimensions: the attention of the models above, and of wider heads.
SHAPES = ((64, 12, 14, 64), (32, 12, 28, 64), (16, 6, 64, 64), (16, 16, 16, 80), (32, 16, 16, 128))
CUTS = [Blocks(*cut) for cut in itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON with everything; a .md beside it has the tables")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--no-tests", action="store_true")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("there is no CUDA GPU here")
    found: dict[str, Any] = {"machine": machine()}
    if not given.no_tests:
        found["tests"] = tests()
    found["kernel"] = [kernel_alone(*shape) for shape in SHAPES]
    if given.tune:
        found["cuts"] = [cut for shape in SHAPES for cut in cuts(*shape)]
    found["models"] = [cost for place, setting in enumerate(SETTINGS) for cost in costs(place, *setting)]
    given.out.write_text(json.dumps(found, indent=1) + "\n")
    page = "\n".join(tables(found))
    given.out.with_suffix(".md").write_text(page)
    print(page)


def machine() -> dict[str, Any]:
    import triton

    return {
        "gpu": torch.cuda.get_device_name(),
        "capability": list(torch.cuda.get_device_capability()),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }


def tests() -> dict[str, Any]:
    """pytest of what needs a GPU, in a process of its own."""
    files = ["tests/test_cuda.py", "tests/test_fused.py", "tests/test_single_pass.py"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "0", "-q", *files], capture_output=True, text=True, check=False
    )
    print(done.stdout[-6000:], flush=True)
    return {"status": done.returncode, "end": done.stdout.splitlines()[-30:]}


def timed(run: Callable[[], object], times: int = 50) -> float:
    """Median milliseconds by CUDA events, after a warm-up."""
    for _ in range(5):
        run()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(times)]
    for before, after in events:
        before.record()
        run()
        after.record()
    torch.cuda.synchronize()
    return numbers.median(before.elapsed_time(after) for before, after in events)


def drawn(images: int, heads: int, side: int, dims: int) -> tuple[TokenLayout, list[torch.Tensor]]:
    layout = TokenLayout((side, side), has_cls=True)
    shape = (images, layout.num_tokens, heads, dims)
    return layout, [torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(3)]


def kernel_alone(*shape: int) -> dict[str, Any]:
    """Milliseconds of torch's attention and of ours, with the sums alone and with distances, of one block."""
    layout, (query, key, value) = drawn(*shape)
    scale = shape[-1] ** -0.5
    ours = {
        name: timed(lambda asked=asked: attend_with_rows(query, key, value, scale, None, layout, distances=asked))
        for name, asked in (("sums", False), ("rows", True))
    }
    torchs = timed(lambda: F.scaled_dot_product_attention(query, key, value, scale=scale))
    line = {"shape": shape, "torch": torchs, **ours}
    print(line, flush=True)
    return line


def cuts(*shape: int) -> list[dict[str, Any]]:
    """Milliseconds of our kernel, its work cut in each way that compiles here; the fastest three are printed."""
    layout, (query, key, value) = drawn(*shape)
    lines = []
    for blocks in CUTS:

        def run(blocks: Blocks = blocks) -> object:
            return _launch(query, key, value, shape[-1] ** -0.5, None, layout, True, blocks)

        try:
            lines.append({"shape": shape, "blocks": blocks, "milliseconds": timed(run, 20)})
        except Exception as error:  # too little shared memory for this cut
            print(shape, blocks, type(error).__name__, flush=True)
    lines.sort(key=lambda line: line["milliseconds"])
    now = suitable_blocks(torch.bfloat16, shape[-1])
    print(f"{shape}, now {tuple(now)}:", *[(tuple(x["blocks"]), round(x["milliseconds"], 3)) for x in lines[:3]])
    return lines


def costs(place: int, name: str, side: int, batches: tuple[int, ...]) -> list[dict[str, Any]]:
    """What both captures cost for a model, at each batch size."""
    module = load_model(name, img_size=side, pretrained=False).module.cuda().eval()
    lines = []
    for batch in batches:
        images = torch.randn(batch, 3, side, side, device="cuda")
        resting = peak_of(module, images, "plain", "bfloat16")
        for way, targets in TARGETS.items():
            plain, this = pairs(module, images, way, ROUNDS, "bfloat16")
            peak = peak_of(module, images, way, "bfloat16")
            ratios = [seconds / base for seconds, base in zip(this, plain, strict=True)]
            line = {
                "model": name,
                "pixels": side,
                "batch": batch,
                "way": way,
                "kernels": kernels_of(module, images, way),
                "ratio": numbers.median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
                "plain_milliseconds": 1e3 * numbers.median(plain),
                "memory_ratio": peak / resting if peak and resting else None,
                "target": targets[place],
            }
            print(line, flush=True)
            lines.append(line)
    return lines


def kernels_of(module: torch.nn.Module, images: torch.Tensor, way: str) -> list[str]:
    """Which kernels a capture takes there."""
    asked = PAPERS if way == "papers" else None
    attention = capture(module, keep="statistics", statistics=asked)
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16), attention:
        module(images)
    return sorted(attention.kernels)


def tables(found: dict[str, Any]) -> list[str]:
    """What was found, as markdown."""
    about = found["machine"]
    lines = [
        f"{about['gpu']}, torch {about['torch']} (CUDA {about['cuda']}), Triton {about['triton']}; bfloat16 autocast.",
        "",
        "| model | pixels | batch | plain, ms | statistics | kernel | ratio (from, to) | target | peak memory |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for cost in found["models"]:
        what = "the paper's three" if cost["way"] == "papers" else "every one"
        lines.append(
            f"| {cost['model']} | {cost['pixels']} | {cost['batch']} | {cost['plain_milliseconds']:.2f} | {what} "
            f"| {', '.join(cost['kernels'])} | {cost['ratio']:.3f}× ({cost['lowest']:.3f} to {cost['highest']:.3f}) "
            f"| {cost['target']:.2f}× | {cost['memory_ratio']:.2f}× |"
        )
    lines += [
        "",
        "| images × heads × tokens × dims | torch, ms | fused, sums | fused, rows and distances |",
        "|---|---|---|---|",
    ]
    for kernel in found["kernel"]:
        images, heads, side, dims = kernel["shape"]
        cells = [f"{kernel[name]:.3f} ({kernel[name] / kernel['torch']:.2f}×)" for name in ("sums", "rows")]
        shape = f"{images} × {heads} × {side**2 + 1} × {dims}"
        lines.append(f"| {shape} | {kernel['torch']:.3f} | {' | '.join(cells)} |")
    return [*lines, ""]


if __name__ == "__main__":
    main()
