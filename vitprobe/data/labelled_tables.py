"""Labelled images from a table: a row an image, with its file, its label, and the part that it belongs to."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from vitprobe.data.images import FileImages, printable
from vitprobe.data.parts import Part, Parts, test_among
from vitprobe.errors import UserError

TABLES = (".csv", ".tsv")
_FILES = ("file", "filename", "file_name", "filepath", "file_path", "path", "image", "image_path", "img", "name")
_LABELS = ("label", "labels", "class", "class_name", "target", "category", "y")
_SPLITS = ("split", "part", "set", "subset", "partition", "fold")
_TRAIN = ("train", "training")
_SHAPE = "a table has a row an image with the columns file, label and, where there are parts, split (train, val)"


def table_parts(path: Path) -> Parts:
    """The parts of a table; paths in it are relative to its folder.

    The first row names the columns, or is an image where it names none: file, label, and a split if there is a third.

    Raises:
        UserError: for a table without these columns, without images, or none of whose files is there.
    """
    shown = printable(path.name)
    columns, rows = _read(path)
    files = [path.parent / row[columns["file"]].strip() for row in rows]
    if not any(file.is_file() for file in files):
        raise UserError(f"none of the {len(files)} files that {shown} names is there, the first: {files[0]}")
    labels = [row[columns["label"]].strip() for row in rows]
    if "" in labels:
        raise UserError(
            f"row {labels.index('') + 1} of {shown} ({rows[labels.index('')][columns['file']]}) has no label"
        )
    names = [row[columns["file"]].strip() for row in rows]

    def part(name: str, positions: Sequence[int]) -> Part:
        where = [files[position] for position in positions]
        images = FileImages(f"{printable(str(path))} ({name})", where, [names[position] for position in positions])
        return Part(name, images, [labels[position] for position in positions])

    if "split" not in columns:
        return Parts(shown, part("all", range(len(rows))))
    splits = [row[columns["split"]].strip().lower() for row in rows]
    train = next((name for name in _TRAIN if name in splits), None)
    test, said = test_among(shown, {_test_name(name) for name in splits})
    if train is None or test is None:
        came = ", ".join(sorted(set(splits))[:5])
        raise UserError(f"the splits of {shown} are {came}: one must be train, and one val (or validation, test)")
    return Parts(
        shown,
        part("train", [position for position, name in enumerate(splits) if name == train]),
        part(test, [position for position, name in enumerate(splits) if _test_name(name) == test]),
        said,
    )


def _test_name(name: str) -> str:
    return {"testing": "test", "dev": "val"}.get(name, name)


def _read(path: Path) -> tuple[dict[str, int], list[list[str]]]:
    """Which column is what, and the rows."""
    shown = printable(path.name)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{shown} cannot be read as a table: {' '.join(str(error).split())}") from error
    head = text.partition("\n")[0]
    delimiter = max("\t;,", key=head.count)
    rows = [row for row in csv.reader(text.splitlines(), delimiter=delimiter) if any(map(str.strip, row))]
    if not rows:
        raise UserError(f"{shown} is empty: {_SHAPE}")
    heading = [cell.strip().lower() for cell in rows[0]]
    kinds = {"file": _FILES, "label": _LABELS, "split": _SPLITS}
    columns = {
        kind: heading.index(next(name for name in names if name in heading))
        for kind, names in kinds.items()
        if any(name in heading for name in names)
    }
    if {"file", "label"} <= columns.keys():
        rows = rows[1:]
    elif not columns and len(heading) in (2, 3):
        columns = {kind: number for number, kind in enumerate(list(kinds)[: len(heading)])}
    else:
        raise UserError(f"{shown} has the columns {', '.join(rows[0])}: {_SHAPE}")
    if not rows:
        raise UserError(f"{shown} names no image: {_SHAPE}")
    short = next((number for number, row in enumerate(rows, 1) if len(row) <= max(columns.values())), None)
    if short is not None:
        raise UserError(f"row {short} of {shown} has {len(rows[short - 1])} of {len(heading)} columns: {_SHAPE}")
    return columns, rows
