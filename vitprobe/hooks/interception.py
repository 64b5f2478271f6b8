"""Seeing the attention calls of a running model, whatever module makes them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from vitprobe.hooks.calls import READERS, SOFTMAXES, AttentionCall, read_softmax

# What a softmax's output may pass on its way to the values and stay the same weights.
_PASSING = {
    *("dropout", "dropout_", "feature_dropout", "alpha_dropout", "to", "type", "type_as", "float", "half", "bfloat16"),
    *("double", "contiguous", "clone", "detach", "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"),
    *("expand", "transpose", "permute", "movedim", "mT", "T", "__get__", "requires_grad_", "cpu", "cuda"),
}
_PRODUCTS = {"matmul", "__matmul__", "__rmatmul__", "bmm", "mm", "einsum", "baddbmm"}


class AttentionWatcher(TorchFunctionMode):
    """While entered, hands every attention call of this thread to `seen`, which says whether it matters.

    Then it runs, unless its output was computed there.

    A function mode sees a call whichever kernel serves it, and wherever the function was imported from; calls that
    `seen` itself makes are not seen again. Of a softmax it is followed what becomes of the output: only what
    multiplies the values as it is, is attention.
    """

    def __init__(self, seen: Callable[[AttentionCall], bool]) -> None:
        super().__init__()
        self.seen = seen
        self._followed: dict[int, tuple[weakref.ref[Tensor], AttentionCall]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Torch's entry point for every overridable function."""
        kwargs = kwargs or {}
        reader = READERS.get(func)
        if reader is not None:
            call = reader(*args, **kwargs)
            self.seen(call)
            # Otherwise handed on in full, so that a capture around this one sees it too.
            return func(*args, **kwargs) if call.output is None else call.take_output()
        output = func(*args, **kwargs)
        if self._followed:
            self._follow(func, args, kwargs, output)
        if func in SOFTMAXES:
            call = read_softmax(*args, **kwargs)
            if call is not None and self.seen(call):
                self._track(output, call)
        return output

    def forget(self) -> None:
        """Follow no softmax any longer."""
        self._followed.clear()

    def _track(self, output: Any, call: AttentionCall) -> None:
        if isinstance(output, Tensor):
            self._followed[id(output)] = (weakref.ref(output), call)

    def _follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Note what a function did with the output of a softmax."""
        name = getattr(func, "__name__", str(func))
        tensors = list(_tensors((args, kwargs)))
        for tensor in tensors:
            reference, call = self._followed.get(id(tensor), (None, None))
            if call is None or reference is None or reference() is not tensor:
                continue
            if name in _PASSING:
                self._track(output, call)
            # Values have a batch; what has none is a matrix that mixes heads.
            elif name in _PRODUCTS and all(other.ndim >= 3 for other in tensors):
                call.applied = True
            elif _in_place(name):
                call.changed_by = call.changed_by or name
                del self._followed[id(tensor)]
            elif isinstance(output, Tensor):
                call.changed_by = call.changed_by or name


def _in_place(name: str) -> bool:
    """Whether a function of this name changes its first argument."""
    return name == "__setitem__" or name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))


def _tensors(values: Any) -> Iterator[Tensor]:
    """The tensors in nested arguments."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        yield from _tensors(tuple(values.values()))
