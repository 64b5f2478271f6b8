"""What a profile is said to say, against its baselines and the shipped references."""

import math

import pytest

from fakes import make_profile
from vitprobe.models.tokens import TokenLayout
from vitprobe.profile import references
from vitprobe.profile.references import Reference, distance, load_references

SELFISH = {
    "cls_self_attention": [0.02, 0.3, 0.5],
    "cls_entropy_share": [0.99, 0.98, 0.97],
    "patch_self_attention_ratio": [0.016, 0.05, 0.12],
}
SHARING = {
    "cls_self_attention": [0.02, 0.02, 0.01],
    "cls_entropy_share": [0.99, 0.8, 0.7],
    "patch_self_attention_ratio": [0.016, 0.016, 0.015],
}


@pytest.fixture
def shipped(monkeypatch):
    def entry(name, paradigm, curves, weights):
        return Reference(name, paradigm, "Toy depth 3", 65, weights, curves)

    uniform = {"cls_self_attention": 1 / 65, "cls_entropy_share": 1.0, "patch_self_attention_ratio": 1 / 64}
    flat = {name: [value] * 3 for name, value in uniform.items()}
    entries = [
        entry("mae", "MIM", SELFISH, "a" * 64),
        entry("sup", "supervised", SHARING, "b" * 64),
        entry("rand", "random", flat, "c" * 64),
    ]
    monkeypatch.setattr(references, "load_references", lambda: entries)
    return entries


def test_a_selfish_cls_is_called_so_with_numbers_intervals_and_baselines(shipped):
    diagnosis = make_profile(SELFISH).diagnosis()
    assert diagnosis.verdict == (
        "toy: [cls] keeps much of its attention for itself; what it gives the patches is near-uniform; patches look "
        "much at themselves."
    )
    cls, entropy, patches = diagnosis.evidence
    assert "[cls] keeps 50.0 % (95 % interval 49." in cls
    assert "n = 40) of its attention for itself in block 2 (uniform attention: 1.54 %; random weights: 1.54 %)" in cls
    assert "its entropy over the patches is 97.0 %" in entropy
    assert f"log 64 = {math.log(64):.2f} nats (uniform attention: 100.0 %; random weights: 100.0 %)" in entropy
    assert "a patch gives 12.0 %" in patches
    assert "uniform attention: 1.56 %" in patches
    assert diagnosis.next_step.startswith("next: [cls] may miss what the patches hold; measure selective aggregations")
    assert str(diagnosis).splitlines() == [diagnosis.verdict, *(f"  {line}" for line in diagnosis.lines[1:])]


def test_a_sharing_cls_is_called_so(shipped):
    diagnosis = make_profile(SHARING, spread=0.001).diagnosis()
    assert diagnosis.verdict == (
        "toy: [cls] spends its attention on the other tokens; what it gives the patches is selective; patches look "
        "mostly at each other."
    )
    assert diagnosis.next_step.startswith("next: by its attention [cls] does aggregate")


def test_in_between_is_called_in_between(shipped):
    curves = {**SHARING, "cls_self_attention": [0.02, 0.02, 0.1], "cls_entropy_share": [0.9] * 3}
    diagnosis = make_profile(curves, spread=0.05).diagnosis()
    words = "[cls] keeps some of its attention for itself; what it gives the patches is spread widely"
    assert words in diagnosis.verdict
    assert diagnosis.next_step.startswith("next: attention alone does not settle whether [cls] aggregates well here")


def test_late_blocks_are_the_last_third():
    curves = {"cls_self_attention": [0.0] * 8 + [0.4, 0.5, 0.6, 0.7]}
    assert "keeps 55.0 %" in (line := make_profile(curves).diagnosis().evidence[0])
    assert "in blocks 8 to 11" in line


def test_resembles_only_where_one_reference_is_clearly_nearer(shipped):
    near = {name: [value + 0.01 for value in curve] for name, curve in SELFISH.items()}
    said = make_profile(near).diagnosis().reference
    assert said.startswith("resembles mae (MIM) most among the references of its architecture")
    assert "mae (MIM) 0.010" in said
    between = {name: [(a + b) / 2 for a, b in zip(SELFISH[name], SHARING[name], strict=True)] for name in SELFISH}
    assert make_profile(between).diagnosis().reference.startswith("resembles none of the shipped references")


def test_a_reference_is_not_said_to_resemble_itself(shipped):
    said = make_profile(SELFISH, weights="a" * 64).diagnosis().reference
    assert said == "these are the weights of the shipped reference mae (MIM) itself"


@pytest.mark.parametrize(
    "other", [{"signature": "Toy depth 4"}, {"layout": TokenLayout(grid=(7, 9), has_cls=True, patch_size=(4, 4))}]
)
def test_no_reference_of_another_architecture_or_token_count_is_used(shipped, other):
    diagnosis = make_profile(SELFISH, **other).diagnosis()
    assert diagnosis.reference.startswith("no reference for this architecture")
    assert "random weights" not in "".join(diagnosis.evidence)


def test_without_cls_the_patches_alone_are_judged(shipped):
    layout = TokenLayout(grid=(8, 8), has_cls=False, patch_size=(4, 4))
    curves = {"patch_self_attention_ratio": SELFISH["patch_self_attention_ratio"]}
    undefined = dict.fromkeys(("cls_self_attention", "cls_entropy_share"), "needs a [cls] token")
    diagnosis = make_profile(curves, layout=layout, undefined=undefined).diagnosis()
    assert diagnosis.verdict == "toy: patches look much at themselves."
    assert "undefined here: cls_self_attention, cls_entropy_share (needs a [cls] token)" in diagnosis.evidence
    assert "there is no [cls] attention to judge" in diagnosis.next_step


def test_a_run_without_the_papers_statistics_says_so(shipped):
    diagnosis = make_profile({"patch_entropy": [1.0, 2.0, 3.0]}).diagnosis()
    assert diagnosis.verdict.startswith("toy: none of the paper's three statistics")
    assert "no comparison with the shipped references" in diagnosis.reference


def test_one_image_has_no_interval():
    line = make_profile(SELFISH, images=1, spread=0).diagnosis().evidence[0]
    assert "keeps 50.0 % (no interval: n = 1)" in line


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
