"""Each learned aggregator is the published one: its tensors, how they are drawn, and what MAE's LARS does to them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from timm.layers import AttentionPool2d, AttentionPoolLatent
from timm.layers.cbam import CbamModule
from timm.models.cait import LayerScaleBlockClassAttn
from timm.models.vision_transformer import Block
from torch import Tensor, nn

import aggregation_reference as reference
import published_poolings as published
from vitprobe.aggregation import TokenBatch, create, names
from vitprobe.layout import TokenLayout
from vitprobe.probing.bank import Bank
from vitprobe.probing.probe import Probe, ProbeSpec
from vitprobe.probing.tap import Tap

DIM, CLASSES = 64, 5
LAYOUT = TokenLayout(grid=(3, 4), has_cls=True, num_registers=1)
POSITIONS = reference.positions(LAYOUT.grid, DIM)
Rows = Callable[[int], list[published.Row]]

# By our name: the published tensors at a width, and the plain statement of what is made of them.
POOLINGS: dict[str, tuple[Rows, Callable[..., Tensor]]] = {
    "abmilp": (published.abmilp, reference.abmilp),
    "abmilp(depth=3)": (partial(published.abmilp, depth=3), reference.abmilp),
    "abmilp(conditioning=position)": (published.abmilp, partial(reference.abmilp, table=POSITIONS)),
    "abmilp(depth=2,activation=tanh,self_attention=both)": (
        partial(published.abmilp, depth=2, attends=True),
        partial(reference.abmilp, kind="both", tanh=True),
    ),
    "abmilp(self_attention=map)": (partial(published.abmilp, attends=True), partial(reference.abmilp, kind="map")),
    "ep": (published.ep, reference.ep),
    "ep(queries=1)": (partial(published.ep, queries=1), reference.ep),
    "ep(queries=8,d_out=2)": (partial(published.ep, queries=8, d_out=2), reference.ep),
    "simpool": (published.simpool, reference.simpool),
    "aim": (published.aim, partial(reference.aim, heads=16)),
    "capi": (published.capi, partial(reference.capi, heads=1)),
    "cae": (published.cae, partial(reference.cae, heads=8)),
    "clip": (partial(published.clip, patches=12), partial(reference.clip, heads=4)),
    "siglip": (published.siglip, partial(reference.siglip, heads=8)),
    "vjepa": (published.vjepa, partial(reference.vjepa, heads=16)),
    "coca": (published.coca, partial(reference.coca, heads=8, size=64)),
    "cait": (published.cait, partial(reference.cait, heads=4)),
    "vit_block": (published.vit_block, partial(reference.vit_block, heads=8)),
    "cbam": (published.cbam, partial(reference.cbam, grid=LAYOUT.grid)),
    "dolg": (published.dolg, reference.dolg),
}


def test_every_learned_aggregator_is_in_the_table() -> None:
    free = ("cls", "gap", "max", "gem", "center", "tokencut", "oracle")
    assert {name for name in names() if not name.startswith(free)} == {name.split("(")[0] for name in POOLINGS}


def same_to_lars(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether two shapes hold the same numbers in the same order, and both more than one dimension or neither."""
    sizes = ([size for size in shape if size > 1] for shape in (one, other))
    return next(sizes) == next(sizes) and (len(one) > 1) == (len(other) > 1)


def test_shapes_that_lars_takes_differently_are_told_apart() -> None:
    assert same_to_lars((1, 32, 8), (32, 8)) and same_to_lars((8, 8, 1, 1), (8, 8))
    for one, other in combinations([(1, 1, 8), (8,), (24, 8), (8, 8), (8, 24)], 2):
        assert not same_to_lars(one, other)


@pytest.mark.parametrize("name", POOLINGS)
@pytest.mark.parametrize("dim", [DIM, 96])
def test_tensors_have_the_published_shapes(name: str, dim: int) -> None:
    own = {key: tuple(tensor.shape) for key, tensor in create(name, dim=dim, layout=LAYOUT).named_parameters()}
    rows = POOLINGS[name][0](dim)
    assert sorted(own) == sorted(ours for _, _, ours, _ in rows) and len({row[0] for row in rows}) == len(rows)
    for key, shape, ours, _ in rows:
        assert same_to_lars(own[ours], shape), f"{key} {shape}, {ours} {own[ours]}"


