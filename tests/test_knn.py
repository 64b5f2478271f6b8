"""k-NN against brute force, in fp16 too; the whole bank; selection that never sees the test images."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from vitprobe.errors import UserError
from vitprobe.probing import knn as module
from vitprobe.probing.knn import NEIGHBOURS, TEMPERATURES, Neighbours, knn, search, vote

CLASSES = 7


def made(images: int, seed: int, dim: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Features around one centre a class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (images,), generator=generator)
    centers = torch.randn(CLASSES, dim, generator=torch.Generator().manual_seed(99))
    return centers[labels] + 1.2 * torch.randn(images, dim, generator=generator), labels


def brute_force(bank, labels, query, k: int, temperature: float) -> list[float]:
    """One query's score of each class, in plain float64: exp(similarity / temperature), normalised."""
    cosines = [float(row @ query / (row.norm() * query.norm())) for row in bank.double()]
    nearest = sorted(range(len(cosines)), key=lambda index: -cosines[index])[:k]
    weights = [math.exp(cosines[index] / temperature) for index in nearest]
    of = [sum(w for w, index in zip(weights, nearest, strict=True) if labels[index] == c) for c in range(CLASSES)]
    return [each / sum(weights) for each in of]


@pytest.fixture
def small_parts(monkeypatch):
    """Searches that have to merge parts."""
    monkeypatch.setattr(module, "_QUERIES", 7)
    monkeypatch.setattr(module, "_BANK", 64)


def test_every_k_and_temperature_of_one_search_equals_brute_force(small_parts):
    (bank, labels), (queries, _) = made(300, 0), made(20, 1)
    near = search(bank, labels, queries, size=300)
    assert near.similarity.shape == (20, 200)
    assert (near.similarity.diff(dim=1) <= 0).all()
    for k in NEIGHBOURS:
        for temperature in TEMPERATURES:
            expected = [brute_force(bank, labels, query.double(), k, temperature) for query in queries]
            np.testing.assert_allclose(vote(near, k, temperature, CLASSES), expected, atol=1e-5)


def test_half_precision_features_with_high_cosines_do_not_overflow(small_parts):
    """exp(0.8 / 0.07) is more than fp16 holds; all cosines here are above."""
    (bank, labels), (queries, own) = made(300, 0), made(20, 1)
    bank, queries = ((each + 12).half() for each in (bank, queries))
    near = search(bank, labels, queries, size=300)
    assert near.similarity.dtype == torch.float32 and near.similarity.min() > 0.8
    scores = vote(near, 20, 0.07, CLASSES)
    expected = [brute_force(bank, labels, query.double(), 20, 0.07) for query in queries]
    np.testing.assert_allclose(scores, expected, atol=1e-4)
    result = knn(bank, labels, queries, own, torch.arange(300) < 30, size=300, num_classes=CLASSES)
    assert result.top1.tolist() == [
        max(range(CLASSES), key=brute_force(bank, labels, query.double(), result.k, result.temperature).__getitem__)
        == own_
        for query, own_ in zip(queries, own, strict=True)
    ]


def test_features_of_any_length_have_the_same_neighbours():
    (bank, labels), (queries, _) = made(50, 0), made(5, 1)
    plain = search(bank, labels, queries, size=50, k=10)
    scaled = search(bank * torch.rand(50, 1).add(0.1) * 1e3, labels, queries * 1e-3, size=50, k=10)
    torch.testing.assert_close(plain.similarity, scaled.similarity)
    assert torch.equal(plain.labels, scaled.labels)


def test_a_part_of_the_bank_is_refused():
    (bank, labels), (queries, own) = made(50, 0), made(5, 1)
    with pytest.raises(AssertionError, match="the bank holds 50 of 400 images"):
        search(bank, labels, queries, size=400, k=5)
    with pytest.raises(AssertionError, match="the bank holds 50 of 400 images"):
        knn(bank, labels, queries, own, torch.arange(50) < 5, size=400, num_classes=CLASSES, ks=(5,))


def test_fewer_images_than_k_is_one_line():
    (bank, labels), (queries, own) = made(210, 0), made(5, 1)
    with pytest.raises(UserError) as error:
        knn(bank, labels, queries, own, torch.arange(210) < 21, size=210, num_classes=CLASSES)
    assert str(error.value) == (
        "k-NN with k = 200 needs 200 training images to search, there are 189 (held-out ones not counted): "
        "choose a smaller k, or give more images"
    )


@pytest.mark.parametrize(("bad", "which"), [("bank", "training"), ("queries", "query")])
def test_features_that_are_not_finite_are_one_line_that_names_the_images(bad, which):
    given = {"bank": made(50, 0)[0], "queries": made(50, 1)[0]}
    given[bad][[3, 4, 10, 11, 12, 40], 0] = float("nan")
    given[bad][3] = float("inf")
    with pytest.raises(UserError) as error:
        search(labels=made(50, 0)[1], **given, size=50, k=5)
    assert str(error.value) == (
        f"features of 6 of 50 {which} images are not finite (numbers 3, 4, 10, 11, 12, …): "
        f"look at these images, or compute in float32"
    )


def test_the_held_out_images_select_and_the_test_images_do_not(monkeypatch):
    (train, labels), (test, own) = made(400, 0), made(100, 1)
    heldout = torch.arange(400) % 5 == 0
    result = knn(train, labels, test, own, heldout, size=400, num_classes=CLASSES)
    assert set(result.heldout_accuracy) == {(k, t) for k in NEIGHBOURS for t in TEMPERATURES}
    rest = ~heldout
    for (k, temperature), accuracy in result.heldout_accuracy.items():
        near = search(train[rest], labels[rest], train[heldout], size=320)
        assert accuracy == pytest.approx(
            float((vote(near, k, temperature, CLASSES).argmax(1) == labels[heldout]).float().mean())
        )
    assert result.heldout_accuracy[result.k, result.temperature] == max(result.heldout_accuracy.values())
    other = knn(train, labels, test, (own + 1) % CLASSES, heldout, size=400, num_classes=CLASSES)
    assert (other.k, other.temperature) == (result.k, result.temperature)
    assert not (other.top1 & result.top1).any()

    near = search(train, labels, test, size=400)  # with all of the training images
    scores = vote(near, result.k, result.temperature, CLASSES)
    assert torch.equal(result.top1, scores.argmax(1) == own)
    assert (result.top1 <= result.top5).all() and result.top1.float().mean() > 0.5


def test_a_class_that_no_neighbour_is_of_is_not_among_the_best_five():
    near = Neighbours(torch.tensor([[0.9, 0.8]]), torch.tensor([[0, 1]]))
    scores = vote(near, 2, 0.1, 50)
    assert [bool(module.correct(scores, torch.tensor([label]), 5)) for label in (0, 1, 2, 49)] == [
        True,
        True,
        False,
        False,
    ]


def test_the_nearest_alone_decides_at_a_low_temperature():
    near = Neighbours(F.normalize(torch.tensor([[3.0, 2.0, 2.0]])), torch.tensor([[4, 1, 1]]))
    assert vote(near, 3, 0.01, CLASSES).argmax() == 4
    assert vote(near, 3, 10.0, CLASSES).argmax() == 1
