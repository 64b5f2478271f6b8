"""Shards: at most 64 images, whole or absent, read back bit for bit."""

import errno
from pathlib import Path

import numpy as np
import pytest

from vitprobe import files
from vitprobe.errors import UserError
from vitprobe.profile.values import SHARD_IMAGES, MemoryValues, Sharder, ShardValues


def batch(start: int, count: int) -> tuple[list[str], list[str], dict[str, np.ndarray]]:
    names = [f"image {i}" for i in range(start, start + count)]
    rng = np.random.default_rng(start)
    arrays = {
        "cls_entropy": rng.random((count, 3, 2), dtype=np.float32),
        "patch_norm_max_ratio": rng.random((count, 3, 1), dtype=np.float32),
    }
    return names, [f"group {i // 2}" for i in range(start, start + count)], arrays


@pytest.mark.parametrize("sizes", [[150], [1] * 70, [64, 64, 22], [63, 2, 85], [5]])
def test_batches_of_any_size_become_shards_of_at_most_64_and_come_back(tmp_path: Path, sizes: list[int]):
    on_disk, in_memory = ShardValues(tmp_path), MemoryValues()
    for values in (on_disk, in_memory):
        sharder, start = Sharder(values), 0
        for size in sizes:
            sharder.add(*batch(start, size))
            start += size
        sharder.flush()
        sharder.flush()  # nothing is left, so nothing is added
    names, groups, parts, start = [], [], [], 0
    for size in sizes:
        n, g, arrays = batch(start, size)
        names, groups, start = names + n, groups + g, start + size
        parts.append(arrays)
    again = ShardValues(tmp_path)
    for values in (on_disk, in_memory, again):
        assert values.names == names
        assert values.groups == groups
        assert values.statistics() == ["cls_entropy", "patch_norm_max_ratio"]
        for statistic in values.statistics():
            np.testing.assert_array_equal(values.read(statistic), np.concatenate([p[statistic] for p in parts]))
        pieces = list(values.shards())
        assert [len(piece.names) for piece in pieces] == [
            min(SHARD_IMAGES, len(names) - i) for i in range(0, len(names), SHARD_IMAGES)
        ]
        assert [name for piece in pieces for name in piece.names] == names
        assert all(len(array) == len(piece.names) for piece in pieces for array in piece.arrays.values())


def test_no_temporary_file_is_left(tmp_path: Path):
    sharder = Sharder(ShardValues(tmp_path))
    sharder.add(*batch(0, 64))
    assert [path.name for path in sorted((tmp_path / "statistics").iterdir())] == ["shard-00000.safetensors"]


def test_a_full_disk_leaves_finished_shards_and_nothing_half_written(tmp_path: Path, monkeypatch):
    values = ShardValues(tmp_path)
    sharder = Sharder(values)
    sharder.add(*batch(0, 64))

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(UserError, match=r"the disk is full, so .* could not be written; free some space or choose"):
        sharder.add(*batch(64, 64))
    assert [path.name for path in sorted((tmp_path / "statistics").iterdir())] == ["shard-00000.safetensors"]
    assert ShardValues(tmp_path).names == [f"image {i}" for i in range(64)]


def test_other_write_errors_name_the_path(tmp_path: Path):
    (tmp_path / "taken").write_text("a file where a folder must be")
    with pytest.raises(UserError, match=r"taken.*could not be written \(.*\); choose another folder"):
        files.write_atomically(tmp_path / "taken" / "x", b"")


@pytest.mark.parametrize("content", [b"", b"nonsense" * 100])
def test_a_broken_shard_is_named(tmp_path: Path, content: bytes):
    path = tmp_path / "statistics" / "shard-00000.safetensors"
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"shard-00000.safetensors cannot be read .*; analyze again with --overwrite"):
        ShardValues(tmp_path)


def test_a_safetensors_file_of_something_else_is_no_shard(tmp_path: Path):
    from safetensors.numpy import save_file

    path = tmp_path / "statistics" / "shard-00000.safetensors"
    path.parent.mkdir()
    save_file({"x": np.zeros(3, dtype=np.float32)}, path)
    with pytest.raises(UserError, match="is no shard of vitprobe; analyze again with --overwrite"):
        ShardValues(tmp_path)


def test_an_empty_folder_has_no_values(tmp_path: Path):
    assert ShardValues(tmp_path).names == []
    assert ShardValues(tmp_path).statistics() == []
    assert MemoryValues().statistics() == []
