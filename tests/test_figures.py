"""Figures by their artists' data, and files by their bytes."""

from __future__ import annotations

import gc
import itertools
import math
import os
import weakref
from dataclasses import dataclass, field

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from fakes import make_profile
from helpers import SMALL, images, tiny
from vitprobe import figures
from vitprobe.errors import UserError
from vitprobe.figures import saving, style
from vitprobe.layout import TokenLayout
from vitprobe.profile.analysis import analyze
from vitprobe.statistics import STATISTICS

NO_CLS = "needs a [cls] token"
ALL_SEEN = frozenset({"residual", "update"})


@dataclass
class FakeProfile:
    """What figures ask of a profile, with values that are a function of block, head and `level`."""

    name: str = "mae_vit_b"
    paradigm: str = "MIM"
    grid: tuple[int, int] = (14, 14)
    has_cls: bool = True
    num_blocks: int = 12
    level: float = 0.2
    n: int = 50
    num_heads: int = 3
    lacks: tuple[str, ...] = ()
    no_interval: bool = False
    signed: bool = False
    asked: list[str] = field(default_factory=list)

    @property
    def layout(self) -> TokenLayout:
        return TokenLayout(self.grid, self.has_cls)

    @property
    def undefined(self) -> dict[str, str]:
        reasons = {name: entry.undefined(self.layout, ALL_SEEN) for name, entry in STATISTICS.items()}
        return {name: reason for name, reason in reasons.items() if reason and "register" not in reason}

    def bounds(self, statistic: str) -> tuple[float, float]:
        signed = self.signed and STATISTICS[statistic].per_head
        return (-math.inf, math.inf) if signed else STATISTICS[statistic].bounds(self.layout)

    def center(self, statistic: str, block: int, head: int = 1) -> float:
        highest = min(STATISTICS[statistic].bounds(self.layout)[1], 10.0)
        return highest * (self.level + 0.3 * block / self.num_blocks + 0.05 * (head - 1))

    def table(self, statistics: list[str] | None = None) -> pd.DataFrame:
        rows = []
        for statistic in statistics or list(STATISTICS):
            self.asked.append(statistic)
            if statistic in self.lacks:
                raise UserError(f"{self.name} has no {statistic}: was not asked for in this run")
            entry = STATISTICS[statistic]
            without = self.no_interval or self.n < 2
            interval = "none" if without else "t" if entry.bounded else "log-t"
            for block in reversed(range(self.num_blocks)):  # the order of rows is the table's affair
                for head in [*range(self.num_heads if entry.per_head else 0), pd.NA]:
                    center = self.center(statistic, block, 1 if head is pd.NA else head)
                    low, high = (math.nan, math.nan) if without else sorted((0.9 * center, 1.1 * center))
                    mean = center * (1.0 if entry.bounded else 1.3)
                    rows.append((self.name, block, head, statistic, mean, low, high, self.n, center, interval))
        names = ["model", "block", "head", "statistic", "mean", "ci_low", "ci_high", "n", "center", "interval"]
        return pd.DataFrame(rows, columns=names).astype({"head": "Int64", "block": int})


def main_lines(ax: Axes) -> list:
    return [line for line in ax.lines if not str(line.get_label()).startswith("_")]


def labelled(artists, label: str) -> list:
    return [artist for artist in artists if artist.get_label() == label]


def legend_texts(ax: Axes) -> list[str]:
    legend = ax.get_legend()
    assert legend is not None
    return [text.get_text() for text in legend.get_texts()]


def note(ax: Axes) -> str:
    (text,) = [text for text in ax.texts if text.get_gid() == "note"]
    return " ".join(text.get_text().split())


def maximum_words(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.texts if text.get_gid() != "note"]


def overlap(one, other) -> bool:
    a, b = one.get_window_extent(), other.get_window_extent()
    return min(a.x1, b.x1) - max(a.x0, b.x0) > 0.5 and min(a.y1, b.y1) - max(a.y0, b.y0) > 0.5


# --- lines, bands, heads


