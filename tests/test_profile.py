"""`Profile`: its table, summary, saving, loading, and what a notebook shows."""

import json
import math

import numpy as np
import pandas as pd
import pytest

from fakes import make_profile
from interval_reference import skew_t_reference
from vitprobe.errors import UserError
from vitprobe.layout import TokenLayout
from vitprobe.profile.profile import Profile

CURVES = {
    "cls_self_attention": [0.1, 0.2, 0.3],
    "cls_self_attention_ratio": [0.5, 1.0, 2.0],
    "cls_entropy_share": [0.9, 0.8, 0.7],
    "patch_norm_max_ratio": [1.5, 1.6, 1.7],
}


@pytest.fixture
def profile() -> Profile:
    return make_profile(CURVES, undefined={"cls_to_registers": "needs register tokens"})


def test_table_is_tidy_with_a_row_a_head_and_one_for_their_mean(profile):
    table = profile.table()
    assert list(table.columns) == [
        "model", "block", "head", "statistic", "mean", "ci_low", "ci_high", "n", "center", "about", "interval"
    ]  # fmt: skip
    per_head, per_block = 3 * (2 + 1), 3 * 1  # one value a block has no row a head beside its own
    assert table.groupby("statistic").size().to_dict() == {
        "cls_self_attention": per_head, "cls_self_attention_ratio": per_head, "cls_entropy_share": per_head,
        "patch_norm_max_ratio": per_block,
    }  # fmt: skip
    means = table[table["head"].isna() & (table["statistic"] == "cls_self_attention")]
    np.testing.assert_allclose(means["mean"], CURVES["cls_self_attention"], atol=1e-6)
    assert list(means["block"]) == [0, 1, 2]
    heads = table[table["head"].notna() & (table["statistic"] == "cls_self_attention")]
    assert list(heads["head"]) == [0, 1] * 3
    first = profile.values.read("cls_self_attention")[:, 1, 0]
    np.testing.assert_allclose(heads[(heads["block"] == 1) & (heads["head"] == 0)]["mean"], first.mean(), rtol=1e-6)
    assert set(table["n"]) == {40}
    assert str(table["head"].dtype) == "Int64"


def test_intervals_are_labelled_and_hold_their_center(profile):
    table = profile.table()
    kinds = table.groupby("statistic")["interval"].agg(lambda kinds: set(kinds).pop())
    assert kinds["cls_self_attention"] == "skew-t"
    assert kinds["cls_self_attention_ratio"] == kinds["patch_norm_max_ratio"] == "log-t"
    assert ((table["ci_low"] < table["center"]) & (table["center"] < table["ci_high"])).all()
    bounded = table[table["interval"] == "skew-t"]
    assert (bounded["center"] == bounded["mean"]).all()
    assert set(bounded["about"]) == {"mean"}
    assert set(table[table["interval"] == "log-t"]["about"]) == {"geometric mean"}


def test_bounds_are_those_of_this_profile():
    layout = TokenLayout(grid=(3, 5), has_cls=True, patch_size=(4, 9))
    profile = make_profile(CURVES, layout=layout)
    assert profile.bounds("cls_self_attention") == (0, 1)
    assert profile.bounds("cls_to_patches") == (0, pytest.approx(1 / 15))
    assert profile.bounds("cls_entropy") == (0, pytest.approx(math.log(15)))
    assert profile.bounds("attention_distance") == (0, pytest.approx(math.hypot(2, 4)))
    assert profile.bounds("attention_distance_px") == (0, pytest.approx(6 * math.hypot(2, 4)))
    assert profile.bounds("patch_norm_max_ratio") == (1, math.inf)
    profile.manifest["signed"] = True
    assert profile.bounds("cls_self_attention") == (-math.inf, math.inf)
    assert profile.bounds("patch_norm_max_ratio") == (1, math.inf)  # of norms, not of attention
    with pytest.raises(UserError, match="there is no statistic 'entropie'"):
        profile.bounds("entropie")


def test_a_signed_profile_has_intervals_that_reach_below_0():
    profile = make_profile({"patch_self_attention": [-0.2, 0.0, 0.2]}, spread=0.3)
    profile.manifest["signed"] = True
    table = profile.table()
    assert set(table["interval"]) == {"skew-t"}
    assert (table["ci_low"] < table["center"]).all() and (table["center"] < table["ci_high"]).all()
    assert table["ci_low"].min() < -0.2


