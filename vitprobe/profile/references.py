"""Shipped profiles to compare with: same architecture and token count only.

`references.json` is written by `python -m zoo.references`: the bundled models and one with random weights, on the
sample photographs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np

from vitprobe.statistics import comparable

# The curves that two profiles are compared by: the paper's three, each from 0 to 1, so that none outweighs the others.
COMPARED = tuple(statistic.name for statistic in comparable())


@dataclass(frozen=True)
class Reference:
    """A shipped profile: means over heads and images, a list over blocks for each statistic."""

    name: str
    paradigm: str
    architecture: str
    num_tokens: int
    weights_sha256: str
    curves: dict[str, list[float]]


def load_references() -> list[Reference]:
    """All shipped references; empty where the package carries none."""
    file = resources.files("vitprobe.profile") / "references.json"
    return [Reference(**entry) for entry in json.loads(file.read_text(encoding="utf-8"))] if file.is_file() else []


def matching_references(manifest: dict[str, Any], num_tokens: int) -> list[Reference]:
    """The references of the same architecture and token count as the run of `manifest`."""
    signature = manifest["model"]["signature"]
    return [r for r in load_references() if r.architecture == signature and r.num_tokens == num_tokens]


def distance(one: dict[str, list[float]], other: dict[str, list[float]]) -> float:
    """Mean absolute difference over blocks and the curves that both have, 0 to 1."""
    shared = [name for name in COMPARED if name in one and name in other]
    return float(np.mean([np.abs(np.subtract(one[name], other[name])).mean() for name in shared]))
