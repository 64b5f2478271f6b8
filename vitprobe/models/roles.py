"""Which of several sets of weights is the one to take, by their names: averaged ones, as timm and each method do."""

from __future__ import annotations

import re
from collections.abc import Iterable

AVERAGED, PLAIN, STUDENT, MOMENTUM = range(4)  # the one to take first

_AVERAGES = {"ema", "swa", "averaged", "average", "avg", "teacher", "polyak", "shadow", "target"}
_STUDENTS = {"student", "online", "anchor", "context", "raw", "current"}
# Averages that serve training alone: MoCo and its kin evaluate the encoder that gradients train.
_KEYS = {"momentum", "key", "k", "m"}


def words_of(name: str) -> set[str]:
    """The words of a name: "model_ema", "modelEMA" and "model.ema" are of the same two."""
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)}


def role(name: str, beside: Iterable[str] = ()) -> int:
    """What the name of a set of weights says of it.

    Args:
        name: of a set, or the prefix that its names have.
        beside: names of the other sets. BYOL's "target" follows an "online" network, which is the one evaluated.
    """
    words = words_of(name)
    if "target" in words and any("online" in words_of(other) for other in beside):
        return MOMENTUM
    for which, kind in ((_KEYS, MOMENTUM), (_AVERAGES, AVERAGED), (_STUDENTS, STUDENT)):
        if words & which:
            return kind
    return PLAIN


def said(taken: str, others: Iterable[str], asked: bool = False) -> tuple[str, ...]:
    """The remark on which set of weights was taken, where there was a choice."""
    others = [other or "one without a key" for other in others]
    if not others:
        return ()
    shown = ", ".join(others[:4]) + (", …" if len(others) > 4 else "")
    choice = next((other for other in others if other != "one without a key"), "")
    way = f" (choose with --weights-key {choice})" if choice and not asked else ""
    return (f"took the weights {taken or 'without a key'}; the file also holds {shown}{way}",)