def test_the_summary_csv_says_which_number_its_interval_belongs_to(tmp_path):
    curves = {"cls_self_attention_ratio": [0.5, 1.0, 2.0], "cls_self_attention": [0.1, 0.2, 0.3]}
    written = pd.read_csv(make_profile(curves).save(tmp_path / "run") / "summary.csv")
    assert dict(zip(written["statistic"], written["about"], strict=True)) == {
        "cls_self_attention_ratio": "geometric mean", "cls_self_attention": "mean"
    }  # fmt: skip
    assert ((written["ci_low"] <= written["center"]) & (written["center"] <= written["ci_high"])).all()


def test_estimate_over_late_blocks_averages_them_image_by_image(profile):
    result = profile.estimate("cls_self_attention", slice(1, 3))
    expected = profile.values.read("cls_self_attention").astype(float)[:, 1:3].mean(axis=(1, 2))
    assert result.mean == pytest.approx(expected.mean())
    assert (result.low, result.high) == pytest.approx(skew_t_reference(expected))


def test_summary_has_a_row_a_block(profile):
    summary = profile.summary()
    assert list(summary.index) == [0, 1, 2]
    assert list(summary.columns) == ["cls_self_attention", "cls_entropy_share"]
    np.testing.assert_allclose(summary["cls_entropy_share"], CURVES["cls_entropy_share"], atol=1e-6)


def test_what_is_not_there_is_said_with_its_reason(profile):
    with pytest.raises(UserError, match="toy has no cls_to_registers: needs register tokens"):
        profile.table(["cls_to_registers"])
    with pytest.raises(UserError, match="toy has no patch_entropy: was not asked for in this run"):
        profile.estimate("patch_entropy")
    with pytest.raises(UserError, match=r"there is no statistic 'cls_self'; the nearest are .*cls_self_attention"):
        profile.table(["cls_self"])


def test_save_and_load_give_the_same_profile(profile, tmp_path):
    profile.save(tmp_path / "run")
    again = Profile.load(tmp_path / "run")
    assert again.manifest == json.loads(json.dumps(profile.manifest))
    assert again.layout == profile.layout
    assert (again.values.names, again.values.groups) == (profile.values.names, profile.values.groups)
    for name in CURVES:
        np.testing.assert_array_equal(again.values.read(name), profile.values.read(name))
    pd.testing.assert_frame_equal(again.table(), profile.table())
    assert str(again.diagnosis()) == str(profile.diagnosis())
    parquet = pd.read_parquet(tmp_path / "run" / "summary.parquet")
    pd.testing.assert_frame_equal(parquet, profile.table())
    csv = pd.read_csv(tmp_path / "run" / "summary.csv", dtype={"head": "Int64"})
    np.testing.assert_allclose(csv["mean"], profile.table()["mean"])
    assert again.save(tmp_path / "run", overwrite=True)  # over itself
    assert Profile.load(tmp_path / "run").num_images == 40


def test_save_refuses_another_run(profile, tmp_path):
    profile.save(tmp_path / "run")
    with pytest.raises(UserError, match="holds another run"):
        profile.save(tmp_path / "run")
    profile.save(tmp_path / "run", overwrite=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no run .there is no manifest.json."),
        ("{", "manifest.json is broken"),
        ("[]", "manifest.json is broken"),
        ("{}", "manifest.json is broken"),
        ('{"format_version": 99}', "has format 99, this vitprobe reads formats up to 2; upgrade vitprobe"),
        ('{"format_version": 1}', "manifest.json is broken, or none of vitprobe's"),
        ('{"name": "my web app"}', "manifest.json is broken, or none of vitprobe's"),
        (
            '{"format_version": 1, "model": {}, "layout": {}, "undefined": {}, "arguments": {}}',
            "holds no finished shard",
        ),
    ],
)
def test_what_is_no_run_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=message):
        Profile.load(tmp_path)


def test_a_run_is_read_from_anywhere(profile, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    profile.save("run")
    again = Profile.load("run")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert len(again.table()) == len(profile.table())


def test_shards_of_another_run_are_not_mixed_in(profile, tmp_path):
    profile.save(tmp_path / "run")
    make_profile(CURVES, heads=3).save(tmp_path / "other")
    shard = tmp_path / "other" / "statistics" / "shard-00000.safetensors"
    shard.rename(tmp_path / "run" / "statistics" / "shard-00001.safetensors")
    with pytest.raises(UserError, match=r"shard-00001\.safetensors is of another run than the shards before it"):
        Profile.load(tmp_path / "run").table()


def test_notebooks_show_the_diagnosis_and_the_table(profile):
    shown = make_profile(CURVES, name="<b>evil</b>")._repr_html_()
    assert "&lt;b&gt;evil&lt;/b&gt;" in shown
    assert "<b>evil" not in shown
    assert "cls_self_attention" in shown
    assert "<li>" in shown
    assert repr(profile) == "Profile('toy', 40 images, 3 blocks)"
