"""Statistics declared from outside: they work wherever the package's do, and what is wrong with one is one line."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import vitprobe as vp
from helpers import assert_close, captured, images, message, random_view, tiny_vit
from vitprobe.layout import TokenLayout
from vitprobe.statistics import STATISTICS, comparable, compute_statistics, of_the_paper
from vitprobe.statistics.computing import AskedView

SHARE: dict[str, Any] = {"label": "a share", "unit": "share", "bounds": (0, 1)}


@pytest.fixture(autouse=True)
def own_table() -> Iterator[None]:
    kept = dict(STATISTICS)
    yield
    STATISTICS.clear()
    STATISTICS.update(kept)


def patch_mass(view: Any) -> Tensor:
    return (view.patch_sums.log_z_patches - view.patch_sums.log_z).exp().mean(dim=-1)


def from_weights(view: Any) -> Tensor:
    layout = view.layout
    return view.probabilities()[:, :, layout.patches][..., layout.patches].sum(dim=-1).mean(dim=-1)


def declared(compute: Any = patch_mass, name: str = "mass", **options: Any) -> str:
    vp.statistics.declare(name, **{**SHARE, "asks": "sums", **options})(compute)
    return name


def refusal(call: Any) -> str:
    with pytest.raises(vp.UserError) as caught:
        call()
    return message(caught)


@pytest.mark.parametrize("keep", ["qk", "statistics"])
@pytest.mark.parametrize("kernel", ["auto", "model"])
@pytest.mark.parametrize("others", [[], ["patch_entropy"], ["cls_entropy"]])
def test_its_values_are_those_of_the_weights(keep: str, kernel: str, others: list[str]) -> None:
    declared()
    declared(from_weights, "mass_of_weights", asks="weights")
    model = tiny_vit(class_token=True, reg_tokens=2)
    reference = captured(model, images(3))
    expected = torch.stack([view.probabilities()[:, :, 3:, 3:].sum(-1).mean(-1) for view in reference], dim=1)
    for name in ("mass", "mass_of_weights"):
        found = captured(model, images(3), keep=keep, kernel=kernel, statistics=[name, *others]).statistics()
        assert set(found) == {name, *others}
        assert_close(found[name], expected)


def test_in_a_profile_a_table_and_a_figure(tmp_path: Path) -> None:
    declared(uniform=16 / 17)
    profile = vp.analyze(tiny_vit(), images(6), statistics=["mass", "cls_entropy"], out=tmp_path / "run")
    table = vp.Profile.load(tmp_path / "run").table(["mass"])
    assert len(table) == 2 * 3 and set(table["interval"]) == {"skew-t"} and profile.bounds("mass") == (0, 1)
    assert (table["ci_low"] < table["center"]).all() and (table["center"] < table["ci_high"]).all()
    ax = vp.figures.statistic(profile, "mass")
    assert ax.get_ylabel() == "a share (share)" and ax.get_ylim()[0] == 0
    assert vp.figures.heads(profile, "mass").get_title() == "VisionTransformer"
    assert "mass" in vp.analyze(tiny_vit(), images(2)).statistics  # among all


def test_a_run_whose_statistic_is_not_declared_here(tmp_path: Path) -> None:
    declared()
    vp.analyze(tiny_vit(), images(2), statistics=["mass", "cls_entropy"], out=tmp_path / "run")
    del STATISTICS["mass"]
    profile = vp.Profile.load(tmp_path / "run")
    advice = "VisionTransformer holds mass, which is not declared here: import the module that declares it"
    assert refusal(profile.table) == refusal(lambda: profile.table(["mass"])) == advice
    assert len(profile.table(["cls_entropy"])) == 6


def test_a_ratio_is_on_the_log_scale_and_a_maximum_has_its_line() -> None:
    declared(lambda view: patch_mass(view) + 1, "ratio", unit="ratio", bounds=(0, math.inf))
    declared(maximum="all of it", from_zero=False)
    profile = vp.analyze(tiny_vit(), images(6), statistics=["mass", "ratio"])
    assert set(profile.table(["ratio"])["about"]) == {"geometric mean"}
    assert vp.figures.statistic(profile, "ratio").get_yscale() == "log"
    ax = vp.figures.statistic(profile, "mass")
    assert "maximum: all of it" in {text.get_text() for text in ax.texts}
    assert ax.get_ylim()[0] > 0


def test_tolerance_counts_as_a_share_of_a_maximum() -> None:
    from vitprobe.profile.stopping import required_precision

    declared(maximum="all of it", bounds=lambda layout: (0, layout.num_patches))
    declared(name="plain")
    layout = TokenLayout((4, 4), has_cls=True)
    precision = required_precision(["mass", "plain", "cls_entropy"], 0.1, layout)
    np.testing.assert_allclose(precision.absolute, [1.6, 0, 0.1 * math.log(16)])
    np.testing.assert_allclose(precision.relative, [0, 0.1, 0])


def test_one_value_per_block() -> None:
    declared(lambda view: view.output_norms.amax(1, keepdim=True), "largest", unit="norm", bounds=(0, math.inf),
             asks="tokens", needs="residual", per_head=False)  # fmt: skip
    found = captured(tiny_vit(), keep="statistics", statistics=["largest"]).statistics()
    assert found["largest"].shape == (2, 2, 1)


def test_what_a_model_lacks_is_said() -> None:
    declared(lambda view: view.cls_row.entropy[..., 0], "mine", asks="cls", needs=("cls", "patches"), bounds=(0, 9))
    capture = captured(tiny_vit(class_token=False, global_pool="avg"), statistics=["mine", "patch_entropy"])
    assert set(capture.statistics()) == {"patch_entropy"}
    assert capture.undefined["mine"] == "needs a [cls] token"


def test_names_that_are_taken() -> None:
    assert refusal(lambda: declared(name="cls_entropy")) == (
        "there is a statistic cls_entropy already (vitprobe's own): give yours another name"
    )
    declared()
    declared()  # a cell run twice
    assert refusal(lambda: declared(from_weights)) == (
        f"there is a statistic mass already (from {__name__}): give yours another name"
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"name": "two words"}, "'two words' is no name for a statistic: use letters, digits and underscores"),
        (
            {"asks": "row"},
            "mass: asks='row' is not known; choose 'tokens', 'cls', 'sums', 'rows' or 'weights'",
        ),
        (
            {"needs": "cls head"},
            "mass: needs='head' is not known; choose among cls, registers, patches, residual, update, distribution",
        ),
        (
            {"bounds": (1, 0)},
            "mass: bounds=(1, 0) are none; give two finite numbers, (0, inf) for a ratio, or (-inf, inf)",
        ),
        (
            {"bounds": (-1, math.inf)},
            "mass: bounds=(-1, inf) are none; give two finite numbers, (0, inf) for a ratio, or (-inf, inf)",
        ),
        (
            {"bounds": lambda layout: 1},
            "mass: bounds=1 are none; give two finite numbers, (0, inf) for a ratio, or (-inf, inf)",
        ),
        (
            {"bounds": (0, math.inf), "maximum": "most"},
            "mass: maximum= names the highest possible value, and its bounds have none: leave it out",
        ),
    ],
)
def test_what_cannot_be_declared(options: dict[str, Any], expected: str) -> None:
    assert refusal(lambda: declared(**options)) == expected
    assert "mass" not in STATISTICS


@pytest.mark.parametrize(
    ("compute", "options", "expected"),
    [
        (
            lambda view: patch_mass(view)[:, 0],
            {},
            "mass gave the shape (2,), not (2, 2), (B, H)",
        ),
        (
            patch_mass,
            {"per_head": False},
            "mass gave the shape (2, 2), not (2, 1), (B, 1); with a value per head leave per_head=False out",
        ),
        (lambda view: patch_mass(view).numpy(), {}, "mass gave a ndarray, not a tensor (2, 2), (B, H)"),
        (
            lambda view: torch.full_like(patch_mass(view), 1.5),
            {},
            "mass gave 1.5 in block 0, outside its bounds 0 to 1: correct the function, or the bounds that it was "
            "declared with",
        ),
        (
            lambda view: patch_mass(view) * math.nan,
            {},
            "mass gave nan in block 0, where the attention is finite: correct the function",
        ),
        (
            lambda view: view.patch_rows.entropy.mean(-1),
            {},
            "mass reads patch_rows, but asks for 'sums': declare asks='rows'",
        ),
        (
            lambda view: view.probabilities(),
            {},
            "mass reads probabilities, but asks for 'sums': declare asks='weights'",
        ),
        (lambda view: view.query, {"asks": "rows"}, "mass reads query, but asks for 'rows': declare asks='weights'"),
        (lambda view: view.cls_row, {}, "mass reads cls_row: declare it with needs='cls'"),
        (lambda view: view.update_norms, {}, "mass reads update_norms: declare it with needs='update'"),
    ],
)
@pytest.mark.parametrize("keep", ["qk", "statistics"])
def test_what_a_function_may_not_do(compute: Any, options: dict[str, Any], expected: str, keep: str) -> None:
    declared(compute, **options)

    def run() -> None:
        captured(tiny_vit(), keep=keep, statistics=["mass", "cls_entropy"]).statistics()

    assert refusal(run) == expected
    assert refusal(lambda: vp.analyze(tiny_vit(), images(2), statistics=["mass"])) == expected


def test_broken_activations_are_the_models() -> None:
    declared()
    model = tiny_vit()
    model.blocks[1].attn.qkv.weight.data.fill_(1e30)  # pyright: ignore
    assert "activations of VisionTransformer are NaN or infinite from block 1" in refusal(
        lambda: vp.analyze(model, images(2), statistics=["mass"])
    )


def test_a_rounding_beyond_the_bounds_passes_and_integers_become_floats() -> None:
    view = random_view(TokenLayout((2, 2), has_cls=True))
    declared(lambda view: torch.ones(view.shape[:2]) * (1 + 1e-5))
    declared(lambda view: torch.ones(view.shape[:2], dtype=torch.int64), "count")
    found = compute_statistics(view, ["mass", "count"])
    assert found["count"].dtype == torch.float32 and (found["mass"] > 1).all()


def test_differential_attention_is_a_difference_for_both_ways_to_ask() -> None:
    declared()
    declared(from_weights, "mass_of_weights", asks="weights", bounds=(-math.inf, math.inf))
    from timm.models.vision_transformer import DiffAttention

    found = captured(tiny_vit(attn_layer=DiffAttention), statistics=["mass", "mass_of_weights"]).statistics()
    assert_close(found["mass"], found["mass_of_weights"])


def test_the_view_of_a_function_is_an_attention_view() -> None:
    view = random_view(TokenLayout((2, 2), has_cls=True))
    assert isinstance(AskedView(view, STATISTICS["cls_entropy"]), type(view))


def test_lists_of_the_papers_three_are_the_tables() -> None:
    from vitprobe.bench import PAPERS
    from vitprobe.figures.saving import PAPER_FIGURES
    from vitprobe.profile.profile import SUMMARY
    from vitprobe.profile.references import COMPARED, load_references

    paper, compared = ([each.name for each in three()] for three in (of_the_paper, comparable))
    assert paper == ["cls_self_attention", "cls_entropy", "patch_self_attention_ratio"]
    assert compared == ["cls_self_attention", "cls_entropy_share", "patch_self_attention_ratio"]
    assert list(PAPERS) == list(PAPER_FIGURES.values()) == paper
    assert list(COMPARED) == list(SUMMARY[:3]) == compared
    for reference in load_references():
        assert list(reference.curves) == compared
    printed = [each.name for each in STATISTICS.values() if each.heading]
    assert printed[:3] == compared
