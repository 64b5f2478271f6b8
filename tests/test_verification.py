"""`Verification`: its table, its differences, its folder."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from made_verifications import made_verification
from vitprobe.errors import UserError
from vitprobe.probing.tap import Tap
from vitprobe.probing.uncertainty import holm
from vitprobe.probing.verification import ACCURACY, CORRECTNESS, Verification
from vitprobe.profile.profile import Profile
from vitprobe.runs.folder import MANIFEST

FIRST = [
    *("label", "aggregator", "block", "norm", "parameters"),
    *("accuracy", "ci_low", "ci_high", "gain", "gain_ci_low", "gain_ci_high"),
]


@pytest.fixture(scope="module")
def made() -> Verification:
    return made_verification()


def test_the_table_has_the_columns_in_their_order(made):
    table = made.table()
    others = ["top5", "mean_per_class", "gain_over", "p_value", "p_holm", "seeds", "images", "interval", "optimizer"]
    assert list(table) == [*FIRST, *others, "learning_rate", "model", "weights"]
    assert list(table["label"]) == ["cls@block11", "gap@block11", "abmilp@block11"]
    assert list(table["aggregator"]) == ["cls", "gap", "abmilp"]
    assert (table["block"] == 11).all() and not table["norm"].any()
    assert list(table["parameters"]) == [0, 0, 193]
    assert (table["seeds"] == 3).all() and (table["images"] == 200).all() and (table["learning_rate"] == 0.1).all()
    assert (table["model"] == "mae_vit_b").all() and (table["weights"] == "0123456789ab").all()


def test_the_numbers_are_means_over_images_and_seeds(made):
    table, top1 = made.table(), np.stack([result.top1 for result in made.results])
    np.testing.assert_allclose(table["accuracy"], top1.mean(axis=(1, 2)))
    np.testing.assert_allclose(table["gain"], top1.mean(axis=(1, 2)) - top1[0].mean())
    np.testing.assert_allclose(table["top5"], [result.top5.mean() for result in made.results])
    per_class = [top1[:, :, made.labels == label].mean(axis=(1, 2)) for label in range(10)]
    np.testing.assert_allclose(table["mean_per_class"], np.mean(per_class, axis=0))
    assert (table["ci_low"] < table["accuracy"]).all() and (table["accuracy"] < table["ci_high"]).all()
    assert (table["gain_ci_low"] <= table["gain"]).all() and (table["gain"] <= table["gain_ci_high"]).all()
    np.testing.assert_allclose(table["p_holm"], holm(table["p_value"].to_numpy()))
    assert table["p_holm"][2] < 0.05 and table["gain_ci_low"][2] > 0


def test_the_baseline_gains_exactly_nothing_over_itself(made):
    baseline = made.table().iloc[0]
    assert (baseline["gain"], baseline["gain_ci_low"], baseline["gain_ci_high"]) == (0, 0, 0)
    assert np.isnan(baseline["p_value"]) and np.isnan(baseline["p_holm"])


def test_other_measures_fill_the_same_columns(made):
    for measure, column in (("top5", "top5"), ("mean_per_class", "mean_per_class")):
        table = made.table(measure)
        assert list(table) == list(made.table())
        np.testing.assert_allclose(table["accuracy"], made.table()[column])
        np.testing.assert_allclose(table["gain"], table["accuracy"] - table["accuracy"][0], atol=1e-12)
    with pytest.raises(UserError) as error:
        made.table("f1")
    assert str(error.value) == "no measure 'f1'; give one of top1, top5, mean_per_class"


def test_gains_are_over_cls_at_the_same_place():
    table = made_verification(places=("@block8", "@block11+norm")).table()
    assert list(table["gain_over"]) == ["cls@block8"] * 3 + ["cls@block11+norm"] * 3
    accuracy = table.set_index("label")["accuracy"]
    gain = accuracy["abmilp@block11+norm"] - accuracy["cls@block11+norm"]
    assert table["gain"][5] == pytest.approx(gain)


def test_a_label_is_taken_apart_into_columns(tmp_path):
    shares = {"cls": 0.5, "abmilp(depth=2,activation=tanh)": 0.6, "oracle:hf-hub:someone/vit@main": 0.6}
    table = made_verification(shares=shares, places=("@block2", "@block10+norm")).table()
    assert list(table["aggregator"]) == [*shares, *shares]
    assert list(table["block"]) == [2] * 3 + [10] * 3 and list(table["norm"]) == [False] * 3 + [True] * 3
    assert list(table["gain_over"]) == ["cls@block2"] * 3 + ["cls@block10+norm"] * 3
    table.to_csv(tmp_path / "table.csv", index=False)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "table.csv"), table, check_dtype=False)
    assert pd.read_csv(tmp_path / "table.csv").dtypes[["block", "norm"]].tolist() == [np.int64, np.bool_]


def test_a_tap_is_read_as_it_is_written():
    for tap in (Tap(0), Tap(11), Tap(3, norm=True)):
        assert Tap.parse(str(tap)) == tap
    for text in ("", "11", "block", "block-1", "block1+norms", "block11 "):
        with pytest.raises(ValueError, match="is no tap such as block11"):
            Tap.parse(text)


def test_a_run_whose_csv_has_the_old_columns_is_read(made, tmp_path):
    folder = made.save(tmp_path / "run")
    old = made.table().drop(columns=["aggregator", "block", "norm"]).rename(columns={"label": "aggregator"})
    old.to_csv(folder / ACCURACY, index=False)
    pd.testing.assert_frame_equal(Verification.load(folder).table(), made.table())


def test_without_cls_gains_are_over_gap_and_without_either_there_are_none():
    table = made_verification(shares={"abmilp": 0.7, "gap": 0.5}).table()
    assert list(table["gain_over"]) == ["gap@block11"] * 2
    alone = made_verification(shares={"abmilp": 0.7, "ep": 0.6})
    table = alone.table()
    assert table["gain_over"].isna().all() and table[["gain", "gain_ci_low", "p_value", "p_holm"]].isna().all(axis=None)
    assert "–" in str(alone) and "nan" not in str(alone)


def test_every_two_results_against_each_other(made):
    pairs, table = made.differences(), made.table().set_index("label")
    assert list(zip(pairs["first"], pairs["second"], strict=True)) == [
        ("cls@block11", "gap@block11"),
        ("cls@block11", "abmilp@block11"),
        ("gap@block11", "abmilp@block11"),
    ]
    np.testing.assert_allclose(pairs["difference"][:2], -table["gain"].to_numpy()[1:])
    np.testing.assert_allclose(pairs["p_value"][:2], table["p_value"].to_numpy()[1:], atol=2e-3)
    np.testing.assert_allclose(pairs["p_holm"], holm(pairs["p_value"].to_numpy()))
    assert (pairs["p_holm"] >= pairs["p_value"]).all() and list(made.differences("top5")) == list(pairs)


def test_one_aggregator_alone_has_no_differences():
    assert len(made_verification(shares={"cls": 0.5}).differences()) == 0


def test_every_face_says_what_the_numbers_are_conditional_on(made):
    sentence = "Conditional on these backbone weights (mae_vit_b, sha256 0123456789ab…)"
    for words in (made.conditions, str(made), made._repr_html_()):
        assert sentence in words and "200 test images and 3 seeds" in words and "protocol fast" in words
    one_seed = made_verification(seeds=1)
    for words in (one_seed.conditions, str(one_seed), one_seed._repr_html_()):
        assert "95 % intervals over 200 test images (one seed: nothing is said about others);" in words
    assert one_seed.table()["ci_low"].notna().all()
    assert repr(made) == "Verification('mae_vit_b', 3 aggregators, 200 images)"


def test_tables_say_what_intervals_are_over(made):
    for table in (made.table(), made.table("mean_per_class"), made.differences()):
        assert set(table["interval"]) == {"images and seeds"}
    one_seed = made_verification(seeds=1)
    for table in (one_seed.table(), one_seed.differences("top5")):
        assert set(table["interval"]) == {"images"}


def test_with_one_image_per_class_and_with_classes_that_are_missing_nothing_is_nan(made):
    """12 of 1,000 classes are among the test images, each once."""
    results = [replace(result, top1=result.top1[:, :12], top5=result.top5[:, :12]) for result in made.results]
    few = Verification(made.manifest, made.images[:12], np.arange(12) * 83, results)
    for seeds in (3, 1):
        found = Verification(
            made.manifest,
            few.images,
            few.labels,
            [replace(result, top1=result.top1[:seeds], top5=result.top5[:seeds]) for result in results],
        )
        per_class, per_image = found.table("mean_per_class"), found.table()
        ends = ["accuracy", "ci_low", "ci_high", "gain", "gain_ci_low", "gain_ci_high"]
        np.testing.assert_allclose(per_class[ends], per_image[ends], atol=1e-12)
        assert (per_class["ci_high"] - per_class["ci_low"] > 0.2).all()
        assert found.differences("mean_per_class").notna().all(axis=None)


def test_a_folder_comes_back_equal(made, tmp_path):
    folder = made.save(tmp_path / "run")
    assert sorted(path.name for path in folder.iterdir()) == [ACCURACY, CORRECTNESS, MANIFEST]
    loaded = Verification.load(str(folder))
    pd.testing.assert_frame_equal(loaded.table(), made.table())
    assert (loaded.images, loaded.manifest) == (made.images, made.manifest)
    assert (loaded.labels == made.labels).all()
    for one, other in zip(loaded.results, made.results, strict=True):
        assert (one.name, one.parameters, one.hyperparameters) == (other.name, other.parameters, other.hyperparameters)
        assert (one.top1 == other.top1).all() and (one.top5 == other.top5).all()
    csv = pd.read_csv(folder / ACCURACY)
    assert list(csv)[: len(FIRST)] == FIRST
    pd.testing.assert_frame_equal(csv, made.table(), check_dtype=False)
    assert (loaded.name, loaded.paradigm, loaded.protocol, loaded.data) == ("mae_vit_b", "MIM", "fast", "digits")


def test_the_same_verification_gives_the_same_bytes(made, tmp_path):
    one, other = made.save(tmp_path / "a"), made_verification().save(tmp_path / "b")
    for name in (ACCURACY, MANIFEST, CORRECTNESS):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_another_run_is_replaced_only_when_told(made, tmp_path):
    folder = made.save(tmp_path / "run")
    (folder / "mine.txt").write_text("mine")
    other = made_verification(shares={"cls": 0.5, "ep": 0.6})
    with pytest.raises(UserError, match="holds another run; pass --overwrite"):
        other.save(folder)
    assert len(Verification.load(folder).results) == 3
    other.save(folder, overwrite=True)
    assert [result.name for result in Verification.load(folder).results] == ["cls@block11", "ep@block11"]
    assert (folder / "mine.txt").read_text() == "mine"


def test_a_full_disk_is_one_line_and_leaves_no_half_file(made, tmp_path, monkeypatch):
    folder, calls = tmp_path / "run", []

    def full_later(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_later)
    with pytest.raises(UserError, match=r"the disk is full, so .*correctness\.safetensors could not be written"):
        made.save(folder)
    assert [path.name for path in folder.iterdir()] == [MANIFEST]
    with pytest.raises(UserError) as error:
        Verification.load(folder)
    assert str(error.value) == (
        f"{folder} is not finished (there is no {CORRECTNESS}); go on with --resume, or verify again with --overwrite"
    )


def test_what_is_no_verification_is_one_line(made, tmp_path):
    with pytest.raises(UserError) as error:
        Verification.load(tmp_path)
    assert str(error.value) == (
        f"{tmp_path} holds no run (there is no manifest.json); give the folder that vitprobe verify wrote"
    )
    folder = made.save(tmp_path / "run")
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, "command": "analyze"} | {"reader": "vitprobe.Profile.load"}))
    with pytest.raises(UserError) as error:
        Verification.load(folder)
    assert str(error.value) == (
        f"{folder} is a run of vitprobe analyze, not of verify: give another folder (vitprobe.Profile.load reads this "
        "one)"
    )
    (folder / MANIFEST).write_text(json.dumps(manifest))
    whole = (folder / CORRECTNESS).read_bytes()
    for broken in (whole[:100], b"", whole[:-1]):
        (folder / CORRECTNESS).write_bytes(broken)
        with pytest.raises(UserError) as error:
            Verification.load(folder)
        assert str(error.value).startswith(f"{folder / CORRECTNESS} cannot be read (")
        assert str(error.value).endswith("); verify again with --overwrite") and "\n" not in str(error.value)


def test_a_verification_is_no_profile(made, tmp_path):
    with pytest.raises(UserError, match="is a run of vitprobe verify, not of analyze: give another folder"):
        Profile.load(made.save(tmp_path / "run"))


def test_results_of_several_runs_are_refused(made):
    fewer = made_verification(images=100)
    with pytest.raises(AssertionError, match="results of several runs"):
        Verification(made.manifest, made.images, made.labels, [*made.results, *fewer.results])
