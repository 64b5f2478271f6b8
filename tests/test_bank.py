"""The bank: joint training is training alone, bit for bit; what diverges leaves alone; an interrupted one resumes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers import message
from vitprobe.aggregation import TokenBatch, create
from vitprobe.errors import UserError
from vitprobe.layout import TokenLayout
from vitprobe.probing.bank import Bank
from vitprobe.probing.probe import Probe, ProbeSpec
from vitprobe.probing.schedule import rate_factor
from vitprobe.probing.tap import Tap

LAYOUT = TokenLayout((3, 3), has_cls=True)
DIM, CLASSES, STEPS = 16, 5, 6
TAPS = (Tap(0), Tap(1, norm=True))
AGGREGATORS = ("cls", "gap", "abmilp", "ep(queries=4)", "aim(heads=4)")
OPTIMIZERS = ("lars", "sgd", "adamw")
RATES = {"lars": (0.5, 5.0), "sgd": (0.01, 0.1), "adamw": (1e-3, 1e-2)}


def grid(aggregators: Sequence[str] = AGGREGATORS, optimizers: Sequence[str] = OPTIMIZERS) -> list[ProbeSpec]:
    return [
        ProbeSpec(aggregator, tap, optimizer, rate, decay, seed)
        for aggregator in aggregators
        for tap in TAPS
        for optimizer in optimizers
        for rate, decay in zip(RATES[optimizer], (0.0, 0.05), strict=True)
        for seed in (0, 1)
    ]


def bank_of(specs: Sequence[ProbeSpec], dtype: torch.dtype = torch.float32, **options) -> Bank:
    sizes = {"dim": DIM, "layout": LAYOUT, "num_classes": CLASSES, "steps": STEPS, "warmup_steps": 2, "dtype": dtype}
    return Bank(specs, **(sizes | options))


def step_of(number: int, dtype: torch.dtype = torch.float32) -> tuple[dict[Tap, TokenBatch], Tensor]:
    generator = torch.Generator().manual_seed(number)
    labels = torch.randint(CLASSES, (12,), generator=generator)
    batches = {}
    for tap in TAPS:
        tokens = torch.randn(12, LAYOUT.num_tokens, DIM, generator=generator, dtype=torch.float64)
        tokens[:, :, 0] += labels[:, None] * 0.5
        batches[tap] = TokenBatch(tokens.to(dtype), LAYOUT)
    return batches, labels


def train(bank: Bank, first: int = 0, last: int = STEPS) -> Bank:
    for number in range(first, last):
        bank.train_step(*step_of(number))
    return bank


def assert_same_bits(actual: nn.Module, expected: nn.Module) -> None:
    ours, theirs = actual.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


@pytest.fixture(scope="module")
def joint() -> Bank:
    return train(bank_of(grid()))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("aggregator", AGGREGATORS)
def test_joint_training_is_training_alone_bit_for_bit(joint: Bank, aggregator: str, optimizer: str) -> None:
    for spec in grid([aggregator], [optimizer]):
        alone = train(bank_of([spec])).probe(spec)
        assert_same_bits(joint.probe(spec), alone)
        assert not torch.equal(alone.head.weight, bank_of([spec]).probe(spec).head.weight)


@pytest.mark.parametrize("optimizer", ["lars", "adamw"])
def test_projections_that_are_one_matrix_are_trained_as_if_alone(optimizer: str) -> None:
    """Halves and thirds of a matrix lie where the bank puts it, and a query is `(1, 1, D)` beside a `(D,)` one."""
    aggregators = ("capi(heads=4)", "siglip(heads=4)", "clip", "cae(heads=4)", "coca(queries=2)")
    specs = [spec for spec in grid(aggregators, [optimizer]) if spec.tap == TAPS[0] and spec.weight_decay]
    joint = train(bank_of(specs), last=3)
    for spec in specs:
        alone = train(bank_of([spec]), last=3).probe(spec)
        assert_same_bits(joint.probe(spec), alone)
        assert not torch.equal(alone.head.weight, bank_of([spec]).probe(spec).head.weight)


def trained_plainly(spec: ProbeSpec) -> Probe:
    """A probe trained by torch's own optimisers, in float64."""
    torch.manual_seed(spec.seed)
    probe = Probe(create(spec.aggregator, dim=DIM, layout=LAYOUT), CLASSES).double()
    rate = spec.learning_rate
    optimizer: torch.optim.Optimizer = (
        torch.optim.SGD(probe.parameters(), lr=rate, momentum=0.9, weight_decay=spec.weight_decay)
        if spec.optimizer == "sgd"
        else torch.optim.AdamW(probe.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=spec.weight_decay)
    )
    for number in range(STEPS):
        batches, labels = step_of(number, torch.float64)
        optimizer.param_groups[0]["lr"] = rate * rate_factor(number, steps=STEPS, warmup_steps=2)
        optimizer.zero_grad()
        F.cross_entropy(probe(batches[spec.tap]), labels).backward()
        optimizer.step()
    return probe


