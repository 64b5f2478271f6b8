"""Means and intervals: groups are the unit, bounded and unbounded statistics, coverage by simulation."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from interval_reference import skew_t_reference
from vitprobe.profile.intervals import Running, estimate, group_sizes

SHARE, RATIO, ANY = (0.0, 1.0), (0.0, math.inf), (-math.inf, math.inf)


def test_a_group_counts_once_whatever_its_size():
    result = estimate(np.array([[1.0], [3.0], [10.0]]), ["b", "b", "a"])
    expected = stats.ttest_1samp([2.0, 10.0], 0).confidence_interval(0.95)
    np.testing.assert_allclose([result.mean, result.low, result.high], [[6.0], [expected.low], [expected.high]])
    assert result.n == 2


@pytest.mark.parametrize("bounds", [SHARE, RATIO], ids=["share", "ratio"])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_values_that_come_in_parts_give_what_all_at_once_give(bounds, grouped, offset):
    """Against numpy on the whole: parts of any size, groups that end in a later part than they begin in."""
    rng = np.random.default_rng(5)
    values = rng.uniform(0.1, 0.9, size=(200, 3, 2)) + (offset if bounds == RATIO else 0.0)
    groups = [str(x) for x in (rng.integers(0, 60, 200) if grouped else range(200))]
    running = Running(group_sizes(groups), bounds)
    edges = [0, 1, 1, 64, 90, 199, 200]
    for start, stop in itertools.pairwise(edges):
        running.add(values[start:stop], groups[start:stop])
    found = running.estimate()
    means = np.stack([values[[g == group for g in groups]].mean(0) for group in dict.fromkeys(groups)])
    if bounds == RATIO:
        half = stats.t.ppf(0.975, len(means) - 1) * np.log(means).std(axis=0, ddof=1) / np.sqrt(len(means))
        low, high = np.exp([np.log(means).mean(axis=0) - half, np.log(means).mean(axis=0) + half])
    else:
        ends = [skew_t_reference(column) for column in means.reshape(len(means), -1).T]
        low, high = np.array(ends).T.reshape(2, *means.shape[1:])
    np.testing.assert_allclose(found.mean, means.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.low, low, rtol=1e-9)
    np.testing.assert_allclose(found.high, high, rtol=1e-9)
    assert found.n == len(means)


def test_equal_values_in_parts_leave_no_spread_at_all():
    running = Running(None, SHARE)
    for size in (3, 5, 1):
        running.add(np.full((size, 1), 0.1), [""] * size)
    found = running.estimate()
    np.testing.assert_array_equal(found.low, found.high)


def test_memory_holds_open_groups_alone():
    groups = ["a", "b", "a", "c", "c"]
    running = Running(group_sizes(groups), SHARE)
    for group, held in zip(groups, (["a"], ["a", "b"][:1], [], ["c"], []), strict=True):
        running.add(np.array([[0.5]]), [group])
        assert list(running.moments.open) == held


@pytest.mark.parametrize("bounds", [SHARE, ANY, (0.0, math.log(196)), (0.0, 1 / 196)], ids=str)
@pytest.mark.parametrize("n", [2, 3, 5, 15, 100])
def test_interval_of_skewed_values_is_that_of_its_definition(bounds, n):
    values = np.random.default_rng(n).beta(0.5, 8, size=(n, 4))
    values[:, 2:] = 1 - values[:, 2:]  # skewed to the other side
    values *= bounds[1] if math.isfinite(bounds[1]) else 1.0
    result = estimate(values, [str(i) for i in range(n)], bounds)
    expected = [skew_t_reference(column, bounds) for column in values.T]
    np.testing.assert_allclose(np.stack([result.low, result.high], axis=1), expected, rtol=1e-9)
    np.testing.assert_allclose(result.mean, values.mean(0))
    np.testing.assert_array_equal(result.center, result.mean)
    assert (result.n, result.kind, result.about, result.few) == (n, "skew-t", "mean", n < 30)


def test_of_symmetric_values_without_bounds_it_is_students():
    values = np.random.default_rng(0).uniform(0.2, 0.6, size=(15, 2))
    values = np.concatenate([values, 1 - values])
    result = estimate(values, [str(i) for i in range(30)], ANY)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    np.testing.assert_allclose(result.low, expected.low)
    np.testing.assert_allclose(result.high, expected.high)


@pytest.mark.parametrize("bounds", [SHARE, (0.0, math.log(196)), ANY], ids=str)
@pytest.mark.parametrize("sequential", [False, True])
def test_an_interval_contains_its_center_at_the_bounds_too(bounds, sequential):
    """Also of values that float32 rounds to beyond a bound, of one that differs, and of values that are all alike."""
    high = bounds[1] if math.isfinite(bounds[1]) else 1.0
    beyond = float(np.nextafter(np.float32(high), np.float32(2 * high)))
    columns = [
        [0.0, 0, 0, 0, 0],
        [high] * 5,
        [beyond] * 5,
        [beyond, high, beyond, high, high],
        [beyond, beyond, beyond, beyond, high * (1 - 1e-7)],
        [0, 0, 0, 0, 1e-30],
        [0, 0, 0, 0, high],
        [0, high, high, high, high],
        [0.1] * 5,
    ]
    for column in columns:
        result = estimate(np.array(column)[:, None], list("abcde"), bounds, sequential=sequential)
        if result.kind != "cs" or math.isfinite(bounds[1]) or len(set(column)) > 1:
            assert result.low <= result.center <= result.high, column
            assert result.low >= bounds[0]
            assert result.high <= max(bounds[1], beyond)
    rounding = estimate(np.array(columns[4])[:, None], list("abcde"), bounds)
    assert rounding.high - rounding.low < 1e-5 * high  # and is not wide for that


@pytest.mark.parametrize("n", [2, 3, 7])
def test_a_ratio_whose_mean_lies_beyond_its_interval_is_about_the_geometric_mean(n):
    values = np.exp(np.array([0.0] * (n - 1) + [0.5])[:, None]) ** 4
    values = np.concatenate([np.tile(values, (40, 1)), [[1e4]]])
    result = estimate(values, [str(i) for i in range(len(values))], (1.0, math.inf))
    assert result.mean > result.high  # why the plain mean must not stand beside it
    assert 1 <= result.low <= result.center <= result.high
    assert (result.kind, result.about) == ("log-t", "geometric mean")


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


@pytest.mark.parametrize("n", [3, 5, 10, 15, 30])
@pytest.mark.parametrize("side", ["near 0", "near 1"])
def test_intervals_of_skewed_shares_hold_at_few_images_where_students_do_not(n, side):
    """Values whose standard deviation is 1.4 times their mean; `python -m benchmarks.intervals` has many more."""
    values = np.random.default_rng(6).beta(0.5, 20, (n, 4000))
    truth = 0.5 / 20.5
    if side == "near 1":
        values, truth = 1 - values, 1 - truth
    result = estimate(values, [str(i) for i in range(n)], SHARE)
    held = ((result.low <= truth) & (truth <= result.high)).mean()
    students = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert 0.92 <= held <= 0.97
    assert ((students.low <= truth) & (truth <= students.high)).mean() < held
    if n <= 15:
        assert ((students.low <= truth) & (truth <= students.high)).mean() < 0.9
