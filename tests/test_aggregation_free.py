"""Aggregators that train nothing: against loops over whole attention matrices, and scipy's eigenvectors."""

from __future__ import annotations

import math

import pytest
import scipy.linalg
import torch
from torch import Tensor

from helpers import message, random_view
from vitprobe.aggregation import TokenBatch, create
from vitprobe.attention.view import AttentionView
from vitprobe.errors import UserError
from vitprobe.layout import TokenLayout
from vitprobe.probing.probe import Probe

DIM = 8
LAYOUT = TokenLayout(grid=(5, 6), has_cls=True, num_registers=2)


def token_batch(layout: TokenLayout = LAYOUT, images: int = 3, **what) -> TokenBatch:
    tokens = torch.randn(images, layout.num_tokens, DIM, generator=torch.Generator().manual_seed(5)).double()
    return TokenBatch(tokens, layout, **what)


def attended_batch(layout: TokenLayout = LAYOUT, **options) -> TokenBatch:
    view = random_view(layout, batch=3, sharpness=3.0, dtype=torch.float64, **options)
    return token_batch(layout, attention=view)


def vector(weights: Tensor, batch: TokenBatch) -> Tensor:
    return (weights[..., None] * batch.patches).sum(dim=1)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert (actual - expected).abs().max() <= tolerance


def test_cls_gap_and_max():
    batch = token_batch()
    cls, gap = batch.tokens[:, 0], batch.tokens[:, 3:].mean(dim=1)
    close(create("cls", dim=DIM)(batch), cls)
    close(create("gap", dim=DIM)(batch), gap)
    both = create("cls+gap", dim=DIM)
    close(both(batch), torch.cat([cls, gap], dim=1))
    assert both.out_dim == 2 * DIM and both.needs_cls and not create("gap", dim=DIM).needs_cls
    close(create("max", dim=DIM)(batch), batch.tokens[:, 3:].max(dim=1).values)


def test_their_weights():
    batch = token_batch()
    assert create("cls", dim=DIM).weights(batch) is None
    for name in ("gap", "cls+gap"):
        close(create(name, dim=DIM).weights(batch), torch.full((3, 1, 30), 1 / 30, dtype=torch.float64))
    weights = create("max", dim=DIM).weights(batch)
    expected = torch.zeros(3, 1, 30, dtype=torch.float64)
    for image in range(3):
        for channel in range(DIM):
            expected[image, 0, batch.patches[image, :, channel].argmax()] += 1 / DIM
    close(weights, expected)
    close(create("gem", dim=DIM, p=1.0).weights(batch).sum(-1), torch.ones(3, 1).double())


def test_gem():
    batch = token_batch()
    positive = batch.tokens[:, 3:].clamp(min=1e-6)
    close(create("gem", dim=DIM)(batch), (positive**3).mean(dim=1) ** (1 / 3))
    close(create("gem", dim=DIM, p=1)(batch), positive.mean(dim=1))
    close(create("gem(p=200)", dim=DIM)(batch), positive.amax(dim=1), 0.05)


@pytest.mark.parametrize(("size", "rows"), [(1, [6]), (2, [6, 7]), (3, [5, 6, 7]), (4, [5, 6, 7, 8])])
def test_center_is_the_papers_window_on_its_grid(size, rows):
    batch = token_batch(TokenLayout(grid=(14, 14), has_cls=True))
    window = batch.patches.unflatten(1, (14, 14))[:, rows][:, :, rows]
    center = create(f"center{size}", dim=DIM)
    close(center(batch), window.mean(dim=(1, 2)))
    assert center.weights(batch).count_nonzero() == 3 * size**2


def test_center_of_an_uneven_grid():
    batch = token_batch(TokenLayout(grid=(5, 6), has_cls=False))
    close(create("center1", dim=DIM)(batch), batch.tokens[:, 2 * 6 + 2])
    patches = [row * 6 + column for row in (1, 2, 3) for column in (1, 2, 3)]
    close(create("center3", dim=DIM)(batch), batch.tokens[:, patches].mean(dim=1))


def test_a_grid_smaller_than_the_window():
    with pytest.raises(UserError) as error:
        create("center4", dim=DIM).check(TokenLayout(grid=(3, 9), has_cls=True), "tiny")
    assert message(error) == "center4 reads 4x4 patches, tiny has 3x9: leave it out, or give larger images"


def test_cls_attention():
    batch = attended_batch()
    row = batch.attention.probabilities().mean(dim=1)[:, 0, 3:]
    weights = row / row.sum(dim=1, keepdim=True)
    aggregator = create("cls_attention", dim=DIM)
    close(aggregator(batch), vector(weights, batch))
    close(aggregator.weights(batch), weights[:, None])


