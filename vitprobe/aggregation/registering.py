"""`register`: an aggregator of one's own under a name, which then works wherever the package's do."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from vitprobe.aggregation.base import Aggregator
from vitprobe.aggregation.table import AGGREGATORS
from vitprobe.errors import UserError

Kind = TypeVar("Kind", bound=Callable[..., Aggregator])

# Name of each registered aggregator → where it is found, as `create` takes it; empty for what no import would find.
SOURCES: dict[str, str] = {}
# Name of each module that was loaded from a file → that file.
FILES: dict[str, str] = {}


def register(name: str) -> Callable[[Kind], Kind]:
    """Register an aggregator: a decorator on a subclass of `Aggregator`, or on a function that makes one.

    From then on `name` works as the package's own do: in `create`, `verify(aggregators=[…])`, tables, figures, saved
    probes, and `vitprobe verify --aggregator` where a plugin registers it. The class is called with `dim=`, the width
    of the tokens, with `layout=` (a `TokenLayout`) where it takes that, and with its options: what it takes by keyword
    alone, each with an int, float, bool or str as default, to be written `name(option=value)`. Registering the same
    class again (a notebook cell run twice) replaces it.

    Args:
        name: letters, digits, and any of `_+-.`; not ending in `_all`, which stands for the option tokens="all".

    Returns:
        The decorator; it returns the class or function unchanged.

    Raises:
        UserError: for a name that is taken or is no name, or what is no aggregator.

    Example:
        >>> import vitprobe as vp
        >>> @vp.aggregation.register("median")
        ... class Median(vp.aggregation.Aggregator):
        ...     def forward(self, batch):
        ...         return batch.patches.median(dim=1).values
        >>> vp.aggregation.create("median", dim=64).out_dim
        64
    """
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w+.-]*", name) or name.endswith("_all"):
        raise UserError(f"{name!r} is no name for an aggregator: use letters, digits and _+-., not ending in _all")

    def add(kind: Any) -> Any:
        _check(kind)
        earlier = AGGREGATORS.get(name)
        if earlier is not None and not (name in SOURCES and _place(earlier) == _place(kind) and _place(kind)[1]):
            where = _place(earlier)[0] if name in SOURCES else "vitprobe's own"
            raise UserError(f"there is an aggregator {name} already ({where}): register yours under another name")
        AGGREGATORS[name], SOURCES[name] = kind, _source(kind)
        return kind

    return add


def as_name(given: Any) -> str:
    """The name by which `create` makes what `verify` was given: a name, or a class or function registered by this call.

    Raises:
        UserError: for what is no aggregator, or has no name of its own or another one's.
    """
    if isinstance(given, str):
        return given
    for name, kind in AGGREGATORS.items():
        if kind is given:
            return name
    _check(given)
    name = getattr(given, "__name__", "")
    if not name.isidentifier():
        raise UserError("an aggregator without a name was given: register it with vitprobe.aggregation.register(NAME)")
    register(name)(given)
    return name


def options_of(kind: Callable[..., Aggregator]) -> dict[str, Any]:
    """The options of an aggregator: what its constructor takes by name alone, and what no name has fixed."""
    fixed = {"layout", *(kind.keywords if isinstance(kind, partial) else ())}
    parameters = inspect.signature(kind).parameters.values()
    return {one.name: one.default for one in parameters if one.kind is one.KEYWORD_ONLY and one.name not in fixed}


def _check(kind: Any) -> None:
    called = getattr(kind, "__name__", type(kind).__name__)
    if isinstance(kind, Aggregator):
        raise UserError(f"{type(kind).__name__}(…) is an aggregator that is made already: give its class")
    if isinstance(kind, type) and not issubclass(kind, Aggregator):
        raise UserError(f"{called} is no aggregator: derive it from vitprobe.aggregation.Aggregator")
    if not callable(kind):
        raise UserError(
            f"{kind!r} is no aggregator: give a name, a subclass of vitprobe.aggregation.Aggregator, or a function "
            f"that makes one"
        )
    if isinstance(kind, type) and kind.forward is Aggregator.forward:
        raise UserError(f"{called} has no forward(batch): define it, from a TokenBatch to (B, out_dim)")
    parameters = inspect.signature(kind).parameters
    if "dim" not in parameters:
        raise UserError(f"{called} does not take dim: it is called with dim=, the width of the tokens")
    for parameter in parameters.values():
        if parameter.name in ("dim", "layout") or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        if parameter.kind is not parameter.KEYWORD_ONLY and parameter.default is not parameter.empty:
            continue  # not to be set by an option
        if type(parameter.default) not in (int, float, bool, str):
            raise UserError(
                f"{called} takes {parameter.name}, which no option can set: take options after a *, each with an int, "
                f"float, bool or str as default"
            )


def _place(kind: Any) -> tuple[str, str]:
    """Where a class or function was defined."""
    return getattr(kind, "__module__", ""), getattr(kind, "__qualname__", "")


def _source(kind: Any) -> str:
    """Where an import finds a class or function; empty for those of a script, a notebook or inside a function."""
    module, name = _place(kind)
    found = module if module in FILES else sys.modules.get(module)
    if module == "__main__" or found is None or not name.isidentifier():
        return ""
    return f"{FILES.get(module, module)}:{name}"