def test_the_bank_trains_as_torch_does() -> None:
    specs = grid(optimizers=("sgd", "adamw"))
    bank = bank_of(specs, torch.float64)
    for number in range(STEPS):
        bank.train_step(*step_of(number, torch.float64))
    for spec in specs:
        expected = trained_plainly(spec).state_dict()
        for name, tensor in bank.probe(spec).state_dict().items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-10, atol=1e-12, msg=f"{spec}: {name}")


def test_losses_are_each_probes_own_and_fall() -> None:
    bank = bank_of(grid(optimizers=("adamw",)), steps=30)
    first = bank.train_step(*step_of(0))
    assert list(first) == list(bank.specs)
    batches, labels = step_of(0)
    for _ in range(20):
        last = bank.train_step(batches, labels)
    assert all(last[spec] < first[spec] for spec in bank.specs)


def test_initial_weights_are_the_seeds_and_leave_torchs_numbers_alone() -> None:
    before = torch.get_rng_state()
    bank = bank_of(grid(["cls", "ep(queries=4)"], ["lars"]))
    assert torch.equal(torch.get_rng_state(), before)
    for spec in bank.specs:
        other = replace(spec, seed=1 - spec.seed)
        same = replace(spec, learning_rate=next(r for r in RATES["lars"] if r != spec.learning_rate))
        same = next(s for s in bank.specs if replace(s, weight_decay=0.0) == replace(same, weight_decay=0.0))
        assert_same_bits(bank.probe(spec), bank.probe(same))
        assert not torch.equal(bank.probe(spec).head.weight, bank.probe(other).head.weight)


def test_initial_classifiers() -> None:
    spec = ProbeSpec("gap", TAPS[0], "lars", 0.1)
    mae = bank_of([spec], num_classes=400).probe(spec).head
    assert 0.009 < mae.weight.std() < 0.011 and not mae.bias.any()
    own = bank_of([spec], num_classes=400, init="default").probe(spec).head
    assert own.weight.abs().max() <= DIM**-0.5 and own.weight.std() > 0.1 and own.bias.any()


def test_a_vector_without_weights_is_pooled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    specs = grid(["gap"])
    bank = bank_of(specs)
    gap = type(create("gap", dim=DIM, layout=LAYOUT))
    pool = gap.forward
    monkeypatch.setattr(gap, "forward", lambda self, batch: calls.append(batch) or pool(self, batch))
    bank.train_step(*step_of(0))
    assert len(specs) == 24 and len(calls) == 2  # two taps


def test_logits_are_those_of_the_probes_in_eval_mode(joint: Bank) -> None:
    batches, _ = step_of(99)
    before = joint.state_dict()["tensors"]
    scores = joint.logits(batches)
    assert set(scores) == set(joint.specs)
    for spec, given in scores.items():
        assert not given.requires_grad
        torch.testing.assert_close(given, joint.probe(spec)(batches[spec.tap]), rtol=1e-5, atol=1e-6)
    one = {tap: TokenBatch(batch.tokens[:1], LAYOUT) for tap, batch in batches.items()}
    assert all(len(given) == 1 for given in joint.logits(one).values())
    for name, tensor in joint.state_dict()["tensors"].items():  # statistics of normalisation too
        assert torch.equal(tensor, before[name]), name


def test_a_probe_that_diverges_is_retired_and_the_others_go_on() -> None:
    sound = grid(["gap", "ep(queries=4)"])
    wild = [ProbeSpec(name, TAPS[0], kind, 1e38, 0.0, 0) for name in AGGREGATORS for kind in ("lars", "sgd")]
    bank = bank_of(sound + wild)
    alone = bank_of(sound)
    for number in range(STEPS):
        batches, labels = step_of(number)
        losses = bank.train_step(batches, labels)
        alone.train_step(batches, labels)
    assert set(bank.retired) == set(wild)
    assert not set(wild) & set(losses) and set(bank.logits(step_of(0)[0])) == set(sound) == set(bank.live)
    assert all("not finite" in reason for reason in bank.retired.values())
    for spec in sound:
        assert_same_bits(bank.probe(spec), alone.probe(spec))


def test_each_way_to_diverge_has_its_reason() -> None:
    specs = [ProbeSpec("gap", TAPS[0], "sgd", rate) for rate in (0.1, 3e38)]
    bank = bank_of(specs, warmup_steps=0)
    batches, labels = step_of(0)
    loud = {tap: TokenBatch(batch.tokens * 1e10, LAYOUT) for tap, batch in batches.items()}
    for _ in range(4):
        bank.train_step(loud, labels)
    assert list(bank.retired) == specs[1:]
    assert bank.retired[specs[1]].startswith(("weights not finite after step", "loss not finite at step"))


