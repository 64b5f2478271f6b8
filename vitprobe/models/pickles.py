"""Reads what `torch.save` wrote without running anything in it: a pickle becomes plain data and records of tensors.

`torch.load` is not used. Its weights-only mode refuses the harmless classes in official training checkpoints
(argparse.Namespace, numpy scalars), and its other mode calls what the file names, hands TorchScript archives to
another loader and can write "patch" files. Here no name in a file is ever imported: the few that describe tensors
become records, and every other one an inert `Foreign`. The tensors' bytes are read later, and only those wanted.
"""

from __future__ import annotations

import io
import math
import mmap
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ZIP_MAGIC = b"PK\x03\x04"
# How torch.save opened its files before version 1.6: a pickled number, then a pickled version.
LEGACY_MAGIC = b"\x8a\x0a" + (0x1950A86A20F9469CFC6C).to_bytes(10, "little")
_LEGACY_PROTOCOL = 1001

_DTYPES = {
    name: getattr(torch, name)
    for name in (
        *("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"),
        *("complex64", "complex128", "float8_e4m3fn", "float8_e5m2"),
    )
}
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}


class BadFileError(Exception):
    """The file is not what `torch.save` writes, or is broken; the message says how, to follow the file's name."""


class _Inert:
    """What a pickle may do to an object while it is built - set its state - has no effect."""

    def __setstate__(self, *state: object) -> None:
        pass


class Foreign(_Inert):
    """Stands for a class or function that a file names, and for all that it would make; does nothing.

    One Python class serves for every name, so that the file cannot choose so much as a class's name.
    """

    label: str = "object"

    def __new__(cls, *args: object, **kwargs: object) -> Foreign:
        # A pickle makes instances by `named.__new__(named, …)`, where `named` is a Foreign itself.
        made = object.__new__(Foreign)
        made.label = cls.label
        return made

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __call__(self, *args: object, **kwargs: object) -> Foreign:
        return Foreign.__new__(self)  # type: ignore[arg-type]

    def append(self, item: object) -> None:
        """Nothing."""

    def extend(self, items: object) -> None:
        """Nothing."""

    def add(self, item: object) -> None:
        """Nothing."""

    def __setitem__(self, key: object, value: object) -> None:
        pass


class _Mapping(_Inert, dict):
    """collections.OrderedDict: a dict already, less the attributes that a pickle would set."""

    def __init__(self, *items: Any) -> None:
        super().__init__(*items)


class _DefaultMapping(_Mapping):
    """collections.defaultdict, less its factory."""

    def __init__(self, *factory: object) -> None:
        super().__init__()


class _Dtype(_Inert):
    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


class _Storage(_Inert):
    def __init__(self, key: str, dtype: torch.dtype, numel: int) -> None:
        self.key, self.dtype, self.numel = key, dtype, numel


class TensorRecord(_Inert):
    """Where a tensor's bytes lie and how to read them; nothing in it has been checked."""

    def __init__(self, storage: _Storage, dtype: torch.dtype, offset: Any, size: Any, stride: Any) -> None:
        self.storage, self.dtype, self.offset, self.size, self.stride = storage, dtype, offset, size, stride