def test_cls_attention_of_the_head_with_the_least_entropy():
    batch = attended_batch(seed=3)
    probabilities, expected, chosen = batch.attention.probabilities(), [], set()
    for image in range(3):
        rows = probabilities[image, :, 0, 3:]
        rows = rows / rows.sum(dim=1, keepdim=True)
        entropies = [-sum(p * math.log(p) for p in row.tolist()) for row in rows]
        chosen.add(entropies.index(min(entropies)))
        expected.append(rows[entropies.index(min(entropies))])
    assert len(chosen) > 1
    close(create("cls_attention_min_entropy", dim=DIM)(batch), vector(torch.stack(expected), batch))


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_center_attention(size, bias):
    extra = torch.randn(3, 33, 33, dtype=torch.float64) if bias else None
    batch = attended_batch(bias=extra)
    top, left = (5 - size) // 2, (6 - size) // 2
    queries = [3 + row * 6 + column for row in range(top, top + size) for column in range(left, left + size)]
    weights = batch.attention.probabilities()[:, :, queries, 3:].mean(dim=(1, 2))
    close(create(f"center_attention{size}", dim=DIM)(batch), vector(weights / weights.sum(dim=1, keepdim=True), batch))


def test_attention_that_a_model_returned_itself():
    batch = attended_batch()
    given = AttentionView.from_probabilities(0, batch.attention.probabilities(), LAYOUT)
    again = TokenBatch(batch.tokens, LAYOUT, given)
    for name in ("cls_attention", "cls_attention_min_entropy", "center_attention2"):
        close(create(name, dim=DIM)(again), create(name, dim=DIM)(batch), 1e-11)


def test_differential_attention():
    first, second = (random_view(LAYOUT, batch=3, dtype=torch.float64, seed=seed) for seed in (1, 2))
    difference = torch.tensor(0.4)
    view = AttentionView(
        0, first.query, first.key, first.scale, None, LAYOUT, subtracted=second, subtracted_weight=difference
    )
    batch = token_batch(attention=view)
    row = view.probabilities().mean(dim=1)[:, 0, 3:]
    close(create("cls_attention", dim=DIM)(batch), vector(row / row.sum(dim=1, keepdim=True), batch), 1e-10)
    with pytest.raises(UserError) as error:
        create("cls_attention_min_entropy", dim=DIM)(batch)
    assert "needs attention that is a distribution" in message(error)


def test_attention_that_was_not_captured():
    for name in ("cls_attention", "cls_attention_min_entropy", "center_attention1"):
        aggregator = create(name, dim=DIM)
        assert aggregator.needs_attention and aggregator.needs_cls == name.startswith("cls")
        with pytest.raises(UserError) as error:
            aggregator(token_batch())
        assert message(error).startswith(f"{name} reads the attention inside the block")


def test_oracle():
    oracle = create("oracle:dino", dim=DIM)
    assert oracle.oracle == "dino" and oracle.name == "oracle:dino" and not oracle.needs_attention
    attention = torch.rand(3, 4, 30, dtype=torch.float64) / 30
    batch = token_batch(oracles={"dino": attention})
    weights = attention.mean(dim=1)
    close(oracle(batch), vector(weights / weights.sum(dim=1, keepdim=True), batch))
    plain = create("oracle:dino(renormalise=false)", dim=DIM)
    assert plain.name == "oracle:dino(renormalise=false)"
    close(plain(batch), vector(weights, batch))
    with pytest.raises(UserError) as error:
        oracle(token_batch())
    assert message(error).startswith("oracle:dino reads the [cls] attention of dino")
    with pytest.raises(UserError) as error:
        oracle(token_batch(oracles={"dino": attention[..., :16]}))
    assert message(error) == "dino has 16 patches, the model 30: choose an oracle with the same grid"