def installed(module: nn.Module, prefix: str = "") -> dict[str, tuple[int, ...]]:
    return {prefix + name: tuple(tensor.shape) for name, tensor in module.named_parameters()}


@pytest.mark.parametrize(
    ("name", "module", "prefix", "without"),
    [
        ("siglip", lambda: AttentionPoolLatent(DIM), "", ()),
        ("clip", lambda: AttentionPool2d(DIM, feat_size=(3, 4), num_heads=4), "", ("norm.",)),
        (
            "cait",
            lambda: LayerScaleBlockClassAttn(DIM, 4, qkv_bias=True),
            "blocks_token_only.0.",
            ("norm.", "cls_token"),
        ),
        ("vit_block", lambda: Block(DIM, 8), "dino_block.", ()),
        ("cbam", lambda: CbamModule(DIM, spatial_kernel_size=7), "", ()),
    ],
)
def test_the_table_agrees_with_the_modules_that_timm_has(name, module, prefix, without) -> None:
    rows = {key: shape for key, shape, _, _ in POOLINGS[name][0](DIM) if not key.startswith(without)}
    assert installed(module(), prefix) == rows


@pytest.mark.parametrize("dim", [8, 24, 40, 72, 100])
def test_cbam_is_as_narrow_as_timms(dim: int) -> None:
    assert installed(CbamModule(dim, spatial_kernel_size=7)) == {key: shape for key, shape, _, _ in published.cbam(dim)}
    own = create("cbam", dim=dim)
    for _, shape, ours, _ in published.cbam(dim):
        assert same_to_lars(tuple(own.get_parameter(ours).shape), shape)


def assert_drawn(values: Tensor, initial: published.Initial, what: str) -> None:
    """The numbers have this mean and deviation as far as so many can, and come near the bound without passing it."""
    values, count = values.double(), values.numel()
    if initial.std == 0:
        assert (values == torch.tensor(initial.mean, dtype=torch.float32)).all(), what
        return
    assert values.abs().max() <= initial.bound * (1 + 1e-6), what
    assert abs(values.mean() - initial.mean) < 5 * initial.std / math.sqrt(count), what
    if count > 100:
        assert values.std().item() == pytest.approx(initial.std, rel=5 / math.sqrt(2 * count)), what
    if count > 1000:
        assert values.abs().max() > (2.8 * initial.std if math.isinf(initial.bound) else 0.97 * initial.bound), what


@pytest.mark.parametrize("name", POOLINGS)
def test_tensors_are_drawn_as_published(name: str) -> None:
    states = []
    for seed in range(24):
        torch.manual_seed(seed)
        states.append(create(name, dim=DIM, layout=LAYOUT).state_dict())
    for _, _, ours, initial in POOLINGS[name][0](DIM):
        assert_drawn(torch.cat([state[ours].flatten() for state in states]), initial, ours)


def test_a_wrong_deviation_is_seen() -> None:
    values = torch.randn(4096)
    assert_drawn(values, published.normal(1.0), "right")
    for initial in (published.normal(1.1), published.cut(1.0), published.uniform(1), published.ZERO):
        with pytest.raises(AssertionError):
            assert_drawn(values, initial, "wrong")
    assert published.cut(1.0).std == pytest.approx(0.8796, abs=1e-4)


@pytest.mark.parametrize("name", ["capi", "ep", "siglip", "gap"])
def test_classifiers_are_the_published_ones(name: str) -> None:
    torch.manual_seed(0)
    probe = Probe(create(name, dim=DIM, layout=LAYOUT), 400)
    deviation = 0.02 if name == "capi" else 0.01
    for key, shape, ours, initial in published.classifier(DIM, 400, deviation):
        assert probe.get_parameter(ours).shape == shape, key
        assert_drawn(probe.get_parameter(ours).detach(), initial, key)
    normalises = [layer for layer in probe.norm.modules() if isinstance(layer, nn.BatchNorm1d)]
    assert [(layer.eps, layer.affine) for layer in normalises] == ([] if name == "capi" else [(1e-6, False)])


