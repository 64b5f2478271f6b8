"""In which precision the forward pass runs; statistics are computed in float32 from the queries and keys it made.

A smaller precision than the weights' is torch's autocast, which leaves the weights as they are. "auto" takes bfloat16
where the first images show that it moves no block's mean over heads and images, of any statistic, by more than a bound.
The bound is relative to that mean, or to the statistic's floor where the mean is smaller; it says nothing of single
heads or single images.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from vitprobe.errors import UserError
from vitprobe.layout import TokenLayout
from vitprobe.statistics import STATISTICS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CHOICES = (*DTYPES, "auto")
DTYPE_BOUND = 0.01  # the largest error that "auto" allows, of |a − b| / max(floor, |b|)
SMALLEST = 1e-2  # the largest floor
BOUNDED = (
    "the mean over heads and these images of each statistic in each block, relative to itself or to the statistic's "
    "floor; single heads and images are not bounded"
)
MEASURED_IMAGES = 8  # "auto" measures on at most as many of the first batch


@dataclass(frozen=True)
class ForwardDtype:
    """What the forward pass runs in, and why.

    Attributes:
        asked: "float32", "bfloat16", "float16", "auto", or None for the weights' own precision.
        taken: the dtype by name.
        bound: with "auto", the error allowed.
        images: with "auto", how many images it was measured on.
        errors: with "auto", the measured error of each statistic under bfloat16: the largest over blocks of
            |a − b| / max(floor, |b|), a and b the means over these images and all heads under bfloat16 and float32.
        reason: with "auto", why nothing was measured, if so.
        floors: with "auto", the floor of each statistic (`floor`).
        bounded: with "auto", what the bound is of, in words.
    """

    asked: str | None
    taken: str
    bound: float | None = None
    images: int | None = None
    errors: dict[str, float] = field(default_factory=dict)
    reason: str | None = None
    floors: dict[str, float] = field(default_factory=dict)
    bounded: str | None = None

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """A context for the forward pass."""
        if self.asked is None or self.taken == "float32":
            return nullcontext()
        return torch.autocast(device.type, DTYPES[self.taken])

    def describe(self) -> dict[str, Any]:
        """For the manifest; infinite errors as text, which JSON lacks."""
        errors = {name: error if math.isfinite(error) else "inf" for name, error in self.errors.items()}
        return {**asdict(self), "errors": errors}

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> ForwardDtype:
        """What `describe` gave, for a run that is resumed: it goes on as it began."""
        errors = {name: float(error) for name, error in description["errors"].items()}
        return cls(**{**description, "errors": errors})


def check_dtype(dtype: Any, bound: Any) -> None:
    """Check the arguments before anything is loaded.

    Raises:
        UserError: for a name that is not in `CHOICES`, or a bound that is no number above 0.
    """
    if dtype is not None and dtype not in CHOICES:
        raise UserError(f"dtype is {dtype!r}; choose one of {', '.join(CHOICES)}, or leave it out")
    is_number = isinstance(bound, Real) and not isinstance(bound, bool)
    if not (is_number and 0 < float(bound) < math.inf):
        raise UserError(f"dtype_bound is {bound!r}; it must be a number above 0, such as {DTYPE_BOUND}")


def weights_dtype(module: nn.Module) -> torch.dtype:
    """The precision of a module's weights, by its first floating-point parameter; float32 without any."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


def own_dtype(module: nn.Module) -> ForwardDtype:
    """The weights' own precision, as it is without being asked for another."""
    return ForwardDtype(None, _name(weights_dtype(module)))


def floor(name: str, layout: TokenLayout | None) -> float:
    """Return the mean of a statistic below which errors are compared absolutely.

    0.01, or the statistic's value under uniform attention where that is less: a share that is 1/N when nothing is
    preferred must be told from 1/N. 0.01 for what has no such value.
    """
    uniform = STATISTICS[name].uniform if name in STATISTICS else None
    value = SMALLEST if uniform is None or layout is None else uniform(layout)
    return min(SMALLEST, value) if value > 0 else SMALLEST