@pytest.mark.parametrize(
    ("draw", "name"),
    [
        (figures.cls_self_attention, "cls_self_attention"),
        (figures.cls_entropy, "cls_entropy"),
        (figures.patch_self_attention_ratio, "patch_self_attention_ratio"),
    ],
)
def test_paper_figures_draw_the_tables_numbers(draw, name):
    profiles = [FakeProfile(), FakeProfile("dino_vit_b", "JEA", level=0.5)]
    ax = draw(profiles)
    lines = main_lines(ax)
    assert [line.get_label() for line in lines] == ["mae_vit_b (MIM)", "dino_vit_b (JEA)"]
    for line, profile in zip(lines, profiles, strict=True):
        x, y = line.get_data()
        np.testing.assert_array_equal(x, range(12))
        np.testing.assert_allclose(y, [profile.center(name, block) for block in range(12)])
        assert set(profile.asked) == {name}  # no statistic is computed or read beyond it
    assert ax.get_xlabel() == "block"
    label = STATISTICS[name]
    assert " ".join(ax.get_ylabel().split()) == f"{label.label} ({label.unit})"
    assert legend_texts(ax) == ["mae_vit_b (MIM)", "dino_vit_b (JEA)"]
    assert not pyplot.get_fignums()


def test_the_band_holds_the_interval():
    profile = FakeProfile()
    ax = figures.cls_self_attention(profile)
    (band,) = labelled(ax.collections, "_interval")
    vertices = band.get_paths()[0].vertices
    for block in range(12):
        heights = vertices[vertices[:, 0] == block, 1]
        center = profile.center("cls_self_attention", block)
        assert heights.min() == pytest.approx(0.9 * center) and heights.max() == pytest.approx(1.1 * center)
    assert note(ax) == "bands: 95 % interval of the mean over images"


def test_no_band_without_errorbar():
    ax = figures.cls_self_attention(FakeProfile(), errorbar=None)
    assert not ax.collections and len(main_lines(ax)) == 1
    assert not [text for text in ax.texts if text.get_gid() == "note"]


@pytest.mark.parametrize("errorbar", [("ci", 90), ("sd", 1)])
def test_another_errorbar_is_refused(errorbar):
    with pytest.raises(UserError) as error:
        figures.cls_self_attention(FakeProfile(), errorbar=errorbar)
    assert str(error.value) == (
        f"errorbar={errorbar!r} is not available: profiles hold 95 % intervals; "
        "give errorbar=('ci', 95), or None for no band"
    )


def test_one_image_has_a_line_but_no_band_and_says_so():
    ax = figures.cls_self_attention([FakeProfile(n=1), FakeProfile("b")])
    assert len(main_lines(ax)) == 2 and len(ax.collections) == 1
    assert "plain mean without interval (fewer than two independent images): mae_vit_b" in note(ax)
    alone = figures.cls_self_attention(FakeProfile(n=1))
    assert not alone.collections and "bands" not in note(alone)


def test_a_ratio_without_interval_is_told_from_too_few_images():
    ax = figures.statistic([FakeProfile(), FakeProfile("b", no_interval=True)], "cls_self_attention_ratio")
    assert "plain mean without interval (an image has a ratio of 0 or ∞): b" in note(ax)
    assert len(ax.collections) == 1


def test_heads_are_thin_lines():
    profile = FakeProfile()
    ax = figures.cls_self_attention(profile, heads=True)
    (main,), thin = main_lines(ax), labelled(ax.lines, "_head")
    assert len(thin) == 3
    for head, line in enumerate(thin):
        np.testing.assert_allclose(
            line.get_ydata(), [profile.center("cls_self_attention", block, head) for block in range(12)]
        )
        assert line.get_linewidth() < main.get_linewidth() and line.get_color() == main.get_color()
    assert legend_texts(ax) == ["mae_vit_b (MIM)"] and note(ax).endswith("thin lines: single heads")
    assert not labelled(figures.cls_self_attention(profile).lines, "_head")


def test_a_statistic_of_whole_blocks_has_no_heads_to_draw():
    ax = figures.statistic(FakeProfile(), "patch_norm_max_ratio", heads=True)
    assert not labelled(ax.lines, "_head") and "heads" not in note(ax)


def test_an_unbounded_ratio_is_drawn_as_geometric_mean_on_a_logarithmic_axis():
    profile = FakeProfile(num_blocks=3)
    ax = figures.statistic(profile, "cls_self_attention_ratio")
    assert ax.get_yscale() == "log"
    expected = [profile.center("cls_self_attention_ratio", block) for block in range(3)]
    np.testing.assert_allclose(main_lines(ax)[0].get_ydata(), expected)  # not 1.3 times it, the plain mean
    assert " ".join(ax.get_ylabel().split()).endswith("(geometric mean, ratio)")
    assert note(ax) == "bands: 95 % interval of the geometric mean over images"


