"""The teaser's bars by their artists' data."""

from __future__ import annotations

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

from made_verifications import made_verification
from vitprobe import figures
from vitprobe.errors import UserError


@pytest.fixture(scope="module")
def several() -> list:
    return [
        made_verification(),
        made_verification("ijepa_vit_h14_in22k", "MIM", {"gap": 0.5, "abmilp": 0.6, "ep": 0.7}),
        made_verification("dino_vit_b", "JEA", {"cls": 0.7, "gap": 0.6, "abmilp": 0.7, "ep": 0.75}),
    ]


def bars(ax) -> list:
    return sorted(ax.patches, key=lambda bar: bar.get_x())


def words(ax) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def note(ax) -> str:
    (text,) = [text for text in ax.texts if text.get_gid() == "note"]
    return " ".join(text.get_text().split())


def test_bars_and_lines_are_the_tables_numbers(several):
    with matplotlib.rc_context():
        before = dict(matplotlib.rcParams)
        ax = figures.selective_aggregation(several)
        assert dict(matplotlib.rcParams) == before
    expected = [
        each.table().set_index("label").loc[f"{aggregator}@block11"]
        for each, first in zip(several, ("cls", "gap", "cls"), strict=True)
        for aggregator in (first, "abmilp")
    ]
    heights = [bar.get_height() for bar in bars(ax)]
    np.testing.assert_allclose(heights, [100 * row["accuracy"] for row in expected])
    ends = np.array([line.get_segments()[0][:, 1] for line in ax.collections])
    np.testing.assert_allclose(ends, [[100 * row["ci_low"], 100 * row["ci_high"]] for row in expected])
    assert [text.get_text() for text in ax.texts[:6]] == [f"{height:.1f}" for height in heights]
    assert ax.get_ylim()[0] == 0 and ax.get_ylim()[1] > 100 * max(row["ci_high"] for row in expected)
    assert ax.get_ylabel() == "accuracy (%)"
    assert words(ax) == ["[cls] or gap", "abmilp"]


def test_under_each_model_stands_its_name_and_its_paired_gain(several):
    ax = figures.selective_aggregation(several)
    labels = [text.get_text() for text in ax.get_xticklabels()]
    for label, verification in zip(labels, several, strict=True):
        row = verification.table().set_index("label").loc["abmilp@block11"]
        name, paradigm = verification.name, verification.paradigm
        *lines, gain, interval = label.split("\n")
        assert "".join(lines).replace(" ", "") == f"{name}({paradigm})"
        assert gain == f"{100 * row['gain']:+.1f}"
        assert interval == f"[{100 * row['gain_ci_low']:.1f}, {100 * row['gain_ci_high']:.1f}]"
    assert "dino_vit_b" in labels[2]  # what fits is not broken


def test_the_note_says_what_numbers_are_conditional_on(several):
    said = note(figures.selective_aggregation(several))
    assert "95 % intervals over test images and seeds" in said and "paired gain of abmilp" in said
    assert "conditional on these backbone weights; digits, protocol fast" in said
    assert "first bar is gap, not [cls]: ijepa_vit_h14_in22k" in said
    alone = note(figures.selective_aggregation(made_verification(seeds=1)))
    assert "95 % intervals over test images alone (one seed);" in alone and "seeds" not in alone


def test_the_note_names_the_models_of_one_seed_beside_others(several):
    said = note(figures.selective_aggregation([made_verification("mae_one_seed", seeds=1), *several]))
    assert "95 % intervals over test images and seeds" in said
    assert "one seed, so intervals are over test images alone: mae_one_seed" in said
    assert "one seed" not in note(figures.selective_aggregation(several))


def test_models_that_lack_an_aggregator_are_named(several):
    ax = figures.selective_aggregation(several, ["abmilp", "ep"])
    assert len(bars(ax)) == 6 and words(ax) == ["[cls] or gap", "abmilp", "ep"]
    assert "not shown: mae_vit_b (has no ep, but cls@block11, gap@block11, abmilp@block11)" in note(ax)
    only_gap = figures.selective_aggregation(several[1], ["ep"])
    assert words(only_gap) == ["gap", "ep"] and "first bar" not in note(only_gap)


def test_a_name_without_place_is_the_deepest_raw_one_and_a_full_name_is_itself():
    verification = made_verification(places=("@block11+norm", "@block11", "@block2"))
    table = verification.table().set_index("label")["accuracy"]
    for asked, found in (("abmilp", "abmilp@block11"), ("abmilp@block2", "abmilp@block2")):
        heights = [bar.get_height() for bar in bars(figures.selective_aggregation(verification, [asked]))]
        np.testing.assert_allclose(heights, [100 * table[found.replace("abmilp", "cls")], 100 * table[found]])


def test_aggregators_at_different_places_share_no_baseline():
    verification = made_verification(shares={"cls": 0.5, "abmilp": 0.6, "ep": 0.6}, places=("@block2", "@block11"))
    with pytest.raises(UserError) as error:
        figures.selective_aggregation(verification, ["abmilp@block2", "ep@block11"])
    assert str(error.value) == (
        "no model has all that is to be drawn: mae_vit_b (gains are over different baselines: cls@block11, cls@block2)"
    )


def test_colours_are_those_of_the_paradigms_and_the_last_bar_is_full(several):
    first, second, *_, fifth, sixth = bars(figures.selective_aggregation(several))
    assert first.get_facecolor()[:3] == second.get_facecolor()[:3] != sixth.get_facecolor()[:3]
    assert second.get_facecolor()[3] == sixth.get_facecolor()[3] == 1 > fifth.get_facecolor()[3]


def test_many_models_widen_our_own_figure_and_not_the_users(several):
    assert figures.selective_aggregation(several).figure.get_figwidth() == pytest.approx(3.4)
    wide = figures.selective_aggregation(several * 3)
    assert wide.figure.get_figwidth() > 6
    assert "mae_vit_b #2" in wide.get_xticklabels()[3].get_text().replace("\n", " ")
    ax = Figure(figsize=(4, 3), layout="constrained").add_subplot()
    assert figures.selective_aggregation(several, ax=ax) is ax
    assert tuple(ax.figure.get_size_inches()) == (4, 3)


def test_it_is_saved_like_any_other(several, tmp_path):
    one, other = (figures.save_figure(figures.selective_aggregation(several), tmp_path / stem) for stem in "ab")
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in other]


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ([], "there is no verification to draw; give one or several (vitprobe.Verification.load reads a run)"),
        (
            ["mae"],
            "this figure draws verifications (what vitprobe.verify and vitprobe.Verification.load give), not a str",
        ),
    ],
)
def test_what_cannot_be_drawn_is_one_line(given, line):
    with pytest.raises(UserError) as error:
        figures.selective_aggregation(given)
    assert str(error.value) == line


def test_no_baseline_is_one_line():
    with pytest.raises(UserError) as error:
        figures.selective_aggregation(made_verification(shares={"abmilp": 0.6}))
    assert str(error.value) == "no model has all that is to be drawn: mae_vit_b (has neither cls nor gap)"
