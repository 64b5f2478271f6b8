"""`Kind`: what tells the runs of one command from those of another. Each command's room declares its own."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """The runs of one command. Patterns are relative to a run's folder; figures are no files of a run.

    Attributes:
        command: the command's name, as in "analyze".
        reader: Python that reads such a run.
        results: patterns of the files that it writes beside the manifest.
        unfinished: patterns of files and folders that only an unfinished run needs.
    """

    command: str
    reader: str
    results: tuple[str, ...]
    unfinished: tuple[str, ...] = ()