@pytest.mark.parametrize(
    ("other", "ticks"), [(0.4, {"2", "3", "4"}), (0.004, {"0.1", "0.5", "2"}), (1e-5, {"$\\mathdefault{10^{-2}}$"})]
)
def test_ticks_of_a_logarithmic_axis_are_plain_numbers_unless_it_is_long(other, ticks):
    profiles = [FakeProfile(num_blocks=1), FakeProfile("b", num_blocks=1, level=other)]
    ax = figures.statistic(profiles, "cls_self_attention_ratio", errorbar=None)
    ax.figure.draw_without_rendering()
    assert ticks <= {label.get_text() for label in ax.get_yticklabels()}


# --- x


def test_models_of_one_depth_are_drawn_over_integer_blocks():
    ax = figures.cls_self_attention([FakeProfile(num_blocks=2), FakeProfile("b", num_blocks=2)])
    ax.figure.draw_without_rendering()
    assert all(float(tick).is_integer() for tick in ax.get_xticks())


def test_models_of_several_depths_share_relative_depth():
    ax = figures.cls_self_attention([FakeProfile(), FakeProfile("l", num_blocks=24), FakeProfile("s", num_blocks=1)])
    assert ax.get_xlabel() == "relative depth (0 first, 1 last)"
    twelve, twenty_four, one = (line.get_xdata() for line in main_lines(ax))
    np.testing.assert_allclose(twelve, np.arange(12) / 11)
    np.testing.assert_allclose(twenty_four, np.arange(24) / 23)
    assert list(one) == [0]


def test_a_single_block_is_a_marker_with_a_bar():
    profile = FakeProfile(num_blocks=1)
    ax = figures.cls_self_attention(profile)
    (line,) = main_lines(ax)
    assert line.get_marker() == "o" and len(line.get_xdata()) == 1
    (bar,) = labelled(ax.collections, "_interval")
    center = profile.center("cls_self_attention", 0)
    np.testing.assert_allclose(bar.get_segments()[0], [[0, 0.9 * center], [0, 1.1 * center]])


# --- y: bounds and maxima


def test_shares_and_distances_start_at_0():
    for name in ("cls_self_attention", "cls_to_patches", "attention_distance", "cls_entropy_share"):
        ax = figures.statistic(FakeProfile(), name)
        assert ax.get_ylim()[0] == 0, name
        assert ax.get_ylim()[1] > 1.1 * FakeProfile().center(name, 11)


def test_a_level_line_has_room_over_it():
    profile = FakeProfile(num_blocks=1, level=0.06, n=1)
    for profiles in (profile, [profile, FakeProfile(num_blocks=1, level=0.0601, n=1)]):
        assert figures.cls_self_attention(profiles).get_ylim()[1] > 1.04 * 0.06


@pytest.mark.parametrize("name", [name for name, entry in STATISTICS.items() if "patches" not in entry.needs])
def test_a_single_patch_is_drawn_with_room_and_without_a_warning(name):
    profile = FakeProfile(grid=(1, 1), num_blocks=2)
    ax = figures.statistic(profile, name)
    bottom, top = ax.get_ylim()
    assert top > bottom
    assert main_lines(ax)[0].get_ydata().tolist() == [profile.center(name, block) for block in range(2)]
    if STATISTICS[name].per_head:
        figures.heads(profile, name)


def test_an_entropy_share_of_a_single_patch_is_named():
    one, many = FakeProfile("one patch", grid=(1, 1)), FakeProfile()
    with pytest.raises(UserError, match=r"one patch \(needs more than one patch\)$"):
        figures.statistic(one, "cls_entropy_share")
    assert "not shown: one patch (needs more than one patch)" in note(
        figures.statistic([one, many], "cls_entropy_share")
    )


def test_the_entropys_maximum_is_log_of_the_number_of_patches():
    ax = figures.cls_entropy([FakeProfile(), FakeProfile("b", "JEA")])
    (line,) = labelled(ax.lines, "_maximum")
    assert list(line.get_ydata()) == pytest.approx([math.log(196)] * 2)
    assert maximum_words(ax) == ["maximum: log 196 = 5.28"]
    assert line.is_dashed()
    assert ax.get_ylim()[1] > math.log(196)


