"""Correctness, means per class, the held-out slice."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vitprobe.probing.heldout import held_out
from vitprobe.probing.scores import correct, mean_per_class

LABELS = torch.tensor([0, 1, 2])


def test_correct_counts_the_classes_of_higher_score():
    scores = torch.tensor([[3.0, 1, 2, 0], [3.0, 1, 2, 0], [3.0, 1, 2, 0]])
    assert correct(scores, LABELS).tolist() == [True, False, False]
    assert correct(scores, LABELS, 2).tolist() == [True, False, True]
    assert correct(scores, LABELS, 3).tolist() == [True, True, True]


def test_top_5_of_three_classes_is_top_3():
    assert correct(torch.randn(3, 3), LABELS, 5).all()


@pytest.mark.parametrize("scores", [torch.zeros(3, 10), torch.full((3, 10), float("nan"))])
def test_who_cannot_tell_is_not_right(scores):
    assert not correct(scores, LABELS).any()
    assert not correct(scores, LABELS, 5).any()


def test_correct_takes_several_classifiers_at_once():
    scores = torch.randn(4, 2, 3, 7)
    one_by_one = torch.stack([torch.stack([correct(each, LABELS, 2) for each in seeds]) for seeds in scores])
    assert torch.equal(correct(scores, LABELS, 2), one_by_one)


def test_mean_per_class_gives_a_rare_class_the_same_say():
    right = np.array([[True] * 9 + [False], [False] * 9 + [True]])
    labels = np.array([3] * 9 + [7])
    np.testing.assert_allclose(mean_per_class(right, labels), [0.5, 0.5])


def test_held_out_takes_its_share_of_every_class():
    labels = np.repeat([0, 1, 2, 3], [100, 30, 2, 1])
    chosen = held_out(labels)
    assert [int(chosen[labels == label].sum()) for label in range(4)] == [10, 3, 1, 0]
    np.testing.assert_array_equal(chosen, held_out(labels))
    assert (chosen != held_out(labels, seed=1)).any()
