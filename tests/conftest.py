"""What every test needs: one thread a worker, the same random numbers each time, no drawing on a screen."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from hypothesis import settings

os.environ.setdefault("MPLBACKEND", "Agg")
torch.set_num_threads(1)  # the workers of pytest-xdist share the cores
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anybody imports triton: our kernel runs in Python

# The same examples each time, and no time limit for each: the machine may be busy.
settings.register_profile("vitprobe", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("vitprobe")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture
def drawn() -> None:
    """For a test that reads the figures which a command writes, in a file where `undrawn` serves the others."""


@pytest.fixture
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are composed and their files written, but nothing is rendered into them, which takes seconds."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr("vitprobe.figures.saving._render", lambda figure, kind: kind.encode())