def test_one_maximum_a_grid_and_near_ones_share_their_words():
    ax = figures.cls_entropy([FakeProfile(grid=grid) for grid in [(16, 16), (4, 4), (14, 14), (16, 16)]])
    heights = [line.get_ydata()[0] for line in labelled(ax.lines, "_maximum")]
    assert heights == pytest.approx([math.log(16), math.log(196), math.log(256)])
    assert maximum_words(ax) == ["maximum: log 16 = 2.77", "maximum: log 196, log 256"]
    ax.figure.draw_without_rendering()
    assert not overlap(*[text for text in ax.texts if text.get_gid() != "note"])


def test_the_maximum_of_an_entropy_share_is_1():
    ax = figures.statistic(FakeProfile(), "patch_entropy_share")
    (line,) = labelled(ax.lines, "_maximum")
    assert list(line.get_ydata()) == [1, 1]
    assert maximum_words(ax) == ["maximum: uniform over the patches"]
    assert not labelled(figures.cls_self_attention(FakeProfile()).lines, "_maximum")


@pytest.mark.parametrize("level", [0.01, 0.65])
def test_an_entropys_axis_shows_its_values_and_at_least_the_upper_quarter(level):
    profile = FakeProfile(level=level)
    ax = figures.cls_entropy(profile)
    bottom, top = ax.get_ylim()
    assert 0 <= bottom <= min(0.75 * math.log(196), 0.9 * profile.center("cls_entropy", 0)) and top > math.log(196)


# --- signed values, and intervals of few images


@pytest.mark.parametrize(("level", "sign"), [(-0.1, "both"), (-0.6, "below"), (0.2, "above")])
def test_signed_values_are_all_in_the_frame_with_0(level, sign):
    profile = FakeProfile(level=level, signed=True)
    for others in ([], [FakeProfile("plain")]):
        ax = figures.statistic([profile, *others], "patch_self_attention", heads=True)
        bottom, top = ax.get_ylim()
        drawn = [line.get_ydata() for line in (*main_lines(ax), *labelled(ax.lines, "_head"))]
        drawn += [band.get_paths()[0].vertices[:, 1] for band in labelled(ax.collections, "_interval")]
        assert bottom <= 0 <= top
        assert bottom < min(map(np.min, drawn)) or (bottom == 0 and sign == "above")
        assert top > max(map(np.max, drawn))
        assert len(labelled(ax.lines, "_zero")) == (sign != "above")
        assert ax.get_yscale() == "linear"
        assert "signed, as attention is a difference A1 − λ·A2: mae_vit_b" in note(ax)
    assert "signed" not in note(figures.statistic(FakeProfile(), "patch_self_attention"))


def test_a_differential_models_figures_show_all_their_values():
    profile = analyze(tiny("vit_dlittle_patch16_reg1_gap_256", **SMALL), images(6))
    assert profile.manifest["signed"]
    for name in profile.statistics:
        ax = figures.statistic(profile, name)
        bottom, top = ax.get_ylim()
        table = profile.table([name])
        table = table[table["head"].isna()]
        assert bottom <= table["ci_low"].min() <= table["ci_high"].max() <= top, name


def test_a_signed_profiles_ratios_of_norms_stay_on_their_logarithmic_axis():
    ax = figures.statistic(FakeProfile(signed=True), "patch_norm_max_ratio")
    assert ax.get_yscale() == "log" and "signed" not in note(ax)


def test_the_heat_map_of_signed_values_is_white_at_0():
    profile = FakeProfile(level=-0.1, signed=True, num_blocks=5)
    (mesh,) = figures.heads(profile, "patch_self_attention").collections
    low, high = mesh.get_clim()
    assert low == -high == -np.abs(mesh.get_array()).max()
    assert min(mesh.cmap(0.5)[:3]) > 0.9  # white, or nearly


def test_the_heat_map_says_that_a_ratio_is_a_geometric_mean():
    ax = figures.heads(FakeProfile(), "cls_self_attention_ratio")
    assert ax.figure.axes[-1].get_ylabel().endswith("(geometric mean, ratio)")


