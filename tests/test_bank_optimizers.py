"""LARS against a plain numpy restatement of MAE's; the schedule; the stacks that probes' parameters are views of."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from vitprobe.probing.optimizers import OPTIMIZERS, Lars
from vitprobe.probing.schedule import rate_factor


class Plain:
    """LARS of one parameter: trust 0.001, momentum 0.9, no dampening; one dimension or none: plain momentum."""

    def __init__(self, value: np.ndarray, rate: float, decay: float) -> None:
        self.value, self.rate, self.decay = value.copy(), rate, decay
        self.buffer = np.zeros_like(value)

    def step(self, gradient: np.ndarray, factor: float) -> None:
        if self.value.ndim > 1:
            gradient = gradient + self.decay * self.value
            of_value, of_gradient = np.sqrt((self.value**2).sum()), np.sqrt((gradient**2).sum())
            if of_value > 0 and of_gradient > 0:
                gradient = gradient * (0.001 * of_value / of_gradient)
        self.buffer = 0.9 * self.buffer + gradient
        self.value = self.value - self.rate * factor * self.buffer


class Several(nn.Module):
    """Parameters of every kind: a matrix, a vector, a number, three dimensions, all zeros; and one that is fixed."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(3, 5, dtype=torch.float64))
        self.vector = nn.Parameter(torch.randn(7, dtype=torch.float64))
        self.number = nn.Parameter(torch.randn((), dtype=torch.float64))
        self.cube = nn.Parameter(torch.randn(2, 3, 4, dtype=torch.float64))
        self.zeros = nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))
        self.fixed = nn.Parameter(torch.ones(2, dtype=torch.float64), requires_grad=False)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lars_is_maes(decay: float) -> None:
    rates = (0.1, 6.4, 30.0)
    copies = [Several() for _ in rates]
    plain = {
        (index, name): Plain(parameter.detach().numpy(), rate, decay)
        for index, (copy, rate) in enumerate(zip(copies, rates, strict=True))
        for name, parameter in copy.named_parameters()
        if parameter.requires_grad
    }
    optimizer = Lars(copies, rates, [decay] * 3)
    random = np.random.default_rng(0)
    for count in range(1, 6):
        for (index, name), own in plain.items():
            gradient = random.normal(size=own.value.shape)
            if count == 2 and name == "matrix":
                gradient = np.zeros_like(gradient)
            copies[index].get_parameter(name).grad.add_(torch.as_tensor(gradient))
            own.step(gradient, 0.7**count)
        optimizer.step(0.7**count, count)
    for (index, name), own in plain.items():
        got = copies[index].get_parameter(name).detach().numpy()
        np.testing.assert_allclose(got, own.value, rtol=1e-12, atol=1e-14, err_msg=name)
    assert all(copy.fixed.grad is None and (copy.fixed == 1).all() for copy in copies)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_step_uses_up_its_gradients(kind: str) -> None:
    copies = [Several(), Several()]
    optimizer = OPTIMIZERS[kind](copies, [0.1, 0.2], [0.0, 0.1])
    copies[0].matrix.grad += 1
    before = copies[0].matrix.detach().clone()
    optimizer.step(1.0, 1)
    assert not torch.equal(copies[0].matrix, before)
    assert not any(
        parameter.grad.any() for copy in copies for parameter in copy.parameters() if parameter.requires_grad
    )


def test_finite_is_said_of_each_copy() -> None:
    copies = [Several() for _ in range(4)]
    optimizer = Lars(copies, [0.1] * 4, [0.0] * 4)
    with torch.no_grad():
        copies[1].matrix[0, 0] = torch.nan
        copies[2].vector[3] = torch.inf
    assert optimizer.finite().tolist() == [True, False, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parameters_lie_as_tensors_of_their_own_would(dtype: torch.dtype) -> None:
    copies = [nn.Linear(5, 3).to(dtype) for _ in range(3)]
    values = [[parameter.detach().clone() for parameter in copy.parameters()] for copy in copies]
    Lars(copies, [0.1] * 3, [0.0] * 3)
    for copy, expected in zip(copies, values, strict=True):
        for parameter, value in zip(copy.parameters(), expected, strict=True):
            assert torch.equal(parameter, value)
            assert parameter.data_ptr() % 64 == 0 and parameter.is_contiguous()


def test_the_schedule_rises_straight_and_falls_as_half_a_cosine() -> None:
    factors = [rate_factor(step, steps=20, warmup_steps=4) for step in range(21)]
    assert factors[:5] == [0, 0.25, 0.5, 0.75, 1]
    assert factors[12] == pytest.approx(0.5) and factors[20] == pytest.approx(0)
    assert factors[8] == pytest.approx(0.5 * (1 + 0.5**0.5))
    assert all(a > b for a, b in pairwise(factors[4:]))


def test_without_a_warm_up_the_first_step_is_the_largest() -> None:
    assert rate_factor(0, steps=3, warmup_steps=0) == 1
