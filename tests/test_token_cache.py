"""The cache of tokens: the same tokens at the precision of fp16, whatever was killed meanwhile; and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import message, tiny_vit
from vitprobe.data.images import ListImages
from vitprobe.data.labelled import LabelledSet
from vitprobe.data.labelled_batches import batches
from vitprobe.errors import UserError
from vitprobe.models.loading import load_model
from vitprobe.probing.cache import TokenCache
from vitprobe.probing.tap import Tap
from vitprobe.probing.tokens import FrozenModel

TAPS = (Tap(1, norm=True), Tap(0))
COUNT = 11


def pictures(count: int = COUNT, seed: int = 0) -> list[Image.Image]:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    return [Image.fromarray(picture) for picture in pixels]


def labelled(items: list) -> LabelledSet:
    return LabelledSet(ListImages(items), np.arange(len(items), dtype=np.int64) % 2)


@pytest.fixture
def frozen() -> Iterator[FrozenModel]:
    with FrozenModel(load_model(tiny_vit()), TAPS, device="cpu") as frozen:
        yield frozen


@pytest.fixture
def split() -> LabelledSet:
    return labelled(pictures())


def refusal(act) -> str:
    with pytest.raises(UserError) as caught:
        act()
    return message(caught)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Killed(BaseException):
    """What a test stops a filling with."""


def fill_and_die(cache: TokenCache, batches_before: int, **options) -> None:
    """Fills a cache as far as some batches, and a half-written one more."""
    left = batches_before

    def progress(count: int) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise Killed

    with pytest.raises(Killed):
        cache.fill(progress=progress, **options)
    with (cache.folder / "block0.npy").open("ab") as file:
        file.write(b"\1" * 100)  # of a batch of which nobody has said that it is there


def test_the_tokens_come_back(tmp_path: Path, frozen: FrozenModel, split: LabelledSet) -> None:
    cache, counts = TokenCache(tmp_path / "tokens", frozen, split), []
    assert not (tmp_path / "tokens").exists() and not cache.complete
    cache.fill(4, progress=counts.append)
    assert cache.complete and counts == [4, 4, 3]
    assert cache.bytes_needed == 2 * COUNT * 17 * 32 * 2 and cache.readable.tolist() == list(range(COUNT))
    (whole,) = batches(split, frozen.model.transform, COUNT)
    expected, order = frozen(whole.pixels), [7, 0, 7, 10]
    for tap, batch in cache.batch(np.array(order)).items():
        torch.testing.assert_close(batch.tokens, expected[tap].tokens[order], rtol=1e-3, atol=1e-3)
        assert batch.tokens.dtype == torch.float32 and batch.layout == expected[tap].layout
        assert (batch.tokens.half().float() == batch.tokens).all()
    assert set(cache.batch([1])) == set(TAPS)
    assert np.load(tmp_path / "tokens" / "block1+norm.npy").shape == (COUNT, 17, 32)
    assert sorted(contents(tmp_path / "tokens")) == ["block0.npy", "block1+norm.npy", "cache.json"]


@pytest.mark.parametrize("batches_before", [1, 2])
def test_a_killed_filling_goes_on(tmp_path: Path, frozen: FrozenModel, split: LabelledSet, batches_before: int) -> None:
    TokenCache(tmp_path / "unbroken", frozen, split).fill(4)
    fill_and_die(TokenCache(tmp_path / "broken", frozen, split), batches_before, batch_size=4)
    cache, counts = TokenCache(tmp_path / "broken", frozen, split), []
    assert not cache.complete and cache.readable.tolist() == list(range(4 * batches_before))
    assert "has the tokens of" in refusal(lambda: cache.batch([0]))
    cache.fill(4, progress=counts.append)
    assert sum(counts) == COUNT - 4 * batches_before
    assert contents(tmp_path / "broken") == contents(tmp_path / "unbroken")
    cache.fill(4, progress=counts.append)  # nothing is missing
    again = TokenCache(tmp_path / "broken", frozen, split)
    assert again.complete and torch.equal(again.batch([3])[TAPS[0]].tokens, cache.batch([3])[TAPS[0]].tokens)


def test_images_that_cannot_be_read(tmp_path: Path, frozen: FrozenModel) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(7)]
    for path, picture in zip(paths, pictures(7), strict=True):
        picture.save(path)
    for number in (2, 3, 5):
        paths[number].write_bytes(b"")
    split = labelled(paths)
    cache = TokenCache(tmp_path / "tokens", frozen, split)
    cache.fill(2)
    for again in (cache, TokenCache(tmp_path / "tokens", frozen, split)):
        assert again.readable.tolist() == [0, 1, 4, 6]
        assert again.skipped == [(paths[number].as_posix(), "the file is empty") for number in (2, 3, 5)]
        assert "5.png could not be read" in refusal(lambda: again.batch([0, 5]))  # noqa: B023
        picture = frozen.model.transform(Image.open(paths[6]))
        torch.testing.assert_close(
            again.batch([6])[TAPS[1]].tokens, frozen(picture[None])[TAPS[1]].tokens, rtol=1e-3, atol=1e-3
        )


def test_tokens_of_something_else_are_not_taken(tmp_path: Path, frozen: FrozenModel, split: LabelledSet) -> None:
    folder = tmp_path / "tokens"
    TokenCache(folder, frozen, split, {"dtype": "float32", "weights": "a"}).fill(4)
    before = contents(folder)
    assert "something else (other weights)" in refusal(
        lambda: TokenCache(folder, frozen, split, {"dtype": "float32", "weights": "b"})
    )
    others = labelled(pictures(seed=1))
    assert "(other data, dtype, weights)" in refusal(lambda: TokenCache(folder, frozen, others))
    with FrozenModel(frozen.model, [Tap(1)], device="cpu") as other:
        assert "(other taps)" in refusal(lambda: TokenCache(folder, other, split, {"dtype": "float32", "weights": "a"}))
    assert contents(folder) == before


def test_a_folder_that_has_lost_something(tmp_path: Path, frozen: FrozenModel, split: LabelledSet) -> None:
    folder = tmp_path / "tokens"
    TokenCache(folder, frozen, split).fill(4)
    file = folder / "block0.npy"
    file.write_bytes(file.read_bytes()[:-1])
    assert "has lost tokens" in refusal(lambda: TokenCache(folder, frozen, split))
    file.unlink()
    assert "has lost tokens" in refusal(lambda: TokenCache(folder, frozen, split))
    for text in ("{", "[]", json.dumps({"made_of": {}})):
        (folder / "cache.json").write_text(text)
        assert "cache.json cannot be read" in refusal(lambda: TokenCache(folder, frozen, split))


def test_a_disk_that_is_too_small(
    tmp_path: Path, frozen: FrozenModel, split: LabelledSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed, asked = 2 * COUNT * 17 * 32 * 2, []

    def disk(free: int) -> None:
        def usage(path: Path) -> SimpleNamespace:
            asked.append(path)
            return SimpleNamespace(free=free)

        monkeypatch.setattr(shutil, "disk_usage", usage)

    disk(needed - 1)
    folder = tmp_path / "not" / "there"
    said = refusal(lambda: TokenCache(folder, frozen, split))
    assert f"take {needed:,} bytes" in said and f"has {needed - 1:,} free" in said
    assert asked == [tmp_path] and not list(tmp_path.iterdir())
    disk(needed)
    fill_and_die(TokenCache(folder, frozen, split), 1, batch_size=8)
    disk(needed * 3 // COUNT)
    TokenCache(folder, frozen, split)  # what is there already needs no room
    disk(needed * 3 // COUNT - 1)
    assert "are missing" in refusal(lambda: TokenCache(folder, frozen, split))


def test_a_disk_that_fills_up(
    tmp_path: Path, frozen: FrozenModel, split: LabelledSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = TokenCache(tmp_path / "tokens", frozen, split)

    def full(*args) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("vitprobe.probing.cache.os.fsync", full)
        assert "the disk is full" in refusal(lambda: cache.fill(4))
    cache = TokenCache(tmp_path / "tokens", frozen, split)
    cache.fill(4)
    assert cache.complete


def test_tokens_beyond_fp16(tmp_path: Path, split: LabelledSet) -> None:
    model = tiny_vit()
    with torch.no_grad():
        model.blocks[1].mlp.fc2.bias[3] = 7e4
    with FrozenModel(load_model(model), [Tap(1)], device="cpu") as frozen:
        cache = TokenCache(tmp_path, frozen, split)
        said = refusal(lambda: cache.fill(4))
    assert "at block1 reach 7e+04 (image 0), and fp16 ends at 65504" in said
    assert not cache.complete and not (tmp_path / "cache.json").exists()