def test_nothing_left_to_train_is_one_line() -> None:
    bank = bank_of(grid(["gap", "abmilp"], ["lars"]))
    batches, labels = step_of(0)
    nan = {tap: TokenBatch(batch.tokens * torch.nan, LAYOUT) for tap, batch in batches.items()}
    with pytest.raises(UserError) as error:
        bank.train_step(nan, labels)
    assert message(error) == "every probe diverged by step 1: lower the learning rates"


@pytest.mark.parametrize("interrupted", [1, 4])
def test_a_resumed_training_equals_an_unbroken_one(joint: Bank, interrupted: int) -> None:
    file = io.BytesIO()
    torch.save(train(bank_of(grid()), 0, interrupted).state_dict(), file)
    file.seek(0)
    resumed = bank_of(grid())
    resumed.load_state_dict(torch.load(file, weights_only=True))
    train(resumed, interrupted)
    assert resumed.step == joint.step == STEPS
    expected = joint.state_dict()["tensors"]
    for name, tensor in resumed.state_dict()["tensors"].items():
        assert torch.equal(tensor, expected[name]), name
    for spec in joint.specs:
        assert_same_bits(resumed.probe(spec), joint.probe(spec))


def test_a_resumed_training_knows_who_was_retired() -> None:
    specs = [ProbeSpec("gap", TAPS[0], "sgd", rate) for rate in (3e38, 0.1)]
    bank = bank_of(specs, warmup_steps=0)
    for number in range(4):
        bank.train_step(*step_of(number))
    assert list(bank.retired) == specs[:1]
    resumed = bank_of(specs, warmup_steps=0)
    resumed.load_state_dict(bank.state_dict())
    assert resumed.retired == bank.retired and resumed.live == specs[1:]


def test_a_state_is_a_copy() -> None:
    bank = bank_of(grid(["gap"], ["sgd"]))
    train(bank, 0, 2)
    state = bank.state_dict()
    kept = {name: tensor.clone() for name, tensor in state["tensors"].items()}
    train(bank, 2)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in state["tensors"].items())


@pytest.mark.parametrize(
    "other", [{"steps": 7}, {"warmup_steps": 1}, {"num_classes": 6}, {"specs": grid(["gap"], ["lars"])}]
)
def test_a_state_of_other_settings_is_refused(other: dict) -> None:
    specs = grid(["gap"], ["sgd"])
    state = bank_of(specs).state_dict()
    with pytest.raises(UserError) as error:
        bank_of(**({"specs": specs} | other)).load_state_dict(state)
    assert message(error) == ("the saved training is one of other probes or another schedule: resume with its settings")


def test_tokens_from_inference_mode_are_trained_on() -> None:
    specs = grid(optimizers=["sgd"])
    usual, bank = bank_of(specs), bank_of(specs)
    batches, labels = step_of(0)
    usual.train_step(batches, labels)
    with torch.inference_mode():
        inference = {tap: TokenBatch(batch.tokens.clone(), LAYOUT) for tap, batch in batches.items()}
    bank.train_step(inference, labels)
    for spec in specs:
        assert_same_bits(bank.probe(spec), usual.probe(spec))


def test_a_probe_taken_out_stays_as_it_was() -> None:
    bank = bank_of(grid(["ep(queries=4)"], ["sgd"]))
    train(bank, 0, 3)
    probe = bank.probe(bank.specs[0])
    assert not probe.training and not any(parameter.requires_grad for parameter in probe.parameters())
    weight = probe.head.weight.clone()
    train(bank, 3)
    assert torch.equal(probe.head.weight, weight)
    assert not torch.equal(bank.probe(bank.specs[0]).head.weight, weight)
    assert probe.head.weight.untyped_storage().nbytes() == weight.nbytes


def test_what_a_bank_cannot_be_given() -> None:
    specs = grid(["gap"], ["sgd"])
    with pytest.raises(ValueError, match="all different"):
        bank_of([*specs, specs[0]])
    with pytest.raises(ValueError, match="needs probes"):
        bank_of([])
    with pytest.raises(UserError) as error:
        bank_of(specs, warmup_steps=6)
    assert message(error) == "a warm-up of 6 steps does not fit in 6 steps of training"
    bank = bank_of(specs)
    batches, labels = step_of(0)
    with pytest.raises(UserError) as error:
        bank.train_step({tap: TokenBatch(batch.tokens[:1], LAYOUT) for tap, batch in batches.items()}, labels[:1])
    assert message(error) == "a batch of one image cannot be normalised: train on batches of two images or more"
    train(bank)
    with pytest.raises(RuntimeError, match="all 6 steps are done"):
        bank.train_step(batches, labels)


def test_names() -> None:
    specs = grid(["gap"], ["sgd"])
    assert {spec.name for spec in specs} == {"gap@block0", "gap@block1+norm"}
