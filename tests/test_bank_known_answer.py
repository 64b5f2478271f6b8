"""A set whose label sits in one patch, anywhere, among distractors: means are blind to it, queries are not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vitprobe.aggregation import TokenBatch
from vitprobe.layout import TokenLayout
from vitprobe.probing.bank import Bank
from vitprobe.probing.probe import ProbeSpec
from vitprobe.probing.tap import Tap

LAYOUT = TokenLayout((4, 4), has_cls=True)
DIM, CLASSES, TAP = 24, 8, Tap(0)
AGGREGATORS = ("cls", "gap", "abmilp", "ep(queries=8)")


def pictures(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Patches show each class twice, in any order; the one that is marked shows the label. [cls] is noise."""
    each_twice = torch.arange(LAYOUT.num_patches) % CLASSES
    shown = each_twice[torch.rand(count, LAYOUT.num_patches, generator=generator).argsort(dim=1)]
    where = torch.randint(LAYOUT.num_patches, (count,), generator=generator)
    labels = shown[torch.arange(count), where]
    tokens = 0.1 * torch.randn(count, LAYOUT.num_tokens, DIM, generator=generator)
    tokens[:, 1:] += 2 * torch.nn.functional.one_hot(shown, DIM)
    tokens[torch.arange(count), 1 + where, -1] += 4
    return tokens, labels


@pytest.mark.parametrize(("optimizer", "rate"), [("adamw", 0.03), ("lars", 30.0)])
def test_the_label_in_one_patch_is_found_by_queries_alone(optimizer: str, rate: float) -> None:
    generator, steps = torch.Generator().manual_seed(0), 150
    specs = [ProbeSpec(aggregator, TAP, optimizer, rate) for aggregator in AGGREGATORS]  # type: ignore[arg-type]
    bank = Bank(specs, dim=DIM, layout=LAYOUT, num_classes=CLASSES, steps=steps, warmup_steps=15)
    for _ in range(steps):
        tokens, labels = pictures(128, generator)
        bank.train_step({TAP: TokenBatch(tokens, LAYOUT)}, labels)
    tokens, labels = pictures(2000, generator)
    scores = bank.logits({TAP: TokenBatch(tokens, LAYOUT)})
    accuracy = {spec.aggregator: (scores[spec].argmax(1) == labels).float().mean().item() for spec in specs}
    assert accuracy["cls"] < 1 / CLASSES + 0.04
    assert accuracy["gap"] < 1 / CLASSES + 0.04
    assert accuracy["abmilp"] > 0.95
    assert accuracy["ep(queries=8)"] > 0.95
