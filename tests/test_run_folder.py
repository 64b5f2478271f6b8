"""A run's folder: one writer at a time, nothing of others taken away, a temporary one gone when nobody reads it."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest

from vitprobe.errors import UserError
from vitprobe.runs.folder import LOCK, RunFolder
from vitprobe.runs.kind import Kind

KIND = Kind("weigh", "vitprobe.Weights.load", ("weights/*.bin", "table.csv"), ("half.bin", "cache/train"))
MANIFEST = {"format_version": 2, "command": "weigh", "model": {}, "layout": {}, "undefined": {}, "arguments": {}}
HOLD = f"""
import sys
from vitprobe.runs.folder import RunFolder
from vitprobe.runs.kind import Kind
folder = RunFolder("run", Kind("weigh", "", ()))
folder.begin({MANIFEST!r})
folder.claim()
print("claimed", flush=True)
sys.stdin.read()
"""


def claimed(path: Path, manifest: dict | None = None, *, go_on: bool = False) -> RunFolder:
    folder = RunFolder(path, KIND)
    folder.begin(manifest or MANIFEST, go_on=go_on)
    folder.claim()
    return folder


def fill(path: Path, *names: str) -> None:
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(name)


def names_in(path: Path) -> set[str]:
    return {str(found.relative_to(path)) for found in path.rglob("*") if found.is_file()}


def test_a_claim_takes_away_the_run_before_and_nothing_else(tmp_path: Path) -> None:
    fill(
        tmp_path, "weights/a.bin", "weights/mine.txt", "table.csv", "half.bin", "cache/train/x", "cache/y", "notes.txt"
    )
    fill(tmp_path, "notes.txt", ".table.csv.partial", "weights/.b.bin.partial")
    with claimed(tmp_path) as folder:
        assert folder.claimed and json.loads((tmp_path / "manifest.json").read_text()) == MANIFEST
        fill(tmp_path, "weights/c.bin")
        folder.claim()  # again: nothing happens
    assert names_in(tmp_path) == {"manifest.json", "weights/c.bin", "weights/mine.txt", "cache/y", "notes.txt"}


def test_a_run_that_is_gone_on_with_keeps_what_it_has(tmp_path: Path) -> None:
    fill(tmp_path, "weights/a.bin", "half.bin", "weights/.b.bin.partial")
    claimed(tmp_path, go_on=True).release()
    assert names_in(tmp_path) == {"manifest.json", "weights/a.bin", "half.bin"}


def test_leaving_takes_the_folder_away_unless_it_holds_something_else(tmp_path: Path) -> None:
    claimed(tmp_path / "run").leave()
    assert not (tmp_path / "run").exists()
    fill(tmp_path / "other", "notes.txt")
    claimed(tmp_path / "other").leave()
    assert names_in(tmp_path / "other") == {"notes.txt"}


def test_two_processes_do_not_write_one_folder_and_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD], cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdin is not None and other.stdout is not None
    try:
        assert other.stdout.readline() == "claimed\n"
        folder = RunFolder(tmp_path / "run", KIND)
        said = rf"another process is writing to {tmp_path / 'run'}: wait until it has ended, or give another --out"
        for step in (lambda: folder.check(overwrite=True), lambda: claimed(tmp_path / "run")):
            with pytest.raises(UserError) as error:
                step()
            assert str(error.value) == said
    finally:
        other.kill()
        other.wait()
        other.stdin.close()
        other.stdout.close()
    assert (tmp_path / "run" / LOCK).exists()  # as a kill leaves it
    folder.check(overwrite=True)
    claimed(tmp_path / "run").release()
    assert names_in(tmp_path / "run") == {"manifest.json"}


def test_a_lock_that_was_left_alone_makes_no_folder_anothers(tmp_path: Path) -> None:
    fill(tmp_path, LOCK, ".manifest.json.partial")
    RunFolder(tmp_path, KIND).check()


def test_a_temporary_folder_is_there_as_long_as_its_keeper() -> None:
    folder = RunFolder.of(None, KIND)
    path, keeper = folder.path, folder.keeper
    assert folder.temporary and path.is_dir()
    folder.begin(MANIFEST)
    with folder:
        folder.claim()
    del folder
    gc.collect()
    assert (path / "manifest.json").exists()
    del keeper
    gc.collect()
    assert not path.exists()


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_of_another_command_is_refused_whatever_is_said(tmp_path: Path, resume: bool) -> None:
    claimed(tmp_path, MANIFEST | {"command": "measure", "reader": "vitprobe.Measures.load"}).release()
    with pytest.raises(UserError) as error:
        RunFolder(tmp_path, KIND).check(overwrite=not resume, resume=resume)
    assert str(error.value) == (
        f"{tmp_path} is a run of vitprobe measure, not of weigh: give another folder (vitprobe.Measures.load reads "
        f"this one)"
    )
