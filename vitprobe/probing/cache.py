"""`TokenCache`: the tokens of every image, stored once in fp16 on a disk, for probes that train without augmentation.

One `.npy` a tap, `(images, tokens, width)`, written from the front, and `cache.json`, which says what they were made
of and how far they go. It is replaced after each batch is on the disk, so that a killed run goes on from there.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from numpy.lib import format as npy
from torch import Tensor

from vitprobe.aggregation.batch import TokenBatch
from vitprobe.data.images import file_size
from vitprobe.data.labelled import LabelledSet
from vitprobe.data.labelled_batches import LabelledBatch, batches
from vitprobe.errors import UserError
from vitprobe.files import disk_errors, free_bytes, write_atomically
from vitprobe.probing.tap import Tap
from vitprobe.probing.tokens import FrozenModel

STATE = "cache.json"
FORMAT_VERSION = 1
LARGEST = float(np.finfo(np.float16).max)


class TokenCache:
    """The tokens of a labelled set at some taps, in a folder.

    Attributes:
        folder: where they are.
        layout: which token is what.
        skipped: name and reason of each image that could not be read.
    """

    def __init__(
        self, folder: str | Path, frozen: FrozenModel, split: LabelledSet, made_of: Mapping[str, Any] | None = None
    ) -> None:
        """Opens what is in the folder already, or says that it will fit; writes nothing.

        Args:
            folder: where the tokens are, or will be.
            frozen: the model, inside its context.
            split: the images.
            made_of: what else the tokens depend on (weights, transform, dtype), as JSON holds it.

        Raises:
            UserError: where the disk has too little room (with the number of bytes), or where the folder holds tokens
                of something else.
        """
        self.folder, self._frozen, self._split = Path(folder), frozen, split
        self.layout = frozen.model.layout.canonical
        self._shape = len(split), self.layout.num_tokens, frozen.dim
        # through JSON, so that it equals what is read back
        self._made_of = json.loads(
            json.dumps(
                {
                    "model": frozen.model.spec.name,
                    "taps": sorted(map(str, frozen.taps)),
                    "data": split.fingerprint(),
                    "shape": self._shape,
                    "layout": asdict(self.layout),
                    **(made_of or {}),
                }
            )
        )
        self._done = 0  # images from the first on, readable or not
        self._bad: list[int] = []
        self.skipped: list[tuple[str, str]] = []
        self._read_state()
        self._require_room()

    @property
    def bytes_needed(self) -> int:
        """What the tokens take on the disk, together with what is there already."""
        return len(self._frozen.taps) * math.prod(self._shape) * 2

    @property
    def bytes_missing(self) -> int:
        """What of that is still to be written."""
        return self.bytes_needed * (len(self._split) - self._done) // len(self._split)

    @property
    def done(self) -> int:
        """Images that are done, from the first on, readable or not."""
        return self._done

    @property
    def complete(self) -> bool:
        """Whether all images are done."""
        return self._done == len(self._split)

    @property
    def readable(self) -> Int64[np.ndarray, " image"]:
        """Positions of the images that have tokens, of those done so far."""
        return np.setdiff1d(np.arange(self._done), self._bad)

    def fill(
        self,
        batch_size: int,
        *,
        workers: int | None = None,
        begin: Callable[[], Any] | None = None,
        progress: Callable[[int], Any] | None = None,
    ) -> None:
        """Compute and store what is missing.

        Batches are those of an unbroken run, if the batch size is the same.

        Args:
            batch_size: images a forward pass.
            workers: as for `batches`.
            begin: called before anything is written, when the first tokens are there.
            progress: called with the number of images done after each batch.

        Raises:
            UserError: for tokens beyond fp16 (naming the first image), NaN or infinite ones, or a full disk; what is
                stored until then stays.
        """
        if self.complete:
            return
        transform, order = self._frozen.model.transform, range(self._done, len(self._split))
        with closing(batches(self._split, transform, batch_size, order=order, workers=workers)) as loaded:
            for number, batch in enumerate(loaded):
                content = self._content(batch)
                if not number:
                    if begin is not None:
                        begin()
                    self._make_files()
                self._store(batch, content)
                if progress is not None:
                    progress(len(batch.indices) + len(batch.skipped))

    def batch(self, indices: Sequence[int] | Int64[np.ndarray, " image"]) -> dict[Tap, TokenBatch]:
        """The tokens of some images at each tap, float32, in the order of `indices`; no attention.

        Raises:
            UserError: before the cache is filled, or for an image that could not be read.
        """
        if not self.complete:
            raise UserError(f"{self.folder} has the tokens of {self._done} of {len(self._split)} images: fill it first")
        rows = np.asarray(indices, np.int64)
        missing = np.intersect1d(rows, self._bad)
        if len(missing):
            raise UserError(f"{self._split.ids[missing[0]]} could not be read, so it has no tokens: leave it out")
        return {
            tap: TokenBatch(torch.from_numpy(self._maps[tap][rows].astype(np.float32)), self.layout)
            for tap in self._frozen.taps
        }

    def _content(self, batch: LabelledBatch) -> dict[Tap, np.ndarray]:
        """What a batch adds to each file."""
        names = [self._split.ids[index] for index in batch.indices]
        rows = np.array(batch.indices, np.int64) - self._done
        given = self._frozen(batch.pixels, names) if names else {}
        content = {}
        for tap in self._frozen.taps:
            count = len(names) + len(batch.skipped)  # of those that could not be read too
            content[tap] = np.zeros((count, *self._shape[1:]), np.float16)
            if names:
                content[tap][rows] = self._halved(given[tap].tokens, tap, names)
        return content

    def _make_files(self) -> None:
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            if not self._done:
                for tap in self._frozen.taps:
                    self._path(tap).write_bytes(self._header)

    def _store(self, batch: LabelledBatch, content: Mapping[Tap, np.ndarray]) -> None:
        """One batch: first the tokens, then the word that they are there."""
        positions = range(self._done, self._done + len(batch.indices) + len(batch.skipped))
        for tap in self._frozen.taps:
            self._write(self._path(tap), positions.start, content[tap])
        self._bad += sorted(set(positions) - set(batch.indices))
        self.skipped += batch.skipped
        self._done = positions.stop
        state = {
            "format_version": FORMAT_VERSION,
            "made_of": self._made_of,
            "done": self._done,
            "bad": self._bad,
            "skipped": self.skipped,
        }
        write_atomically(self.folder / STATE, json.dumps(state, indent=1).encode())

    def _halved(self, tokens: Tensor, tap: Tap, names: Sequence[str]) -> np.ndarray:
        largest = tokens.abs().flatten(1).amax(dim=1)
        over = (largest > LARGEST).nonzero().flatten().tolist()
        if over:
            raise UserError(
                f"tokens of {self._frozen.model.spec.name} at {tap} reach {float(largest[over[0]]):.3g} (image "
                f"{names[over[0]]}), and fp16 ends at {LARGEST:.0f}: use a protocol without a cache"
            )
        return tokens.to("cpu", torch.float16).numpy()

    def _write(self, path: Path, start: int, content: np.ndarray) -> None:
        with disk_errors(path), path.open("r+b") as file:
            file.seek(self._offset(start))
            file.write(content.data)
            file.flush()
            os.fsync(file.fileno())

    def _path(self, tap: Tap) -> Path:
        return self.folder / f"{tap}.npy"

    def _offset(self, row: int) -> int:
        """Where in a file an image's tokens begin."""
        return len(self._header) + row * math.prod(self._shape[1:]) * 2

    @cached_property
    def _header(self) -> bytes:
        header = BytesIO()
        npy.write_array_header_1_0(header, {"descr": "<f2", "fortran_order": False, "shape": self._shape})
        return header.getvalue()

    @cached_property
    def _maps(self) -> dict[Tap, np.ndarray]:
        return {tap: np.load(self._path(tap), mmap_mode="r") for tap in self._frozen.taps}

    def _read_state(self) -> None:
        """What an earlier sitting has stored, if it was of the same."""
        path = self.folder / STATE
        if not path.exists():
            return
        try:
            state = json.loads(path.read_bytes())
            made_of, done, bad, skipped = (state[key] for key in ("made_of", "done", "bad", "skipped"))
            self._bad, self.skipped = list(bad), [(name, reason) for name, reason in skipped]
        except (ValueError, TypeError, KeyError, OSError) as error:
            raise UserError(f"{path} cannot be read ({type(error).__name__}): delete {self.folder}") from None
        differing = [key for key in {**made_of, **self._made_of} if made_of.get(key) != self._made_of.get(key)]
        if differing:
            raise UserError(
                f"{self.folder} holds tokens of something else (other {', '.join(differing)}): delete it, or choose "
                f"another folder (--out)"
            )
        if any(file_size(self._path(tap)) < self._offset(done) for tap in self._frozen.taps):
            raise UserError(f"{self.folder} has lost tokens that it had: delete it, and they are computed again")
        self._done = done

    def _require_room(self) -> None:
        """Raises a UserError where the disk has less room than what is missing takes."""
        missing = self.bytes_missing
        free = free_bytes(self.folder)
        if missing > free:
            raise UserError(
                f"the tokens of {len(self._split)} images take {self.bytes_needed:,} bytes, of which {missing:,} are "
                f"missing, and the disk of {self.folder} has {free:,} free: free some, choose another folder (--out), "
                f"or a protocol without a cache"
            )
