"""The numbers of a profile in plain words: what [cls] and the patches do, against baselines, and what to try next.

The words follow fixed rules, written down here and in docs/verdict.md. "Late blocks" are the last third. A verdict is a
statement about attention; whether another aggregation gives a better representation is for probing to measure.

Each word follows a number that means the same at any number of tokens: a half of the attention, or the effective number
of patches as a share of all. Where references of the same architecture and token count are shipped, "much" is relative
to them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from vitprobe.layout import TokenLayout
from vitprobe.profile.intervals import Estimate
from vitprobe.profile.references import COMPARED, Reference, distance, matching_references
from vitprobe.statistics import STATISTICS

MOST = 0.5  # "most of its attention": more than this share of it
# The effective number of patches, exp(entropy), as a share of all: below the first "selective", above the second
# "near-uniform", between them "spread widely".
SELECTIVE, NEAR_UNIFORM = 0.5, 0.8
MUCH = 2.0  # [cls] keeps "much" for itself above this many times what it keeps in each reference not trained by masking
FEWEST_REFERENCES = 2  # nothing is compared with fewer
# "Resembles" is said of a mean difference of the three curves up to this, where the nearest reference is at most half
# as far as the next. The same bundled weights on other images differ by up to 0.021, different ones by 0.030 or more.
RESEMBLES = 0.025
CLEARLY_NEARER = 0.5
MASKED, RANDOM = "MIM", "random"  # paradigms

PUBLISHED = (
    "known of published models (arXiv 2412.03215, ImageNet): [cls] of MAE attends mostly to itself and near-uniformly "
    "over the patches, that of joint-embedding models and of a fine-tuned MAE more selectively; patches of MAE attend "
    "more to themselves than those of joint-embedding models"
)


@runtime_checkable
class Measured(Protocol):
    """What a diagnosis reads of a `Profile` (which calls this module, so it is not imported here)."""

    manifest: dict[str, Any]

    @property
    def name(self) -> str:
        """The model's name."""
        ...

    @property
    def layout(self) -> TokenLayout:
        """Which token is what."""
        ...

    @property
    def num_blocks(self) -> int:
        """Blocks of the model."""
        ...

    @property
    def statistics(self) -> list[str]:
        """What it holds."""
        ...

    @property
    def undefined(self) -> dict[str, str]:
        """What it does not, and why."""
        ...

    def estimate(self, statistic: str, blocks: slice | None = None) -> Estimate:
        """Mean and interval of the mean over heads, by block or over some blocks."""
        ...


@dataclass(frozen=True)
class Diagnosis:
    """What a profile says in words.

    Attributes:
        verdict: one sentence.
        evidence: a line each for [cls], its effective number of patches and the patches, with intervals, thresholds and
            baselines.
        reference: what it resembles, or why that is not said and what is known of published models.
        next_step: what to try next.
    """

    verdict: str
    evidence: tuple[str, ...]
    reference: str
    next_step: str

    @property
    def lines(self) -> list[str]:
        """All of it, a line each."""
        return [self.verdict, *self.evidence, self.reference, self.next_step]

    def __str__(self) -> str:
        """The verdict, and the rest indented under it."""
        return "\n  ".join(self.lines)


