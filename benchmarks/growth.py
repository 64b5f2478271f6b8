"""How cost grows with work: with the number of images (time linear, memory flat), and with the number of tokens.

    python -m benchmarks.growth images     # 1,000 to 50,000 pictures made on the fly, mae_vit_nano, to a saved run
    python -m benchmarks.growth tokens     # 197 to 16,385 tokens, two blocks of ViT-S/16, one image

Each count of images runs in a process of its own, whose peak resident memory is printed; `above` is what that is above
the same process before the run.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics as numbers
import tempfile
import time
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vitprobe.bench import in_a_fresh_process, pairs, peak_of
from vitprobe.profile.analysis import analyze

IMAGES = (1_000, 2_000, 5_000, 10_000, 20_000, 50_000)
SIDES = (14, 28, 56, 88, 128)  # patches
ASKED = ("papers", "every")  # keys of `vitprobe.bench.WAYS`


class Made(Dataset[Tensor]):
    """Pictures of smoothed noise, each from its own number; none is kept."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        coarse = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(index))
        return torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bilinear")[0]


def of_images(count: int) -> tuple[float, float, float]:
    """Seconds of a whole run of `count` images, its process's peak memory, and how much that is above the start."""
    before = _peak()
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        analyze("mae_vit_nano", DataLoader(Made(count), batch_size=128), out=Path(folder) / "run")
        seconds = time.perf_counter() - began
    return seconds, _peak(), _peak() - before


def _peak() -> float:
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def grow_images() -> None:
    print("| images | seconds | ms an image | peak memory, MB | above the start, MB |\n|---|---|---|---|---|")
    for count in IMAGES:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            seconds, peak, above = pool.apply(of_images, (count,))
        print(
            f"| {count:,} | {seconds:.1f} | {1e3 * seconds / count:.2f} | {peak / 1e6:.0f} | {above / 1e6:.0f} |",
            flush=True,
        )


def two_blocks(side: int) -> tuple[VisionTransformer, Tensor]:
    """Two blocks of ViT-S/16 over `side` × `side` patches, and an image for them."""
    torch.manual_seed(0)
    pixels = 16 * side
    model = VisionTransformer(img_size=pixels, embed_dim=384, depth=2, num_heads=6, num_classes=0).eval()
    return model, torch.randn(1, 3, pixels, pixels)


def memory(side: int, way: str) -> float | None:
    """Bytes that a pass takes at its peak; for a process of its own."""
    return peak_of(*two_blocks(side), way)


def grow_tokens(rounds: int) -> None:
    print("| tokens | plain, ms | " + " | ".join(f"{way}: time, memory" for way in ASKED) + " |\n|---|---|---|---|")
    for side in SIDES:
        cells = []
        for way in ASKED:
            plain, this = pairs(*two_blocks(side), way, rounds, None)
            peak, base = (in_a_fresh_process(memory, side, each) for each in (way, "plain"))
            ratio = numbers.median(one / other for one, other in zip(this, plain, strict=True))
            share = f"{peak / base:.2f}×" if peak and base else "?"
            cells.append(f"{ratio:.2f}×, {share}")
        print(f"| {side**2 + 1:,} | {1e3 * numbers.median(plain):.0f} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["images", "tokens"])
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    if given.what == "images":
        grow_images()
    else:
        grow_tokens(given.rounds)


if __name__ == "__main__":
    main()
