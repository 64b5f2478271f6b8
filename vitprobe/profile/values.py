"""The values of a run, one an image, block and head: in memory, or in shards on disk that are read when asked for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float32
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from vitprobe.data.batches import Key
from vitprobe.errors import UserError
from vitprobe.files import disk_errors, write_atomically

SHARD_FOLDER = "statistics"
SHARDS = "shard-*.safetensors"
METADATA = "vitprobe"

Arrays = Mapping[str, Float32[np.ndarray, "image block head"]]


@dataclass(frozen=True)
class Shard:
    """Some images of a run: their names, groups, and `(n, blocks, heads)` of each statistic.

    Attributes:
        names: of its images.
        groups: what each was taken from.
        arrays: the values by statistic; of a shard without a readable image none.
        skipped: name and reason of each bad image.
        whole: whether all its images are in it; False where Ctrl-C came before.
        ends: whether it is the last of its part of a stream.
    """

    names: list[str]
    groups: list[str]
    arrays: Arrays
    skipped: list[tuple[str, str]] = field(default_factory=list)
    whole: bool = True
    ends: bool = False


@dataclass
class MemoryValues:
    """Values held in memory."""

    pieces: list[Shard] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """The images' names."""
        return [name for piece in self.pieces for name in piece.names]

    @property
    def groups(self) -> list[str]:
        """The images' groups."""
        return [group for piece in self.pieces for group in piece.groups]

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """Name and reason of each image that could not be read."""
        return [bad for piece in self.pieces for bad in piece.skipped]

    def statistics(self) -> list[str]:
        """Names of the statistics."""
        return next((list(piece.arrays) for piece in self.pieces if piece.arrays), [])

    def read(self, statistic: str) -> Float32[np.ndarray, "image block head"]:
        """Every image's values of one statistic."""
        return np.concatenate([values for values, _ in self.parts(statistic)])

    def parts(self, statistic: str) -> Iterator[tuple[Float32[np.ndarray, "image block head"], list[str]]]:
        """The same a piece at a time, each with the groups of its images."""
        yield from ((piece.arrays[statistic], piece.groups) for piece in self.pieces if piece.arrays)

    def shards(self) -> Iterator[Shard]:
        """The pieces as they were added."""
        yield from self.pieces

    def shard(self, number: int) -> Shard | None:
        """The shard of this number; None where it has not come."""
        return self.pieces[number] if number < len(self.pieces) else None

    def add(self, piece: Shard, key: Key | None = None) -> None:
        """Append the images of one shard; shards come in order here, so `key` adds nothing."""
        self.pieces.append(piece)


class ShardValues:
    """Values in the shards of a run's folder, in the order of their keys; arrays stay on disk until they are read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()  # read later, when the process may have gone elsewhere
        self._heads: dict[Key, Shard] = {}  # without the arrays' contents
        self._statistics: list[str] = []
        for path in (self.folder / SHARD_FOLDER).glob(SHARDS):
            if re.fullmatch(r"shard(-\d+)+", path.stem):
                with _open(path) as shard:
                    self._hold(_key(path), _head(shard.metadata() or {}, path))
        self._heads = dict(sorted(self._heads.items()))

    def _hold(self, key: Key, head: tuple[Shard, list[str]]) -> None:
        self._heads[key] = head[0]
        self._statistics = self._statistics or head[1]

    @property
    def heads(self) -> Mapping[Key, Shard]:
        """The shards without their arrays, by key, in order."""
        return self._heads

    @property
    def names(self) -> list[str]:
        """The images' names, shard by shard."""
        return [name for head in self._heads.values() for name in head.names]

    @property
    def groups(self) -> list[str]:
        """The images' groups."""
        return [group for head in self._heads.values() for group in head.groups]

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """Name and reason of each image that could not be read."""
        return [bad for head in self._heads.values() for bad in head.skipped]

    def statistics(self) -> list[str]:
        """Names of the statistics."""
        return list(self._statistics)

    def read(self, statistic: str) -> Float32[np.ndarray, "image block head"]:
        """Every image's values of one statistic, from disk."""
        return np.concatenate([values for values, _ in self.parts(statistic)])

    def parts(self, statistic: str) -> Iterator[tuple[Float32[np.ndarray, "image block head"], list[str]]]:
        """The same a shard at a time, each with the groups of its images."""
        shape: tuple[int, ...] | None = None
        for key, head in self._heads.items():
            if not head.names:
                continue
            with _open(self._path(key)) as shard:
                part = shard.get_tensor(statistic) if statistic in set(shard.keys()) else None
            if part is None or part.shape[1:] != (shape or part.shape[1:]):
                raise UserError(
                    f"{self._path(key)} is of another run than the shards before it; analyze again with --overwrite"
                )
            shape = part.shape[1:]
            yield part, head.groups

    def shards(self) -> Iterator[Shard]:
        """The shards in order."""
        for key, head in self._heads.items():
            with _open(self._path(key)) as shard:
                yield replace(head, arrays={name: shard.get_tensor(name) for name in self._statistics if head.names})

    def shard(self, number: int) -> Shard | None:
        """The shard of this number, also one that another process wrote; None where it is not there whole."""
        path = self._path((number,))
        if not path.exists():
            return None
        with _open(path) as shard:
            head, statistics = _head(shard.metadata() or {}, path)
            arrays = {name: shard.get_tensor(name) for name in statistics}
        return replace(head, arrays=arrays) if head.whole else None

    def keep(self, count: int) -> None:
        """Remove all but the first `count` shards."""
        for key in [key for key in self._heads if key >= (count,)]:
            with disk_errors(self._path(key)):
                self._path(key).unlink(missing_ok=True)
            del self._heads[key]

    def add(self, piece: Shard, key: Key | None = None) -> None:
        """Write one more shard (after the last without `key`); it is readable as soon as this returns."""
        if key is None:
            key = (max(self._heads, default=(-1,))[0] + 1,)
        last = not self._heads or key > next(reversed(self._heads))
        said = {**vars(piece), "arrays": list(piece.arrays)}
        arrays = {name: np.ascontiguousarray(array) for name, array in piece.arrays.items()}
        # Under one key: safetensors writes several in any order, and equal shards should be equal files.
        write_atomically(self._path(key), save(arrays, metadata={METADATA: json.dumps(said)}))
        self._hold(key, (replace(piece, arrays={}), list(piece.arrays)))
        if not last:
            self._heads = dict(sorted(self._heads.items()))

    def _path(self, key: Key) -> Path:
        return self.folder / SHARD_FOLDER / f"shard-{'-'.join(f'{number:05d}' for number in key)}.safetensors"


def _key(path: Path) -> Key:
    return tuple(int(number) for number in path.stem.split("-")[1:])


def _head(metadata: dict[str, str], path: Path) -> tuple[Shard, list[str]]:
    """A shard without its arrays, and their names."""
    try:
        said = json.loads(metadata[METADATA])
        said["skipped"] = [(name, reason) for name, reason in said["skipped"]]
        return Shard(**{**said, "arrays": {}}), said["arrays"]
    except (KeyError, ValueError, TypeError):
        raise UserError(f"{path} is no shard of vitprobe; analyze again with --overwrite") from None


def _open(path: Path):
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}); analyze again with --overwrite") from None