def test_few_images_are_said_under_the_axes():
    profiles = [FakeProfile("a", n=5), FakeProfile("b"), FakeProfile("c", n=29), FakeProfile("d", n=1)]
    words = note(figures.cls_self_attention(profiles))
    assert "few images (n = 5), intervals of skewed values may be too narrow: a" in words
    assert "few images (n = 29), intervals of skewed values may be too narrow: c" in words
    assert words.count("few images") == 2
    assert "few images" not in note(figures.cls_self_attention(FakeProfile(n=30)))
    assert "few" not in str(figures.cls_self_attention(FakeProfile(n=5), errorbar=None).texts)


@pytest.mark.parametrize("name", ["cls_self_attention", "cls_self_attention_ratio", "patch_norm_max_ratio"])
@pytest.mark.parametrize("tolerance", [None, 0.1])
def test_each_line_lies_in_its_band(name, tolerance):
    """Of a real profile with values so skewed that the plain mean of a ratio lies outside."""
    rng = np.random.default_rng(0)
    count = 2 if STATISTICS[name].per_head else 1
    values = 1 + rng.lognormal(0, 2, (60, 3, count)).astype(np.float32)
    if name == "cls_self_attention":
        values = values / (values + 100)
    profile = make_profile({name: values.mean(axis=(0, 2))}, images=60, values={name: values})
    profile.manifest["arguments"]["tolerance"] = tolerance
    ax = figures.statistic(profile, name)
    (line,), (band,) = main_lines(ax), labelled(ax.collections, "_interval")
    vertices = band.get_paths()[0].vertices
    for block, y in zip(*line.get_data(), strict=True):
        ends = vertices[vertices[:, 0] == block, 1]
        assert ends.min() < y < ends.max()


# --- looks


def test_paradigms_differ_by_more_than_colour():
    looks = style.looks(list(style.PARADIGMS))
    for attribute in ("color", "linestyle", "marker"):
        assert len({getattr(look, attribute) for look in looks}) == 7, attribute
    mim, jea = main_lines(figures.cls_entropy([FakeProfile(), FakeProfile("b", "JEA")]))
    assert mim.get_color() != jea.get_color() and mim.get_marker() != jea.get_marker()
    assert not mim.is_dashed() and jea.is_dashed()


def test_models_of_one_paradigm_share_its_style_and_differ_in_shade_and_marker():
    looks = style.looks(["JEA", "MIM"] + ["JEA"] * 7)
    family = [look for look in looks if look.marker == "s"]
    assert len(family) == 8 and len({look.linestyle for look in family}) == 1
    assert len({look.color for look in family}) == 8
    assert all(a.markerfacecolor != b.markerfacecolor for a, b in itertools.pairwise(family))
    assert looks[0].color == "#0072b2" and looks[1] == style.looks(["MIM"])[0]


def contrast_on_white(color: str) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    return 1.05 / (0.05 + float(np.dot([0.2126, 0.7152, 0.0722], linear)))


@pytest.mark.parametrize("paradigm", style.PARADIGMS)
def test_every_shade_stands_out_on_white(paradigm):
    assert contrast_on_white("#ffffff") == pytest.approx(1)
    for look in style.looks([paradigm] * 5):
        assert contrast_on_white(look.color) >= 3


def test_legend_says_paradigm_where_known_and_numbers_equal_names():
    names = [FakeProfile("m", "random"), FakeProfile("m", "unknown"), FakeProfile("x", "new-fangled")]
    assert legend_texts(figures.cls_entropy(names)) == ["m #1 (random weights)", "m #2", "x"]


# --- what is missing


def test_a_model_without_cls_is_named_with_the_reason():
    ax = figures.cls_self_attention([FakeProfile(), FakeProfile("siglip", "VLM", has_cls=False)])
    assert legend_texts(ax) == ["mae_vit_b (MIM)"]
    assert note(ax).endswith(f"not shown: siglip ({NO_CLS})")


def test_a_statistic_that_was_not_measured_is_named_too():
    ax = figures.cls_self_attention([FakeProfile(), FakeProfile("b", lacks=("cls_self_attention",))])
    assert legend_texts(ax) == ["mae_vit_b (MIM)"]
    assert note(ax).endswith("not shown: b (was not asked for in this run)")


def test_a_model_without_a_finite_value_is_named_too():
    ax = figures.cls_self_attention([FakeProfile(), FakeProfile("b", level=math.nan)])
    assert note(ax).endswith("not shown: b (no finite value)")


