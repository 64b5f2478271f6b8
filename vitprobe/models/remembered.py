"""Specs of models that were loaded by name here, for when their modules come back inside something else."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from vitprobe.models.entries import ModelSpec

_Sums = tuple[tuple[str, float], ...]
_LOADED: WeakKeyDictionary[nn.Module, tuple[ModelSpec, _Sums]] = WeakKeyDictionary()


def remember(tower: nn.Module, spec: ModelSpec) -> None:
    """Note what is known of the weights that are in a module now."""
    _LOADED[tower] = spec, _sums(tower)


def recall(tower: nn.Module) -> ModelSpec | None:
    """What is known of a module, if its weights are still those that were loaded; None for any other."""
    spec, sums = _LOADED.get(tower, (None, None))
    try:
        return spec if sums is not None and sums == _sums(tower) else None
    except (RuntimeError, NotImplementedError):  # quantised since: other weights
        return None


def _sums(module: nn.Module) -> _Sums:
    """The sum of each weight, which training changes; much cheaper than a digest."""
    weights = ((name, value) for name, value in module.state_dict().items() if isinstance(value, Tensor))
    return tuple((name, float(value.detach().cpu().sum(dtype=torch.float64))) for name, value in weights)
