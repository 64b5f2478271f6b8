"""What is minimised: one module a method, found by the name that a recipe gives it."""

from __future__ import annotations

import importlib

from zoo.objectives.base import Objective
from zoo.recipe import Recipe

# Imported when asked for: some need lightly (the extra `zoo`), and evaluating or shipping one needs its own only.
OBJECTIVES = {
    "mae": "MaskedAutoencoder",
    "supervised": "Supervised",
    "mocov3": "MoCoV3",
    "dino": "DINO",
    "ibot": "IBOT",
    "simmim": "SimMIM",
    "ijepa": "IJEPA",
}


def build_objective(recipe: Recipe) -> Objective:
    """The untrained objective of a recipe, its weights drawn from torch's global seed."""
    module = importlib.import_module(f"zoo.objectives.{recipe.method}")
    return getattr(module, OBJECTIVES[recipe.method])(recipe)
