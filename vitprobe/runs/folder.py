"""A run's folder: what may be written where, and the manifest that describes it."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from vitprobe.errors import UserError
from vitprobe.files import PARTIAL, disk_errors, partial_of, write_atomically
from vitprobe.profile.values import SHARD_FOLDER, SHARDS

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SUMMARIES = ("summary.csv", "summary.parquet")
REQUIRED = ("format_version", "model", "layout", "undefined", "arguments")
READERS = {"analyze": "vitprobe.Profile.load", "verify": "vitprobe.Verification.load"}  # by the command that wrote


def check_output(folder: Path, overwrite: bool, resume: bool = False, command: str = "analyze") -> None:
    """Refuse a folder that a run of a command must not be written to; touches nothing.

    Raises:
        UserError: for a file, a folder with another run (without `overwrite` or `resume`), with a run of another
            command, or with something else in it, or a place that is not writable.
    """
    with disk_errors(folder):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file; give --out a folder")
        if folder.is_dir() and any(not _unfinished(path) for path in folder.iterdir()):
            manifest = _run_manifest(folder)
            if manifest is None:
                raise UserError(f"{folder} is not empty and holds no run of vitprobe; give --out a new or empty folder")
            _require_of(folder, manifest, command)
            if not overwrite and not resume:
                raise UserError(
                    f"{folder} holds another run; pass --overwrite to replace it, --resume to go on with it, "
                    f"or give another --out"
                )
        existing = folder.absolute()
        while not existing.exists():
            existing = existing.parent
        if not existing.is_dir():
            raise UserError(f"{existing} is a file, so {folder} cannot be made; give another --out")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise UserError(f"{existing} is not writable; give another --out")


def _unfinished(path: Path) -> bool:
    """Whether a file is what a kill left of one being written."""
    return path.name.startswith(".") and path.name.endswith(PARTIAL)


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run of vitprobe: others too call a file `manifest.json`."""
    return _run_manifest(folder) is not None


def _run_manifest(folder: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and all(key in manifest for key in REQUIRED) else None


def _require_of(folder: Path, manifest: dict[str, Any], command: str) -> None:
    """Raises a UserError for the run of another command."""
    wrote = "verify" if manifest.get("kind") else "analyze"  # a profile's manifest names no kind
    if wrote != command:
        raise UserError(
            f"{folder} is a run of vitprobe {wrote}, not of {command}: give another folder ({READERS[wrote]} reads "
            f"this one)"
        )


def clear_run(folder: Path) -> None:
    """Remove a run's own files from its folder, and nothing else (figures are the command line's)."""
    clear_results(folder)
    with disk_errors(folder):
        (folder / MANIFEST).unlink(missing_ok=True)


def clear_results(folder: Path) -> None:
    """Remove all of a run's own files but the manifest: a kill meanwhile leaves a folder that is still a run's."""
    clear_unfinished(folder)
    with disk_errors(folder):
        for path in (folder / SHARD_FOLDER).glob(SHARDS):
            path.unlink()
        for name in SUMMARIES:
            (folder / name).unlink(missing_ok=True)
        with suppress(OSError):  # not there, or it holds something else
            (folder / SHARD_FOLDER).rmdir()


def clear_unfinished(folder: Path) -> None:
    """Remove what a kill left of files that were being written."""
    with disk_errors(folder):
        for name in (MANIFEST, *SUMMARIES):
            partial_of(folder / name).unlink(missing_ok=True)
        for path in (folder / SHARD_FOLDER).glob(partial_of(Path(SHARDS)).name):
            path.unlink()


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write `manifest.json`, atomically."""
    write_atomically(folder / MANIFEST, (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode())


def read_manifest(folder: Path, command: str = "analyze") -> dict[str, Any]:
    """The manifest of a run's folder.

    Args:
        folder: where the run is.
        command: which command writes such runs, for the messages.

    Raises:
        UserError: where there is none, it is broken, another command wrote it, or a newer vitprobe.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(
            f"{folder} holds no run (there is no {MANIFEST}); give the folder that vitprobe {command} wrote"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        manifest = None
    version = manifest.get("format_version", FORMAT_VERSION) if isinstance(manifest, dict) else FORMAT_VERSION
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path} has format {version}, this vitprobe reads format {FORMAT_VERSION}; "
            f"upgrade vitprobe or {command} again"
        )
    if not is_run(folder):
        raise UserError(f"{path} is broken, or none of vitprobe's; give the folder of a run, or {command} again")
    assert manifest is not None  # is_run has read it too
    _require_of(folder, manifest, command)
    return manifest
