"""The picture of the package in docs/architecture.md: its rooms, and which of them imports which.

    python -m benchmarks.house            # writes the picture between the markers of docs/architecture.md
    python -m benchmarks.house --imports  # prints every import between rooms, and those that go up

A room is a package or a module directly below `vitprobe/`. Imports inside functions count, those for type checkers
alone do not. `tests/test_house.py` holds the package to the order of `LEVELS`. Takes a second.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- house: made by python -m benchmarks.house -->", "<!-- /house -->"

# From the base up: a room imports rooms of earlier levels alone, never one beside it.
LEVELS = (
    ("errors",),
    ("files", "memory", "layout", "plugins"),
    ("data",),
    ("models",),
    ("attention",),
    ("statistics",),
    ("hooks",),
    ("frozen",),
    ("runs",),
    ("profile", "aggregation"),
    ("probing",),
    ("figures", "bench"),
    ("cli",),
)
DOORS = ("__init__", "__main__")  # these may import everything, and nothing imports them but the command line


class Import(NamedTuple):
    """One import: the module that imports, and the one that is imported, each as `room.module…`."""

    importer: str
    imported: str

    @property
    def rooms(self) -> tuple[str, str]:
        return self.importer.partition(".")[0], self.imported.partition(".")[0]

    def __str__(self) -> str:
        return f"vitprobe.{self.importer} imports vitprobe.{self.imported}"


def modules(package: Path) -> dict[str, Path]:
    """Name below the package → file; a package is named as its folder is."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


def imports(package: Path = ROOT / "vitprobe") -> list[Import]:
    """All imports of modules of the package by others of it."""
    known = modules(package)
    found = {
        Import(name, target)
        for name, path in known.items()
        for target in _imported(ast.parse(path.read_text(encoding="utf-8")), package.name, set(known))
        if target != name
    }
    return sorted(found)


def _imported(tree: ast.AST, package: str, known: set[str]) -> Iterator[str]:
    for node in _without_type_checking(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            # of `from a.b import c`, c may be a module
            targets = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in targets:
            top, _, name = target.partition(".")
            if top == package:
                yield name if name in known else name.rpartition(".")[0] or "__init__"


def _without_type_checking(tree: ast.AST) -> Iterator[ast.AST]:
    yield tree
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        yield from _without_type_checking(node)


def upward(found: list[Import]) -> list[Import]:
    """Those that the order of `LEVELS` does not allow."""
    level = {room: number for number, rooms in enumerate(LEVELS) for room in rooms}
    wrong = []
    for each in found:
        importer, imported = each.rooms
        if importer == imported or importer in DOORS:
            continue
        if imported in DOORS:
            if importer != "cli":  # which tells the version
                wrong.append(each)
        elif level[imported] >= level[importer]:
            wrong.append(each)
    return wrong


def circle(found: list[Import]) -> list[str]:
    """Modules that import each other in a circle, the first one again at the end; empty where there is none."""
    graph: dict[str, set[str]] = {}
    for importer, imported in found:
        graph.setdefault(importer, set()).add(imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(reversed(error.args[1]))
    return []


def rooms(found: list[Import]) -> dict[str, set[str]]:
    """Room → the rooms it imports, doors left out."""
    result: dict[str, set[str]] = {room: set() for level in LEVELS for room in level}
    for each in found:
        importer, imported = each.rooms
        if importer != imported and importer not in DOORS and imported not in DOORS:
            result[importer].add(imported)
    return result


def reduced(graph: dict[str, set[str]]) -> dict[str, list[str]]:
    """The imports of each room that do not follow from others: by way of another room that it imports."""

    def below(room: str, seen: frozenset[str]) -> set[str]:
        reached = set()
        for other in graph[room] - seen:
            reached |= {other} | below(other, seen | {other})
        return reached

    reach = {room: below(room, frozenset({room})) for room in graph}
    return {
        room: [other for other in graph if other in direct and not any(other in reach[via] for via in direct - {other})]
        for room, direct in graph.items()
    }


def picture(found: list[Import]) -> str:
    """The rooms as Mermaid, base at the bottom, with the imports that do not follow from others."""
    lines = ["```mermaid", "flowchart BT"]
    for level in LEVELS:
        lines += [f"  {room}" for room in level]
    lines += [f"  {room} --> {other}" for room, others in reduced(rooms(found)).items() for other in others]
    return "\n".join([*lines, "```"])


def written(page: str, drawn: str) -> str:
    """The page with the picture between its markers."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin and end, f"{PAGE} lacks the markers {BEGIN} and {END}"
    return f"{before}{BEGIN}\n{drawn}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--imports", action="store_true", help="print every import between rooms instead")
    args = parser.parse_args()
    found = imports()
    if args.imports:
        wrong = upward(found)
        for each in found:
            if each.rooms[0] != each.rooms[1]:
                print(f"{each}{' (up)' if each in wrong else ''}")
        return
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), picture(found)), encoding="utf-8")


if __name__ == "__main__":
    main()
