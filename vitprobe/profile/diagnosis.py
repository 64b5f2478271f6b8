"""The numbers of a profile in plain words: what [cls] and the patches do, against baselines, and what to try next.

The words follow fixed rules, written down here and nowhere else. "Late blocks" are the last third. A verdict is a
statement about attention; whether another aggregation gives a better representation is for probing to measure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from vitprobe.models.tokens import TokenLayout
from vitprobe.profile.intervals import Estimate
from vitprobe.profile.references import COMPARED, Reference, distance, matching_references

KEEPS = 0.10  # [cls] keeps "much" for itself where the whole interval lies above this share and 3 times uniform
NEAR_UNIFORM = 0.95  # an entropy above this share of log N is called near-uniform
SELECTIVE = 0.85  # and below this one selective
OWN = 3.0  # patches look "much" at themselves where the whole interval lies above this many times uniform
# "Resembles" is said where the nearest reference is at most half as far as the next.
CLEARLY_NEARER = 0.5


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
        evidence: a line each for [cls], its entropy and the patches, with intervals and baselines.
        reference: what it resembles, or why that is not said.
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
    references = matching_references(profile.manifest, profile.layout.num_tokens)
    random = next((reference for reference in references if reference.paradigm == "random"), None)

    def baseline(name: str, uniform: float) -> str:
        text = f"uniform attention: {_percent(uniform)}"
        if random is not None:
            text += f"; random weights: {_percent(sum(random.curves[name][late]) / len(random.curves[name][late]))}"
        return text

    span = f"blocks {late.start} to {late.stop - 1}" if late.stop - late.start > 1 else f"block {late.start}"
    evidence, layout = [], profile.layout
    if "cls_self_attention" in found:
        keeps = found["cls_self_attention"]
        evidence.append(
            f"[cls] keeps {_interval(keeps)} of its attention for itself in {span} "
            f"({baseline('cls_self_attention', 1 / layout.num_tokens)})"
        )
    if "cls_entropy_share" in found:
        evidence.append(
            f"its entropy over the patches is {_interval(found['cls_entropy_share'])} of the maximum, "
            f"log {layout.num_patches} = {math.log(layout.num_patches):.2f} nats "
            f"({baseline('cls_entropy_share', 1.0)})"
        )
    if "patch_self_attention_ratio" in found:
        evidence.append(
            f"a patch gives {_interval(found['patch_self_attention_ratio'])} of its attention to patches to itself "
            f"({baseline('patch_self_attention_ratio', 1 / layout.num_patches)})"
        )
    missing = [name for name in COMPARED if name not in found]
    if missing:
        reasons = {profile.undefined.get(name, "not asked for in this run") for name in missing}
        evidence.append(f"undefined here: {', '.join(missing)} ({'; '.join(sorted(reasons))})")
    verdict, next_step = _verdict(profile, found)
    return Diagnosis(f"{profile.name}: {verdict}", tuple(evidence), _resemblance(profile, references), next_step)


def _verdict(profile: Measured, found: dict[str, Estimate]) -> tuple[str, str]:
    """The sentence, and what to try next."""
    layout = profile.layout
    parts, signs = [], set()
    if (keeps := found.get("cls_self_attention")) is not None:
        threshold = max(KEEPS, 3 / layout.num_tokens)
        if _low(keeps) > threshold:
            parts.append("[cls] keeps much of its attention for itself")
            signs.add("bad")
        elif _high(keeps) <= threshold:
            parts.append("[cls] spends its attention on the other tokens")
        else:
            parts.append("[cls] keeps some of its attention for itself")
            signs.add("unclear")
    if (entropy := found.get("cls_entropy_share")) is not None:
        if _low(entropy) > NEAR_UNIFORM:
            parts.append("what it gives the patches is near-uniform")
            signs.add("bad")
        elif _high(entropy) < SELECTIVE:
            parts.append("what it gives the patches is selective")
        else:
            parts.append("what it gives the patches is spread widely")
            signs.add("unclear")
    if (own := found.get("patch_self_attention_ratio")) is not None and layout.num_patches > 1:
        much = _low(own) > OWN / layout.num_patches
        parts.append("patches look much at themselves" if much else "patches look mostly at each other")
    if not parts:
        parts.append("none of the paper's three statistics was measured, so there is no verdict")
    if not found:
        step = "next: measure the paper's three statistics too (leave --statistic out)"
    elif not layout.has_cls:
        step = (
            "next: there is no [cls] attention to judge; read the patch tokens, averaged or pooled by attention, and "
            "probe both"
        )
    elif "bad" in signs:
        step = (
            "next: [cls] may miss what the patches hold; measure selective aggregations of the patch tokens against "
            "[cls] and their average (vitprobe verify) before you settle on [cls]"
        )
    elif "unclear" in signs:
        step = (
            "next: attention alone does not settle whether [cls] aggregates well here; measure [cls], the average of "
            "the patch tokens and selective aggregations of them against each other (vitprobe verify)"
        )
    else:
        step = (
            "next: by its attention [cls] does aggregate; probe it against the average of the patch tokens, and look "
            "at single heads in summary.csv"
        )
    return "; ".join(parts) + ".", step


def _resemblance(profile: Measured, references: list[Reference]) -> str:
    if not references:
        return "no reference for this architecture: vitprobe ships none with the same blocks, width, heads and tokens"
    own_weights = profile.manifest["model"]["weights_sha256"]
    for reference in references:
        if reference.weights_sha256 == own_weights:
            return f"these are the weights of the shipped reference {reference.name} ({reference.paradigm}) itself"
    curves = {name: profile.estimate(name).mean.tolist() for name in COMPARED if name in profile.statistics}
    if not curves:
        return "no comparison with the shipped references: this run holds none of the paper's three statistics"
    ranked = sorted(((distance(curves, r.curves), r) for r in references), key=lambda pair: pair[0])
    said = ", ".join(f"{r.name} ({r.paradigm}) {away:.3f}" for away, r in ranked)
    where = f"mean difference of the three curves: {said}"
    if len(ranked) > 1 and ranked[0][0] > CLEARLY_NEARER * ranked[1][0]:
        return f"resembles none of the shipped references of its architecture clearly ({where})"
    nearest = ranked[0][1]
    return f"resembles {nearest.name} ({nearest.paradigm}) most among the references of its architecture ({where})"


def _low(result: Estimate) -> float:
    return float(result.mean if math.isnan(result.low) else result.low)


def _high(result: Estimate) -> float:
    return float(result.mean if math.isnan(result.high) else result.high)


def _number(percent: float) -> str:
    """A percentage to a tenth, below ten to a hundredth."""
    return f"{percent:.1f}" if percent >= 10 else f"{percent:.2f}"


def _percent(share: float) -> str:
    return f"{_number(100 * share)} %"


def _interval(result: Estimate) -> str:
    mean = _percent(float(result.mean))
    if math.isnan(result.low):
        return f"{mean} (no interval: n = {result.n})"
    low, high = (_number(100 * float(end)) for end in (result.low, result.high))
    return f"{mean} (95 % interval {low} to {high}, n = {result.n})"
