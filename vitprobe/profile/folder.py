"""A run's folder: what may be written where, and the manifest that describes it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from vitprobe.errors import UserError
from vitprobe.files import write_atomically
from vitprobe.profile.values import SHARD_FOLDER

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
OURS = (MANIFEST, SHARD_FOLDER, "summary.csv", "summary.parquet", "figures")


def check_output(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that a run must not be written to; touches nothing.

    Raises:
        UserError: for a file, a folder with another run (without `overwrite`), a folder with something else in it, or
            a place that is not writable.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; give --out a folder")
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / MANIFEST).is_file():
            raise UserError(f"{folder} is not empty and holds no run of vitprobe; give --out a new or empty folder")
        if not overwrite:
            raise UserError(f"{folder} holds another run; pass --overwrite to replace it, or give another --out")
    existing = folder
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise UserError(f"{existing} is a file, so {folder} cannot be made; give another --out")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{existing} is not writable; give another --out")


def clear_run(folder: Path) -> None:
    """Remove a run's own files from its folder, and nothing else."""
    for name in OURS:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write `manifest.json`, atomically."""
    write_atomically(folder / MANIFEST, (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode())


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a run's folder.

    Raises:
        UserError: where there is none, it is broken, or it was written by a newer vitprobe.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(f"{folder} holds no run (there is no {MANIFEST}); give the folder that vitprobe analyze wrote")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["format_version"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is broken; analyze again with --overwrite") from None
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path} has format {version}, this vitprobe reads format {FORMAT_VERSION}; "
            f"upgrade vitprobe or analyze again with --overwrite"
        )
    return manifest
