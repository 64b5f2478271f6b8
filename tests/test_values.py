"""Shards: whole or absent, read back bit for bit, in the order of their keys."""

import errno
from pathlib import Path

import numpy as np
import pytest

from vitprobe import files
from vitprobe.errors import UserError
from vitprobe.profile.values import Shard, ShardValues


def batch(start: int, count: int) -> tuple[list[str], list[str], dict[str, np.ndarray]]:
    names = [f"image {i}" for i in range(start, start + count)]
    rng = np.random.default_rng(start)
    arrays = {
        "cls_entropy": rng.random((count, 3, 2), dtype=np.float32),
        "patch_norm_max_ratio": rng.random((count, 3, 1), dtype=np.float32),
    }
    return names, [f"group {i // 2}" for i in range(start, start + count)], arrays


@pytest.mark.parametrize("sizes", [[150], [1] * 7, [64, 64, 22], [63, 2, 85], [5]])
def test_shards_come_back(tmp_path: Path, sizes: list[int]):
    written = ShardValues(tmp_path)
    starts = np.cumsum([0, *sizes]).tolist()
    shards = [Shard(*batch(start, size)) for start, size in zip(starts, sizes, strict=False)]
    for shard in shards:
        written.add(shard)
    for values in (written, ShardValues(tmp_path)):
        assert values.names == [name for shard in shards for name in shard.names]
        assert values.groups == [group for shard in shards for group in shard.groups]
        assert values.statistics() == ["cls_entropy", "patch_norm_max_ratio"]
        for statistic in values.statistics():
            expected = np.concatenate([shard.arrays[statistic] for shard in shards])
            np.testing.assert_array_equal(values.read(statistic), expected)
        pieces = list(values.shards())
        assert [len(piece.names) for piece in pieces] == sizes
        assert all(len(array) == len(piece.names) for piece in pieces for array in piece.arrays.values())


def test_shards_are_read_in_the_order_of_their_keys_whenever_they_came(tmp_path: Path):
    values = ShardValues(tmp_path)
    keys = [(100000,), (2,), (0,), (10,), (1,)]  # as text 100000 would come before 10
    for key in keys:
        values.add(Shard(*batch(key[0], 2)), key)
    for read in (values, ShardValues(tmp_path)):
        assert list(read.heads) == sorted(keys)
        assert read.names == [f"image {key[0] + i}" for key in sorted(keys) for i in range(2)]
        expected = np.concatenate([batch(key[0], 2)[2]["cls_entropy"] for key in sorted(keys)])
        np.testing.assert_array_equal(read.read("cls_entropy"), expected)
    values.add(Shard(*batch(7, 1)))  # without a key: after the last
    assert list(ShardValues(tmp_path).heads)[-1] == (100001,)


def test_what_a_shard_says_beside_its_values_comes_back(tmp_path: Path):
    values = ShardValues(tmp_path)
    bad = [("bad.png", "the file is empty")]
    values.add(Shard([], [], {}, skipped=bad), (0, 0))  # not one readable image
    values.add(Shard(*batch(0, 3), skipped=[("x", "why")], whole=False, ends=True), (0, 1))
    again = ShardValues(tmp_path)
    assert again.skipped == [*bad, ("x", "why")] == values.skipped
    assert [(head.whole, head.ends) for head in again.heads.values()] == [(True, False), (False, True)]
    assert again.statistics() == ["cls_entropy", "patch_norm_max_ratio"]
    assert again.read("cls_entropy").shape == (3, 3, 2)
    assert [len(shard.arrays) for shard in again.shards()] == [0, 2]


def test_no_temporary_file_is_left(tmp_path: Path):
    ShardValues(tmp_path).add(Shard(*batch(0, 64)))
    assert [path.name for path in sorted((tmp_path / "statistics").iterdir())] == ["shard-00000.safetensors"]


def test_a_full_disk_leaves_finished_shards_and_nothing_half_written(tmp_path: Path, monkeypatch):
    values = ShardValues(tmp_path)
    values.add(Shard(*batch(0, 64)))

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(UserError, match=r"the disk is full, so .* could not be written; free some space or choose"):
        values.add(Shard(*batch(64, 64)))
    assert [path.name for path in sorted((tmp_path / "statistics").iterdir())] == ["shard-00000.safetensors"]
    assert ShardValues(tmp_path).names == values.names == [f"image {i}" for i in range(64)]


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
