"""What torchrun says to the processes that it starts, in their environment; read without importing torch."""

from __future__ import annotations

import os


def launched() -> bool:
    """Whether torchrun (or its like) started this process as one of several."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def rank() -> int:
    """Which of them it is, from 0."""
    return int(os.environ["RANK"]) if launched() else 0


def local_rank() -> int:
    """Which of those on this machine it is, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0")) if launched() else 0


def local_processes() -> int:
    """How many of them run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if launched() else 1
