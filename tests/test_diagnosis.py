"""What a profile is said to say, against its baselines and the shipped references."""

import math
import re
from typing import Any

import numpy as np
import pytest

from fakes import make_profile
from helpers import SMALL, images, tiny
from made_squares import squares
from vitprobe.layout import TokenLayout
from vitprobe.probing.verify import verify
from vitprobe.profile import references
from vitprobe.profile.analysis import analyze
from vitprobe.profile.references import Reference, distance, load_references

SELFISH: dict[str, Any] = {
    "cls_self_attention": [0.02, 0.3, 0.5],
    "cls_entropy_share": [0.99, 0.98, 0.97],
    "patch_self_attention_ratio": [0.016, 0.05, 0.12],
}
SHARING = {
    "cls_self_attention": [0.02, 0.02, 0.01],
    "cls_entropy_share": [0.99, 0.8, 0.7],
    "patch_self_attention_ratio": [0.016, 0.016, 0.015],
}


def entry(name: str, paradigm: str, curves: dict[str, list[float]], weights: str) -> Reference:
    return Reference(name, paradigm, "Toy depth 3", 65, weights, curves)


UNIFORM = {"cls_self_attention": 1 / 65, "cls_entropy_share": 1.0, "patch_self_attention_ratio": 1 / 64}
JOINT = {name: [value + 0.04 for value in curve] for name, curve in SHARING.items()}


@pytest.fixture
def shipped(monkeypatch):
    entries = [
        entry("mae", "MIM", SELFISH, "a" * 64),
        entry("sup", "supervised", SHARING, "b" * 64),
        entry("joint", "JEA", JOINT, "d" * 64),
        entry("rand", "random", {name: [value] * 3 for name, value in UNIFORM.items()}, "c" * 64),
    ]
    monkeypatch.setattr(references, "load_references", lambda: entries)
    return entries


def entropy_share(effective: float, patches: int) -> float:
    """The entropy as a share of log N of attention with this effective number of patches as a share of all."""
    return math.log(effective * patches) / math.log(patches)


def a_profile(keeps=0.13, effective=0.43, times=3.8, grid=(8, 8), **options):
    """A profile with the same numbers in all of its blocks."""
    layout = TokenLayout(grid=grid, has_cls=True, patch_size=(4, 4))
    curves = {
        "cls_self_attention": [keeps] * 3,
        "cls_entropy_share": [entropy_share(effective, layout.num_patches)] * 3,
        "patch_self_attention_ratio": [times / layout.num_patches] * 3,
    }
    return make_profile(curves, layout=layout, **{"spread": 1e-4, **options})


# Words, numbers and thresholds ----------------------------------------------------------------------------------------


def test_a_selfish_cls_is_called_so_with_numbers_intervals_and_baselines(shipped):
    curves = {**SELFISH, "cls_self_attention": [0.02, 0.3, 0.6]}
    diagnosis = make_profile(curves).diagnosis()
    effective = math.exp(0.97 * math.log(64))
    assert diagnosis.verdict == (
        "toy: [cls] gives most of its attention to itself (60.0 % to itself); over the patches [cls] is "
        f"near-uniform (effectively {effective:.1f} of 64); patches look mostly at each other (7.7 times an even share "
        "at themselves)."
    )
    cls, entropy, patches = diagnosis.evidence
    assert "[cls] gives 60.0 % (95 % interval 59." in cls
    assert "n = 40) of its attention to itself in block 2 (uniform attention: 1.54 %; random weights: 1.54 %; " in cls
    assert "trained references: 1.00 % to 50.0 %; much: above 10.0 %, 2 times the most of the references not" in cls
    assert f"exp(entropy), is {effective:.1f} of 64, {100 * effective / 64:.1f} % (95 % interval " in entropy
    assert "selective: below 50 %, near-uniform: above 80 %" in entropy
    assert f"entropy: 97.0 % of log 64 = {math.log(64):.2f} nats; uniform attention: 64; random weights: 64" in entropy
    assert "a patch gives 12.0 %" in patches
    assert "7.7 times an even share (uniform attention: 1.56 %; random weights: 1.56 %" in patches
    assert "attention alone does not say: measure [cls], the average of the patch tokens and" in diagnosis.next_step
    assert "reported of masked autoencoders" in diagnosis.next_step
    assert str(diagnosis).splitlines() == [diagnosis.verdict, *(f"  {line}" for line in diagnosis.lines[1:])]


