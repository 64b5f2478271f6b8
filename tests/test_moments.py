"""The accumulator against numpy in float64: whatever the parts, the groups and the scale."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from vitprobe.profile.intervals import group_sizes
from vitprobe.profile.moments import GroupMoments


def group_means(values: np.ndarray, groups: list[str]) -> np.ndarray:
    of = np.array(groups)
    return np.stack([values[of == group].mean(axis=0) for group in dict.fromkeys(groups)])


def drawn(grouped: bool, shape: tuple[int, ...] = (3, 2)) -> tuple[np.ndarray, list[str]]:
    rng = np.random.default_rng(7)
    values = rng.lognormal(size=(200, *shape))
    return values, [f"g{i}" for i in (rng.integers(0, 60, 200) if grouped else range(200))]


def require_equal(moments: GroupMoments, means: np.ndarray, scaled: np.ndarray) -> None:
    assert moments.n == len(means)
    np.testing.assert_allclose(moments.plain_mean, means.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(moments.mean, scaled.mean(axis=0), rtol=1e-11)
    np.testing.assert_allclose(moments.spread, scaled.std(axis=0, ddof=1), rtol=1e-11)
    np.testing.assert_allclose(moments.skewness, stats.skew(scaled, axis=0), rtol=1e-8, atol=1e-9)
    assert moments.defined.all()


@pytest.mark.parametrize("offset", [0.0, 1e6])
@pytest.mark.parametrize("edges", [[0, 200], [0, 1, 1, 64, 90, 199, 200], list(range(201))], ids=["whole", "few", "1"])
@pytest.mark.parametrize(("grouped", "known"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("shape", [(3, 2), ()], ids=str)
def test_parts_give_what_numpy_gives_of_the_whole(
    shape: tuple[int, ...], grouped: bool, known: bool, edges: list[int], offset: float
) -> None:
    values, groups = drawn(grouped, shape)
    values += offset
    moments = GroupMoments(group_sizes(groups) if known else None, alone=not grouped)
    for start, stop in itertools.pairwise(edges):
        moments.add(values[start:stop], groups[start:stop])
    means = group_means(values, groups)
    if offset:  # of numbers near 1e6, a rounding of 1e-16 is 1e-10 of what they differ by
        assert moments.n == len(means)
        np.testing.assert_allclose(moments.spread, means.std(axis=0, ddof=1), rtol=1e-8)
    else:
        require_equal(moments, means, means)
    assert bool(moments.open) == (grouped and not known)


def test_a_group_that_grows_counts_once_by_its_mean_so_far_on_a_scale_of_its_own() -> None:
    values, groups = drawn(grouped=True, shape=(2,))
    moments = GroupMoments(scale=lambda means: np.where([False, True], np.log(means), means))
    for count in range(1, 201):
        moments.add(values[count - 1 : count], groups[count - 1 : count])
        if count in (50, 200):
            means = group_means(values[:count], groups[:count])
            require_equal(moments, means, np.stack([means[:, 0], np.log(means[:, 1])], axis=1))


def test_whole_groups_are_forgotten() -> None:
    groups = ["a", "b", "a", "c", "c"]
    moments = GroupMoments(group_sizes(groups))
    for group, held in zip(groups, (["a"], ["a"], [], ["c"], []), strict=True):
        moments.add(np.array([[0.5]]), [group])
        assert list(moments.open) == held


def test_equal_values_leave_exactly_no_spread() -> None:
    apart, together = GroupMoments(), GroupMoments(alone=True)
    for size in (3, 5, 1):
        apart.add(np.full((size, 1), 0.1), ["a", "b", "c", "a", "d"][:size])
        together.add(np.full((size, 1), 0.1), [""] * size)
    assert (apart.n, together.n) == (4, 9)
    assert together.spread == 0 == together.skewness
    assert apart.spread < 1e-16  # 0.1 + 0.1 + 0.1 is not three times 0.1
    np.testing.assert_allclose([apart.mean, together.mean], 0.1)


def test_the_only_group_may_grow() -> None:
    moments = GroupMoments()
    for value in (1.0, 2.0, 6.0):
        moments.add(np.array([[value]]), ["a"])
    moments.add(np.array([[5.0]]), ["b"])
    assert (moments.n, moments.mean, moments.spread) == (2, 4.0, np.std([3, 5], ddof=1))


def test_what_the_scale_does_not_reach_is_undefined_until_it_is_taken_out() -> None:
    moments = GroupMoments(scale=np.log)
    moments.add(np.array([[1.0, 0.0], [2.0, 3.0]]), ["a", "b"])
    assert moments.defined.tolist() == [True, False]
    assert np.isnan(moments.mean).tolist() == np.isnan(moments.spread).tolist() == [False, True]
    np.testing.assert_array_equal(moments.plain_mean, [1.5, 1.5])
    moments.add(np.array([[1.0, 2.0]]), ["a"])
    means = np.array([[1.0, 1.0], [2.0, 3.0]])
    require_equal(moments, means, np.log(means))
