"""The identity of a model's weights: one digest over all that they are, however they are kept.

Plain tensors, in the order of their names, make the digest of an ordinary model. Where a model has them, the digest
holds quantised tensors and packed weights, tensor subclasses by the tensors in them, what a module saves beside its
tensors (`get_extra_state`), and buffers that are not saved. What is made of something else has no identity.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import io
import json
import types
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter, nn.Buffer)
_DEPTH = 24  # of values within values
_WORDS = (enum.Enum, torch.device, torch.dtype, torch.layout, torch.memory_format, torch.qscheme)


class _UnknownError(Exception):
    """A value whose content cannot be told."""


def weights_sha256(module: nn.Module) -> str | None:
    """The SHA-256 of a model's weights: names in order, kind of number, shape and bytes; the same on every device.

    None where a part of them is of a kind that cannot be read, see `unidentified`.
    """
    digest = hashlib.sha256()
    try:
        for name, value in _state(module):
            _add(digest, name, value)
    except _UnknownError:
        return None
    return digest.hexdigest()


def unidentified(module: nn.Module) -> str:
    """What of a model's weights no digest covers, in a few words: its name and its class; "" where one covers all."""
    for name, value in _state(module):
        try:
            _add(hashlib.sha256(), name, value)
        except _UnknownError as error:
            return f"{name} is a {error}"
    return ""


