"""The kinds of image sources, all one `Images`: files, a tar, lists and tensors in memory."""

from __future__ import annotations

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence, Set
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from vitprobe.data.bands import RGB, ByteStream, Picture, Wanted
from vitprobe.data.batches import Batch, iterate
from vitprobe.data.decoding import BadImageError, convert, decode
from vitprobe.data.listing import LeftOut, printable
from vitprobe.data.reading import Reading
from vitprobe.data.shards import SHARD_IMAGES, Share, iterate_shards
from vitprobe.errors import UserError

Groups = Sequence[Any] | Callable[[str], Any] | None


class Images(ABC):
    """Images that can be read one by one, by position; safe to pickle and to read from several processes.

    Attributes:
        source: where they come from, to print.
        names: one distinct, printable, stable name an image (the path inside its folder or tar; else a number).
        groups: what each image was taken from - the unit of every interval; by default the image's own name.
        wanted: what the model takes of a picture; RGB until `for_model`.
        normalised: whether the images are tensors that are normalised already.
        left_out: files that were there and are not among the images.
        listed: whether each image has a position, so that they can be counted, drawn and read alone.
        streamed: whether the images come part after part from the beginning of each part.
        resumable: whether the images come in the same order each time, so that a part of them can be read later or by
            another process.
    """

    wanted: Wanted = RGB
    normalised: bool = False
    listed: bool = True
    streamed: bool = False
    resumable: bool = True
    left_out: LeftOut = LeftOut()

    def __init__(self, source: str, names: Iterable[str], groups: Groups = None) -> None:
        self.source = printable(source)
        self.names = _distinct(names)
        self.groups = resolve_groups(self.names, groups)

    def __len__(self) -> int:
        """How many images there are, readable or not."""
        return len(self.names)

    def for_model(self, wanted: Wanted) -> Images:
        """The same images with the channels that a model takes.

        Raises:
            UserError: for tensors of another number of channels.
        """
        again = copy.copy(self)
        again.wanted = wanted
        return again

    def regrouped(self, groups: Groups) -> Images:
        """Return the same images with other groups.

        Raises:
            UserError: for a list of another length.
        """
        again = copy.copy(self)
        again.groups = resolve_groups(self.names, groups)
        return again

    def batches(self, reading: Reading, share: Share | None = None) -> Generator[Batch, None, None]:
        """Return the images in batches; closing the generator ends the processes that read.

        Args:
            reading: order, batch size, processes.
            share: the shards that one process reads, which batches do not cross; default: all images, without shards.

        Raises:
            UserError: as `vitprobe.data.batches.iterate`.
        """
        order = reading.order(len(self))
        workers, pin = reading.workers_for(len(order)), reading.pin_memory
        if share is None:
            return iterate(self, order, reading.transform, reading.batch_size, workers, pin)
        return iterate_shards(self, order, reading.transform, reading.batch_size, share, workers, pin)

    def total(self, reading: Reading, share: Share | None = None) -> int | None:
        """Return how many images `batches` reads, bad ones included; None where nobody has counted them."""
        total = len(reading.order(len(self)))
        if share is None:
            return total
        return sum(min(SHARD_IMAGES, total - number * SHARD_IMAGES) for number in share.shards(total))

    def unheeded(self, reading: Reading) -> list[str]:
        """Return a line for each wish of a reading that these images leave no room for."""
        return []

    @abstractmethod
    def read(self, index: int) -> Picture | Float[Tensor, "channel height width"]:
        """The image at a position: a picture with the channels that are wanted, or a tensor, normalised already.

        Raises:
            BadImageError: where it cannot be read.
        """

    def open(self, index: int) -> ByteStream | None:
        """The file of the image at a position, open; None for what is in no file.

        Raises:
            BadImageError: where it cannot be opened.
        """
        return None

    @abstractmethod
    def fingerprint(self) -> str:
        """sha256 over names and byte sizes (files) or contents (memory); empty where only reading all would tell."""


class FileImages(Images):
    """Image files, read when asked for."""

    def __init__(self, source: str, paths: Sequence[Path], names: Iterable[str], groups: Groups = None) -> None:
        super().__init__(source, names, groups)
        self.paths = list(paths)

    def read(self, index: int) -> Picture:
        """The picture in a file."""
        with self.open(index) as file:
            return decode(file, self.names[index], self.wanted)

    def open(self, index: int) -> BufferedReader:
        """The file."""
        return _open_file(self.paths[index], self.names[index])

    def fingerprint(self) -> str:
        """sha256 over names and byte sizes."""
        return digest(f"{name}\0{file_size(path)}" for name, path in zip(self.names, self.paths, strict=True))


class TarImages(Images):
    """Image files in a plain tar (also in tars inside it), each read from its place without unpacking.

    Every read opens the tar anew: a handle shared with forked workers would share its position too.
    """

    def __init__(
        self, path: Path, places: Sequence[tuple[int, int]], names: Iterable[str], groups: Groups = None
    ) -> None:
        super().__init__(str(path), names, groups)
        self.path = path
        self.places = list(places)

    def read(self, index: int) -> Picture:
        """The picture in a member of the tar."""
        return decode(self.open(index), self.names[index], self.wanted)

    def open(self, index: int) -> BytesIO:
        """The member's content."""
        start, size = self.places[index]
        try:
            with self.path.open("rb") as tar:
                tar.seek(start)
                return BytesIO(tar.read(size))
        except OSError as error:
            reason = f"its tar cannot be read: {error.strerror or error}"
            raise BadImageError(self.names[index], reason) from error

    def fingerprint(self) -> str:
        """sha256 over names and byte sizes."""
        return digest(f"{name}\0{size}" for name, (_, size) in zip(self.names, self.places, strict=True))