def choose_dtype(
    asked: str | None,
    bound: float,
    module: nn.Module,
    device: torch.device,
    measure: Callable[[ForwardDtype], Mapping[str, Tensor]],
    layout: Callable[[], TokenLayout | None] = lambda: None,
) -> ForwardDtype:
    """Settle the dtype of a run, when its first images have come.

    Args:
        asked: one of `CHOICES`, or None.
        bound: the error that "auto" allows.
        module: the model, on its device.
        device: that device.
        measure: dtype → `{name: (images, blocks, heads)}` of a forward pass in it; called for "auto" alone. Empty where
            there was no image.
        layout: called after `measure`: the token layout that it saw, for the floors.

    Raises:
        UserError: for weights that are not float32, or a dtype that the device cannot autocast to.
    """
    if asked is None:
        return own_dtype(module)
    own = weights_dtype(module)
    if own != torch.float32:
        raise UserError(
            f"dtype={asked!r} is for float32 weights and these are {_name(own)}: leave it out to run them as they are, "
            f"or convert the model first"
        )
    wanted = "bfloat16" if asked == "auto" else asked
    obstacle = None if wanted == "float32" else _obstacle(device, wanted)
    if asked != "auto":
        if obstacle is not None:
            raise UserError(f"dtype={asked!r} cannot be used on {device} ({obstacle}); choose another, or auto")
        return ForwardDtype(asked, asked)
    plain, small = ForwardDtype(asked, "float32"), ForwardDtype(asked, "bfloat16")
    if obstacle is not None:
        return ForwardDtype(asked, "float32", bound, reason=f"{device} cannot run bfloat16: {obstacle}")
    values, reference = measure(small), measure(plain)
    if not reference:
        return ForwardDtype(asked, "float32", bound, reason="there was no image to measure bfloat16 on")
    seen = layout()
    floors = {name: floor(name, seen) for name in reference}
    errors, images = relative_errors(values, reference, floors), len(next(iter(reference.values())))
    taken = small.taken if all(error <= bound for error in errors.values()) else plain.taken
    return ForwardDtype(asked, taken, bound, images, errors, floors=floors, bounded=BOUNDED)


def relative_errors(
    values: Mapping[str, Tensor], reference: Mapping[str, Tensor], floors: Mapping[str, float] | None = None
) -> dict[str, float]:
    """Return the largest error of each statistic over blocks: |a − b| / max(floor, |b|) of means over images and heads.

    `floors` by statistic; 0.01 for those that are not in it.
    """
    errors = {}
    for name, expected in reference.items():
        a, b = (tensor.double().mean(dim=(0, 2)) for tensor in (values[name], expected))
        smallest = (floors or {}).get(name, SMALLEST)
        error = torch.where(a == b, 0.0, (a - b).abs() / b.abs().clamp(min=smallest))  # infinity equals itself
        errors[name] = float(torch.where(error.isnan(), math.inf, error).max())
    return errors


def dtype_line(described: dict[str, Any]) -> str | None:
    """What `ForwardDtype.describe` says, for the reader; None where no precision was asked for."""
    settled = ForwardDtype.from_description(described)
    if settled.asked != "auto":
        return None if settled.asked is None else f"dtype: {settled.taken}, as asked"
    if settled.reason is not None:
        return f"dtype: {settled.taken}, as {settled.reason}"
    ranked = sorted(settled.errors, key=lambda name: -settled.errors[name])
    said = ", ".join(f"{name} {settled.errors[name]:.1e}" for name in ranked)
    verdict = "within" if settled.taken == "bfloat16" else "not all within"
    low, high = (pick(settled.floors.values(), default=SMALLEST) for pick in (min, max))
    return (
        f"dtype: {settled.taken}; the errors of bfloat16 against float32 in block means (over heads and the first "
        f"{settled.images} images) are {verdict} {settled.bound:g} of the mean, or of its floor where that is larger "
        f"({low:.2g}{'' if low == high else f' to {high:.2g}'}: the value under uniform attention, at most "
        f"{SMALLEST:g}); single heads and images are not bounded. Errors: {said}"
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _obstacle(device: torch.device, dtype: str) -> str | None:
    """Why a device cannot autocast to this dtype; None if it can."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # torch's way to say that it would go on without
            with torch.autocast(device.type, DTYPES[dtype]):
                pass
    except (RuntimeError, UserWarning) as error:
        return " ".join(str(error).split()).partition(". ")[0]
    return None
