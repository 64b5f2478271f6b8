"""Shards: fixed slices of one order, whoever computes them and whenever."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from vitprobe.data.batches import default_workers
from vitprobe.data.reading import Reading
from vitprobe.data.shards import SHARD_IMAGES, Share, iterate_shards
from vitprobe.data.sources import open_images
from vitprobe.frozen import device as state
from vitprobe.frozen.device import choose_batch_size, choose_device

PIXELS = torch.arange(200).view(-1, 1, 1, 1).expand(-1, 3, 2, 2).float()
ORDER = np.random.default_rng(0).permutation(200)[:170].tolist()


def read(share: Share, batch_size: int = 24, workers: int = 0):
    return list(iterate_shards(open_images(PIXELS), ORDER, lambda image: image, batch_size, share, workers))


@pytest.mark.parametrize("batch_size", [1, 24, 64])
def test_shard_k_is_always_the_same_slice(batch_size):
    batches = read(Share(), batch_size)
    assert [i for batch in batches for i in batch.indices] == ORDER
    assert [batch.shard for batch in batches if batch.last] == [(0,), (1,), (2,)]
    for key in range(3):
        here = [batch for batch in batches if batch.shard == (key,)]
        assert [i for batch in here for i in batch.indices] == ORDER[64 * key : 64 * (key + 1)]
        assert [batch.last for batch in here] == [False] * (len(here) - 1) + [True]
        assert all(len(batch) == batch_size for batch in here[:-1])


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("done", [[], [0], [1, 2], [0, 1, 2]])
def test_shares_are_what_is_missing_and_nothing_twice(size, done):
    shares = [read(Share(rank, size, frozenset((key,) for key in done))) for rank in range(size)]
    dealt = sorted(i for share in shares for batch in share for i in batch.indices)
    assert dealt == sorted(i for key in {0, 1, 2} - set(done) for i in ORDER[64 * key : 64 * (key + 1)])
    alone = {tuple(batch.indices) for batch in read(Share())}
    assert {tuple(batch.indices) for share in shares for batch in share} <= alone


def test_what_is_missing_is_dealt_evenly():
    """Also where one process died at once, and all of its shards are missing."""
    done = frozenset((key,) for key in range(0, 10, 2))
    assert [Share(rank, 2, done).shards(10 * SHARD_IMAGES) for rank in range(2)] == [[1, 5, 9], [3, 7]]


@pytest.mark.parametrize("num_images", [None, 1, 64, 65, 150, 1000])
@pytest.mark.parametrize("loader_batch", [7, 64, 100])
def test_a_loaders_batches_are_cut_where_a_shard_is_full(num_images, loader_batch):
    loader = DataLoader(list(PIXELS), batch_size=loader_batch)
    reading = Reading(lambda image: image, batch_size=64, num_images=num_images)
    batches = list(open_images(loader).batches(reading, Share()))
    count = min(200, num_images or 200)
    assert [i for batch in batches for i in batch.indices] == list(range(count))
    assert all(len(batch) == len(batch.pixels) == len(batch.names) == len(batch.groups) for batch in batches)
    for key in range(-(-count // 64)):
        here = [i for batch in batches if batch.shard == (key,) for i in batch.indices]
        assert here == list(range(64 * key, min(64 * (key + 1), count)))
    assert sum(batch.last for batch in batches) == count // 64


def test_processes_on_one_machine_share_its_cores_memory_and_gpus(monkeypatch):
    assert [default_workers(10**6, 16, processes) for processes in (1, 2, 4, 16)] == [8, 7, 3, 1]
    assert default_workers(None, 4) == 3  # nobody knows how many: many
    layout, cpu = open_layout(), choose_device("cpu")
    monkeypatch.setattr(state, "free_memory", lambda device: 2**30)
    assert choose_batch_size(layout, 768, cpu, 1) >= 2 * choose_batch_size(layout, 768, cpu, 4) > 0
    assert choose_device("cpu", 3) == cpu
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    seen = []
    monkeypatch.setattr(state.torch, "empty", lambda size, device: seen.append(str(device)) or torch.zeros(size))
    for device in (None, "cuda", "cuda:0"):
        choose_device(device, 3)
    assert seen == ["cuda:3", "cuda:3", "cuda:0"]


def open_layout():
    from vitprobe.layout import TokenLayout

    return TokenLayout((14, 14), True)
