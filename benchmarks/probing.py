"""What it costs to train many probes in one pass over the images, against the pass of one.

    python -m benchmarks.probing                  # ViT-S/16 at 224 px, 1,000 classes, 16 aggregators × 8 learning rates
    python -m benchmarks.probing --heavy          # and each of the heavy aggregators × 8 learning rates, apart
    python -m benchmarks.probing --tokens-only --batch-size 256 --width 128 --classes 10  # the probes alone

Random weights and random images: as fast as real ones. Times are paired: each round runs both passes, in turning order;
the figure is the median of the ratios.
"""

from __future__ import annotations

import argparse
import statistics as numbers
import time
from collections.abc import Callable, Sequence

import torch

from vitprobe.aggregation import TokenBatch, create
from vitprobe.layout import TokenLayout
from vitprobe.models.loading import load_model
from vitprobe.probing.bank import Bank
from vitprobe.probing.probe import ProbeSpec
from vitprobe.probing.tap import Tap
from vitprobe.probing.tokens import FrozenModel

CENTERS = tuple(f"center{size}" for size in range(1, 5))
FREE = ("cls", "gap", "cls+gap", "max", "gem", *CENTERS, "cls_attention", "cls_attention_min_entropy")
LIGHT = ("abmilp", "ep", "aim", "cae", "capi")
HEAVY = ("simpool", "clip", "siglip", "vjepa", "coca", "cait", "vit_block", "cbam", "dolg")
FOUR = ("cls", "gap", "abmilp", "ep")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--learning-rates", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--heavy", action="store_true", help="also each heavy aggregator, apart")
    parser.add_argument("--tokens-only", action="store_true", help="no backbone: 4 aggregators × rates × 3 seeds")
    parser.add_argument("--width", type=int, default=128, help="with --tokens-only: numbers a token")
    parser.add_argument("--grid", type=int, default=8, help="with --tokens-only: patches a side")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    rates = [0.1 * 2**power for power in range(given.learning_rates)]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, batches of {given.batch_size}")
    if given.tokens_only:
        _tokens_only(rates, given)
    else:
        _with_backbone(rates, given)


def _tokens_only(rates: Sequence[float], given: argparse.Namespace) -> None:
    layout, tap = TokenLayout((given.grid, given.grid), has_cls=True), Tap(0)
    batch = TokenBatch(torch.randn(given.batch_size, layout.num_tokens, given.width), layout)
    labels = torch.randint(given.classes, (given.batch_size,))
    print(f"{layout}, width {given.width}, {given.classes} classes")
    for aggregators in (*((name,) for name in FOUR), FOUR):
        specs = _specs(aggregators, rates, tap, seeds=3)
        bank = _bank(specs, given.width, layout, given.classes)
        seconds = [_seconds(lambda bank=bank: bank.train_step({tap: batch}, labels)) for _ in range(given.rounds + 1)]
        middle, least = numbers.median(seconds[1:]), min(seconds[1:])
        print(
            f"{len(specs)} probes, {', '.join(aggregators)}: {middle * 1e3:.1f} ms a step ({least * 1e3:.1f} at least)"
        )


def _with_backbone(rates: Sequence[float], given: argparse.Namespace) -> None:
    model = load_model(given.model, pretrained=False)
    images = torch.randn(given.batch_size, 3, *model.transform.size)
    labels = torch.randint(given.classes, (given.batch_size,))
    tap = Tap(len(model.anatomy.blocks) - 1)
    with FrozenModel(model, [tap]) as frozen:
        dim = frozen.dim
    layout = model.layout

    def one_pass(specs: Sequence[ProbeSpec]) -> Callable[[], object]:
        bank = _bank(specs, dim, layout, given.classes)
        attention = any(create(spec.aggregator, dim=dim, layout=layout).needs_attention for spec in specs)

        def run() -> None:
            with FrozenModel(model, [tap], attention=attention) as frozen:
                bank.train_step(frozen(images), labels)

        return run

    plain = one_pass(_specs(["cls"], rates[:1], tap))
    print(f"{given.model}, {layout}, width {dim}, {given.classes} classes")
    for aggregators in ((*FREE, *LIGHT), *((name,) for name in HEAVY if given.heavy)):
        specs = _specs(aggregators, rates, tap)
        _report(f"{len(specs)} probes, {', '.join(aggregators)}", plain, one_pass(specs), given.rounds)


def _report(name: str, plain: Callable[[], object], many: Callable[[], object], rounds: int) -> None:
    ratios, seconds = [], []
    for turn in range(rounds + 1):
        times = {run: _seconds(run) for run in ((plain, many) if turn % 2 else (many, plain))}
        if turn:  # the first warms up
            ratios.append(times[many] / times[plain])
            seconds.append((times[plain], times[many]))
    base, this = (numbers.median(column) for column in zip(*seconds, strict=True))
    print(
        f"{name}: {numbers.median(ratios):.2f}× the pass of one ({min(ratios):.2f} to {max(ratios):.2f}); "
        f"{base:.2f} s and {this:.2f} s a batch",
        flush=True,
    )


def _specs(aggregators: Sequence[str], rates: Sequence[float], tap: Tap, seeds: int = 1) -> list[ProbeSpec]:
    return [
        ProbeSpec(aggregator, tap, "lars", rate, 0.0, seed)
        for aggregator in aggregators
        for rate in rates
        for seed in range(seeds)
    ]


def _bank(specs: Sequence[ProbeSpec], dim: int, layout: TokenLayout, classes: int) -> Bank:
    return Bank(specs, dim=dim, layout=layout, num_classes=classes, steps=10_000, warmup_steps=10)


def _seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
