"""Correctness, means per class, the held-out slice; intervals and p-values by known answers and by simulation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from vitprobe.probing import resampling
from vitprobe.probing.heldout import held_out
from vitprobe.probing.resampling import holm, resample
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


# --- intervals


def of_shares(*shares: float, seeds: int = 1, images: int = 200) -> np.ndarray:
    """Results that are right on the first images, alike with every seed."""
    right = [np.arange(images) < round(share * images) for share in shares]
    return np.stack([np.stack([row] * seeds) for row in right])


@pytest.mark.parametrize("share", [0.0, 0.3, 0.985, 1.0])
@pytest.mark.parametrize("seeds", [1, 3])
def test_where_seeds_agree_the_interval_is_jeffreys(share, seeds):
    found = resample(of_shares(share, seeds=seeds), draws=40_000).accuracies()
    right = 200 * share
    low, high = stats.beta(right + 0.5, 200 - right + 0.5).ppf([0.025, 0.975])
    assert found.value[0] == pytest.approx(share)
    np.testing.assert_allclose([found.low[0], found.high[0]], [min(low, share), max(high, share)], atol=2e-3)


def test_where_images_agree_the_interval_is_students_over_seeds():
    """Seeds that are right on other images of a great many: what is left is the spread over seeds."""
    right = np.zeros((1, 3, 30_000), dtype=bool)
    for seed, share in enumerate((0.4, 0.5, 0.56)):
        right[0, seed, np.random.default_rng(seed).permutation(30_000)[: round(share * 30_000)]] = True
    found = resample(right).accuracies()
    expected = stats.ttest_1samp([0.4, 0.5, 0.56], 0).confidence_interval()
    np.testing.assert_allclose([found.low[0], found.high[0]], [expected.low, expected.high], atol=0.02)


def test_pairing_takes_out_what_two_results_share():
    """The second is right where the first is, and on ten more of 200: the difference is much surer than either."""
    drawn = resample(of_shares(0.5, 0.55))
    first, second = drawn.accuracies().low, drawn.accuracies().high
    difference = drawn.differences([1, 0, 1], [0, 1, 1])
    np.testing.assert_allclose(difference.value, [0.05, -0.05, 0])
    assert second[0] - first[0] > 2 * (difference.high[0] - difference.low[0])
    assert difference.low[0] > 0 and difference.p_value[0] < 0.01
    np.testing.assert_allclose(
        [difference.low[1], difference.high[1]], [-difference.high[0], -difference.low[0]], atol=3e-3
    )
    assert (
        difference.low[2] < 0 < difference.high[2] and difference.p_value[2] > 0.9
    )  # equal here is not equal anywhere


def test_the_interval_and_the_p_value_say_the_same():
    rng = np.random.default_rng(5)
    for shift in np.linspace(0, 0.06, 13):
        right = rng.random((2, 3, 400)) < np.array([0.5, 0.5 + shift])[:, None, None]
        found = resample(right, draws=1000).differences([1], [0])
        assert (found.p_value[0] < 0.05) == (found.low[0] > 0 or found.high[0] < 0)


def test_draws_come_back_and_do_not_depend_on_how_many_are_made_at_once(monkeypatch):
    right = np.random.default_rng(0).random((2, 3, 50)) < 0.5
    labels = np.random.default_rng(1).integers(0, 4, 50)
    for classes in (None, labels):
        whole = resample(right, classes, draws=100)
        with monkeypatch.context() as patch:
            patch.setattr(resampling, "_CHUNK", 350)
            parts = resample(right, classes, draws=100)
        np.testing.assert_allclose(parts.images, whole.images, rtol=1e-6)
        np.testing.assert_array_equal(parts.seeds, whole.seeds)
        np.testing.assert_allclose(parts.ends, whole.ends, rtol=1e-6)
        assert (resample(right, classes, draws=100, seed=1).images != whole.images).all()


def test_means_over_classes_are_weighted_within_classes():
    """A class that is always right and one that is half right: only the second one's images matter."""
    labels = np.repeat([1, 0], [150, 50])
    right = np.concatenate([np.ones(150, bool), np.arange(50) < 25])[None, None]
    drawn = resample(right, labels)
    assert drawn.value[0] == pytest.approx(0.75)
    assert drawn.images.std() == pytest.approx(0.5 * np.sqrt(0.25 / 51), rel=0.03)  # Beta(25, 25), halved
    shuffled = np.random.default_rng(0).permutation(200)
    again = resample(right[:, :, shuffled], labels[shuffled])
    assert again.images.std() == pytest.approx(drawn.images.std(), rel=0.03)


@pytest.mark.parametrize(
    ("seed_spread", "gap", "seeds"),
    [(0.0, 0.1, 3), (0.05, 0.1, 3), (0.3, 0.1, 3), (0.02, 0.0, 3), (0.05, 0.1, 5), (0.0, 0.1, 1)],
)
def test_intervals_hold_the_truth_in_at_least_95_percent_of_runs(seed_spread, gap, seeds):
    """Results share what makes an image hard; each has its own taste, luck, and seeds that are better or worse."""
    rng, runs, images = np.random.default_rng(7), 300, 300
    thresholds = np.array([0.8, 0.8 + gap])
    truth = stats.norm.cdf(thresholds / np.sqrt(1 + 0.6**2 + 0.3**2 + seed_spread**2))
    if seeds == 1:  # then nothing tells how far another seed would lie: the truth is that of this one
        seed_spread = 0.0
    held = np.zeros(2)
    for _ in range(runs):
        hard = rng.normal(size=images) + rng.normal(0, 0.6, (2, 1, images)) + rng.normal(0, 0.3, (2, seeds, images))
        drawn = resample(hard < thresholds[:, None, None] + rng.normal(0, seed_spread, (2, seeds, 1)), draws=400)
        for row, (found, true) in enumerate(
            [(drawn.accuracies(), truth[0]), (drawn.differences([1], [0]), truth[1] - truth[0])]
        ):
            held[row] += found.low[0] <= true <= found.high[0]
    assert (held / runs > 0.925).all() and (held / runs < 0.998).all()  # 0.95 is within 2 standard errors of 0.925


def test_images_alone_would_hold_it_too_rarely():
    """Why seeds are in the interval: the same data, taken as if there were one seed."""
    rng, with_seeds, without = np.random.default_rng(8), 0, 0
    truth = stats.norm.cdf(0.8 / np.sqrt(1.04))
    for _ in range(200):
        right = (rng.normal(size=1000) < 0.8 + rng.normal(0, 0.2, (3, 1)))[None]
        both, images = resample(right, draws=400).accuracies(), resample(right[:, :1], draws=400).accuracies()
        with_seeds += bool(both.low[0] <= truth <= both.high[0])
        without += bool(images.low[0] <= truth <= images.high[0])
    assert with_seeds / 200 > 0.92
    assert without / 200 < 0.65


def test_holm_against_a_worked_example():
    adjusted = holm(np.array([0.01, np.nan, 0.04, 0.03, 0.005]))
    np.testing.assert_allclose(adjusted, [0.03, np.nan, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm(np.array([0.9, 0.8])), [1.0, 1.0])
    assert np.isnan(holm(np.array([np.nan]))).all()
