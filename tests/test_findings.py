"""What the zoo is said to show: the shipped profiles are what the code computes, the document is what was measured."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import vitprobe as vp
from tiny_recipes import Recipe  # makes zoo importable
from vitprobe.errors import UserError
from vitprobe.profile.references import COMPARED, load_references
from zoo import findings
from zoo.recipe import load_recipe

DOCUMENT = Path(__file__).parent.parent / "docs" / "findings.md"
ZOO = [*findings.BUNDLED, *findings.COMPARED]


@pytest.fixture(scope="module")
def profiles() -> dict[str, vp.Profile]:
    """Of the bundled models on the packaged photographs."""
    return {name: vp.analyze(name) for name in findings.BUNDLED}


@pytest.mark.parametrize("reference", load_references(), ids=lambda reference: reference.name)
def test_a_shipped_profile_is_what_the_code_computes(profiles, reference):
    profile = profiles[reference.name]
    assert profile.manifest["model"]["weights_sha256"] == reference.weights_sha256
    for name in COMPARED:
        expected = np.array(reference.curves[name])
        allowed = 1e-4 * np.maximum(0.01, np.abs(expected)) + 1e-6  # the design's bound, and six decimals
        assert (np.abs(profile.estimate(name).mean - expected) <= allowed).all(), name


def test_every_bundled_model_is_a_reference_and_random_weights_are_its_control():
    assert [reference.name for reference in load_references()] == list(findings.BUNDLED)
    assert findings.BUNDLED[-1] == "random_vit_nano"


def test_the_measured_weights_are_the_shipped_ones(profiles):
    table = pd.read_csv(findings.TABLES / "late.csv")
    assert set(table["model"]) == set(ZOO)
    for name, profile in profiles.items():
        measured = set(table.loc[table["model"] == name, "weights"])
        assert measured == {profile.manifest["model"]["weights_sha256"][:12]}, name
    assert set(table["n"]) == {8000}


def test_late_means_are_those_of_the_curves():
    late = pd.read_csv(findings.TABLES / "late.csv").set_index(["model", "statistic"])["mean"]
    curves = pd.read_csv(findings.TABLES / "curves.csv")
    assert sorted(set(curves["block"])) == list(range(12))
    of_curves = curves[curves["block"] >= 8].groupby(["model", "statistic"])["mean"].mean()
    np.testing.assert_allclose(late, of_curves[late.index], rtol=1e-4)


def test_the_claims_are_differences_of_these_means():
    late = pd.read_csv(findings.TABLES / "late.csv").set_index(["model", "statistic"])["mean"]
    claims = pd.read_csv(findings.TABLES / "claims.csv")
    assert len(claims) == len(findings.CLAIMS)
    for _, row in claims.iterrows():
        difference = late[row["one"], row["statistic"]] - late[row["other"], row["statistic"]]
        assert row["difference"] == pytest.approx(difference, abs=2e-5)
        assert row["ci_low"] <= row["difference"] <= row["ci_high"]


def test_the_document_has_the_tables_that_the_command_prints():
    text = DOCUMENT.read_text()
    for table in (findings.late_table(), findings.claims_table(), findings.gains_table()):
        assert table in text


def test_a_claim_is_judged_by_differences_paired_by_photograph(profiles):
    claim = findings.Claim("…", "cls_self_attention", "mae_vit_nano", "random_vit_nano")
    found = findings.judge(claim, profiles)
    values = [profiles[name].values.read("cls_self_attention")[:, 8:].mean(axis=(1, 2)) for name in vars(claim).values()
              if name in profiles]  # fmt: skip
    groups = profiles["mae_vit_nano"].values.groups
    differences = pd.Series(values[0] - values[1]).groupby(list(groups)).mean()
    half = 1.0 * differences.std() / np.sqrt(len(differences))
    assert found["n"] == len(differences)
    assert found["difference"] == pytest.approx(differences.mean(), rel=1e-4)
    assert (found["ci_high"] - found["ci_low"]) / 2 > 1.9 * half  # t's 0.975 quantile is above 1.96


def test_comparison_runs_differ_from_the_shipped_recipe_in_what_they_say():
    """The recipes that are not shipped change one thing each."""
    shipped, short = load_recipe("mae_vit_nano"), load_recipe("mae10_vit_nano")
    same = {"name"}

    def changed(one: Recipe, other: Recipe) -> set[str]:
        return {key for key, value in vars(one).items() if vars(other)[key] != value} - same

    assert changed(shipped, short) == {"epochs"}
    assert changed(short, load_recipe("mae_xavier_vit_nano")) == {"initial"}


def test_an_unknown_recipe_is_no_model():
    with pytest.raises(UserError):
        vp.load_model("mae10_vit_nano")
