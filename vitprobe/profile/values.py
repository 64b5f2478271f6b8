"""The values of a run, one an image, block and head: in memory, or in shards on disk that are read when asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from jaxtyping import Float32
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from vitprobe.errors import UserError
from vitprobe.files import write_atomically

SHARD_IMAGES = 64
SHARD_FOLDER = "statistics"
SHARDS = "shard-*.safetensors"

Arrays = Mapping[str, Float32[np.ndarray, "image block head"]]


@dataclass(frozen=True)
class Shard:
    """Some images of a run: their names, groups, and `(n, blocks, heads)` of each statistic."""

    names: list[str]
    groups: list[str]
    arrays: Arrays


class Values(Protocol):
    """All values of a run."""

    names: list[str]
    groups: list[str]

    def statistics(self) -> list[str]:
        """Names of the statistics that there are values of."""
        ...

    def read(self, statistic: str) -> Float32[np.ndarray, "image block head"]:
        """Every image's values of one statistic."""
        ...

    def shards(self) -> Iterator[Shard]:
        """The values in pieces of at most `SHARD_IMAGES` images."""
        ...


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

    def statistics(self) -> list[str]:
        """Names of the statistics."""
        return list(self.pieces[0].arrays) if self.pieces else []

    def read(self, statistic: str) -> Float32[np.ndarray, "image block head"]:
        """Every image's values of one statistic."""
        return np.concatenate([piece.arrays[statistic] for piece in self.pieces])

    def shards(self) -> Iterator[Shard]:
        """The pieces as they were added."""
        yield from self.pieces

    def add(self, piece: Shard) -> None:
        """Append the images of one shard."""
        self.pieces.append(piece)


class ShardValues:
    """Values in the shards of a run's folder; only the names of images, groups and statistics are held."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()  # read later, when the process may have gone elsewhere
        self.paths = sorted((self.folder / SHARD_FOLDER).glob(SHARDS))
        self.names: list[str] = []
        self.groups: list[str] = []
        self._statistics: list[str] = []
        for path in self.paths:
            with _open(path) as shard:
                self._append(shard.metadata() or {}, path)

    def _append(self, metadata: dict[str, str], path: Path) -> None:
        try:
            self.names += json.loads(metadata["names"])
            self.groups += json.loads(metadata["groups"])
            self._statistics = self._statistics or json.loads(metadata["statistics"])
        except (KeyError, json.JSONDecodeError):
            raise UserError(f"{path} is no shard of vitprobe; analyze again with --overwrite") from None

    def statistics(self) -> list[str]:
        """Names of the statistics."""
        return list(self._statistics)

    def read(self, statistic: str) -> Float32[np.ndarray, "image block head"]:
        """Every image's values of one statistic, from disk."""
        parts: list[np.ndarray] = []
        for path in self.paths:
            with _open(path) as shard:
                part = shard.get_tensor(statistic) if statistic in set(shard.keys()) else None
            if part is None or part.shape[1:] != (parts or [part])[0].shape[1:]:
                raise UserError(f"{path} is of another run than the shards before it; analyze again with --overwrite")
            parts.append(part)
        return np.concatenate(parts)

    def shards(self) -> Iterator[Shard]:
        """The shards in order."""
        start = 0
        for path in self.paths:
            with _open(path) as shard:
                arrays = {name: shard.get_tensor(name) for name in json.loads(shard.metadata()["statistics"])}
            stop = start + len(next(iter(arrays.values())))
            yield Shard(self.names[start:stop], self.groups[start:stop], arrays)
            start = stop

    def add(self, piece: Shard) -> None:
        """Write one more shard; it is readable as soon as this returns."""
        path = self.folder / SHARD_FOLDER / f"shard-{len(self.paths):05d}.safetensors"
        metadata = {
            "names": json.dumps(piece.names),
            "groups": json.dumps(piece.groups),
            "statistics": json.dumps(list(piece.arrays)),
        }
        arrays = {name: np.ascontiguousarray(array) for name, array in piece.arrays.items()}
        write_atomically(path, save(arrays, metadata=metadata))
        self.paths.append(path)
        self._append(metadata, path)


class Sharder:
    """Collects batches and passes them on as shards of `SHARD_IMAGES` images."""

    def __init__(self, values: MemoryValues | ShardValues) -> None:
        self.values = values
        self._names: list[str] = []
        self._groups: list[str] = []
        self._arrays: dict[str, np.ndarray] = {}

    def add(self, names: list[str], groups: list[str], arrays: Arrays) -> None:
        """Take one batch; whole shards go on at once."""
        self._names += names
        self._groups += groups
        for name, array in arrays.items():
            self._arrays[name] = np.concatenate([self._arrays[name], array]) if name in self._arrays else array
        while len(self._names) >= SHARD_IMAGES:
            self.flush()

    def flush(self) -> None:
        """Pass on what is left, at most one shard of it."""
        if self._names:
            first, rest = slice(None, SHARD_IMAGES), slice(SHARD_IMAGES, None)
            arrays = {name: array[first] for name, array in self._arrays.items()}
            self.values.add(Shard(self._names[first], self._groups[first], arrays))
            self._names, self._groups = self._names[rest], self._groups[rest]
            self._arrays = {name: array[rest] for name, array in self._arrays.items()}


def _open(path: Path):
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}); analyze again with --overwrite") from None