class _Function(_Inert):
    """A function of torch's that describes a tensor; holds ours in its place."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)


def _foreign(label: str) -> Foreign:
    made = Foreign()
    made.label = label
    return made


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Any:
    """torch._utils._rebuild_tensor and _v2; the rest: requires_grad, hooks, metadata."""
    if not isinstance(storage, _Storage) or (len(rest) > 2 and rest[2]):
        return _foreign("tensor of a kind that is not read here")
    return TensorRecord(storage, storage.dtype, offset, size, stride)


def _tensor_with_dtype(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Any:
    """torch._utils._rebuild_tensor_v3; the rest: requires_grad, hooks, dtype, metadata."""
    known = isinstance(storage, _Storage) and len(rest) > 2 and isinstance(rest[2], _Dtype)
    if not known or (len(rest) > 3 and rest[3]):
        return _foreign("tensor of a kind that is not read here")
    return TensorRecord(storage, rest[2].dtype, offset, size, stride)


def _parameter(data: Any, *rest: Any) -> Any:
    """torch._utils._rebuild_parameter: the tensor in it."""
    return data


def _with_attributes(function: Any, kind: Any, args: Any, state: Any) -> Any:
    """torch._tensor._rebuild_from_type_v2: the tensor, less its class and attributes."""
    return function(*args) if isinstance(function, _Function) else _foreign("tensor")


_NAMES: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Mapping,
    ("collections", "defaultdict"): _DefaultMapping,
    ("torch._utils", "_rebuild_tensor"): _Function(_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _Function(_tensor),
    ("torch._utils", "_rebuild_tensor_v3"): _Function(_tensor_with_dtype),
    ("torch._utils", "_rebuild_parameter"): _Function(_parameter),
    ("torch._utils", "_rebuild_parameter_with_state"): _Function(_parameter),
    ("torch._tensor", "_rebuild_from_type_v2"): _Function(_with_attributes),
    **{("torch", name): _Dtype(dtype) for name, dtype in _DTYPES.items()},
    **{
        (module, name): _Dtype(dtype)
        for module in ("torch", "torch.cuda", "torch.storage")
        for name, dtype in _STORAGES.items()
    },
}


class _Reader(pickle._Unpickler):  # type: ignore[name-defined]
    """An unpickler that imports nothing.

    Python's own in Python, not the one in C: that one allocates what a file of ten bytes claims to need.
    """

    def __init__(self, file: Any) -> None:
        super().__init__(file, encoding="latin1")  # which decodes whatever Python 2 wrote
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        """The record that a name stands for."""
        return _NAMES.get((module, name)) or _foreign(f"{module}.{name}")

    def get_extension(self, code: int) -> Any:
        """Nothing: extensions are names that this process has registered."""
        raise pickle.UnpicklingError("a pickle extension")

    def persistent_load(self, saved_id: Any) -> _Storage:
        """The storage that a tensor lies in: ("storage", type, key, device, number of elements, view of another)."""
        kind, dtype, key, _, numel, *view = saved_id
        if kind != "storage" or not isinstance(dtype, _Dtype) or not isinstance(key, str) or any(view):
            raise pickle.UnpicklingError("a storage of an unknown kind")
        if type(numel) is not int:
            raise pickle.UnpicklingError("a storage without a size")
        return self.storages.setdefault(key, _Storage(key, dtype.dtype, numel))


def _unpickle(file: Any) -> tuple[Any, dict[str, _Storage]]:
    """The plain data of one pickle, and the storages it names."""
    reader = _Reader(file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about escapes in strings
        try:
            return reader.load(), reader.storages
        except Exception as error:  # a broken pickle can raise nearly anything
            reason = " ".join(str(error).split())[:120]
            raise BadFileError(f"is damaged: its pickle cannot be read ({type(error).__name__}: {reason})") from error


@dataclass(frozen=True)
class SavedFile:
    """A file of `torch.save`: its content as plain data, and how to read a storage's bytes into a tensor."""

    content: Any
    read_storage: Callable[[_Storage], Tensor]

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
                raise BadFileError(f"is damaged at {name}: {error}") from error
            except (ValueError, TypeError, RuntimeError, MemoryError, OSError, zipfile.BadZipFile) as error:
                reason = " ".join(str(error).split())[:120]
                raise BadFileError(f"is damaged at {name} ({type(error).__name__}: {reason})") from error
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


def _nbytes(storage: _Storage) -> int:
    return storage.numel * storage.dtype.itemsize


def read_zip(path: Path) -> SavedFile:
    """A file of `torch.save` since torch 1.6.

    Raises:
        BadFileError: for another zip archive, TorchScript, or a damaged file.
    """
    try:
        archive = zipfile.ZipFile(path)
        records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error) as error:
        raise BadFileError(f"is a damaged or cut-off zip archive ({error})") from error
    if "constants.pkl" in records or any(name.startswith("code/") for name in records):
        raise BadFileError("is a TorchScript archive, which holds code: save model.state_dict() instead")
    if "data.pkl" not in records:
        raise BadFileError("is a zip archive that torch.save did not write")

    budget = path.stat().st_size  # archives may describe the same bytes again and again

    def read(name: str) -> bytes:
        nonlocal budget
        info = records.get(name)
        if info is None:
            raise BadFileError(f"is damaged: it has no record {name}")
        budget -= info.file_size
        if info.compress_type != zipfile.ZIP_STORED or budget < 0:
            raise BadFileError("is damaged: its records are not stored as torch.save stores them")
        try:
            return archive.read(info)
        except (zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError, struct.error) as error:
            raise BadFileError(f"is damaged: {' '.join(str(error).split())[:120]}") from error

    if "byteorder" in records and read("byteorder") != b"little":
        raise BadFileError("was saved on a big-endian machine, which is not read here")
    content, _ = _unpickle(io.BytesIO(read("data.pkl")))

    def read_storage(storage: _Storage) -> Tensor:
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
    _unpickle(data)  # the magic number, which brought us here
    protocol, _ = _unpickle(data)
    if protocol != _LEGACY_PROTOCOL:
        raise BadFileError("was saved by a version of torch that is not known")
    system, _ = _unpickle(data)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise BadFileError("was saved on a big-endian machine, which is not read here")
    content, storages = _unpickle(data)
    keys, _ = _unpickle(data)

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

    def read_storage(storage: _Storage) -> Tensor:
        start, length = places.get(storage.key, len(data)), _nbytes(storage)
        if length < 0 or len(data) < start + length:
            raise BadFileError("the file is cut off")
        return _bytes_to_tensor(data[start : start + length])

    return SavedFile(content, read_storage)


def _bytes_to_tensor(data: bytes) -> Tensor:
    """The bytes as uint8, in memory of torch's own (aligned and writable)."""
    tensor = torch.empty(len(data), dtype=torch.uint8)
    if data:
        memoryview(tensor.numpy())[:] = data
    return tensor
