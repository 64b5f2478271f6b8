"""`create`: an aggregator from a name such as `abmilp_all(depth=2)` or `my_module:MyAggregator`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from typing import Any

from torch import Tensor

from vitprobe.aggregation.attended import Oracle
from vitprobe.aggregation.base import Aggregator
from vitprobe.aggregation.finding import resolve
from vitprobe.aggregation.registering import SOURCES, options_of
from vitprobe.aggregation.table import AGGREGATORS
from vitprobe.errors import UserError
from vitprobe.layout import TokenLayout
from vitprobe.plugins import load_plugins

_ORACLE = "oracle:"
_NAME = re.compile(r"(?P<base>[^()]+)(?:\((?P<options>[^()]*)\))?")
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}


def names() -> list[str]:
    """The names of all aggregators; `oracle:<model>` stands for one with any model's name in it."""
    load_plugins()
    return [*AGGREGATORS, f"{_ORACLE}<model>"]


def split_names(text: str) -> list[str]:
    """The names in a list such as `cls,abmilp(depth=2,activation=tanh)`: commas in brackets do not part them."""
    return [name.strip() for name in re.split(r",(?![^()]*\))", text) if name.strip()]


def create(name: str, *, dim: int, layout: TokenLayout | None = None, **options: Any) -> Aggregator:
    """An aggregator, its weights drawn from torch's global generator.

    Args:
        name: one of `names()`, with `_all` after it for [cls] and patches instead of patches alone, and perhaps with
            options in brackets: `abmilp_all(depth=2,activation=tanh)`. Or where one of your own is found:
            `my_package.my_module:MyAggregator` or `path/to/file.py:MyAggregator`, also with options.
        dim: numbers a token.
        layout: of the tokens; needed by `clip` alone.
        **options: the same options, by name.

    Raises:
        UserError: for a name or an option that there is not, for what is no aggregator, and where sizes do not fit.
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
    if base in SOURCES:
        if not isinstance(aggregator, Aggregator):
            raise UserError(f"{base} made a {type(aggregator).__name__}, not a vitprobe.aggregation.Aggregator")
        aggregator.source = SOURCES[base]
        aggregator.register_forward_hook(_check_vectors, with_kwargs=True)
    aggregator.name = _canonical(base, defaults, chosen)
    return aggregator


def is_known(name: str) -> bool:
    """Whether `create` finds this name without importing anything for it but plugins."""
    base = name.partition("(")[0]
    if ":" in base and not base.startswith(_ORACLE):
        return False
    try:
        return bool(_find(base))
    except UserError:
        return False


def _check_vectors(aggregator: Any, args: tuple[Any, ...], kwargs: dict[str, Any], vectors: Any) -> None:
    """Hook on aggregators from outside.

    Raises:
        UserError: for vectors of another shape than they announce.
    """
    batch = (*args, *kwargs.values())[0]
    wanted = (len(batch), aggregator.out_dim)
    came = tuple(vectors.shape) if isinstance(vectors, Tensor) else type(vectors).__name__
    if came != wanted:
        raise UserError(
            f"{aggregator.name} gave {came}, not {wanted}, (B, out_dim): return one vector per image, and say its "
            f"width with super().__init__(dim, out_dim=…)"
        )


def _find(base: str) -> tuple[str, Callable[..., Aggregator], dict[str, Any], bool]:
    """The name without `_all`, what makes the aggregator, the defaults of its options, whether `_all` was there."""
    if base.startswith(_ORACLE) and len(base) > len(_ORACLE):
        kind = partial(Oracle, model=base.removeprefix(_ORACLE))
        return base, kind, options_of(kind), False
    if ":" in base and not base.startswith(_ORACLE):
        base = resolve(base)
    plain = base.removesuffix("_all")
    if not {base, plain} & AGGREGATORS.keys():
        load_plugins()
    if base in AGGREGATORS:
        return base, AGGREGATORS[base], options_of(AGGREGATORS[base]), False
    if plain in AGGREGATORS and "tokens" in options_of(AGGREGATORS[plain]):
        return plain, AGGREGATORS[plain], options_of(AGGREGATORS[plain]), True
    near = get_close_matches(base, names(), n=3, cutoff=0.5) or names()
    raise UserError(f"no aggregator is called {base!r}; the nearest: {', '.join(near)}")


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
