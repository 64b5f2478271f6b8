"""What a seed is: order and crops of its own, shared by its probes, so that intervals over seeds hold."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers import message, tiny_vit
from made_squares import BANK, CACHED, KNN, squares
from vitprobe import UserError, verify
from vitprobe.aggregation import TokenBatch
from vitprobe.layout import TokenLayout
from vitprobe.probing import PROTOCOLS
from vitprobe.probing.bank import Bank
from vitprobe.probing.feeds import Fed, ImageFeed
from vitprobe.probing.inputs import Inputs
from vitprobe.probing.probe import ProbeSpec
from vitprobe.probing.scores import correct
from vitprobe.probing.tap import Tap
from vitprobe.probing.training import Training
from vitprobe.probing.uncertainty import components

LAYOUT, TAP, DIM, CLASSES = TokenLayout((2, 2), has_cls=True), Tap(0), 8, 4
CENTERS = torch.randn(CLASSES, DIM, generator=torch.Generator().manual_seed(5))


def images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Tokens around a centre a class, [cls] noisier than the patches."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    tokens = 2.5 * torch.randn(count, LAYOUT.num_tokens, DIM, generator=generator) + CENTERS[labels][:, None]
    return tokens, labels


@dataclass
class MadeFeed:
    """Tokens of made images, changed a little by each crop; says who read what."""

    tokens: Tensor
    labels: Tensor
    batch_size: int
    read: list[tuple[tuple[int, int] | None, list[int]]] = field(default_factory=list)

    def __call__(self, order: Sequence[int], crops: tuple[int, int] | None = None) -> Generator[Fed, None, None]:
        for start in range(0, len(order), self.batch_size):
            here = list(order[start : start + self.batch_size])
            self.read.append((crops, here))
            tokens = self.tokens[here]
            if crops is not None:
                for row, index in enumerate(here):
                    generator = torch.Generator().manual_seed(hash((*crops, index)) % 2**31)
                    tokens[row] += 1.5 * torch.randn(LAYOUT.num_tokens, DIM, generator=generator)
            yield Fed({TAP: TokenBatch(tokens, LAYOUT)}, self.labels[here], here, [])


THREE = ("cls", "gap", "abmilp")


def specs(seeds: Sequence[int], names: Sequence[str] = THREE) -> list[ProbeSpec]:
    return [ProbeSpec(name, TAP, "adamw", rate, 0.0, seed) for name in names for rate in (1e-2,) for seed in seeds]


def training(
    feed: Any,
    seeds: Sequence[int],
    steps: int = 24,
    echoes: int = 3,
    pool: int = 2,
    names: Sequence[str] = THREE,
    **options: Any,
) -> Training:
    bank = Bank(specs(seeds, names), dim=DIM, layout=LAYOUT, num_classes=CLASSES, steps=steps, warmup_steps=2)
    settings = {"batch_size": feed.batch_size, "path": Path("nowhere"), "claim": lambda: None} | options
    made = Training(bank, feed, range(len(feed.labels)), steps, echoes=echoes, pool=pool, **settings)
    made.save = lambda: None  # type: ignore[method-assign]
    return made


def trained(feed: Any, seeds: Sequence[int], **options: Any) -> Bank:
    made = training(feed, seeds, **options)
    made.run(lambda count: None)
    return made.bank


def test_seeds_read_crops_and_orders_of_their_own_and_together_those_of_one_training() -> None:
    feed, counted = MadeFeed(*images(64, 0), batch_size=16), []
    made = training(feed, (0, 1, 2))
    made.run(counted.append)
    assert made.bank.step == 24
    assert len(feed.read) == 24  # 24 steps of each seed, three for each batch that it reads: 8 batches a seed
    assert sum(counted) == made.images == made.images_done == 24 * 16
    of_seed = {seed: [(crops, here) for crops, here in feed.read if crops and crops[0] == seed] for seed in (0, 1, 2)}
    for read in of_seed.values():
        assert [crops[1] for crops, _ in read if crops] == [0] * 4 + [1] * 4
        for epoch in (0, 4):  # every image once a pass
            assert sorted(index for _, here in read[epoch : epoch + 4] for index in here) == list(range(64))
    orders = {tuple(index for _, here in read for index in here) for read in of_seed.values()}
    assert len(orders) == 3


@pytest.mark.parametrize(("echoes", "pool", "steps"), [(3, 2, 24), (3, 4, 13), (2, 1, 7), (1, 1, 9), (5, 3, 4)])
def test_each_step_is_a_whole_batch_and_each_image_is_used_as_often(
    monkeypatch: pytest.MonkeyPatch, echoes: int, pool: int, steps: int
) -> None:
    feed, seen = MadeFeed(*images(64, 0), batch_size=16), []
    real = Bank.train_step

    def step(self: Bank, batches: Any, labels: Any) -> Any:
        seen.append({seed: batches[seed].vectors["gap@block0"] for seed in labels})
        assert all(len(part) == 16 for part in labels.values())
        return real(self, batches, labels)

    monkeypatch.setattr(Bank, "train_step", step)
    trained(feed, (3, 4), echoes=echoes, pool=pool, steps=steps)
    assert len(seen) == steps
    rows = {seed: torch.cat([each[seed] for each in seen]) for seed in (3, 4)}
    for mine in rows.values():
        _, counts = mine.unique(dim=0, return_counts=True)
        assert counts.max() == min(echoes, steps)
        if steps % (echoes * pool) == 0:
            assert (counts == echoes).all()
    both = torch.cat([part.unique(dim=0) for part in rows.values()])
    assert len(both.unique(dim=0)) == len(both)  # no crop is read by two seeds


def test_a_probe_is_that_of_a_training_of_its_seed_alone_bit_for_bit() -> None:
    both = trained(MadeFeed(*images(64, 0), batch_size=16), (0, 7))
    alone = trained(MadeFeed(*images(64, 0), batch_size=16), (7,))
    for spec in alone.specs:
        theirs = both.probe(spec).state_dict()
        for name, tensor in alone.probe(spec).state_dict().items():
            assert torch.equal(tensor, theirs[name]), (spec, name)


@pytest.mark.parametrize("stop", [1, 5, 6, 12, 13, 23])
def test_a_resumed_training_is_the_unbroken_one_within_a_pool_too(tmp_path: Path, stop: int) -> None:
    def begun() -> Training:
        made = training(
            MadeFeed(*images(64, 0), batch_size=16),
            (0, 1),
            path=tmp_path / "state",
            watched=range(10),
            pool=2,
            echoes=3,
        )
        del made.save
        return made

    whole = begun()
    whole.run(lambda count: None)
    (tmp_path / "state").unlink()
    first = begun()
    real = first.bank.train_step

    def step(batches: Any, labels: Any) -> Any:
        if first.batches == stop:
            first.save()
            raise KeyboardInterrupt
        return real(batches, labels)

    first.bank.train_step = step  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        first.run(lambda count: None)
    again = begun()
    again.load()
    assert again.batches == stop and again.images_done <= again.images
    again.run(lambda count: None)
    mine, expected = again.bank.state_dict()["tensors"], whole.bank.state_dict()["tensors"]
    assert all(torch.equal(mine[name], tensor) for name, tensor in expected.items())
    assert torch.equal(again.halfway, whole.halfway)  # type: ignore[arg-type]


def right(bank: Bank, tokens: Tensor, labels: Tensor) -> np.ndarray:
    """Of each aggregator, with each seed, which images it has right."""
    scores = bank.logits({TAP: TokenBatch(tokens, LAYOUT)})
    found = {spec: correct(given, labels).numpy() for spec, given in scores.items()}
    names = list(dict.fromkeys(spec.aggregator for spec in bank.specs))
    return np.stack([np.stack([found[spec] for spec in bank.specs if spec.aggregator == name]) for name in names])


@pytest.fixture(scope="module")
def runs() -> list[np.ndarray]:
    """20 runs of three seeds on the same images; all initial weights are the same: orders and crops alone differ."""
    test = images(400, 1)
    found = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("vitprobe.probing.bank._initial", _always_seed_0(patched))
        for run in range(20):
            bank = trained(MadeFeed(*images(96, 0), batch_size=16), (3 * run, 3 * run + 1, 3 * run + 2), steps=24)
            found.append(right(bank, *test))
    return found


def _always_seed_0(patched: pytest.MonkeyPatch) -> Any:
    from vitprobe.probing import bank

    real = bank._initial
    return lambda spec, *rest: real(replace(spec, seed=0), *rest)


def test_gains_of_runs_that_differ_in_orders_and_crops_lie_in_each_others_intervals(runs: list[np.ndarray]) -> None:
    intervals = [components(found).differences([1, 2], [0, 0]) for found in runs]
    inside = [
        (mine.low <= other.value) & (other.value <= mine.high)
        for mine in intervals
        for other in intervals
        if mine is not other
    ]
    assert np.mean(inside, axis=0).min() >= 0.95


def test_the_spread_over_seeds_foretells_that_of_runs(runs: list[np.ndarray]) -> None:
    """Images are the same in all runs: their means over seeds vary by what seeds vary, by nothing shared."""
    gains = np.stack([found.mean(axis=2)[1:] - found.mean(axis=2)[0] for found in runs])  # run, aggregator, seed
    within = gains.var(axis=2, ddof=1).mean(axis=0) / gains.shape[2]
    between = gains.mean(axis=2).var(axis=0, ddof=1)
    assert (within > 0).all()
    ratio = between / within  # of 19 and of 40 degrees of freedom: 0.42 to 2.1 in 95 % of such tests, if the same
    assert (ratio > 0.35).all() and (ratio < 2.6).all(), ratio


def test_in_a_run_seeds_have_crops_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    real = ImageFeed.__call__

    def call(self: ImageFeed, order: Any, crops: Any = None) -> Any:
        drawn.append(crops)
        return real(self, order, crops)

    monkeypatch.setattr(ImageFeed, "__call__", call)
    found = verify(tiny_vit(), squares(), ["cls", "gap"], protocol=BANK, workers=0, seed=4)
    assert {crops[0] for crops in drawn if crops} == {8, 9}
    shared = len([crops for crops in drawn if crops])
    drawn.clear()
    alone = verify(tiny_vit(), squares(), ["cls", "gap"], protocol=BANK, workers=0, seed=4, independent_seeds=True)
    assert len([crops for crops in drawn if crops]) > shared
    assert found.manifest["protocol"]["hash"] != alone.manifest["protocol"]["hash"]
    assert alone.manifest["protocol"]["echoes"] == 1 and alone.manifest["arguments"]["independent_seeds"] is True


def test_the_model_reads_as_many_images_as_for_one_seed() -> None:
    passes: list[int] = []
    model = tiny_vit()
    model.blocks[0].register_forward_pre_hook(lambda _, given: passes.append(len(given[0])))

    def images_read(**options: Any) -> int:
        passes.clear()
        verify(model, squares(), ["gap"], workers=0, **options)
        return sum(passes)

    protocol = replace(BANK, epochs=4)
    one, two = (images_read(protocol=replace(protocol, seeds=seeds)) for seeds in (1, 2))
    assert one == two
    apart = images_read(protocol=protocol, independent_seeds=True)
    assert apart - one == 12 * 16  # the second seed's 12 batches


@pytest.mark.parametrize(
    ("protocol", "words"),
    [
        (CACHED, "cached reads each seed's images by itself already: leave independent seeds out"),
        (KNN, "knn has no seeds: leave independent seeds out, or use the protocol fast"),
    ],
)
def test_independent_seeds_of_what_has_none(protocol: Any, words: str) -> None:
    with pytest.raises(UserError) as caught:
        verify(tiny_vit(), squares(), protocol=protocol, independent_seeds=True)
    assert message(caught).startswith(words)
    assert verify(tiny_vit(), squares(), ["gap"], protocol=protocol, workers=0).num_images == 24


def test_pools_take_bounded_memory() -> None:
    fast = PROTOCOLS["fast"]
    assert fast.steps_a_batch == 6 and BANK.steps_a_batch == BANK.seeds == 2 and PROTOCOLS["cached"].steps_a_batch == 1
    vit_b = 128 * 197 * 768 * 4
    assert fast.pool_of(1) == fast.pool and fast.pool_of(vit_b) == fast.pool
    assert fast.pool_of(4 * vit_b) == 1 and fast.pool_of(2**40) == 1
    assert fast.independent().pool_of(1) == 1
    for wrong in ({"pool": 0}, {"echoes": 0}):
        with pytest.raises(UserError):
            replace(fast, **wrong)


def test_inputs_are_picked_and_joined_row_by_row() -> None:
    tokens, _ = images(6, 3)
    bank = Bank(specs((0,)), dim=DIM, layout=LAYOUT, num_classes=CLASSES, steps=3)
    parts = [bank.read({TAP: TokenBatch(part, LAYOUT)}) for part in tokens.split(2)]
    picked = Inputs.joined(parts).pick(torch.tensor([5, 0]))
    assert torch.equal(picked.tokens[TAP].tokens, tokens[[5, 0]])
    torch.testing.assert_close(picked.vectors["gap@block0"], tokens[[5, 0], 1:].mean(dim=1))
    assert set(picked.vectors) == {"cls@block0", "gap@block0"}
    assert bank.bytes_an_image == 4 * (2 * DIM + LAYOUT.num_tokens * DIM)
    assert (
        not Bank(specs((0,), ["gap"]), dim=DIM, layout=LAYOUT, num_classes=2, steps=3)
        .read({TAP: TokenBatch(tokens, LAYOUT)})
        .tokens
    )