def test_a_statistic_that_no_model_has_is_an_error():
    profiles = [FakeProfile("a", has_cls=False), FakeProfile("b", has_cls=False)]
    with pytest.raises(UserError) as error:
        figures.cls_entropy(profiles)
    assert str(error.value) == f"cls_entropy is undefined for every model given: a ({NO_CLS}); b ({NO_CLS})"


def test_no_profile_is_an_error():
    with pytest.raises(UserError) as error:
        figures.cls_entropy([])
    assert str(error.value) == (
        "there is no profile to draw; give one profile or several (vitprobe.Profile.load reads a run)"
    )


@pytest.mark.parametrize(("wrong", "kind"), [("x", "str"), (None, "NoneType"), (["a", "b"], "str"), ([[]], "list")])
def test_what_is_no_profile_is_an_error(wrong, kind, tmp_path):
    expected = f"figures draw profiles (what vitprobe.analyze and vitprobe.Profile.load give), not a {kind}"
    for draw in (figures.cls_entropy, figures.statistic, lambda given: figures.save_paper_figures(given, tmp_path)):
        arguments = (wrong, "cls_entropy") if draw is figures.statistic else (wrong,)
        with pytest.raises(UserError) as error:
            draw(*arguments)
        assert str(error.value) == expected
    with pytest.raises(UserError, match=r"^figures draw profiles .*, not a (str|NoneType|list)$"):
        figures.heads(wrong)


def test_several_profiles_may_come_from_a_generator():
    assert len(main_lines(figures.cls_entropy(profile for profile in eight_models()))) == 8


def test_an_unknown_statistic_lists_the_nearest():
    with pytest.raises(UserError, match=r"there is no statistic 'cls_entrpy'; the nearest are cls_entropy"):
        figures.statistic(FakeProfile(), "cls_entrpy")


# --- layout


def eight_models() -> list[FakeProfile]:
    paradigms = ["MIM", "MIM", "JEA", "JEA", "hybrid", "supervised", "VLM", "random"]
    blocks = [12, 24] * 4
    return [
        FakeProfile(f"{paradigm.lower()}_vit_base_{index}", paradigm, num_blocks=depth, level=0.1 + 0.05 * index)
        for index, (paradigm, depth) in enumerate(zip(paradigms, blocks, strict=True))
    ] + [FakeProfile("a_model_without_it", "VLM", has_cls=False)]


@pytest.mark.parametrize("profiles", [[FakeProfile()], eight_models()])
def test_legend_and_note_cover_nothing_and_the_width_is_one_column(profiles):
    ax = figures.cls_entropy(profiles)
    figure = ax.figure
    assert isinstance(figure, Figure) and figure.get_figwidth() == pytest.approx(3.4)
    figure.draw_without_rendering()
    legend = ax.get_legend()
    (text,) = [text for text in ax.texts if text.get_gid() == "note"]
    assert legend is not None
    for one, other in [(legend, ax), (legend, ax.xaxis.label), (text, legend), (text, ax)]:
        assert not overlap(one, other), (one, other)
    page = figure.bbox
    for artist in (legend, text, ax.xaxis.label, ax.yaxis.label):
        extent = artist.get_window_extent()
        assert extent.x0 >= page.x0 - 1 and extent.x1 <= page.x1 + 1
        assert extent.y0 >= page.y0 - 1 and extent.y1 <= page.y1 + 1
    inches = ax.get_window_extent().height / figure.dpi
    assert 1.5 < inches < 2.2  # the data keep their room however long the legend
    sizes = [label.get_fontsize() for label in (ax.xaxis.label, ax.yaxis.label, *ax.get_xticklabels())]
    assert min(sizes) >= 8 and max(sizes) <= 9


def test_a_long_name_is_broken_and_keeps_the_width():
    name = "hf-hub:timm/" + "a_very_long_name_" * 5
    ax = figures.cls_entropy(FakeProfile(name))
    assert legend_texts(ax)[0].replace("\n", "").replace(" ", "") == f"{name}(MIM)"
    ax.figure.draw_without_rendering()
    legend = ax.get_legend()
    assert legend is not None and legend.get_window_extent().x1 <= ax.figure.bbox.x1 + 1


