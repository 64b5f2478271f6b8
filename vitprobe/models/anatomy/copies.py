"""Copies of a model that run recorded operations instead of its blocks: traced, scripted, exported, graphs of fx."""

from __future__ import annotations

import torch
from torch import nn


def why_copy(model: object) -> str | None:
    """One line that says what kind of copy of a model this is and what to give instead; None for any other object."""
    made = _made_by(model)
    if made is None:
        return None
    return (
        f"{type(model).__name__} is a copy of a model made by {made}: it runs recorded operations, not the model's "
        f"blocks, so their attention cannot be seen; give the nn.Module that the copy was made from"
    )


def _made_by(model: object) -> str | None:
    if isinstance(model, torch.jit.ScriptModule):
        return "torch.jit (trace or script)"
    homes = {kind.__module__ for kind in type(model).__mro__}
    if any(home.startswith("torch.export.") for home in homes):
        return "torch.export"
    if isinstance(model, nn.Module) and any(home.startswith("torch.fx.graph_module") for home in homes):
        return "torch.fx or torch.export"
    return None
