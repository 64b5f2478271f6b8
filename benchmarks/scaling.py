"""How long a big set takes and how much it writes, from what is measured on a small one here.

    python -m benchmarks.scaling --data DIR                                # mae_vit_nano
    python -m benchmarks.scaling --data DIR --model vit_base_patch16_224   # random weights: as fast as trained ones

prints images a second (reading and decoding in one process, the model's own forward pass, `analyze` from images to the
saved run), the bytes an image, and the planning table of docs/scaling.md.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from vitprobe.data.batches import iterate
from vitprobe.data.sources import open_images
from vitprobe.models.loading import load_model
from vitprobe.profile.analysis import analyze
from vitprobe.statistics import of_the_paper

SETS = {"ImageNet-1k val": 50_000, "ImageNet-21k": 14_197_122, "LAION-400M": 400_000_000}
PAPER = tuple(statistic.name for statistic in of_the_paper())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default="mae_vit_nano")
    parser.add_argument("--num-images", type=int, default=256)
    parser.add_argument("--device", default=None)
    parser.add_argument("--workers", type=int, default=None)
    given = parser.parse_args()
    model = load_model(given.model, pretrained="nano" in given.model)
    images = open_images(given.data)
    count = min(given.num_images, len(images))
    device = torch.device(given.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    print(f"{given.model}, {count} images of {images.source}, {device}, {torch.get_num_threads()} threads")
    print(f"decode in one process: {count / _decode(images, count, model.transform):.0f} images/s")
    print(f"forward pass alone: {count / _forward(model, count, device):.0f} images/s")
    rows = []
    for name, statistics in (("the paper's three", PAPER), ("every statistic", None)):
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            analyze(
                model,
                given.data,
                num_images=count,
                statistics=statistics,
                workers=given.workers,
                device=given.device,
                out=Path(folder) / "run",
            )
            seconds = (time.perf_counter() - began) / count
            size = sum(path.stat().st_size for path in Path(folder, "run", "statistics").iterdir()) / count
        print(f"analyze, {name}: {1 / seconds:.1f} images/s, {size:.0f} bytes an image")
        rows.append((name, seconds, size))
    print("\n| set | images | " + " | ".join(f"{name}: process-hours, bytes" for name, _, _ in rows) + " |")
    print("|---|---|" + "---|" * len(rows))
    for name, images_of in SETS.items():
        cells = [f"{seconds * images_of / 3600:,.1f} h, {_bytes(size * images_of)}" for _, seconds, size in rows]
        print(f"| {name} | {images_of:,} | {' | '.join(cells)} |")


def _decode(images, count: int, transform) -> float:
    began = time.perf_counter()
    for _ in iterate(images, range(count), transform, 32):
        pass
    return time.perf_counter() - began


def _forward(model, count: int, device: torch.device) -> float:
    module, batch = model.module.to(device).eval(), torch.randn(32, 3, *model.transform.size, device=device)
    with torch.inference_mode():
        module(batch)
        began = time.perf_counter()
        for _ in range(-(-count // 32)):
            out = module(batch)
        out.sum().item()  # a GPU has finished when this is here
    return (time.perf_counter() - began) * count / (-(-count // 32) * 32)


def _bytes(size: float) -> str:
    unit, name = next((unit, name) for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1, "B")) if size >= unit)
    return f"{size / unit:,.1f} {name}"


if __name__ == "__main__":
    main()