def test_given_axes_are_used_returned_and_may_be_in_a_grid():
    figure = Figure(figsize=(7, 3), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    assert figures.cls_entropy(FakeProfile(), ax=left) is left
    assert figures.cls_self_attention(FakeProfile(), ax=right) is right
    figure.draw_without_rendering()
    assert figure.get_size_inches() == pytest.approx((7, 3))
    assert len(main_lines(left)) == len(main_lines(right)) == 1
    legends = [left.get_legend(), right.get_legend()]
    assert legends[0] and legends[1] and not overlap(*legends) and not overlap(legends[0], right)


def test_axes_of_a_subfigure_may_be_given_and_saved(tmp_path):
    figure = Figure(layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.subfigures(1, 2)[0].subplots()
    assert figures.cls_entropy(FakeProfile(), ax=ax) is ax
    assert all(path.stat().st_size for path in figures.save_figure(ax, tmp_path / "sub"))


def test_settings_of_the_caller_come_back_even_after_an_error(tmp_path):
    with matplotlib.rc_context({"font.family": "serif", "lines.linewidth": 7.0}):
        before = dict(matplotlib.rcParams)
        ax = figures.cls_entropy(FakeProfile())
        figures.save_figure(ax, tmp_path / "a")
        with pytest.raises(UserError):
            figures.cls_entropy(FakeProfile(has_cls=False))
        assert dict(matplotlib.rcParams) == before
        assert main_lines(ax)[0].get_linewidth() < 2 and "DejaVu Sans" in ax.xaxis.label.get_fontfamily()


def test_many_figures_leave_nothing_behind():
    alive = weakref.WeakSet()
    for _ in range(22):  # matplotlib warns of more than 20 that stay open
        alive.add(figures.cls_entropy(FakeProfile(num_blocks=2), errorbar=None).figure)
    gc.collect()
    assert not pyplot.get_fignums() and not alive


def test_where_pyplot_can_show_figures_they_are_its_own(monkeypatch):
    monkeypatch.setattr(style, "_NOT_SHOWN", set())  # as in a notebook: the backend is one that shows
    before = set(pyplot.get_fignums())
    ax = figures.cls_entropy(FakeProfile())
    try:
        assert len(set(pyplot.get_fignums()) - before) == 1 and pyplot.figure(max(pyplot.get_fignums())) is ax.figure
        assert ax.figure.get_figwidth() == pytest.approx(3.4)
    finally:
        pyplot.close(ax.figure)


# --- files


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, bytes]:
    stem = tmp_path_factory.mktemp("saved") / "deep" / "figure.of.vit_base"
    ax = figures.cls_entropy([FakeProfile(), FakeProfile("dino_vit_b", "JEA", level=0.5)])
    paths = figures.save_figure(ax, stem)
    assert [path.name for path in paths] == [f"figure.of.vit_base.{kind}" for kind in ("pdf", "svg", "png")]
    assert sorted(stem.parent.iterdir()) == sorted(paths)  # no temporary file stays
    return {path.suffix: path.read_bytes() for path in paths}


def test_pdf_embeds_truetype_fonts(saved):
    assert saved[".pdf"].startswith(b"%PDF")
    assert b"/FontFile2" in saved[".pdf"] and b"/Type3" not in saved[".pdf"]
    assert b"CreationDate" not in saved[".pdf"]


def test_svg_text_is_text(saved):
    svg = saved[".svg"].decode()
    assert "<text" in svg and ">mae_vit_b (MIM)</text>" in svg and "sans-serif" in svg
    assert "<dc:date>" not in svg


def test_png_has_300_dots_an_inch(saved):
    width = int.from_bytes(saved[".png"][16:20])
    assert width == round(3.4 * 300)


def test_the_same_figure_gives_the_same_bytes(tmp_path):
    first = figures.save_figure(figures.cls_entropy(FakeProfile()), tmp_path / "a")
    second = figures.save_figure(figures.cls_entropy(FakeProfile()), str(tmp_path / "b"))
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.suffix
    other = figures.save_figure(figures.cls_entropy(FakeProfile(level=0.5)).figure, tmp_path / "c")
    assert all(a.read_bytes() != b.read_bytes() for a, b in zip(first, other, strict=True))


def test_a_figure_without_layout_engine_is_saved_with_its_legend(tmp_path):
    figure = Figure(figsize=(4, 2), dpi=100)
    FigureCanvasAgg(figure)
    ax = figures.cls_entropy(eight_models(), ax=figure.subplots())
    png = figures.save_figure(ax, tmp_path / "mine")[2].read_bytes()
    assert int.from_bytes(png[20:24]) > 2 * 300 + 200  # taller than the figure: the legend under it


def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path, monkeypatch):
    (tmp_path / "a.pdf").write_bytes(b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError) as error:
        figures.save_figure(figures.cls_entropy(FakeProfile()), tmp_path / "a")
    assert str(error.value).startswith(f"the disk is full, so {tmp_path / 'a.pdf'} could not be written; ")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pdf"] and (tmp_path / "a.pdf").read_bytes() == b"old"


