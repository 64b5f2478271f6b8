"""Is the probe trained? Anchors by logistic regression, and losses that still fall at the end."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from helpers import tiny_vit
from made_squares import BANK, CACHED, METHODS, squares, write_squares
from test_cli import invoke
from test_seeds import CLASSES, MadeFeed, images, training
from vitprobe import Verification, verify
from vitprobe.probing import FrozenModel, Tap
from vitprobe.probing.anchor import anchor_positions
from vitprobe.probing.heldout import held_out
from vitprobe.probing.logistic import STRENGTHS
from vitprobe.probing.trained import fall, in_words, points_below, shortfalls

SHORT = replace(BANK, learning_rates=(1e-6, 2e-6))  # rates with which nothing is learned


def run(protocol: Any = BANK, aggregators: Any = ("cls", "gap", "abmilp"), **options: Any) -> Verification:
    return verify(tiny_vit(), squares(), aggregators, protocol=protocol, workers=0, **options)


@pytest.mark.parametrize("protocol", [BANK, CACHED], ids=lambda protocol: protocol.name)
def test_an_anchor_is_scikit_learns_logistic_regression_on_unaugmented_vectors(protocol: Any) -> None:
    model, data = tiny_vit(), squares()
    found = run(protocol)
    anchors = found.manifest["anchors"]
    assert set(anchors) == {"cls@block1", "gap@block1"}  # of those without weights
    held = held_out(data.train.labels, protocol.heldout, 0)

    def vectors(split: Any) -> np.ndarray:
        from vitprobe.models.loading import load_model

        loaded = load_model(model)
        pixels = torch.stack([loaded.transform(split.images.read(index)) for index in range(len(split))])
        with FrozenModel(loaded, [Tap(1)]) as frozen:
            return frozen(pixels)[Tap(1)].tokens[:, 0].double().numpy()

    train, test = vectors(data.train), vectors(data.test)
    scaler = StandardScaler().fit(train[~held])
    accuracies = {}
    for strength in STRENGTHS:
        fitted = LogisticRegression(C=strength, tol=1e-6, max_iter=5000)
        fitted.fit(scaler.transform(train[~held]), data.train.labels[~held])
        accuracies[strength] = [
            fitted.score(scaler.transform(part), labels)
            for part, labels in ((train[held], data.train.labels[held]), (test, data.test.labels))
        ]
    mine = anchors["cls@block1"]
    assert mine["images"] == 54 and mine["c"] in STRENGTHS
    assert mine["heldout_accuracy"] == pytest.approx(max(right for right, _ in accuracies.values()), abs=0.17)
    assert mine["accuracy"] == pytest.approx(accuracies[mine["c"]][1], abs=1.01 / 24)  # one image
    table = found.table().set_index("aggregator")
    assert table["anchor"].isna().tolist() == [False, False, True]


@pytest.mark.parametrize("method", ["knn", "logistic"])
def test_what_is_not_trained_has_no_anchor(method: str) -> None:
    found = run(METHODS[method], ["cls", "gap"])
    assert found.manifest["anchors"] == {} and found.warnings == [] and "anchor" not in found.table()


def test_a_probe_below_its_anchor_is_said_everywhere(tmp_path: Path) -> None:
    found = run(SHORT, out=tmp_path / "run")
    anchor, accuracy = found.anchor("gap@block1"), found.table()["accuracy"][1]
    assert anchor is not None and anchor > accuracy + 0.01
    words = f"gap@block1 is {100 * (anchor - accuracy):.1f} points below logistic regression on the same vectors"
    assert any(line.startswith(words) for line in found.warnings)
    for said in (str(found), found._repr_html_(), str(Verification.load(tmp_path / "run"))):
        assert f"warning: {words}" in said and f"{100 * (anchor - accuracy):.1f} below anchor" in said
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["anchors"]["gap@block1"]["accuracy"] == anchor


@pytest.mark.usefixtures("undrawn")
def test_the_command_line_says_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vitprobe.probing.protocols import PROTOCOLS

    monkeypatch.setitem(PROTOCOLS, "fast", SHORT)
    folder = write_squares(tmp_path / "squares")
    options = ["--data", folder, "--model", "random_vit_nano", "--block", 0, "--workers", 0]
    result = invoke(
        "verify",
        *options,
        "--aggregator",
        "cls",
        "--aggregator",
        "gap",
        "--out",
        tmp_path / "run",
        "--independent-seeds",
    )
    assert result.exit_code == 0, result.output
    assert "warning: gap@block0 is" in result.stdout
    assert Verification.load(tmp_path / "run").manifest["protocol"]["echoes"] == 1
    refused = invoke("verify", *options, "--protocol", "knn", "--independent-seeds", "--out", tmp_path / "other")
    assert refused.exit_code == 2 and not (tmp_path / "other").exists()


def curve(level: float, seeds: int = 3, images: int = 400, noise: float = 0.5) -> np.ndarray:
    """Losses that differ much from image to image, alike in every seed."""
    rng = np.random.default_rng(0)
    apart = rng.standard_normal(images)
    return level * (1 + noise * (apart - apart.mean())) + 0.01 * rng.standard_normal((seeds, images))


@pytest.mark.parametrize(
    ("halfway", "end", "steep"),
    [
        *((1.0, 0.99, False), (1.0, 0.9, False), (1.0, 0.8, True), (2.2, 2.1, True), (0.2, 0.17, False)),
        *((1.0, 1.2, False), (2.31, 2.2, True), (2.4, 2.35, True), (1.0, 1.0, False)),
    ],
)
def test_a_made_curve(halfway: float, end: float, steep: bool) -> None:
    start = float(np.log(10))
    share, found = fall(curve(halfway), curve(end), start)
    assert found is steep
    if max(halfway, end) < start and halfway > end:
        assert share == pytest.approx((halfway - end) / (start - end), abs=0.01)
    assert share <= 1


def test_a_loss_that_falls_as_fast_as_on_average_is_steep_and_one_that_has_settled_is_not() -> None:
    from vitprobe.probing.schedule import rate_factor

    factors = np.array([rate_factor(step, steps=1000, warmup_steps=100) for step in range(1000)])
    way = np.cumsum(factors) / factors.sum()
    assert 1 - way[499] == pytest.approx(0.22, abs=0.01)

    def looked_at(loss: np.ndarray) -> bool:
        return fall(curve(loss[499]), curve(loss[-1]), loss[0])[1]

    assert looked_at(2.3 - way) and looked_at(0.3 + 2 * np.exp(-way))
    assert not looked_at(0.3 + 2 * np.exp(-10 * way))


def test_a_fall_on_a_few_images_is_no_certain_one() -> None:
    rng = np.random.default_rng(1)
    before, after = rng.exponential(1.0, (1, 5)), rng.exponential(0.9, (1, 5))
    assert fall(before, after, 2.3)[1] is False
    assert fall(np.ones((2, 1)), np.zeros((2, 1)), 2.3)[1] is False  # one image has no deviation


def test_a_short_training_of_a_learned_probe_is_not_converged_and_a_long_one_is() -> None:
    found = {}
    for steps in (8, 400):
        feed = MadeFeed(*images(2400, 0), batch_size=64)
        made = training(feed, (0, 1), steps=steps, names=["abmilp"], watched=range(1200, 2400))
        made.positions = range(1200)
        made.run(lambda count: None)
        halfway, end = np.stack(list(made.watched_losses().values()), axis=1)
        assert halfway.shape == (2, 1200)
        found[steps] = fall(halfway, end, math.log(CLASSES))
    assert found[8][1] and not found[400][1], found
    assert found[8][0] > 0.2 > found[400][0]


def test_a_learned_probe_that_has_not_converged_is_named(tmp_path: Path) -> None:
    given = run(aggregators=["cls", "abmilp"])
    chosen = [dict(result.hyperparameters) for result in given.results]
    assert {"loss_fall", "converged"} <= set(chosen[1]) and not {"loss_fall", "converged"} & set(chosen[0])
    for converged in (False, True):
        results = [
            given.results[0],
            replace(given.results[1], hyperparameters={**chosen[1], "loss_fall": 0.3, "converged": converged}),
        ]
        made = Verification(given.manifest, given.images, given.labels, results)
        made.save(tmp_path / str(converged))
        for found in (made, Verification.load(tmp_path / str(converged))):
            named = [line for line in found.warnings if line.startswith("abmilp@block1 is not converged: 30%")]
            assert bool(named) is not converged
            for said in (str(found), found._repr_html_()):
                assert ("not converged" in said) is not converged
            assert list(found.table()["converged"])[1] is converged


def test_in_words() -> None:
    assert points_below(0.5, 0.505) is None and points_below(0.5, None) is None and points_below(0.6, 0.5) is None
    assert points_below(0.5, 0.55) == pytest.approx(5)
    assert in_words(0.5, 0.55, {}) == "5.0 below anchor" and in_words(0.5, None, {}) == ""
    falling = {"loss_fall": 0.2, "converged": False}
    assert in_words(0.5, None, falling) == "not converged" and in_words(0.5, None, {**falling, "converged": True}) == ""
    assert shortfalls("ep@block1", 0.5, None, falling) == [
        "ep@block1 is not converged: 20% of the fall of its loss on held-out images came in the second half of the "
        "training; more steps would give it more"
    ]
    assert shortfalls("cls@block1", 0.5, None, {"c": 1.0, "converged": False}) == []  # of logistic regression's solver


def test_anchors_of_large_sets_are_fitted_on_a_part_of_every_class() -> None:
    labels = np.repeat(np.arange(10), 100)
    positions = np.flatnonzero(np.arange(1000) % 10 > 0).tolist()
    assert anchor_positions(positions, labels, 0, most=900) == positions
    part = anchor_positions(positions, labels, 0, most=300)
    assert set(part) < set(positions) and np.bincount(labels[part]).tolist() == [30] * 10
    assert anchor_positions(positions, labels, 0, most=300) == part != anchor_positions(positions, labels, 1, most=300)