def diagnose(profile: Measured) -> Diagnosis:
    """The diagnosis of one profile; statistics that it does not hold are left out and said to be."""
    late = slice(2 * profile.num_blocks // 3, profile.num_blocks)
    found = {name: profile.estimate(name, late) for name in COMPARED if name in profile.statistics}
    own_weights = profile.manifest["model"]["weights_sha256"]
    references = matching_references(profile.manifest, profile.layout.num_tokens)
    others = [reference for reference in references if reference.weights_sha256 != own_weights]
    comparison = _Comparison(others, late)
    words = _words(profile, found, comparison)
    return Diagnosis(
        f"{profile.name}: {words}",
        tuple(_evidence(profile, found, comparison, late)),
        _resemblance(profile, references, others),
        _next_step(profile, found, comparison),
    )


@dataclass(frozen=True)
class _Comparison:
    """The late blocks of the references of the same architecture and token count, without the profile's own weights."""

    references: Sequence[Reference]
    late: slice

    def values(self, name: str, *, masked: bool) -> list[float]:
        """Means of a statistic over late blocks of the trained references; those trained by masking where asked for."""
        trained = [r for r in self.references if r.paradigm != RANDOM and (masked or r.paradigm != MASKED)]
        return [_mean(reference.curves[name][self.late]) for reference in trained]

    def of_random(self, name: str) -> float | None:
        """The same of random weights, if they are among the references."""
        return next((_mean(r.curves[name][self.late]) for r in self.references if r.paradigm == RANDOM), None)

    @property
    def much(self) -> float | None:
        """The share of its attention above which [cls] keeps much for itself; None with too few references."""
        values = self.values("cls_self_attention", masked=False)
        return MUCH * max(values) if len(values) >= FEWEST_REFERENCES else None


def _evidence(profile: Measured, found: dict[str, Estimate], comparison: _Comparison, late: slice) -> list[str]:
    """A line for each of the three statistics with its interval and baselines, and one for those that are undefined."""
    layout = profile.layout
    span = f"blocks {late.start} to {late.stop - 1}" if late.stop - late.start > 1 else f"block {late.start}"

    def baselines(name: str, uniform: str, show: Any) -> str:
        parts = [uniform]
        if (random := comparison.of_random(name)) is not None:
            parts.append(f"random weights: {show(random)}")
        if len(values := comparison.values(name, masked=True)) >= FEWEST_REFERENCES:
            parts.append(f"trained references: {show(min(values))} to {show(max(values))}")
        return "; ".join(parts)

    lines = []
    if (keeps := found.get("cls_self_attention")) is not None:
        even = _percent(_uniform("cls_self_attention", layout))
        said = [baselines("cls_self_attention", f"uniform attention: {even}", _percent)]
        if comparison.much is not None:
            said.append(
                f"much: above {_percent(comparison.much)}, {MUCH:g} times the most of the references not trained by "
                f"masking"
            )
        lines.append(f"[cls] gives {_interval(keeps)} of its attention to itself in {span} ({'; '.join(said)})")
    if (entropy := found.get("cls_entropy_share")) is not None:
        patches = layout.num_patches

        def count(share: float) -> str:
            return f"{_patches(share, patches):.1f}"

        ends = "" if math.isnan(entropy.low) else f"{count(float(entropy.low))} to {count(float(entropy.high))}"
        center = float(entropy.center)
        lines.append(
            f"its effective number of patches, exp(entropy), is {count(center)} of {patches}, "
            f"{_percent(_patches(center, patches) / patches)} ({_in_words(entropy, ends)}; selective: below "
            f"{100 * SELECTIVE:g} %, near-uniform: above {100 * NEAR_UNIFORM:g} %; entropy: {_percent(center)} of "
            f"log {patches} = {math.log(patches):.2f} nats; "
            f"{baselines('cls_entropy_share', f'uniform attention: {patches}', count)})"
        )
    if (own := found.get("patch_self_attention_ratio")) is not None:
        even = _percent(_uniform("patch_self_attention_ratio", layout))
        lines.append(
            f"a patch gives {_interval(own)} of its attention to patches to itself, {_times(own, layout)} an even "
            f"share ({baselines('patch_self_attention_ratio', f'uniform attention: {even}', _percent)})"
        )
    missing = [name for name in COMPARED if name not in found]
    if missing:
        reasons = {profile.undefined.get(name, "not asked for in this run") for name in missing}
        lines.append(f"undefined here: {', '.join(missing)} ({'; '.join(sorted(reasons))})")
    return lines


def _words(profile: Measured, found: dict[str, Estimate], comparison: _Comparison) -> str:
    """The sentence."""
    layout, parts = profile.layout, []
    if (keeps := found.get("cls_self_attention")) is not None:
        parts.append(f"[cls] {_keeping(keeps, comparison.much)} ({_percent(float(keeps.center))} to itself)")
    if (entropy := found.get("cls_entropy_share")) is not None:
        patches = layout.num_patches
        count = _patches(float(entropy.center), patches)
        word = _spreading(entropy, patches)
        doubt = "; too few images to tell" if " or " in word else ""
        parts.append(f"over the patches [cls] is {word} (effectively {count:.1f} of {patches}{doubt})")
    if (own := found.get("patch_self_attention_ratio")) is not None and layout.num_patches > 1:
        where = _sided(
            own, MOST, "mostly at themselves", "mostly at each other", "about as much at themselves as at each other"
        )
        parts.append(f"patches look {where} ({_times(own, layout)} an even share at themselves)")
    if not parts:
        parts.append("none of the paper's three statistics was measured, so there is no verdict")
    return "; ".join(parts) + "."


def _keeping(keeps: Estimate, much: float | None) -> str:
    if much is not None and _low(keeps) > much and _low(keeps) <= MOST:
        return "keeps much of its attention for itself"
    return _sided(
        keeps,
        MOST,
        "gives most of its attention to itself",
        "gives most of its attention to other tokens",
        "gives about half of its attention to itself",
    )


def _spreading(entropy: Estimate, patches: int) -> str:
    low, high = (_spread_word(_patches(end, patches) / patches) for end in (_low(entropy), _high(entropy)))
    return low if low == high else f"{low} or {high}"


def _spread_word(share: float) -> str:
    return "selective" if share < SELECTIVE else "near-uniform" if share > NEAR_UNIFORM else "spread widely"


def _next_step(profile: Measured, found: dict[str, Estimate], comparison: _Comparison) -> str:
    """What to try; that is to measure, as attention alone does not say how well [cls] summarizes an image."""
    if not found:
        if all(name in profile.undefined for name in COMPARED):
            return "next: this attention is not judged here; measure what the tokens hold (vitprobe verify)"
        return "next: measure the paper's three statistics too (leave --statistic out)"
    if not profile.layout.has_cls:
        return (
            "next: there is no [cls] attention to judge; read the patch tokens, averaged or pooled by attention, and "
            "probe both"
        )
    measure = (
        "measure [cls], the average of the patch tokens and selective aggregations of them against each other "
        "(vitprobe verify)"
    )
    keeps, entropy = found.get("cls_self_attention"), found.get("cls_entropy_share")
    threshold = MOST if comparison.much is None else min(MOST, comparison.much)
    patches = profile.layout.num_patches
    if (keeps is not None and _low(keeps) > threshold) or (
        entropy is not None and _spreading(entropy, patches) == "near-uniform"
    ):
        return (
            "next: a [cls] that attends to itself or near-uniformly is what was reported of masked autoencoders, where "
            f"selective aggregation helped; whether it helps here, attention alone does not say: {measure}"
        )
    return f"next: attention alone does not say how well [cls] summarizes an image: {measure}"


def _resemblance(profile: Measured, references: Sequence[Reference], others: Sequence[Reference]) -> str:
    for reference in references:
        if reference not in others:
            return f"these are the weights of the shipped reference {reference.name} ({reference.paradigm}) itself"
    if len(others) < FEWEST_REFERENCES:
        shipped = "no reference" if not others else f"one reference ({others[0].name}), too few to compare with,"
        return (
            f"vitprobe ships {shipped} with the same blocks, width, heads and tokens, so no number is judged by one; "
            f"{PUBLISHED}"
        )
    curves = {name: profile.estimate(name).center.tolist() for name in COMPARED if name in profile.statistics}
    if not curves:
        return "no comparison with the shipped references: this run holds none of the paper's three statistics"
    ranked = sorted(((distance(curves, r.curves), r) for r in others), key=lambda pair: pair[0])
    said = ", ".join(f"{r.name} ({r.paradigm}) {away:.3f}" for away, r in ranked)
    where = f"mean difference of the three curves: {said}; resembles: at most {RESEMBLES:g} and half the next"
    (nearest_away, nearest), (next_away, _) = ranked[:2]
    if nearest_away > RESEMBLES or nearest_away > CLEARLY_NEARER * next_away:
        return f"resembles none of the shipped references of its architecture ({where})"
    return f"resembles {nearest.name} ({nearest.paradigm}) among the references of its architecture ({where})"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _uniform(name: str, layout: TokenLayout) -> float:
    uniform = STATISTICS[name].uniform
    assert uniform is not None  # all of `COMPARED` have one
    return uniform(layout)


def _patches(entropy_share: float, patches: int) -> float:
    """The effective number of patches of an entropy given as a share of log N."""
    return math.exp(entropy_share * math.log(patches))


def _times(own: Estimate, layout: TokenLayout) -> str:
    return f"{float(own.center) / _uniform('patch_self_attention_ratio', layout):.1f} times"


def _sided(result: Estimate, threshold: float, above: str, below: str, between: str) -> str:
    """The words for an interval above a threshold, at most at it, or around it."""
    return above if _low(result) > threshold else below if _high(result) <= threshold else between


def _low(result: Estimate) -> float:
    return float(result.center if math.isnan(result.low) else result.low)


def _high(result: Estimate) -> float:
    return float(result.center if math.isnan(result.high) else result.high)


def _number(percent: float) -> str:
    """A percentage to a tenth, below ten to a hundredth."""
    return f"{percent:.1f}" if percent >= 10 else f"{percent:.2f}"


def _percent(share: float) -> str:
    return f"{_number(100 * share)} %"


def _interval(result: Estimate) -> str:
    ends = "" if math.isnan(result.low) else " to ".join(_number(100 * float(end)) for end in (result.low, result.high))
    return f"{_percent(float(result.center))} ({_in_words(result, ends)})"


def _in_words(result: Estimate, ends: str) -> str:
    """An interval's ends with n; that there is none, or that it rests on few images."""
    if not ends:
        return f"no interval: n = {result.n}"
    return f"95 % interval {ends}, n = {result.n}{', few images' if result.few else ''}"