def test_a_sharing_cls_is_called_so(shipped):
    diagnosis = make_profile(SHARING, spread=0.001).diagnosis()
    assert diagnosis.verdict == (
        "toy: [cls] gives most of its attention to other tokens (1.00 % to itself); over the patches [cls] is "
        f"selective (effectively {64**0.7:.1f} of 64); patches look mostly at each other (1.0 times an even share at "
        "themselves)."
    )
    assert diagnosis.next_step.startswith("next: attention alone does not say how well [cls] summarizes an image")
    assert "masked" not in diagnosis.next_step


SIZES = [(8, 8), (14, 14), (16, 16), (32, 32)]  # 64, 196, 256 and 1,024 patches


@pytest.mark.parametrize("grid", SIZES, ids=str)
@pytest.mark.parametrize(
    ("effective", "word"),
    [(0.02, "selective"), (0.43, "selective"), (0.49, "selective"), (0.51, "spread widely"), (0.6, "spread widely"),
     (0.79, "spread widely"), (0.81, "near-uniform"), (0.99, "near-uniform")],
)  # fmt: skip
def test_how_selective_it_is_called_follows_the_effective_share_of_patches_at_any_number(grid, effective, word):
    patches = grid[0] * grid[1]
    verdict = a_profile(effective=effective, grid=grid).diagnosis().verdict
    assert f"over the patches [cls] is {word} (effectively {effective * patches:.1f} of {patches});" in verdict


@pytest.mark.parametrize("grid", SIZES, ids=str)
@pytest.mark.parametrize("sharpness", [0.5, 2.0, 6.0])
def test_the_same_shape_of_a_distribution_has_the_same_words_on_any_grid(grid, sharpness):
    """A bump of attention over the image, seen on a finer or coarser grid; entropies by numpy."""

    def words(rows: int, columns: int) -> list[str]:
        y, x = np.meshgrid((np.arange(rows) + 0.5) / rows, (np.arange(columns) + 0.5) / columns, indexing="ij")
        weights = np.exp(-sharpness * ((y - 0.5) ** 2 + (x - 0.5) ** 2) * 4).ravel()
        weights = weights / weights.sum()
        curves = {
            "cls_self_attention": [0.13] * 3,
            "cls_entropy_share": [-(weights * np.log(weights)).sum() / math.log(len(weights))] * 3,
            "patch_self_attention_ratio": [weights.max()] * 3,
        }
        layout = TokenLayout(grid=(rows, columns), has_cls=True)
        verdict = make_profile(curves, layout=layout, spread=1e-5).diagnosis().verdict
        return re.findall(r"[a-z\[\]-]+", re.sub(r"\(.*?\)", "", verdict))

    assert words(*grid) == words(64, 64)


def test_what_read_like_a_masked_autoencoder_is_not_judged_without_references():
    """DINOv2's ViT-S/14 tuned for saliency: 256 patches, entropy 85 % of its maximum, 13 % for itself."""
    curves = {
        "cls_self_attention": [0.13] * 3, "cls_entropy_share": [0.85] * 3, "patch_self_attention_ratio": [0.02] * 3,
    }  # fmt: skip
    layout = TokenLayout(grid=(16, 16), has_cls=True, patch_size=(14, 14))
    diagnosis = make_profile(curves, layout=layout, spread=1e-4).diagnosis()
    assert diagnosis.verdict == (
        "toy: [cls] gives most of its attention to other tokens (13.0 % to itself); over the patches [cls] is "
        "selective (effectively 111.4 of 256); patches look mostly at each other (5.1 times an even share "
        "at themselves)."
    )
    text = str(diagnosis)
    assert "much" not in text and "may miss" not in text and "resembles" not in text
    assert "no number is judged by one; known of published models (arXiv 2412.03215, ImageNet)" in diagnosis.reference
    assert diagnosis.next_step.startswith("next: attention alone does not say how well [cls] summarizes an image")