def plain_parts(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors of real numbers that a parameter is made of: itself, or what its class holds, where known."""
    try:
        inner = _inside(tensor)
    except _UnknownError:
        return
    if inner is None:
        if tensor.is_floating_point() or tensor.is_complex():
            yield tensor.detach().float() if tensor.dtype.itemsize == 1 else tensor.detach()
    else:
        yield from (found for part in inner.values() if isinstance(part, Tensor) for found in plain_parts(part))


def _state(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """All that a model's outputs depend on, by name: first what `state_dict` has, in the order of the names."""
    state = module.state_dict(keep_vars=True)  # of which a copy would lose what its class holds
    yield from sorted(state.items())
    kept = {_place(value) for value in state.values()} - {None}
    unsaved: dict[str, Any] = {
        name: value
        for named in (module.named_parameters, module.named_buffers)
        for name, value in named(remove_duplicate=False)
        if name not in state and _place(value) not in kept
    }
    for path, part in module.named_modules(remove_duplicate=False):
        packed = {name: value for name, value in vars(part).items() if isinstance(value, torch.ScriptObject)}
        unsaved |= {full: value for name, value in packed.items() if (full := f"{path}.{name}") not in state}
    for name, value in sorted(unsaved.items()):
        yield f"{name} (not saved)", value


def _place(value: Any) -> tuple[int, int] | None:
    """Where in memory a plain tensor lies; None of anything else."""
    if not isinstance(value, Tensor) or type(value) not in _PLAIN or value.layout is not torch.strided:
        return None
    return (value.data_ptr(), value.numel()) if value.numel() and not value.is_meta else None


def _add(digest: Any, name: Any, value: Any, depth: int = _DEPTH) -> None:
    """Add a value under a name, every part of it so that no two different values are written alike."""
    if depth == 0:
        raise _UnknownError(type(value).__qualname__)
    inner = _inside(value) if isinstance(value, Tensor) else _parts(value)
    if inner is not None:
        _write(digest, [name, _class_of(value), *(value.shape if isinstance(value, Tensor) else ()), list(inner)])
        for key, part in inner.items():
            _add(digest, [name, key], part, depth - 1)
        return
    words, content = _leaf(value)
    _write(digest, [name, *words])
    digest.update(content)


def _write(digest: Any, words: list[Any]) -> None:
    text = json.dumps(words)
    digest.update(f"{len(text)}:{text}".encode())


def _leaf(value: Any) -> tuple[list[Any], Any]:
    """A value without parts: what it is, in words, and its bytes."""
    named: Any = value
    if isinstance(value, Tensor):
        plain = value.detach().as_subclass(Tensor).resolve_conj().resolve_neg()
        content = plain.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        return [str(value.dtype), list(value.shape)], content
    if value is None or isinstance(value, bool | int | float | str):
        return ["value", type(value).__name__, repr(value)], b""
    if isinstance(value, _WORDS):
        # Where weights lie is no part of them.
        return ["value", type(value).__name__, "" if isinstance(value, torch.device) else str(value)], b""
    if isinstance(value, bytes | bytearray | io.BytesIO):
        content = value.getvalue() if isinstance(value, io.BytesIO) else bytes(value)
        return ["bytes", len(content)], content
    if isinstance(value, np.ndarray | np.generic) and not value.dtype.hasobject:
        return ["array", str(value.dtype), list(value.shape)], np.ascontiguousarray(value).tobytes()
    if isinstance(value, type | types.BuiltinFunctionType) or _at_the_top(value):
        return ["name", f"{named.__module__}.{named.__qualname__}"], b""
    raise _UnknownError(_class_of(value))


def _parts(value: Any) -> dict[str, Any] | None:
    """What a value that is no tensor is made of, by name; None of one without parts."""
    if isinstance(value, torch.ScriptObject):
        return {"state": _unpacked(value)}
    if isinstance(value, Mapping):  # in its order, which may mean something
        return {"keys": list(value.keys()), "values": list(value.values())}
    if isinstance(value, list | tuple):
        return {str(number): part for number, part in enumerate(value)}
    if isinstance(value, functools.partial):
        return {"function": value.func, "arguments": value.args, "options": value.keywords}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
    return None


def _inside(tensor: Tensor) -> dict[str, Any] | None:
    """What a tensor is made of, by name; None of a plain one, whose bytes say all."""
    if tensor.is_meta or nn.parameter.is_lazy(tensor):
        raise _UnknownError("tensor without memory")
    if tensor.is_quantized:
        return _inside_quantised(tensor)
    if tensor.is_mkldnn:
        return {"dense": tensor.to_dense()}
    if tensor.layout is torch.sparse_coo:
        whole = tensor.detach().coalesce()
        return {"indices": whole.indices(), "values": whole.values()}
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return {"rows": tensor.crow_indices(), "columns": tensor.col_indices(), "values": tensor.values()}
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return {"rows": tensor.row_indices(), "columns": tensor.ccol_indices(), "values": tensor.values()}
    if type(tensor) in _PLAIN:
        return None
    if (whole := _gathered(tensor)) is not None:
        return {"whole": whole}
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None:
        try:
            names, about = flatten()
            return {name: getattr(tensor, name) for name in names} | {"about": about}
        except Exception as error:  # a library's own code
            raise _UnknownError(type(tensor).__qualname__) from error
    try:
        held = tensor.numel() == 0 or tensor.data_ptr() != 0
        plain = tensor.detach().as_subclass(Tensor)
    except Exception as error:
        raise _UnknownError(type(tensor).__qualname__) from error
    if not held:
        raise _UnknownError(type(tensor).__qualname__)
    return {"values": plain} | vars(tensor)


def _inside_quantised(tensor: Tensor) -> dict[str, Any]:
    found: dict[str, Any] = {"scheme": str(tensor.qscheme()), "kind": tensor.dtype, "numbers": tensor.int_repr()}
    if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        return found | {"scale": tensor.q_scale(), "zero": tensor.q_zero_point()}
    return found | {
        "axis": tensor.q_per_channel_axis(),
        "scales": tensor.q_per_channel_scales(),
        "zeros": tensor.q_per_channel_zero_points(),
    }


def _gathered(tensor: Tensor) -> Tensor | None:
    """The whole of a tensor whose parts several processes hold (a DTensor); None of any other."""
    if type(tensor).__module__.partition(".")[0] != "torch" or not hasattr(tensor, "full_tensor"):
        return None
    try:
        return tensor.detach().full_tensor()  # type: ignore[attr-defined]
    except Exception as error:  # a mesh without its processes, parts that cannot be put together
        raise _UnknownError(type(tensor).__qualname__) from error


def _unpacked(packed: torch.ScriptObject) -> Any:
    """What is in an object of torch's own in C++, such as a packed weight."""
    for way in ("__getstate__", "unpack"):
        try:
            return getattr(packed, way)()
        except Exception:  # the other way, or none
            continue
    raise _UnknownError(_class_of(packed))


def _class_of(value: Any) -> str:
    if isinstance(value, torch.ScriptObject):
        return str(value._type())  # type: ignore[attr-defined]
    return type(value).__qualname__


def _at_the_top(value: Any) -> bool:
    """Whether a value is a function whose name says what it does: no lambda, nothing made within another function."""
    return isinstance(value, types.FunctionType) and value.__qualname__.isidentifier() and value.__name__ != "<lambda>"