class PublishedLars:
    """MAE's `util/lars.py` in plain words, on tensors in their published shapes."""

    def __init__(self, tensors: dict[str, Tensor], decay: float) -> None:
        self.tensors, self.decay = tensors, decay
        self.momentum = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}

    def step(self, gradients: dict[str, Tensor], rate: float) -> None:
        for name, tensor in self.tensors.items():
            update = gradients[name]
            if tensor.ndim > 1:
                update = update + self.decay * tensor
                size, of_update = tensor.square().sum().sqrt(), update.square().sum().sqrt()
                if size > 0 and of_update > 0:
                    update = update * (0.001 * size / of_update)
            self.momentum[name] = 0.9 * self.momentum[name] + update
            self.tensors[name] = tensor - rate * self.momentum[name]


def batch_of(step: int) -> tuple[TokenBatch, Tensor]:
    generator = torch.Generator().manual_seed(step)
    labels = torch.randint(CLASSES, (8,), generator=generator)
    tokens = torch.randn(8, LAYOUT.num_tokens, DIM, generator=generator, dtype=torch.float64)
    return TokenBatch(tokens + 0.3 * labels[:, None, None], LAYOUT), labels


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("name", POOLINGS)
def test_two_steps_of_lars_are_those_of_the_published_module(name: str, decay: float) -> None:
    """Pooling, normalisation and classifier, from the same weights and on the same images, in float64."""
    rate, tap = 3.0, Tap(0)
    spec = ProbeSpec(name, tap, "lars", rate, decay)
    bank = Bank([spec], dim=DIM, layout=LAYOUT, num_classes=CLASSES, steps=2, dtype=torch.float64)
    make_rows, statement = POOLINGS[name]
    own = dict(bank.probe(spec).named_parameters())
    rows = [(key, shape, f"aggregator.{ours}") for key, shape, ours, _ in make_rows(DIM)]
    width = own["head.weight"].shape[1]
    rows += [(key, shape, ours) for key, shape, ours, _ in published.classifier(width, CLASSES)]
    shapes = {ours: tensor.shape for ours, tensor in own.items()}
    official = PublishedLars({key: own[ours].detach().reshape(shape) for key, shape, ours in rows}, decay)
    unread = {"norm2_cross.weight", "norm2_cross.bias"} if name == "cae" else set()
    for step in range(2):
        batch, labels = batch_of(step)
        leaves = {key: tensor.clone().requires_grad_() for key, tensor in official.tensors.items()}
        named = {ours.removeprefix("aggregator."): leaves[key].reshape(shapes[ours]) for key, _, ours in rows}
        vector = statement(named, batch.patches)
        if name != "capi":
            vector = (vector - vector.mean(0)) / (vector.var(0, correction=0) + 1e-6).sqrt()
        loss = F.cross_entropy(reference.linear(vector, named, "head"), labels)
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        gradients = {key: gradient for key, gradient in zip(leaves, found, strict=True) if gradient is not None}
        assert leaves.keys() - gradients.keys() == unread
        zeros = {key: torch.zeros_like(leaves[key]) for key in unread}
        official.step(gradients | zeros, rate * 0.5 * (1 + math.cos(math.pi * step / 2)))
        bank.train_step({tap: batch}, labels)
    trained = dict(bank.probe(spec).named_parameters())
    moved = 0
    for key, _, ours in rows:
        expected = official.tensors[key].reshape(shapes[ours])
        torch.testing.assert_close(
            trained[ours], expected, rtol=1e-9, atol=1e-11, msg=lambda text, key=key: f"{key}: {text}"
        )
        moved += not torch.equal(trained[ours], own[ours])
    assert moved >= len(rows) - 4


def test_the_step_of_a_query_is_in_proportion_to_its_norm() -> None:
    """AIM's query is `(1, 1, D)`; kept as `(D,)`, it would take its plain gradient for a step."""
    spec = ProbeSpec("aim", Tap(0), "lars", 3.0)
    bank = Bank([spec], dim=DIM, layout=LAYOUT, num_classes=CLASSES, steps=2, dtype=torch.float64)
    before = bank.probe(spec).get_parameter("aggregator.query")
    batch, labels = batch_of(0)
    bank.train_step({spec.tap: batch}, labels)
    step = bank.probe(spec).get_parameter("aggregator.query") - before
    assert before.shape == (1, 1, DIM)
    assert step.norm().item() == pytest.approx(3.0 * 0.001 * before.norm().item(), rel=1e-9)