@pytest.mark.parametrize("grid", SIZES, ids=str)
@pytest.mark.parametrize(
    ("keeps", "words"),
    [(0.02, "most of its attention to other tokens"), (0.13, "most of its attention to other tokens"),
     (0.49, "most of its attention to other tokens"), (0.5, "about half of its attention to itself"),
     (0.51, "most of its attention to itself"), (0.9, "most of its attention to itself")],
)  # fmt: skip
def test_without_references_a_half_is_what_most_means_at_any_number_of_tokens(grid, keeps, words):
    assert f"toy: [cls] gives {words} (" in a_profile(keeps=keeps, grid=grid, signature="nobody's").diagnosis().verdict


@pytest.mark.parametrize(
    ("keeps", "words"),
    [(0.05, "gives most of its attention to other tokens"), (0.09, "gives most of its attention to other tokens"),
     (0.11, "keeps much of its attention for itself"), (0.45, "keeps much of its attention for itself"),
     (0.7, "gives most of its attention to itself")],
)  # fmt: skip
def test_much_is_twice_what_references_not_trained_by_masking_keep(shipped, keeps, words):
    """They keep 1 % and 5 % in the last block; that the masked autoencoder keeps 50 % does not count."""
    diagnosis = a_profile(keeps=keeps).diagnosis()
    assert diagnosis.verdict.startswith(f"toy: [cls] {words} (")
    assert ("reported of masked" in diagnosis.next_step) == (keeps > 0.1)


def test_much_is_not_said_with_one_reference_alone(shipped):
    shipped.remove(shipped[2])
    diagnosis = a_profile(keeps=0.3).diagnosis()
    assert "much" not in str(diagnosis)
    assert "trained references: 1.00 % to 50.0 %" in diagnosis.evidence[0]


def test_a_model_is_not_compared_with_itself(shipped):
    """Of sup itself, one reference not trained by masking is left."""
    assert "much" not in str(a_profile(keeps=0.3, weights="b" * 64).diagnosis())


def test_an_interval_around_a_threshold_gets_both_words():
    verdict = a_profile(effective=0.5, spread=0.05).diagnosis().verdict
    assert "[cls] is selective or spread widely (effectively 32.0 of 64; too few images to tell);" in verdict
    own = a_profile(times=32, spread=0.05).diagnosis().verdict
    assert "patches look about as much at themselves as at each other (32." in own
    assert "patches look mostly at themselves" in a_profile(times=50).diagnosis().verdict


def test_few_images_are_said_beside_their_intervals():
    for count, said in ((5, True), (29, True), (30, False)):
        diagnosis = a_profile(images=count).diagnosis()
        assert all((f"n = {count}, few images" in line) == said for line in diagnosis.evidence)


def test_late_blocks_are_the_last_third():
    curves = {"cls_self_attention": [0.0] * 8 + [0.4, 0.5, 0.6, 0.7]}
    assert "gives 55.0 %" in (line := make_profile(curves).diagnosis().evidence[0])
    assert "in blocks 8 to 11" in line


@pytest.mark.parametrize(("off", "resembles"), [(0.01, True), (0.024, True), (0.026, False), (0.2, False)])
def test_resembles_only_within_an_absolute_bound(shipped, off, resembles):
    near = {name: [value + off for value in curve] for name, curve in SELFISH.items()}
    said = make_profile(near, spread=1e-4).diagnosis().reference
    if resembles:
        assert said.startswith("resembles mae (MIM) among the references of its architecture")
    else:
        assert said.startswith("resembles none of the shipped references of its architecture")
    assert f"mae (MIM) {off:.3f}" in said
    assert "resembles: at most 0.025 and half the next" in said


def test_resembles_only_where_one_reference_is_clearly_nearer(shipped):
    between = {name: [(a + b) / 2 for a, b in zip(SHARING[name], JOINT[name], strict=True)] for name in SHARING}
    said = make_profile(between, spread=1e-4).diagnosis().reference
    assert "0.020" in said  # to both, which is within the bound
    assert said.startswith("resembles none of the shipped references")


def test_resembles_needs_two_references(shipped):
    del shipped[1:]
    said = make_profile(SELFISH, spread=1e-4).diagnosis().reference
    assert said.startswith("vitprobe ships one reference (mae), too few to compare with, with the same blocks")
    assert "known of published models" in said