def test_a_file_in_the_folders_place_is_one_line(tmp_path):
    taken = tmp_path / "taken"
    taken.write_text("mine")
    ax = figures.cls_entropy(FakeProfile())
    for below in (taken, taken / "sub" / "folder"):
        for save in (
            lambda folder: figures.save_paper_figures(FakeProfile(), folder),
            lambda folder: figures.save_figure(ax, folder / "stem"),
        ):
            with pytest.raises(UserError) as error:
                save(below)
            assert str(error.value) == f"{taken} is a file; give a folder"
    assert [path.name for path in tmp_path.iterdir()] == ["taken"] and taken.read_text() == "mine"


def test_a_stem_without_a_name_is_one_line():
    with pytest.raises(UserError) as error:
        figures.save_figure(figures.cls_entropy(FakeProfile()), "")
    assert str(error.value) == "'.' names no file; give a folder and the file's name without its ending"


def test_the_papers_figures_are_written_into_a_new_folder(tmp_path):
    profiles = [FakeProfile(num_blocks=2), FakeProfile("b", "JEA", num_blocks=2)]
    written = figures.save_paper_figures(profiles, tmp_path / "new" / "figures")
    stems = ["figure3_cls_self_attention", "figure4_cls_entropy", "figure5_patch_self_attention"]
    assert [path.name for path in written] == [f"{stem}.{kind}" for stem in stems for kind in ("pdf", "svg", "png")]
    assert all(path.parent == tmp_path / "new" / "figures" and path.stat().st_size for path in written)
    assert not pyplot.get_fignums()
    for stem, name in saving.PAPER_FIGURES.items():
        assert STATISTICS[name].figure == int(stem[6])


def test_a_figure_that_no_model_has_is_left_out(tmp_path):
    written = figures.save_paper_figures([FakeProfile(has_cls=False)], tmp_path)
    assert [path.stem for path in written] == ["figure5_patch_self_attention"] * 3
    assert sorted(tmp_path.iterdir()) == sorted(written)
    with pytest.raises(UserError, match="there is no profile to draw"):
        figures.save_paper_figures([], tmp_path)


def test_the_heat_map_shows_each_head_of_each_block():
    profile = FakeProfile(num_blocks=5, num_heads=3)
    with matplotlib.rc_context():
        before = dict(matplotlib.rcParams)
        ax = figures.heads(profile, "cls_self_attention")
        assert dict(matplotlib.rcParams) == before
    (mesh,) = ax.collections
    shown = np.asarray(mesh.get_array()).reshape(3, 5)
    expected = [[profile.center("cls_self_attention", block, head) for block in range(5)] for head in range(3)]
    np.testing.assert_allclose(shown, expected)
    assert mesh.get_clim() == (0, pytest.approx(np.max(expected)))
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title()) == ("block", "head", "mae_vit_b")
    assert ax.figure.axes[-1].get_ylabel() == "[cls] self-attention (share)"


def test_the_heat_map_refuses_what_has_no_heads():
    with pytest.raises(UserError, match="patch_norm_max_ratio has one value a block, not one a head"):
        figures.heads(FakeProfile(), "patch_norm_max_ratio")
    with pytest.raises(UserError, match="was not asked for"):
        figures.heads(FakeProfile(lacks=("cls_entropy",)), "cls_entropy")
    with pytest.raises(UserError, match="no statistic 'entropie'"):
        figures.heads(FakeProfile(), "entropie")


def test_the_heat_map_draws_on_given_axes():
    ax = Figure().add_subplot()
    assert figures.heads(FakeProfile(), ax=ax) is ax
