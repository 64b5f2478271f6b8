"""Learned aggregators: equal to their plain statement in value and gradient, and of the size that is published."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import aggregation_reference as reference
from vitprobe.aggregation import Aggregator, TokenBatch, create, names
from vitprobe.layout import TokenLayout

DIM = 32
LAYOUT = TokenLayout(grid=(3, 4), has_cls=True, num_registers=2)

LEARNED: dict[str, Callable[..., Tensor]] = {
    "abmilp": reference.abmilp,
    "abmilp(depth=3)": reference.abmilp,
    "ep(queries=8)": reference.ep,
    "ep(queries=4,d_out=2)": reference.ep,
    "simpool": reference.simpool,
    "aim(heads=4)": lambda p, x: reference.aim(p, x, 4),
    "capi(heads=4)": lambda p, x: reference.capi(p, x, 4),
    "cae": lambda p, x: reference.cae(p, x, 8),
    "clip": lambda p, x: reference.clip(p, x, 4),
    "siglip": lambda p, x: reference.siglip(p, x, 8),
    "vjepa": lambda p, x: reference.vjepa(p, x, 16),
    "coca(queries=3)": lambda p, x: reference.coca(p, x, 8, 64),
    "cait": lambda p, x: reference.cait(p, x, 4),
    "vit_block": lambda p, x: reference.vit_block(p, x, 8),
    "cbam": lambda p, x: reference.cbam(p, x, LAYOUT.grid),
    "dolg": reference.dolg,
}
WITH_CLS = [name for name in LEARNED if name != "cbam"]


def with_all(name: str) -> str:
    base, bracket, rest = name.partition("(")
    return f"{base}_all{bracket}{rest}"


def token_batch(layout: TokenLayout = LAYOUT, *, images: int = 3, dim: int = DIM, dtype: torch.dtype = torch.float64):
    """Random tokens with a mean and a spread of their own in each channel, as real ones have."""
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randn(images, layout.num_tokens, dim, generator=generator, dtype=torch.float64)
    scale, offset = (torch.rand(dim, generator=generator, dtype=torch.float64) * 2 for _ in range(2))
    return TokenBatch((tokens * (scale + 0.1) + offset).to(dtype), layout)


def randomized(aggregator: Aggregator) -> Aggregator:
    """In float64, with no parameter that is 0, or so small that its part would not be seen."""
    generator = torch.Generator().manual_seed(3)
    for parameter in aggregator.double().parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return aggregator


def values_and_gradients(aggregator: Aggregator, vectors: Tensor) -> tuple[Tensor, ...]:
    mixed = (vectors * torch.linspace(-1, 2, vectors.numel(), dtype=vectors.dtype).view_as(vectors)).sum()
    read = [parameter for name, parameter in aggregator.named_parameters() if "unread" not in name]
    return vectors, *torch.autograd.grad(mixed, read)


def assert_equal(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, b in zip(actual, expected, strict=True):
        a, b = a.detach(), b.detach()
        assert a.shape == b.shape and (a - b).abs().max() <= 1e-12 * max(1.0, b.abs().max().item())


@pytest.mark.parametrize("name", LEARNED)
def test_equals_its_plain_statement_in_value_and_gradient(name):
    batch = token_batch()
    aggregator = randomized(create(name, dim=DIM, layout=LAYOUT))
    expected = LEARNED[name](dict(aggregator.named_parameters()), batch.tokens[:, 3:])
    assert expected.shape == (3, aggregator.out_dim)
    assert_equal(values_and_gradients(aggregator, aggregator(batch)), values_and_gradients(aggregator, expected))


@pytest.mark.parametrize("name", WITH_CLS)
def test_all_reads_cls_and_patches_and_no_registers(name):
    batch = token_batch()
    aggregator = randomized(create(with_all(name), dim=DIM, layout=LAYOUT))
    tokens = torch.cat([batch.tokens[:, :1], batch.tokens[:, 3:]], dim=1)
    expected = LEARNED[name](dict(aggregator.named_parameters()), tokens)
    assert_equal((aggregator(batch),), (expected,))
    assert aggregator.needs_cls and aggregator.name == with_all(name)


def test_without_registers_all_tokens_are_read_where_they_are():
    batch = token_batch(TokenLayout(grid=(3, 4), has_cls=True))
    assert batch.read("all") is batch.tokens
    aggregator = randomized(create("cae_all", dim=DIM))
    expected = reference.cae(dict(aggregator.named_parameters()), batch.tokens, 8)
    assert_equal((aggregator(batch),), (expected,))


@pytest.mark.parametrize("name", [*LEARNED, *map(with_all, WITH_CLS)])
def test_one_image_and_a_model_in_float32(name):
    """A batch of one keeps its shape; weights are one set a query, 0 at least, over all patches of an uneven grid."""
    batch = token_batch(images=1, dtype=torch.float32)
    aggregator = create(name, dim=DIM, layout=LAYOUT).eval()
    assert aggregator(batch).shape == (1, aggregator.out_dim)
    weights = aggregator.weights(batch)
    assert weights is not None and weights.shape[0] == 1 and weights.shape[2] == 12
    assert (weights >= 0).all()
    if aggregator.name not in ("cbam", "dolg", "dolg_all"):
        totals = weights.sum(dim=-1)
        assert (totals <= 1 + 1e-5).all()
        others = aggregator.name.split("(")[0] in ("clip", "cait") or "_all" in name
        assert others or torch.allclose(totals, torch.ones_like(totals))


def test_the_weights_make_the_vector():
    batch = token_batch()
    for name in ("abmilp(depth=2,activation=tanh)", "simpool"):
        aggregator = randomized(create(name, dim=DIM))
        weights, patches = aggregator.weights(batch), batch.patches
        if name == "simpool":
            patches = nn.functional.layer_norm(patches, (DIM,), *aggregator.norm.parameters(), 1e-6)
        assert_equal((aggregator(batch),), ((weights @ patches)[:, 0],))


# Parameters for D = 768, 1024 and 196 patches, from the sizes published for the released code.
COUNTS = {
    "abmilp": (769, 1025),
    "abmilp(depth=2)": (591_361, 1_050_625),
    "abmilp(depth=3)": (1_181_953, 2_100_225),
    "abmilp(self_attention=map)": (2_360_833, 4_196_353),
    "abmilp(depth=2,activation=tanh,self_attention=both)": (2_951_425, 5_245_953),
    "abmilp(conditioning=position)": (769, 1025),
    "ep": (614_400, 1_081_344),
    "ep(queries=48,d_out=8)": (110_592, None),
    "ep(queries=64)": (638_976, 1_114_112),
    "simpool": (1_181_184, 2_099_200),
    "aim": (1_180_416, 2_098_176),
    "capi": (2 * 768**2 + 3 * 768, 2 * 1024**2 + 3 * 1024),
    "cae": (2_366_976, 4_204_544),
    "clip": (2_515_200, 4_402_176),
    "siglip": (7_085_568, 12_593_152),
    "vjepa": (7_088_640, 12_597_248),
    "coca": (1_036_032, 1_381_376),
    "cait": (7_091_712, 12_601_344),
    "vit_block": (7_085_568, 12_593_152),
    "cbam": (73_828, 131_172),
    "dolg": (592_897, 1_052_673),
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name):
    for dim, count in zip((768, 1024), COUNTS[name], strict=True):
        if count is None:
            continue
        with torch.device("meta"):
            aggregator = create(name, dim=dim, layout=TokenLayout(grid=(14, 14), has_cls=True))
        assert aggregator.num_parameters == count and aggregator.learned


def test_every_learned_aggregator_is_held_to_a_statement_and_a_count():
    free = ("cls", "gap", "max", "gem", "center", "tokencut", "oracle")
    learned = {name for name in names() if not name.startswith(free)}
    assert learned == {name.split("(")[0] for name in LEARNED} == {name.split("(")[0] for name in COUNTS}


def test_dit_with_128_queries():
    with torch.device("meta"):
        assert create("ep", dim=1152, queries=128).num_parameters + 1152 * 1000 + 1000 == 2_627_560


@pytest.mark.parametrize("kind", ["none", "map", "both"])
@pytest.mark.parametrize("tokens", ["patches", "all"])
def test_abmilp_with_self_attention_and_positions(kind, tokens):
    batch = token_batch()
    options = {"self_attention": kind, "conditioning": "position", "activation": "tanh", "depth": 2}
    aggregator = randomized(create("abmilp", dim=DIM, tokens=tokens, **options))
    p = dict(aggregator.named_parameters())
    x = batch.tokens[:, 3:]
    table = reference.positions(LAYOUT.grid, DIM)
    if tokens == "all":
        x = torch.cat([batch.tokens[:, :1], x], dim=1)
        table = torch.cat([torch.zeros(1, DIM, dtype=torch.float64), table])
    assert_equal((aggregator(batch),), (reference.abmilp(p, x, kind=kind, tanh=True, table=table),))


def test_abmilp_reads_the_first_patch():
    """The released code for patches alone drops the first token it gets, also where that is a patch."""
    batch = token_batch()
    aggregator = randomized(create("abmilp", dim=DIM))
    changed = batch.tokens.clone()
    changed[:, 3] += 1
    assert not torch.equal(aggregator(replace(batch, tokens=changed)), aggregator(batch))


def test_aim_follows_the_statistics_of_its_batches():
    batch, norm = token_batch(), nn.BatchNorm1d(DIM, eps=1e-6, affine=False).double()
    aggregator = randomized(create("aim", dim=DIM))
    p = dict(aggregator.named_parameters())
    for _ in range(3):
        aggregator(batch)
        norm(batch.patches.mT)
    normed = norm.eval()(batch.patches.mT).mT
    assert_equal((aggregator.eval()(batch),), (reference.separate(p, normed, 16),))
    before = {name: value.clone() for name, value in aggregator.state_dict().items()}
    aggregator(batch)
    assert all(torch.equal(value, before[name]) for name, value in aggregator.state_dict().items())


def test_a_seed_gives_the_same_weights():
    for name in LEARNED:
        states = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            states.append(torch.cat([t.flatten() for t in create(name, dim=DIM, layout=LAYOUT).parameters()]))
        assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


def test_initial_weights():
    assert not create("cae", dim=DIM).query.any()
    assert torch.equal(create("cait", dim=DIM).scale, torch.full((DIM,), 1e-5))
    vjepa = create("vjepa", dim=256)
    assert vjepa.attention.key_value.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert vjepa.attention.out.weight.std().item() == pytest.approx(0.02 / 2**0.5, rel=0.05)
    assert create("ep", dim=512).queries.std().item() == pytest.approx(0.02, rel=0.05)
    clip = create("clip", dim=256, layout=LAYOUT)
    assert clip.attention.query_key_value.weight.std().item() == pytest.approx(1 / 16, rel=0.05)
    assert create("capi", dim=192).attention.heads == 3 and create("capi", dim=32).attention.heads == 1
