"""The examples in the package's docstrings run: offline, in a folder of their own, and give what they say."""

from __future__ import annotations

import doctest
import inspect
import socket
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

import vitprobe
from vitprobe.aggregation.registering import SOURCES
from vitprobe.aggregation.table import AGGREGATORS
from vitprobe.models import registered
from vitprobe.statistics import STATISTICS

ROOT = Path(vitprobe.__file__).parent
WITHOUT = {"load_probe"}  # which would have to train one first: tests/test_saved_probes.py


def with_examples() -> list[str]:
    """Modules with a line of an example."""
    found = [path for path in sorted(ROOT.rglob("*.py")) if ">>> " in path.read_text(encoding="utf-8")]
    return [".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__") for path in found]


@pytest.fixture(autouse=True)
def own_tables(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What an example declares or registers is gone after it."""
    tables = STATISTICS, AGGREGATORS, SOURCES
    kept = [dict(table) for table in tables]
    monkeypatch.setattr(registered, "_REGISTERED", {})
    yield
    for table, before in zip(tables, kept, strict=True):
        table.clear()
        table.update(before)


@pytest.mark.parametrize("name", with_examples())
def test_the_examples_of(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*address: object) -> None:
        raise AssertionError(f"an example needs the network ({address[1:]})")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    said: list[str] = []
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS)
    examples = [each for each in doctest.DocTestFinder(exclude_empty=True).find(import_module(name)) if each.examples]
    assert examples, "the module has examples where doctest does not look"
    for each in examples:
        runner.run(each, out=said.append)
    assert not said, "".join(said)


def test_every_public_name_has_an_example() -> None:
    public = {name: getattr(vitprobe, name) for name in vitprobe.__all__}
    documented = {name: value for name, value in public.items() if inspect.isroutine(value) or inspect.isclass(value)}
    assert {name for name, value in documented.items() if ">>> " not in (value.__doc__ or "")} == WITHOUT


def test_an_example_that_gives_something_else_is_seen() -> None:
    """So that the test above can fail."""
    said: list[str] = []
    example = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "sum", None, None)
    doctest.DocTestRunner(verbose=False).run(example, out=said.append)
    assert "Expected:\n    3\nGot:\n    2" in "".join(said)
