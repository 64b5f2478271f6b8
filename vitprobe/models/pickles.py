"""Unpickles without running anything: what a file of `torch.save` names becomes plain data and records of tensors.

`torch.load` is not used. Its weights-only mode refuses files that official training code saves, some of them whatever
it is told to allow (docs/architecture.md has the measurement), and its other mode calls what the file names, hands
TorchScript archives to another loader, and can write "patch" files. Here no name in a file is ever imported: the few
that describe tensors become records, and every other one an inert `Foreign`. The tensors' bytes are read later, and
only those wanted.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import torch

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


def one_line(text: object, limit: int = 160) -> str:
    """Text from a file, fit for a terminal: one line, printable, not endless."""
    words = " ".join(str(text).split())
    printable = "".join(letter if letter.isprintable() else "?" for letter in words[: limit + 1])
    return printable if len(printable) <= limit else printable[: limit - 1] + "…"


# What may be a key of a dict. Tuples may not: nested in themselves a few dozen times they take forever to hash, and
# nested deeply they overrun the stack.
_KEYS = (str, int, float, bytes, type(None))


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
        """Another one."""
        # A pickle makes instances by `named.__new__(named, …)`, where `named` is a Foreign itself.
        made = object.__new__(Foreign)
        made.label = cls.label
        return made

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __call__(self, *args: object, **kwargs: object) -> Foreign:
        """Another one."""
        return Foreign.__new__(self)  # type: ignore[arg-type]

    def append(self, item: object) -> None:
        """Nothing."""

    def extend(self, items: object) -> None:
        """Nothing."""


class _Mapping(_Inert, dict):
    """collections.OrderedDict: a dict already, less the attributes that a pickle would set."""

    def __init__(self, pairs: Any = ()) -> None:
        super().__init__((key, value) for key, value in pairs if isinstance(key, _KEYS))


class _DefaultMapping(_Mapping):
    """collections.defaultdict, less its factory."""

    def __init__(self, *factory: object) -> None:
        super().__init__()


class _Dtype(_Inert):
    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


class Storage(_Inert):
    """A tensor's memory in the file: `numel` elements of `dtype`, under a key."""

    def __init__(self, key: str, dtype: torch.dtype, numel: int) -> None:
        self.key, self.dtype, self.numel = key, dtype, numel


class TensorRecord(_Inert):
    """Where a tensor's bytes lie and how to read them; nothing in it has been checked."""

    def __init__(self, storage: Storage, dtype: torch.dtype, offset: Any, size: Any, stride: Any) -> None:
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


def _tensor(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any = None, hooks: Any = None, metadata: Any = None
) -> Any:
    """torch._utils._rebuild_tensor and _rebuild_tensor_v2."""
    return _record(storage, getattr(storage, "dtype", None), offset, size, stride, metadata)


def _tensor_with_dtype(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, metadata: Any = None
) -> Any:
    """torch._utils._rebuild_tensor_v3."""
    return _record(storage, getattr(dtype, "dtype", None), offset, size, stride, metadata)


def _record(storage: Any, dtype: Any, offset: Any, size: Any, stride: Any, metadata: Any) -> Any:
    # Metadata mark a tensor whose values are to be conjugated or negated.
    if not isinstance(storage, Storage) or not isinstance(dtype, torch.dtype) or metadata:
        return _foreign("tensor of a kind that is not read here")
    return TensorRecord(storage, dtype, offset, size, stride)


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

    # What the machine of pickle._Unpickler works on.
    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, file: Any) -> None:
        super().__init__(file, encoding="latin1")  # which decodes whatever Python 2 wrote
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        """The record that a name stands for."""
        return _NAMES.get((module, name)) or _foreign(f"{module}.{name}")

    def get_extension(self, code: int) -> Any:
        """Nothing: extensions are names that this process has registered."""
        raise pickle.UnpicklingError("a pickle extension")

    def persistent_load(self, saved_id: Any) -> Storage:
        """The storage that a tensor lies in: ("storage", type, key, device, number of elements, view of another)."""
        kind, dtype, key, _, numel, *view = saved_id
        if kind != "storage" or not isinstance(dtype, _Dtype) or not isinstance(key, str) or any(view):
            raise pickle.UnpicklingError("a storage of an unknown kind")
        if type(numel) is not int:
            raise pickle.UnpicklingError("a storage without a size")
        storage = self.storages.setdefault(key, Storage(key, dtype.dtype, numel))
        if (storage.dtype, storage.numel) != (dtype.dtype, numel):
            raise pickle.UnpicklingError("a storage that is said to be two things")
        return storage

    def _set_items(self, target: Any, items: list[Any]) -> None:
        if isinstance(target, dict):
            pairs = zip(items[::2], items[1::2], strict=True)
            target.update((key, value) for key, value in pairs if isinstance(key, _KEYS))

    def _load_setitem(self) -> None:
        items, self.stack[-2:] = self.stack[-2:], []
        self._set_items(self.stack[-1], items)

    def _load_setitems(self) -> None:
        items = self.pop_mark()
        self._set_items(self.stack[-1], items)

    def _load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._set_items(self.stack[-1], items)

    def _load_additems(self) -> None:
        self.pop_mark()  # what is in a set is hashed, and no weights are in sets

    def _load_frozenset(self) -> None:
        self.pop_mark()
        self.append(frozenset())

    dispatch: ClassVar[dict[int, Callable[..., None]]] = {
        **pickle._Unpickler.dispatch,  # type: ignore[attr-defined]
        pickle.SETITEM[0]: _load_setitem,
        pickle.SETITEMS[0]: _load_setitems,
        pickle.DICT[0]: _load_dict,
        pickle.ADDITEMS[0]: _load_additems,
        pickle.FROZENSET[0]: _load_frozenset,
    }


def unpickle(file: Any) -> tuple[Any, dict[str, Storage]]:
    """The plain data of one pickle, and the storages it names."""
    reader = _Reader(file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about escapes in strings
        try:
            return reader.load(), reader.storages
        except Exception as error:  # a broken pickle can raise nearly anything
            reason = f"{type(error).__name__}: {one_line(error)}"
            raise BadFileError(f"is damaged: its pickle cannot be read ({reason})") from error