@pytest.mark.parametrize("layout", [LAYOUT, TokenLayout(grid=(14, 14), has_cls=True)])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_center_attention_at_the_papers_scale(layout, size):
    """`ca` of the released script, one image at a time: renormalised with 1e-6, then the mean over patches."""
    batch = attended_batch(layout)
    aggregator = create(f"center_attention{size}(scale=paper)", dim=DIM)
    first, (height, width) = layout.num_prefix_tokens, layout.grid
    expected = []
    for image, attention in enumerate(batch.attention.probabilities()):
        mean = attention.mean(dim=0)[first:, first:].reshape(height, width, height * width)
        rows, columns = (slice(n // 2 - math.ceil(size / 2), n // 2 + size // 2) for n in (height, width))
        if height % 2 or width % 2:  # the script takes even grids alone; of others we take the middle
            rows, columns = (slice((n - size) // 2, (n - size) // 2 + size) for n in (height, width))
        weights = mean[rows, columns].mean(dim=(0, 1))
        weights = weights / (weights.sum() + 1e-6)
        expected.append((batch.patches[image] * weights[:, None]).mean(dim=0))
    close(aggregator(batch), torch.stack(expected))
    summed = create(f"center_attention{size}", dim=DIM)(batch)
    close(aggregator(batch) * layout.num_patches, summed, 1e-4)


def test_an_oracle_at_the_papers_scale():
    """`dino` of the released script: the mean over heads and patches of tokens times attention, not renormalised."""
    attention = torch.rand(3, 4, 30, dtype=torch.float64) / 30
    batch = token_batch(oracles={"dino": attention})
    expected = (batch.patches[:, None] * attention[..., None]).mean(dim=(1, 2))
    for name in ("oracle:dino(scale=paper)", "oracle:dino(renormalise=false,scale=paper)"):
        oracle = create(name, dim=DIM)
        assert oracle.name == name and not oracle.learned and oracle.oracle == "dino"
        close(oracle(batch), expected)
        close(oracle.weights(batch).sum(dim=-1)[:, 0], attention.sum(dim=-1).mean(dim=1) / 30)


def test_a_probe_sees_the_papers_scale():
    """Normalisation does not undo a scale at which its 1e-6 is not small beside the variance."""
    batch = attended_batch()
    small, large = (
        Probe(create(f"center_attention2{scale}", dim=DIM), 2).double().vector(batch) for scale in ("(scale=paper)", "")
    )
    vectors = create("center_attention2(scale=paper)", dim=DIM)(batch)
    centred = vectors - vectors.mean(dim=0)
    close(small, centred / (centred.square().mean(dim=0) + 1e-6).sqrt())
    assert (small.abs() < large.abs()).all()


def object_batch() -> tuple[TokenBatch, Tensor]:
    """Images with an object of 7 patches: its tokens point one way, the background's another, with some noise."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(4, LAYOUT.num_tokens, DIM, generator=generator).double() * 0.2
    inside = torch.zeros(4, 30, dtype=torch.bool)
    for image in range(4):
        inside[image, torch.randperm(30, generator=generator)[:7]] = True
    tokens[:, 3:, 0] += torch.where(inside, 1.0, -0.3)
    tokens[:, 3:, 1] += torch.where(inside, 0.0, 1.0)
    return TokenBatch(tokens, LAYOUT), inside


def cut(patches: Tensor, tau: float, eps: float) -> tuple[Tensor, Tensor]:
    """The second generalised eigenvector of one image's graph, by scipy, and the object."""
    cosines = torch.nn.functional.cosine_similarity(patches[:, None], patches[None], dim=-1)
    edges = torch.where(cosines > tau, 1.0, eps).double().numpy()
    degrees = edges.sum(axis=1)
    _, vectors = scipy.linalg.eigh(torch.tensor(degrees).diag().numpy() - edges, torch.tensor(degrees).diag().numpy())
    second = torch.from_numpy(vectors[:, 1].copy())
    above = second > second.mean()
    return (second, above) if above[second.abs().argmax()] else (-second, ~above)


@pytest.mark.parametrize("tau", [0.2, 0.9])
def test_tokencut_is_the_second_eigenvector(tau):
    batch = token_batch()
    for kind in ("bipartition", "eigenvector", "eigenvector_bipartition", "eigenvector_softmax"):
        weights = create("tokencut", dim=DIM, kind=kind, tau=tau, eps=1e-3).weights(batch)
        for image in range(3):
            vector, inside = cut(batch.patches[image], tau, 1e-3)
            expected = {
                "bipartition": inside.double(),
                "eigenvector": vector - vector.min(),
                "eigenvector_bipartition": (vector - vector.min()) * inside,
                "eigenvector_softmax": ((vector - vector.mean()) / vector.std(correction=0)).exp(),
            }[kind]
            if tau == 0.2:  # with 0.9 hardly any two are alike, and eigenvalues coincide
                close(weights[image, 0], expected / expected.sum(), 1e-8)
            close(weights[image].sum(), torch.ones((), dtype=torch.float64))


def test_tokencut_finds_the_object():
    batch, inside = object_batch()
    weights = create("tokencut", dim=DIM).weights(batch)[:, 0]
    assert torch.equal(weights > 0, inside)
    close(create("tokencut", dim=DIM)(batch), vector(inside.double() / 7, batch))


def test_nothing_to_cut_is_the_mean():
    alike = torch.ones(1, 33, DIM)
    apart = torch.zeros(1, 12, 12)
    apart[0] = torch.eye(12)
    for tokens, layout in ((alike, LAYOUT), (apart, TokenLayout(grid=(3, 4), has_cls=False))):
        batch = TokenBatch(tokens, layout)
        close(create("tokencut", dim=tokens.shape[2])(batch), batch.patches.mean(dim=1), 1e-6)


def test_nothing_of_them_is_trained():
    for name in ("cls", "gap", "center2", "cls_attention", "oracle:x", "tokencut", "gem"):
        aggregator = create(name, dim=DIM)
        assert not aggregator.learned and aggregator.num_parameters == 0 and not aggregator.state_dict()


def test_one_image_of_float32():
    view = random_view(LAYOUT, batch=1)
    for name in ("cls", "gap", "cls+gap", "max", "gem", "center3", "center_attention3", "cls_attention", "tokencut"):
        aggregator = create(name, dim=DIM)
        batch = TokenBatch(torch.randn(1, LAYOUT.num_tokens, DIM), LAYOUT, view)
        vectors = aggregator(batch)
        assert vectors.shape == (1, aggregator.out_dim) and vectors.dtype == torch.float32
        weights = aggregator.weights(batch)
        assert weights is None or weights.shape == (1, 1, 30)
