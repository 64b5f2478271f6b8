"""Means and intervals: groups are the unit, bounded and unbounded statistics, coverage by simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from vitprobe.profile.intervals import estimate, group_means

SHARE, RATIO = (0.0, 1.0), (0.0, math.inf)


def test_group_means_weigh_the_images_of_a_group_alike_and_keep_the_order_of_groups():
    values = np.array([[1.0], [3.0], [10.0]])
    np.testing.assert_array_equal(group_means(values, ["b", "b", "a"]), [[2.0], [10.0]])


def test_t_interval_equals_scipys():
    values = np.random.default_rng(0).uniform(0.2, 0.6, size=(30, 2))
    result = estimate(values, [str(i) for i in range(30)], SHARE)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    np.testing.assert_allclose(result.low, expected.low)
    np.testing.assert_allclose(result.high, expected.high)
    np.testing.assert_allclose(result.mean, values.mean(0))
    np.testing.assert_array_equal(result.center, result.mean)
    assert (result.n, result.kind) == (30, "t")


def test_n_counts_groups_not_images():
    photographs = np.random.default_rng(1).uniform(size=(8, 1))
    crops = np.repeat(photographs, 8, axis=0)
    grouped = estimate(crops, [f"photo {i // 8}" for i in range(64)], SHARE)
    alone = estimate(photographs, [str(i) for i in range(8)], SHARE)
    assert grouped.n == 8
    np.testing.assert_allclose([grouped.low, grouped.high], [alone.low, alone.high])


def test_interval_is_clipped_at_the_bounds():
    values = np.array([[0.0], [0.0], [0.0], [1e-3]])
    result = estimate(values, list("abcd"), SHARE)
    assert result.low == 0.0 < result.mean
    result = estimate(1 - values, list("abcd"), SHARE)
    assert result.high == 1.0


def test_unbounded_ratio_gets_a_log_interval_about_the_geometric_mean_beside_the_plain_mean():
    values = np.exp(np.random.default_rng(2).normal(0, 2, size=(50, 1)))
    result = estimate(values, [str(i) for i in range(50)], RATIO)
    expected = stats.ttest_1samp(np.log(values), 0).confidence_interval(0.95)
    np.testing.assert_allclose([result.low, result.high], np.exp([expected.low, expected.high]))
    np.testing.assert_allclose(result.center, stats.gmean(values))
    np.testing.assert_allclose(result.mean, values.mean(0))
    assert result.kind == "log-t"


@pytest.mark.parametrize(
    ("values", "bounds"), [([[0.3]], SHARE), ([[1.0], [0.0]], RATIO), ([[1.0], [math.inf]], RATIO)]
)
def test_no_interval_rather_than_a_wrong_one(values, bounds):
    result = estimate(np.array(values), [str(i) for i in range(len(values))], bounds)
    assert result.kind == "none"
    assert np.isnan(result.low).all()
    assert np.isnan(result.high).all()
    assert result.mean == np.mean(values)


@pytest.mark.parametrize(
    ("draw", "truth", "bounds"),
    [
        (lambda rng, n: rng.beta(2, 20, n), 2 / 22, SHARE),
        (lambda rng, n: np.exp(rng.normal(0.3, 1.5, n)), math.exp(0.3), RATIO),
    ],
    ids=["bounded share: mean", "heavy-tailed ratio: geometric mean"],
)
def test_intervals_cover_the_truth_95_percent_of_the_time(draw, truth, bounds):
    rng, n, runs = np.random.default_rng(3), 50, 2000
    groups, covered = [str(i) for i in range(n)], 0
    for _ in range(runs):
        result = estimate(draw(rng, n)[:, None], groups, bounds)
        covered += bool(result.low <= truth <= result.high)
    assert 0.93 <= covered / runs <= 0.97


def test_crops_counted_as_images_would_cover_far_too_rarely():
    """Why groups exist: the same data, with and without them."""
    rng, with_groups, without = np.random.default_rng(4), 0, 0
    for _ in range(1000):
        crops = (rng.normal(0.5, 0.1, (8, 1)) + rng.normal(0, 0.02, (8, 8))).reshape(64, 1)
        grouped = estimate(crops, [str(i // 8) for i in range(64)], SHARE)
        alone = estimate(crops, [str(i) for i in range(64)], SHARE)
        with_groups += bool(grouped.low <= 0.5 <= grouped.high)
        without += bool(alone.low <= 0.5 <= alone.high)
    assert with_groups / 1000 > 0.93
    assert without / 1000 < 0.75
