"""`analyze` from a folder of JPEGs to the saved run, against decoding and the plain forward pass in a like loop.

    python -m benchmarks.end_to_end --data DIR                                  # vit_base_patch16_224, random weights
    python -m benchmarks.end_to_end --data DIR --model mae_vit_nano

Both read the same images with as many workers in batches of the same size; rounds alternate which goes first, and the
median of the ratios is printed. What `analyze` does once (the weights' digest, intervals, the folder) is in its time.
"""

from __future__ import annotations

import argparse
import statistics as numbers
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from vitprobe.bench import PAPERS
from vitprobe.data.batches import default_workers, iterate
from vitprobe.data.sources import open_images
from vitprobe.models.loaded import LoadedModel
from vitprobe.models.loading import load_model
from vitprobe.profile.analysis import analyze

BATCH = 16


def plain(model: LoadedModel, data: Path, count: int, workers: int) -> None:
    """Decoding and the model's own forward pass."""
    images = open_images(data)
    with torch.inference_mode():
        for batch in iterate(images, range(count), model.transform, BATCH, workers=workers):
            model.module(batch.pixels)


def whole(statistics: tuple[str, ...] | None, model: LoadedModel, data: Path, count: int, workers: int) -> None:
    """`analyze` to a saved run."""
    with tempfile.TemporaryDirectory() as folder:
        analyze(
            model,
            data,
            num_images=count,
            statistics=statistics,
            batch_size=BATCH,
            workers=workers,
            device="cpu",
            out=Path(folder) / "run",
            progress=False,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--num-images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    model = load_model(given.model, pretrained="nano" in given.model)
    count = min(given.num_images, len(open_images(given.data)))
    workers = default_workers(count)
    print(f"{given.model}, {count} images, {workers} workers, {torch.get_num_threads()} threads")
    for name, statistics in (("the paper's three", PAPERS), ("every statistic", None)):
        runs = {"plain": plain, "whole": partial(whole, statistics)}
        ratios, seconds = [], []
        for turn in range(given.rounds + 1):
            took = {}
            for which in ("plain", "whole") if turn % 2 else ("whole", "plain"):
                began = time.perf_counter()
                runs[which](model, given.data, count, workers)
                took[which] = time.perf_counter() - began
            if turn:  # the first warms up
                ratios.append(took["whole"] / took["plain"])
                seconds.append(took["plain"])
        print(
            f"{name}: {numbers.median(ratios):.3f}× ({min(ratios):.3f} to {max(ratios):.3f}), "
            f"plain {numbers.median(seconds):.1f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
