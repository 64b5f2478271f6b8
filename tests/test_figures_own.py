"""`figures.draw`: values of one's own in the form of the package's figures."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest

from helpers import message
from test_figures import FakeProfile, labelled, legend_texts, main_lines, note
from vitprobe import UserError, figures


def depth(profile: Any) -> np.ndarray:
    return np.arange(profile.num_blocks) / 20


def refusal(*arguments: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        figures.draw(*arguments, **{"ylabel": "y", **options})
    return message(caught)


def test_an_array_is_a_line_per_model() -> None:
    ax = figures.draw([FakeProfile(), FakeProfile("b", "JEA")], depth, ylabel="depth (twentieths)", bounds=(0, 1))
    first, second = main_lines(ax)
    np.testing.assert_allclose(first.get_ydata(), np.arange(12) / 20)
    np.testing.assert_allclose(first.get_xdata(), np.arange(12))
    assert legend_texts(ax) == ["mae_vit_b (MIM)", "b (JEA)"] and first.get_color() != second.get_color()
    assert ax.get_ylabel() == "depth (twentieths)" and ax.get_ylim()[0] == 0 and ax.get_xlabel() == "block"
    assert not labelled(ax.collections, "_interval")


def test_depths_share_an_axis_and_notes_stand_under_it() -> None:
    several = [FakeProfile(num_blocks=4), FakeProfile("l", num_blocks=24)]
    ax = figures.draw(several, depth, ylabel="y", notes=["one", "two"])
    assert ax.get_xlabel().startswith("relative depth") and main_lines(ax)[0].get_xdata()[-1] == 1
    assert note(ax) == "one two"
    assert note(figures.draw(several, depth, ylabel="y", notes="only this")) == "only this"


def test_a_table_has_bands_and_heads() -> None:
    def halved(profile: Any) -> pd.DataFrame:
        table = profile.table(["cls_self_attention"])
        table[["center", "ci_low", "ci_high"]] /= 2
        return table

    profile = FakeProfile()
    ax = figures.draw(profile, halved, ylabel="y", bounds=(0, 1), heads=True)
    plain = figures.cls_self_attention(profile, heads=True)
    np.testing.assert_allclose(main_lines(ax)[0].get_ydata(), np.asarray(main_lines(plain)[0].get_ydata()) / 2)
    assert len(labelled(ax.collections, "_interval")) == 1
    assert len(labelled(ax.lines, "_head")) == len(labelled(plain.lines, "_head")) > 0
    assert note(ax) == "thin lines: single heads"


def test_references_and_ratios() -> None:
    ax = figures.draw(
        FakeProfile(), lambda p: depth(p) + 0.5, ylabel="y", bounds=(0, math.inf), reference={1: "even", 2.5: "odd"}
    )
    assert ax.get_yscale() == "log"
    assert [line.get_ydata()[0] for line in labelled(ax.lines, "_maximum")] == [1, 2.5]
    assert {"even", "odd"} <= {text.get_text() for text in ax.texts}
    ax = figures.draw(FakeProfile(), depth, ylabel="y", bounds=(0, 1), reference={0.1: "low"})
    assert ax.get_ylim()[1] >= 11 / 20


def test_a_model_without_values_is_named() -> None:
    def mine(profile: Any) -> np.ndarray:
        if profile.name == "b":
            raise UserError("b has no register")
        return depth(profile) * (math.nan if profile.name == "c" else 1)

    ax = figures.draw([FakeProfile(), FakeProfile("b"), FakeProfile("c")], mine, ylabel="y")
    assert note(ax) == "not shown: b (has no register); c (no finite value)"
    assert refusal([FakeProfile("b"), FakeProfile("c")], mine) == (
        "no model has the values to draw: b (has no register); c (no finite value)"
    )


def test_values_that_cannot_be_drawn() -> None:
    table = pd.DataFrame({"block": [0, 0], "center": [1.0, 2.0]})
    lacks = table.rename(columns={"center": "mean"})
    advice = "return (12,), one number per block, or a table with the columns block and center"
    for found, expected in (
        (np.zeros((12, 2)), f"the values of mae_vit_b have the shape (12, 2): {advice}"),
        ("text", f"the values of mae_vit_b have a str: {advice}"),
        (
            lacks,
            "the table for mae_vit_b has no column center, but block, mean: name the values center, one row per block",
        ),
        (table, "the table for mae_vit_b has several rows for a block: one row per block, one per head beside"),
        (np.full(12, 1.5), "a value of mae_vit_b is 1.5, outside bounds=(0, 1): correct one of them"),
    ):
        assert refusal(FakeProfile(), lambda profile, found=found: found, bounds=(0, 1)) == expected
    assert "figures draw profiles" in refusal(7, depth)


def test_the_old_name_of_figure_5_warns_and_draws_the_same() -> None:
    with pytest.warns(DeprecationWarning, match="is called figures.patch_self_attention_ratio now"):
        old = figures.patch_self_attention(FakeProfile())
    new = figures.patch_self_attention_ratio(FakeProfile())
    np.testing.assert_array_equal(main_lines(old)[0].get_ydata(), main_lines(new)[0].get_ydata())