def test_a_reference_is_not_said_to_resemble_itself(shipped):
    said = make_profile(SELFISH, weights="a" * 64).diagnosis().reference
    assert said == "these are the weights of the shipped reference mae (MIM) itself"


@pytest.mark.parametrize(
    "other", [{"signature": "Toy depth 4"}, {"layout": TokenLayout(grid=(7, 9), has_cls=True, patch_size=(4, 4))}]
)
def test_no_reference_of_another_architecture_or_token_count_is_used(shipped, other):
    diagnosis = make_profile(SELFISH, **other).diagnosis()
    assert diagnosis.reference.startswith("vitprobe ships no reference with the same blocks, width, heads and tokens")
    assert "random weights" not in "".join(diagnosis.evidence)
    assert "references" not in "".join(diagnosis.evidence)
    assert "much" not in str(diagnosis)


def test_without_cls_the_patches_alone_are_judged(shipped):
    layout = TokenLayout(grid=(8, 8), has_cls=False, patch_size=(4, 4))
    curves = {"patch_self_attention_ratio": SELFISH["patch_self_attention_ratio"]}
    undefined = dict.fromkeys(("cls_self_attention", "cls_entropy_share"), "needs a [cls] token")
    diagnosis = make_profile(curves, layout=layout, undefined=undefined).diagnosis()
    assert diagnosis.verdict == "toy: patches look mostly at each other (7.7 times an even share at themselves)."
    assert "undefined here: cls_self_attention, cls_entropy_share (needs a [cls] token)" in diagnosis.evidence
    assert "there is no [cls] attention to judge" in diagnosis.next_step


def test_a_run_without_the_papers_statistics_says_so(shipped):
    diagnosis = make_profile({"patch_entropy": [1.0, 2.0, 3.0]}).diagnosis()
    assert diagnosis.verdict.startswith("toy: none of the paper's three statistics")
    assert "no comparison with the shipped references" in diagnosis.reference
    assert diagnosis.next_step == "next: measure the paper's three statistics too (leave --statistic out)"


def test_what_is_undefined_is_not_asked_for():
    """Differential attention has none of the three, so they cannot be measured too."""
    undefined = dict.fromkeys(UNIFORM, "needs attention weights that are a distribution")
    diagnosis = make_profile({"patch_self_attention": [0.1, -0.2, 0.3]}, undefined=undefined).diagnosis()
    assert "--statistic" not in str(diagnosis)
    assert diagnosis.next_step == (
        "next: this attention is not judged here; measure what the tokens hold (vitprobe verify)"
    )


def test_the_entropy_alone_is_said_of_cls():
    curves = {"cls_entropy_share": [0.7] * 3}
    assert make_profile(curves).diagnosis().verdict.startswith("toy: over the patches [cls] is selective")


def test_one_image_has_no_interval():
    diagnosis = make_profile(SELFISH, images=1, spread=0).diagnosis()
    assert "[cls] gives 50.0 % (no interval: n = 1)" in diagnosis.evidence[0]
    assert "% (no interval: n = 1; selective" in diagnosis.evidence[1]


def test_the_shipped_references_are_of_the_bundled_architecture():
    entries = {entry.name: entry for entry in load_references()}
    assert set(entries) == {
        *("mae_vit_nano", "mae_xavier_vit_nano", "mae_ft_vit_nano"),
        *("mocov3_vit_nano", "supervised_vit_nano", "random_vit_nano"),
    }
    assert {entry.architecture for entry in entries.values()} == {
        "VisionTransformer depth 12 width 128 heads 4 patch 4x4 prefix 1"
    }
    assert {entry.num_tokens for entry in entries.values()} == {65}
    random = entries["random_vit_nano"].curves
    assert distance(random, {name: [1 / 65 if "cls_self" in name else 1.0 if "entropy" in name else 1 / 64] * 12
                             for name in random}) < 0.01  # fmt: skip


def test_what_is_advised_of_differential_attention_can_be_done():
    model = tiny("vit_dlittle_patch16_reg1_gap_256", **SMALL)
    diagnosis = analyze(model, images(2)).diagnosis()
    assert diagnosis.next_step.endswith("measure what the tokens hold (vitprobe verify)")
    assert len(verify(model, squares(train=120), ["gap"], protocol="knn", workers=0).table()) == 1
