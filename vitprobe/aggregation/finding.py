"""From `my_package.my_module:MyAggregator` or `path/to/file.py:MyAggregator` to a registered name."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import import_module, invalidate_caches
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from vitprobe.aggregation.base import Aggregator
from vitprobe.aggregation.registering import FILES, as_name
from vitprobe.errors import UserError
from vitprobe.plugins import in_words


def resolve(text: str) -> str:
    """The name under which the aggregator at a place is registered, now if it was not; its module runs once a process.

    Args:
        text: `module:Name`, a module that Python can import (also from the current folder), or `file.py:Name`. `_all`
            after it stays behind the name.

    Raises:
        UserError: where there is no such module, file or name, where the module fails, or for what is no aggregator.
    """
    place, _, name = text.rpartition(":")
    module = _load_file(place, text) if place.endswith(".py") else _load_module(place, text)
    plain = name.removesuffix("_all")
    for found, rest in ((name, ""), (plain, "_all" if plain != name else "")):
        if hasattr(module, found):
            return as_name(_kind(module, found, text)) + rest
    own = [each for each, kind in vars(module).items() if _is_own(kind)]
    near = get_close_matches(name, own, n=3, cutoff=0.5) or own
    has = f"its aggregators: {', '.join(near)}" if near else "it defines no aggregator"
    raise UserError(f"{place} has no {name!r}; {has}")


def _kind(module: ModuleType, name: str, text: str) -> object:
    kind = getattr(module, name)
    if isinstance(kind, str):
        raise UserError(f"{text} is a text, no aggregator: name a class or a function that makes one")
    return kind


def _is_own(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, Aggregator) and not kind.__module__.startswith("vitprobe.")


def _load_module(place: str, text: str) -> ModuleType:
    # Python searches the folder of the command `vitprobe`, not the one that it is called in.
    with _searched(Path.cwd()), _one_line(place, text):
        return import_module(place)


def _load_file(place: str, text: str) -> ModuleType:
    path = Path(place).expanduser().resolve()
    if not path.is_file():
        raise UserError(f"{place} does not exist: give a file as in path/to/file.py:MyAggregator")
    name = f"vitprobe_file_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # of a file that ends in .py
    module = module_from_spec(spec)
    sys.modules[name], FILES[name] = module, str(path)
    with _searched(path.parent), _one_line(place, text):  # as for a script, what lies beside it can be imported
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return module


@contextmanager
def _searched(folder: Path) -> Iterator[None]:
    """Context in which Python finds modules in a folder too, after all others."""
    sys.path.append(str(folder))
    try:
        invalidate_caches()
        yield
    finally:
        sys.path.remove(str(folder))


@contextmanager
def _one_line(place: str, text: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise UserError(f"{place} of the aggregator {text} cannot be imported ({in_words(error)})") from error