class ListImages(Images):
    """A list of paths, pictures and float tensors (C, H, W), also mixed."""

    def __init__(self, items: Sequence[Path | Image.Image | Tensor], groups: Groups = None) -> None:
        names = (item.as_posix() if isinstance(item, Path) else str(i) for i, item in enumerate(items))
        super().__init__(f"a list of {len(items)} images", names, groups)
        self.items = list(items)
        self.normalised = all(isinstance(item, Tensor) for item in self.items)

    def for_model(self, wanted: Wanted) -> Images:
        """The same list; its tensors must have the channels already."""
        for position, item in enumerate(self.items):
            if isinstance(item, Tensor):
                _require_channels(item, f"tensor {position} of the list", wanted)
        return super().for_model(wanted)

    def read(self, index: int) -> Picture | Float[Tensor, "channel height width"]:
        """The item: a path decoded, a picture with the channels that are wanted, a tensor as it is."""
        item, name = self.items[index], self.names[index]
        if isinstance(item, Path):
            with _open_file(item, name) as file:
                return decode(file, name, self.wanted)
        if isinstance(item, Tensor):
            return item
        return convert(item, name, self.wanted)

    def open(self, index: int) -> BufferedReader | None:
        """The file of a path."""
        item = self.items[index]
        return _open_file(item, self.names[index]) if isinstance(item, Path) else None

    def fingerprint(self) -> str:
        """sha256 over names, and sizes of files or contents of the rest."""
        return digest(
            part
            for name, item in zip(self.names, self.items, strict=True)
            for part in (name, *_parts(item, self.wanted))
        )


class TensorImages(Images):
    """One float tensor (n, C, H, W), normalised already."""

    normalised = True

    def __init__(self, pixels: Float[Tensor, "n channel height width"], groups: Groups = None) -> None:
        super().__init__(f"a tensor of shape {tuple(pixels.shape)}", map(str, range(len(pixels))), groups)
        self.pixels = pixels

    def for_model(self, wanted: Wanted) -> Images:
        """The same tensor, which must have the channels already."""
        _require_channels(self.pixels, "the tensor", wanted)
        return super().for_model(wanted)

    def read(self, index: int) -> Float[Tensor, "channel height width"]:
        """The image as it is."""
        return self.pixels[index]

    def fingerprint(self) -> str:
        """sha256 over the tensor's type, shape and values."""
        return digest(_parts(self.pixels))


def check_groups(groups: object) -> Groups:
    """The groups that a user gave, if they can be groups at all.

    Raises:
        UserError: for a string, or what is neither a list (an array, a column of a table) nor a function.
    """
    should = "give a list, one group an image, or a function of its name"
    if isinstance(groups, str):
        raise UserError(f"groups is one string, {groups!r}: {should}")
    if groups is None or callable(groups):
        return groups
    # a generator is used up after one reading, a set has no order, and a dict would give its keys
    if isinstance(groups, Mapping | Set) or not hasattr(groups, "__len__") or getattr(groups, "ndim", 1) != 1:
        raise UserError(f"groups is a {type(groups).__name__}: {should}")
    return list(groups)  # type: ignore[call-overload]


def resolve_groups(names: list[str], groups: Groups) -> list[str]:
    """One group an image, from what the user gave.

    Raises:
        UserError: for a list of another length.
    """
    if groups is None:
        return list(names)
    if callable(groups):
        return [str(groups(name)) for name in names]
    if len(groups) != len(names):
        raise UserError(f"groups has {len(groups)} entries for {len(names)} images: give one an image")
    return [str(group) for group in groups]


def _open_file(path: Path, name: str) -> BufferedReader:
    try:
        if not path.is_file():  # opening a pipe would wait for ever
            raise BadImageError(name, "no such file" if not path.exists() else "not a regular file")
        return path.open("rb")
    except OSError as error:
        raise BadImageError(name, f"cannot be opened: {error.strerror or error}") from error


def _require_channels(pixels: Tensor, what: str, wanted: Wanted) -> None:
    """Raises a UserError for a tensor of another number of channels."""
    if pixels.shape[-3] != wanted.channels:
        expected = f"({'n, ' * (pixels.ndim - 3)}{wanted.channels}, height, width)"
        raise UserError(f"{what} has the shape {tuple(pixels.shape)}, and the model takes {expected}")


def file_size(path: Path) -> int:
    """Bytes of a file; -1 where it is gone."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _parts(item: Path | Image.Image | Tensor, wanted: Wanted = RGB) -> Iterator[str | bytes]:
    """What tells an item from another."""
    if isinstance(item, Path):
        yield str(file_size(item))
    elif isinstance(item, Tensor):
        yield f"{item.dtype} {tuple(item.shape)}"
        yield item.contiguous().view(torch.uint8).numpy().tobytes()
    else:
        yield str(item.size)
        try:
            yield convert(item, "", wanted).tobytes()
        except BadImageError as error:
            yield error.reason


def digest(parts: Iterable[str | bytes]) -> str:
    """sha256 over the parts and where each ends."""
    result = hashlib.sha256()
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        result.update(len(content).to_bytes(8, "big"))  # so that "a", "bc" differs from "ab", "c"
        result.update(content)
    return result.hexdigest()


def _distinct(names: Iterable[str]) -> list[str]:
    """Printable names, a second "a" called "a#2"."""
    last: dict[str, int] = {}  # the number that each name was last given
    result: list[str] = []
    for name in map(printable, names):
        distinct = name
        while distinct in last:
            last[name] += 1
            distinct = f"{name}#{last[name]}"
        last[distinct] = 1
        result.append(distinct)
    return result
