"""LARS, SGD and AdamW for many probes of one shape at once, each with its own rate, decay and state.

A parameter that every probe has is one tensor with the probes along its first dimension (`Stack`), so that an update is
a handful of operations however many probes there are. Updates are made of elementwise operations that round once
(no fused multiply-add, whose rounding may depend on an element's place), and norms are taken probe by probe: a probe's
numbers are the same bits whatever stands beside it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

MOMENTUM = 0.9  # of LARS and SGD
TRUST = 0.001  # of LARS
BETAS = (0.9, 0.95)  # of AdamW
EPSILON = 1e-8  # of AdamW


class Stack:
    """One parameter of several probes as one tensor; the probes' own parameters and gradients become views of it.

    Attributes:
        values: `(probes, …)`.
        gradients: as `values`; backward passes add to it.
        moments: running means that the optimiser keeps, each as `values`.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], moments: Sequence[str]) -> None:
        self.values = _aligned(len(parameters), parameters[0])
        self.gradients = torch.zeros_like(self.values)
        self.moments = {name: torch.zeros_like(self.values) for name in moments}
        for parameter, value, gradient in zip(parameters, self.values, self.gradients, strict=True):
            value.copy_(parameter.detach())
            parameter.data = value
            parameter.grad = gradient

    @property
    def is_matrix(self) -> bool:
        """Whether a probe's parameter has more than one dimension."""
        return self.values.ndim > 2

    def per_probe(self, numbers: Float[Tensor, " probe"]) -> Tensor:
        """One number a probe in the shape and type that multiply `values`."""
        return numbers.to(self.values.dtype).view(-1, *[1] * (self.values.ndim - 1))


class StackedOptimizer(ABC):
    """Trains several modules of one shape, each as if alone.

    Args:
        copies: the modules; what of them requires a gradient is trained.
        learning_rates: one a module, before the schedule.
        weight_decays: one a module.
    """

    moments: ClassVar[tuple[str, ...]]

    def __init__(
        self, copies: Sequence[nn.Module], learning_rates: Sequence[float], weight_decays: Sequence[float]
    ) -> None:
        parameters = [[(n, p) for n, p in copy.named_parameters() if p.requires_grad] for copy in copies]
        self.stacks = {
            same[0][0]: Stack([parameter for _, parameter in same], self.moments)
            for same in zip(*parameters, strict=True)
        }
        device = next(iter(self.stacks.values())).values.device
        self._rates = torch.tensor(learning_rates, dtype=torch.float64, device=device)
        self._decays = torch.tensor(weight_decays, dtype=torch.float64, device=device)

    @torch.no_grad()
    def step(self, factor: float, count: int) -> None:
        """Updates every module from its gradients, which are then 0 again.

        Args:
            factor: what the schedule multiplies learning rates by.
            count: steps with this one, from 1.
        """
        rates = self._rates * factor
        for stack in self.stacks.values():
            self._update(stack, rates, self._decays, count)
            stack.gradients.zero_()

    @abstractmethod
    def _update(self, stack: Stack, rates: Tensor, decays: Tensor, count: int) -> None: ...

    def finite(self) -> Bool[Tensor, " probe"]:
        """Whether all weights of a module are finite."""
        sums = [
            stack.values.reshape(len(stack.values), -1).sum(1) for stack in self.stacks.values()
        ]  # NaN and infinity survive a sum
        return torch.stack(sums).isfinite().all(0)

    def state(self) -> dict[str, Tensor]:
        """The tensors that a resumed training needs, by name; not copies."""
        tensors = {}
        for name, stack in self.stacks.items():
            tensors[name] = stack.values
            tensors |= {f"{name}.{moment}": tensor for moment, tensor in stack.moments.items()}
        return tensors


class Lars(StackedOptimizer):
    """Momentum SGD in which the step of a matrix is in proportion to its norm, as MAE's linear probe uses it.

    Parameters of one dimension take plain momentum steps without weight decay.
    """

    moments = ("momentum",)

    def _update(self, stack: Stack, rates: Tensor, decays: Tensor, count: int) -> None:
        update = stack.gradients
        if stack.is_matrix:
            update = update + stack.values * stack.per_probe(decays)
            weights, updates = _norms(stack.values), _norms(update)
            trust = torch.where((weights > 0) & (updates > 0), TRUST * weights / updates, 1.0)
            update = update * stack.per_probe(trust)
        momentum = stack.moments["momentum"].mul_(MOMENTUM).add_(update)
        stack.values.sub_(momentum * stack.per_probe(rates))


class Sgd(StackedOptimizer):
    """SGD with momentum; weight decay is added to the gradient."""

    moments = ("momentum",)

    def _update(self, stack: Stack, rates: Tensor, decays: Tensor, count: int) -> None:
        update = stack.gradients + stack.values * stack.per_probe(decays)
        momentum = stack.moments["momentum"].mul_(MOMENTUM).add_(update)
        stack.values.sub_(momentum * stack.per_probe(rates))


class AdamW(StackedOptimizer):
    """Adam with decoupled weight decay; betas 0.9 and 0.95, as CAPI's probes use it."""

    moments = ("mean", "square")

    def _update(self, stack: Stack, rates: Tensor, decays: Tensor, count: int) -> None:
        (first, second), gradient = BETAS, stack.gradients
        mean = stack.moments["mean"].mul_(first).add_(gradient * (1 - first))
        square = stack.moments["square"].mul_(second).add_(gradient * gradient * (1 - second))
        scale = square.sqrt().div_(math.sqrt(1 - second**count)).add_(EPSILON)
        stack.values.mul_(stack.per_probe(1 - rates * decays))
        stack.values.sub_((mean / scale).mul_(stack.per_probe(rates / (1 - first**count))))


OPTIMIZERS: dict[str, type[StackedOptimizer]] = {"lars": Lars, "sgd": Sgd, "adamw": AdamW}


def _aligned(copies: int, like: Tensor) -> Tensor:
    """Zeros `(copies, *like.shape)`; each copy begins at a multiple of 64 bytes, as a tensor of its own would.

    Libraries for matrix products may round differently where their inputs lie otherwise.
    """
    unit = 64 // like.element_size()
    padded = -(-like.numel() // unit) * unit
    storage = torch.zeros(copies, padded, dtype=like.dtype, device=like.device)
    return storage[:, : like.numel()].unflatten(1, like.shape) if like.ndim else storage[:, 0]


def _norms(values: Tensor) -> Tensor:
    """The norm of each probe's values; one by one, so that the order of summing never depends on how many there are."""
    return torch.stack([torch.linalg.vector_norm(value) for value in values])
