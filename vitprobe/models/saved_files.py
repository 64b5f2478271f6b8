"""The two file formats of `torch.save`, read so that nothing in them runs."""

from __future__ import annotations

import io
import math
import mmap
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitprobe.models.pickles import BadFileError, Storage, TensorRecord, one_line, unpickle

ZIP_MAGIC = b"PK\x03\x04"
# How torch.save opened its files before version 1.6: a pickled number, then a pickled version.
LEGACY_MAGIC = b"\x8a\x0a" + (0x1950A86A20F9469CFC6C).to_bytes(10, "little")
_LEGACY_PROTOCOL = 1001


@dataclass(frozen=True)
class SavedFile:
    """A file of `torch.save`: its content as plain data, and how to read a storage's bytes into a tensor."""

    content: Any
    read_storage: Callable[[Storage], Tensor]

    def tensors(self, records: dict[str, TensorRecord]) -> dict[str, Tensor]:
        """The tensors of some records; those that share memory in the file share it here.

        Raises:
            BadFileError: for a record that does not lie within its storage, or a file that ends too early.
        """
        storages: dict[str, Tensor] = {}
        tensors = {}
        for name, record in records.items():
            try:
                if record.storage.key not in storages:
                    storages[record.storage.key] = self.read_storage(record.storage)
                tensors[name] = _view(storages[record.storage.key], record)
            except BadFileError as error:
                raise BadFileError(f"is damaged at {one_line(name)}: {error}") from error
            except (ValueError, TypeError, RuntimeError, MemoryError, OSError, zipfile.BadZipFile) as error:
                reason = f"{type(error).__name__}: {one_line(error)}"
                raise BadFileError(f"is damaged at {one_line(name)} ({reason})") from error
        return tensors


def _view(storage: Tensor, record: TensorRecord) -> Tensor:
    """One tensor of a storage's bytes, if the record is sane."""
    size, stride = tuple(record.size), tuple(record.stride)
    numbers = (record.offset, *size, *stride)
    if len(size) != len(stride) or any(type(number) is not int or number < 0 for number in numbers):
        raise BadFileError("its shape makes no sense")
    elements = storage.numel() // record.dtype.itemsize
    numel = math.prod(size)
    if numel == 0:
        return torch.empty(size, dtype=record.dtype)
    last = record.offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    # More elements than the storage holds would be a small file that asks for any amount of memory.
    if last >= elements or numel > elements:
        raise BadFileError("it reaches beyond its storage")
    return storage.view(record.dtype).as_strided(size, stride, record.offset)


def _nbytes(storage: Storage) -> int:
    return storage.numel * storage.dtype.itemsize


def records_of(path: Path) -> list[str]:
    """The names of the records of a zip archive; none of a damaged one."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error):
        return []


def read_zip(path: Path) -> SavedFile:
    """A file of `torch.save` since torch 1.6.

    Raises:
        BadFileError: for another zip archive, TorchScript, or a damaged file.
    """
    try:
        archive = zipfile.ZipFile(path)
        records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error) as error:
        raise BadFileError(f"is a damaged or cut-off zip archive ({one_line(error)})") from error
    if "constants.pkl" in records or any(name.startswith("code/") for name in records):
        raise BadFileError("is a TorchScript archive, which holds code: save model.state_dict() instead")
    if "data.pkl" not in records:
        raise BadFileError("is a zip archive that torch.save did not write")

    budget = path.stat().st_size  # archives may describe the same bytes again and again

    def read(name: str) -> bytes:
        nonlocal budget
        info = records.get(name)
        if info is None:
            raise BadFileError(f"is damaged: it has no record {one_line(name)}")
        budget -= info.file_size
        if info.compress_type != zipfile.ZIP_STORED or budget < 0:
            raise BadFileError("is damaged: its records are not stored as torch.save stores them")
        try:
            return archive.read(info)
        except (zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError, struct.error) as error:
            raise BadFileError(f"is damaged: {one_line(error)}") from error

    if "byteorder" in records and read("byteorder") != b"little":
        raise BadFileError("was saved on a big-endian machine, which is not read here")
    content, _ = unpickle(io.BytesIO(read("data.pkl")))

    def read_storage(storage: Storage) -> Tensor:
        data = read(f"data/{storage.key}")
        if len(data) != _nbytes(storage):
            raise BadFileError(f"its storage has {len(data)} bytes instead of {_nbytes(storage)}")
        return _bytes_to_tensor(data)

    return SavedFile(content, read_storage)


def read_legacy(path: Path) -> SavedFile:
    """A file of `torch.save` before torch 1.6 (or with `_use_new_zipfile_serialization=False`).

    Raises:
        BadFileError: for a damaged file.
    """
    with path.open("rb") as file:
        # Bounds every read by the file's size, whatever length the pickle claims.
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    unpickle(data)  # the magic number, which brought us here
    protocol, _ = unpickle(data)
    if protocol != _LEGACY_PROTOCOL:
        raise BadFileError("was saved by a version of torch that is not known")
    system, _ = unpickle(data)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise BadFileError("was saved on a big-endian machine, which is not read here")
    content, storages = unpickle(data)
    keys, _ = unpickle(data)

    # After the pickles, each storage: its number of elements, and these.
    places: dict[str, int] = {}
    position = data.tell()
    for key in keys if isinstance(keys, list) else ():
        if not isinstance(key, str) or key not in storages or len(data) < position + 8:
            raise BadFileError("is damaged or cut off")
        if struct.unpack_from("<q", data, position)[0] != storages[key].numel:
            raise BadFileError("is damaged: a storage is not as long as it should be")
        places[key] = position + 8
        position += 8 + _nbytes(storages[key])

    def read_storage(storage: Storage) -> Tensor:
        start, length = places.get(storage.key, len(data)), _nbytes(storage)
        if length < 0 or len(data) < start + length:
            raise BadFileError("the file is cut off")
        return _bytes_to_tensor(data[start : start + length])

    return SavedFile(content, read_storage)


def _bytes_to_tensor(data: bytes) -> Tensor:
    """The bytes as uint8, in memory of torch's own (aligned and writable)."""
    tensor = torch.empty(len(data), dtype=torch.uint8)
    if data:
        tensor.numpy().data[:] = data
    return tensor
