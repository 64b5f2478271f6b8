"""A run's folder: what may be written where, whose it is, and what of it a command may take away."""

from __future__ import annotations

import json
import os
import shutil
import weakref
from contextlib import suppress
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from filelock import FileLock, Timeout

from vitprobe.errors import UserError
from vitprobe.files import PARTIAL, disk_errors, partial_of, write_atomically
from vitprobe.runs.kind import Kind
from vitprobe.runs.manifest import MANIFEST, command_of, read_manifest, reader_of

LOCK = ".lock"


class Keeper:
    """Something to hold."""


class RunFolder:
    """Where a run is, or will be.

    The folder is this run's from `claim` on. What fails before leaves nothing behind, and takes nothing away.

    Attributes:
        path: of the folder.
        kind: the runs of which command.
        claimed: whether it is this run's.
        keeper: of a temporary folder, which is removed when nothing holds its keeper any more; None of others.
    """

    def __init__(self, path: str | Path, kind: Kind, keeper: Keeper | None = None) -> None:
        self.path, self.kind, self.claimed, self.keeper = Path(path), kind, False, keeper
        self._lock = FileLock(self.path / LOCK, timeout=0)
        self._manifest: dict[str, Any] = {}
        self._go_on = False

    @classmethod
    def of(cls, out: str | Path | None, kind: Kind) -> RunFolder:
        """The folder `out`; without it a temporary one, which is there as long as its keeper is."""
        if out is not None:
            return cls(out, kind)
        path = mkdtemp(prefix="vitprobe-")
        keeper = Keeper()
        weakref.finalize(keeper, shutil.rmtree, path, ignore_errors=True)
        return cls(path, kind, keeper)

    @property
    def temporary(self) -> bool:
        """Whether the folder goes when nobody reads it any more."""
        return self.keeper is not None

    # Before the run ---------------------------------------------------------------------------------------------------

    def check(self, overwrite: bool = False, resume: bool = False) -> None:
        """Refuse a folder that such a run must not be written to; touches nothing.

        Raises:
            UserError: for a file, a folder with another run (without `overwrite` or `resume`), with a run of another
                command, with something else in it, or that another process is writing, or a place that is not writable.
        """
        path = self.path
        with disk_errors(path):
            if path.exists() and not path.is_dir():
                raise UserError(f"{path} is a file; give --out a folder")
            if path.is_dir() and any(not _left_by_a_kill(entry) for entry in path.iterdir()):
                manifest = read_manifest(path)
                if manifest is None:
                    raise UserError(
                        f"{path} is not empty and holds no run of vitprobe; give --out a new or empty folder"
                    )
                self._require_kind(manifest)
                if not overwrite and not resume:
                    raise UserError(
                        f"{path} holds another run; pass --overwrite to replace it, --resume to go on with it, "
                        f"or give another --out"
                    )
            if (path / LOCK).exists() and not self._lock.is_locked:
                self._acquire()
                self._lock.release()
            existing = path.absolute()
            while not existing.exists():
                existing = existing.parent
            if not existing.is_dir():
                raise UserError(f"{existing} is a file, so {path} cannot be made; give another --out")
            if not os.access(existing, os.W_OK | os.X_OK):
                raise UserError(f"{existing} is not writable; give another --out")

    @property
    def holds_run(self) -> bool:
        """Whether there is a run of vitprobe: others too call a file `manifest.json`."""
        return read_manifest(self.path) is not None

    def read(self) -> dict[str, Any]:
        """The manifest of the run that is there, in today's dialect.

        Raises:
            UserError: where there is none, it is broken, another command wrote it, or a newer vitprobe.
        """
        path, command = self.path / MANIFEST, self.kind.command
        if not path.is_file():
            raise UserError(
                f"{self.path} holds no run (there is no {MANIFEST}); give the folder that vitprobe {command} wrote"
            )
        manifest = read_manifest(self.path)
        if manifest is None:
            raise UserError(f"{path} is broken, or none of vitprobe's; give the folder of a run, or {command} again")
        self._require_kind(manifest)
        return manifest

    def _require_kind(self, manifest: dict[str, Any]) -> None:
        wrote = command_of(manifest)
        if wrote != self.kind.command:
            raise UserError(
                f"{self.path} is a run of vitprobe {wrote}, not of {self.kind.command}: give another folder "
                f"({reader_of(manifest)} reads this one)"
            )

    # During the run ---------------------------------------------------------------------------------------------------

    def begin(self, manifest: dict[str, Any], *, go_on: bool = False) -> None:
        """Say what run it is to be; nothing is written yet.

        Args:
            manifest: of the run, as it is when the folder is claimed.
            go_on: with the run that is there, whose results stay.
        """
        self._manifest, self._go_on = manifest, go_on

    def claim(self) -> None:
        """Make the folder the run's that was begun, once: another run's results go, and the manifest is written.

        Raises:
            UserError: where the disk takes no more, or another process is writing there.
        """
        if self.claimed:
            return
        ours = not self.path.exists()
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        self._acquire()
        try:
            self._take()
        except BaseException:
            if ours:
                self.leave()
            raise
        self.claimed = True

    def _take(self) -> None:
        if not self._go_on:  # the old manifest stays until then: a kill meanwhile leaves a folder that is still a run's
            self.clear_results()
            self.clear_unfinished()
        self._clear_partial()
        self.write_manifest(self._manifest)

    def write_manifest(self, manifest: dict[str, Any]) -> None:
        """Write `manifest.json`, atomically."""
        content = json.dumps(manifest, indent=2, ensure_ascii=False)
        write_atomically(self.path / MANIFEST, f"{content}\n".encode())

    def release(self) -> None:
        """Let other processes have the folder."""
        if self._lock.is_locked:
            with suppress(OSError):
                (self.path / LOCK).unlink(missing_ok=True)
            self._lock.release()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _acquire(self) -> None:
        try:
            self._lock.acquire()
        except Timeout:
            raise UserError(
                f"another process is writing to {self.path}: wait until it has ended, or give another --out"
            ) from None
        except NotImplementedError:  # a file system without locks
            return

    # What may go ------------------------------------------------------------------------------------------------------

    def clear(self) -> None:
        """Remove a run's own files, and nothing else (figures are the command line's)."""
        self.clear_results()
        self.clear_unfinished()
        with disk_errors(self.path):
            (self.path / MANIFEST).unlink(missing_ok=True)

    def leave(self) -> None:
        """Remove a run's own files, and the folder unless it holds something else."""
        self.clear()
        self.release()
        with suppress(OSError):
            self.path.rmdir()

    def clear_results(self) -> None:
        """Remove what such a run writes, but for the manifest."""
        self._remove(self.kind.results)

    def clear_unfinished(self) -> None:
        """Remove what only an unfinished run needs, and what a kill left of files that were being written."""
        self._remove(self.kind.unfinished)
        self._clear_partial()

    def _clear_partial(self) -> None:
        self._remove(
            [str(partial_of(Path(pattern))) for pattern in (MANIFEST, *self.kind.results, *self.kind.unfinished)]
        )

    def _remove(self, patterns: tuple[str, ...] | list[str]) -> None:
        with disk_errors(self.path):
            for pattern in patterns:
                for path in list(self.path.glob(pattern)):
                    if path.is_dir():
                        shutil.rmtree(path)
                    else:
                        path.unlink(missing_ok=True)
                inner = self.path / Path(pattern).parent
                if inner != self.path:
                    with suppress(OSError):  # not there, or it holds something else
                        inner.rmdir()


def _left_by_a_kill(path: Path) -> bool:
    """Whether a file says nothing of a run: one that was being written, or a lock."""
    return path.name == LOCK or (path.name.startswith(".") and path.name.endswith(PARTIAL))
