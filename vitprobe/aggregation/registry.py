"""Every aggregator by its name, and `create`, which makes one of a name such as `abmilp_all(depth=2)`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from typing import Any

from vitprobe.aggregation.abmilp import AbMilp
from vitprobe.aggregation.attended import CenterAttention, ClsAttention, ClsAttentionMinEntropy, Oracle
from vitprobe.aggregation.base import Aggregator
from vitprobe.aggregation.blocks import Cait, VitBlock, VJepa
from vitprobe.aggregation.convolutional import Cbam, Dolg
from vitprobe.aggregation.language import Clip, Coca, Siglip
from vitprobe.aggregation.queries import Aim, Cae, Capi, EfficientProbing, SimPool
from vitprobe.aggregation.simple import Center, Cls, ClsGap, Gap, Gem, Max
from vitprobe.aggregation.tokencut import TokenCut
from vitprobe.errors import UserError
from vitprobe.layout import TokenLayout

AGGREGATORS: dict[str, Callable[..., Aggregator]] = {
    "cls": Cls,
    "gap": Gap,
    "cls+gap": ClsGap,
    "max": Max,
    "gem": Gem,
    **{f"center{size}": partial(Center, size=size) for size in range(1, 5)},
    **{f"center_attention{size}": partial(CenterAttention, size=size) for size in range(1, 5)},
    "cls_attention": ClsAttention,
    "cls_attention_min_entropy": ClsAttentionMinEntropy,
    "tokencut": TokenCut,
    "abmilp": AbMilp,
    "ep": EfficientProbing,
    "simpool": SimPool,
    "aim": Aim,
    "capi": Capi,
    "cae": Cae,
    "clip": Clip,
    "siglip": Siglip,
    "vjepa": VJepa,
    "coca": Coca,
    "cait": Cait,
    "vit_block": VitBlock,
    "cbam": Cbam,
    "dolg": Dolg,
}

_ORACLE = "oracle:"
_NAME = re.compile(r"(?P<base>[^()]+)(?:\((?P<options>[^()]*)\))?")
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}


def names() -> list[str]:
    """The names of all aggregators; `oracle:<model>` stands for one with any model's name in it."""
    return [*AGGREGATORS, f"{_ORACLE}<model>"]


def split_names(text: str) -> list[str]:
    """The names in a list such as `cls,abmilp(depth=2,activation=tanh)`: commas in brackets do not part them."""
    return [name.strip() for name in re.split(r",(?![^()]*\))", text) if name.strip()]


def create(name: str, *, dim: int, layout: TokenLayout | None = None, **options: Any) -> Aggregator:
    """An aggregator, its weights drawn from torch's global generator.

    Args:
        name: one of `names()`, with `_all` after it for [cls] and patches instead of patches alone, and perhaps with
            options in brackets: `abmilp_all(depth=2,activation=tanh)`.
        dim: numbers a token.
        layout: of the tokens; needed by `clip` alone.
        **options: the same options, by name.

    Raises:
        UserError: for a name or an option that there is not, and where sizes do not fit.
    """
    match = _NAME.fullmatch(name)
    base, given = (name, "") if match is None else (match["base"], match["options"] or "")
    base, kind, defaults, all_tokens = _find(base)
    chosen = {"tokens": "all"} if all_tokens else {}
    for option, value in (chosen | _split(base, given) | options).items():
        if option not in defaults:
            has = f"it has {', '.join(defaults)}" if defaults else "it has none"
            raise UserError(f"{base} has no option {option!r}: {has}")
        chosen[option] = _value(base, option, defaults[option], value)
    if "layout" in inspect.signature(kind).parameters:
        kind = partial(kind, layout=layout)
    aggregator = kind(dim=dim, **chosen)
    aggregator.name = _canonical(base, defaults, chosen)
    return aggregator


def _find(base: str) -> tuple[str, Callable[..., Aggregator], dict[str, Any], bool]:
    """The name without `_all`, what makes the aggregator, the defaults of its options, whether `_all` was there."""
    plain = base.removesuffix("_all")
    if base.startswith(_ORACLE) and len(base) > len(_ORACLE):
        kind = partial(Oracle, model=base.removeprefix(_ORACLE))
        return base, kind, _defaults(kind), False
    if base in AGGREGATORS:
        return base, AGGREGATORS[base], _defaults(AGGREGATORS[base]), False
    if plain in AGGREGATORS and "tokens" in _defaults(AGGREGATORS[plain]):
        return plain, AGGREGATORS[plain], _defaults(AGGREGATORS[plain]), True
    near = get_close_matches(base, names(), n=3, cutoff=0.5) or names()
    raise UserError(f"no aggregator is called {base!r}; the nearest: {', '.join(near)}")


def _defaults(kind: Callable[..., Aggregator]) -> dict[str, Any]:
    """The options of an aggregator: what its constructor takes by name alone, and what no name has fixed."""
    fixed = kind.keywords if isinstance(kind, partial) else {}
    parameters = inspect.signature(kind).parameters.values()
    return {one.name: one.default for one in parameters if one.kind is one.KEYWORD_ONLY and one.name not in fixed}


def _split(base: str, given: str) -> dict[str, str]:
    """The options in brackets."""
    options = {}
    for part in filter(None, (part.strip() for part in given.split(","))):
        option, equals, value = part.partition("=")
        if not equals:
            raise UserError(f"{base}: {part!r} is no option; write option=value")
        options[option.strip()] = value.strip()
    return options


def _value(base: str, option: str, default: Any, value: Any) -> Any:
    """The value of an option, as the kind of thing that its default is."""
    kind = type(default)
    try:
        if kind is bool:
            return {"true": True, "false": False}[str(value).lower()]
        if kind is int and float(value) != int(value):
            raise ValueError
        return kind(value)
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{base}: {option} is {_WORDS[kind]}, not {value!r}") from None


def _canonical(base: str, defaults: dict[str, Any], options: dict[str, Any]) -> str:
    """The name with the options that are not the defaults, in the order of their declaration."""
    others = {option: options[option] for option in defaults if option in options}
    others = {option: value for option, value in others.items() if value != defaults[option]}
    name = base + ("_all" if others.pop("tokens", None) == "all" else "")
    words = [f"{option}={str(value).lower() if isinstance(value, bool) else value}" for option, value in others.items()]
    return f"{name}({','.join(words)})" if words else name
