"""Stop when it is known: the rule, the interval that looking does not invalidate, coverage by simulation."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from helpers import message
from stopping_simulation import LAYOUT, POPULATIONS, simulate
from vitprobe.errors import UserError
from vitprobe.profile.intervals import LEVEL, NARROWEST_AT, estimate, sequence_half_width
from vitprobe.profile.stopping import (
    FEWEST_GROUPS,
    Stopper,
    check_tolerance,
    required_precision,
    stopping_line,
)
from vitprobe.profile.values import Shard, ShardValues

SHARE = (0.0, 1.0)
BLOCKS = 2


def shards_of(arrays: dict[str, np.ndarray], groups: list[str] | None = None, size: int = 64) -> list[Shard]:
    """Values `(n, blocks, heads)` in shards."""
    count = len(next(iter(arrays.values())))
    names = [f"{i:05d}.png" for i in range(count)]
    groups = groups or names
    return [
        Shard(
            names[start : start + size],
            groups[start : start + size],
            {name: array[start : start + size].astype(np.float32) for name, array in arrays.items()},
        )
        for start in range(0, count, size)
    ]


def shares(images: int, spread: float = 0.1, heads: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.5, spread, (images, BLOCKS, heads))


# The interval ---------------------------------------------------------------------------------------------------------


def test_the_boundary_is_the_papers():
    """Formula of arXiv 2103.06476 with its rho, written out once more."""
    alpha, n, spread = 0.05, 300, 2.0
    rho = math.sqrt((-2 * math.log(alpha) + math.log(-2 * math.log(alpha) + 1)) / NARROWEST_AT)
    expected = spread * math.sqrt(2 * (n * rho**2 + 1) / (n**2 * rho**2) * math.log(math.sqrt(n * rho**2 + 1) / alpha))
    assert sequence_half_width(np.array(spread), n, 1.0) == pytest.approx(expected)


def test_it_is_narrowest_for_its_n_about_where_it_is_said_to_be():
    widths = {n: float(sequence_half_width(np.array(1.0), n, 1.0)) * math.sqrt(n) for n in range(64, 20_000, 4)}
    best = min(widths, key=lambda n: widths[n])
    assert 0.8 * NARROWEST_AT < best < 1.25 * NARROWEST_AT
    assert widths[best] < 3.1  # a t interval has 1.96
    assert max(widths.values()) < 3.7


def test_equal_values_leave_room_for_those_not_seen_yet():
    half = sequence_half_width(np.zeros(2), 100, np.array([1.0, math.inf]))
    assert half[0] == pytest.approx(math.log(20) / 100)  # the rule of three
    assert half[1] == math.inf
    result = estimate(np.full((100, 1), 0.3), [str(i) for i in range(100)], SHARE, sequential=True)
    np.testing.assert_allclose([result.low[0], result.high[0]], [0.3 - half[0], 0.3 + half[0]])
    unbounded = estimate(np.full((100, 1), 3.0), [str(i) for i in range(100)], (0.0, math.inf), sequential=True)
    assert np.isnan([unbounded.low, unbounded.high]).all()


def test_estimates_of_a_run_that_stopped_itself_are_of_the_sequence_and_wider():
    rng, groups = np.random.default_rng(0), [str(i) for i in range(200)]
    for bounds, kinds in ((SHARE, ("skew-t", "cs")), ((0.0, math.inf), ("log-t", "log-cs"))):
        values = rng.uniform(0.2, 0.6, (200, 3))
        plain, sequence = estimate(values, groups, bounds), estimate(values, groups, bounds, sequential=True)
        assert (plain.kind, sequence.kind) == kinds
        assert (sequence.low < plain.low).all()
        assert (plain.high < sequence.high).all()
        np.testing.assert_array_equal(sequence.center, plain.center)
    spread = np.log(values).std(axis=0, ddof=1)
    half = sequence_half_width(spread, 200, math.inf)
    np.testing.assert_allclose(np.log(sequence.high / sequence.center), half)


@pytest.mark.parametrize("name", POPULATIONS)
@pytest.mark.parametrize("tolerance", [0.5, 0.3, 0.1])
def test_the_interval_at_the_stop_covers(name, tolerance):
    """In at least 93.5 % of 2,000 runs by the rule as implemented."""
    outcome = simulate(POPULATIONS[name], tolerance, runs=2000)
    assert outcome.covered.mean() >= 0.935
    assert (outcome.used >= FEWEST_GROUPS).all()
    assert (outcome.used % 64 == 0).all()


def test_a_t_interval_looked_at_again_and_again_would_not():
    rare, skewed = POPULATIONS["0 or 1, 1 in 100"], POPULATIONS["lognormal, sigma 1"]
    assert simulate(rare, 0.3, runs=2000, rule="t").covered.mean() < 0.6
    assert simulate(skewed, 0.3, runs=2000, rule="t").covered.mean() < 0.92
    normal = POPULATIONS["normal, mean 1, sd 0.5"]
    assert simulate(normal, 0.01, runs=500, rule="t").always.mean() < 0.75
    assert simulate(normal, 0.01, runs=500).always.mean() >= LEVEL


def test_the_simulation_decides_as_the_runs_do():
    population, tolerance = POPULATIONS["beta(2, 20), as a share"], 0.2
    outcome = simulate(population, tolerance, runs=1, seed=5)
    rng, stopper = np.random.default_rng(5), Stopper(tolerance, LAYOUT)
    values = np.zeros((0, 1, 1))
    while not stopper.enough:
        values = np.concatenate([values, population.draw(rng, (1, 64)).reshape(64, 1, 1)])
        stopper.add(shards_of({population.statistic: values})[-1])
    assert stopper.n == outcome.used[0]


# The rule -------------------------------------------------------------------------------------------------------------


def test_what_a_tolerance_asks_of_each_kind_of_statistic():
    names = ["patch_self_attention", "cls_entropy", "patch_entropy_share", "patch_norm_max_ratio", "attention_distance"]
    required = required_precision(names, 0.1, LAYOUT)
    np.testing.assert_allclose(required.relative, [0.1, 0, 0, 0, 0.1])
    np.testing.assert_allclose(required.absolute, [0, 0.1 * math.log(196), 0.1, 0.1, 0])
    np.testing.assert_array_equal(required.logarithmic, [False, False, False, True, False])
    np.testing.assert_allclose(required.reach, [1, math.log(196), 1, math.inf, LAYOUT.diagonal])
    signed = required_precision(["cls_self_attention", "patch_norm_max_ratio"], 0.1, LAYOUT, signed=True)
    np.testing.assert_array_equal(signed.reach, [math.inf, math.inf])
    np.testing.assert_array_equal(signed.logarithmic, [False, True])


@pytest.mark.parametrize("stopped", [True, False])
def test_the_half_width_that_is_printed_is_the_one_that_decides(stopped):
    values = shares(64, heads=1)
    result = estimate(values[..., 0], [str(i) for i in range(64)], SHARE, sequential=True)
    ratio = float(((result.high - result.low) / 2 / result.mean).max())
    tolerance = ratio * (1.001 if stopped else 0.999)
    assert Stopper(tolerance, LAYOUT).add(shards_of({"patch_self_attention": values})[0]) is stopped


def test_a_ratio_is_known_when_the_log_of_its_geometric_mean_is():
    values = np.exp(np.random.default_rng(0).normal(5, 0.5, (64, BLOCKS, 1)))
    result = estimate(values[..., 0], [str(i) for i in range(64)], (0.0, math.inf), sequential=True)
    half = float(np.log(result.high / result.center).max())
    for factor, stopped in ((1.001, True), (0.999, False)):
        assert Stopper(half * factor, LAYOUT).add(shards_of({"patch_norm_max_ratio": values})[0]) is stopped


def test_the_mean_over_heads_counts_not_each_head():
    opposite = np.random.default_rng(0).normal(0, 0.2, (64, BLOCKS, 1))
    values = 0.5 + np.concatenate([opposite, -opposite, np.random.default_rng(1).normal(0, 0.01, opposite.shape)], 2)
    assert Stopper(0.05, LAYOUT).add(shards_of({"patch_self_attention": values})[0])


def test_the_stop_waits_for_every_statistic_and_block():
    exact, loose = shares(128, 0.01), shares(128, 0.01)
    loose[:, 1] += np.random.default_rng(3).normal(0, 0.2, (128, 1))
    stopper = Stopper(0.05, LAYOUT)
    for shard in shards_of({"patch_self_attention": exact, "patches_to_cls": loose}):
        assert not stopper.add(shard)
    assert stopper.unknown == {"patches_to_cls": [1]}


def test_fewer_than_64_groups_are_never_enough():
    values = shares(63, 1e-4)
    stopper = Stopper(0.5, LAYOUT)
    assert not stopper.add(shards_of({"patch_self_attention": values})[0])
    assert stopper.unknown == {"patch_self_attention": [0, 1]}
    crops = Stopper(0.5, LAYOUT)
    values, groups = shares(640, 1e-4), [f"photograph {i % 63}" for i in range(640)]
    assert not any(crops.add(shard) for shard in shards_of({"patch_self_attention": values}, groups))
    assert crops.n == 63


def test_infinite_and_zero_ratios_are_never_known():
    values = np.exp(np.random.default_rng(0).normal(0, 0.01, (128, 3, 1)))
    values[70, 1] = 0
    values[80, 2] = np.inf
    first, second = shards_of({"patch_norm_max_ratio": values})
    stopper = Stopper(0.2, LAYOUT)
    assert stopper.add(first)
    assert not stopper.add(second)
    assert stopper.unknown == {"patch_norm_max_ratio": [1, 2]}


def test_equal_values_are_known_once_other_ones_must_be_rare():
    values = np.full((128, 1, 2), 0.5)
    stopper = Stopper(0.06, LAYOUT)  # log(20) / 64 = 0.047, log(20) / 128 = 0.023 of the reach of 1
    assert [stopper.add(shard) for shard in shards_of({"patch_self_attention": values})] == [False, True]


def test_images_that_are_groups_alone_take_no_memory():
    stopper = Stopper(0.001, LAYOUT, grouped=False)
    with_groups = Stopper(0.001, LAYOUT)
    for shard in shards_of({"patch_self_attention": shares(256)}):
        stopper.add(shard)
        with_groups.add(shard)
    assert stopper._moments is not None and with_groups._moments is not None
    assert not stopper._moments.open
    np.testing.assert_allclose(stopper._moments.spread, with_groups._moments.spread)
    assert stopper.n == with_groups.n == 256


def test_shards_are_followed_past_unreadable_ones_up_to_the_first_that_is_not_whole(tmp_path):
    first, second, third = shards_of({"patch_self_attention": shares(192, 0.3)})
    values, stopper = ShardValues(tmp_path), Stopper(0.001, LAYOUT)
    values.add(first, (0,))
    values.add(Shard([], [], {}, skipped=[("bad.png", "no image")]), (1,))
    values.add(replace(second, whole=False), (2,))
    values.add(third, (3,))
    assert not stopper.follow(values)
    assert (stopper.shards, stopper.n) == (2, 64)
    values.add(second, (2,))
    assert not stopper.follow(values)
    assert (stopper.shards, stopper.n) == (4, 192)
    values.keep(3)
    assert list(values.heads) == [(0,), (1,), (2,)] == list(ShardValues(tmp_path).heads)
    assert values.shard(3) is None


def test_the_same_shards_in_the_same_order_decide_the_same():
    values = shards_of({"patch_self_attention": shares(640, 0.2), "cls_entropy": shares(640, 0.2)})
    decided = []
    for _ in range(2):
        stopper = Stopper(0.03, LAYOUT)
        decided.append([stopper.add(shard) for shard in values])
    assert decided[0] == decided[1]
    assert True in decided[0]
    assert decided[0][0] is False


# What is said ---------------------------------------------------------------------------------------------------------


def test_why_it_stopped_is_said():
    known = Stopper(0.05, LAYOUT)
    known.add(shards_of({"patch_self_attention": shares(64, 0.01)})[0])
    assert known.describe() == {"tolerance": 0.05, "stopped": "known", "groups": 64, "unknown": {}}
    assert stopping_line(known.describe()) == (
        "stopped after n = 64: every mean over heads is known within the tolerance of 0.05"
    )
    exhausted = Stopper(0.001, LAYOUT)
    exhausted.add(shards_of({"patch_self_attention": shares(64), "cls_entropy": shares(64, 1e-3)})[0])
    assert exhausted.describe()["stopped"] == "exhausted"
    assert stopping_line(exhausted.describe()) == (
        "the images ran out at n = 64 with 2 means over heads not yet known within the tolerance of 0.001, most of "
        "patch_self_attention (blocks 0, 1)"
    )
    few = Stopper(0.5, LAYOUT)
    few.add(shards_of({"patch_self_attention": shares(10)})[0])
    assert stopping_line(few.describe()) == "the images ran out at n = 10, below the 64 that --tolerance needs"
    assert Stopper(0.5, LAYOUT).describe() == {"tolerance": 0.5, "stopped": "exhausted", "groups": 0, "unknown": {}}


@pytest.mark.parametrize("tolerance", [0, -0.1, 1, 5, math.nan, math.inf, "0.05", True])
def test_a_tolerance_that_is_none_is_refused(tolerance):
    with pytest.raises(UserError) as error:
        check_tolerance(tolerance)
    assert message(error) == (
        f"tolerance is {tolerance!r}; it must be a number above 0 and below 1, such as 0.05 for 5 %"
    )


@pytest.mark.parametrize("tolerance", [None, 0.05, np.float64(0.1)])
def test_a_tolerance_or_none_is_taken(tolerance):
    check_tolerance(tolerance)
