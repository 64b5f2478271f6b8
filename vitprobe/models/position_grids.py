"""Of which grid a file's table of positions is: rows and columns, where its length alone leaves that open."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Grid = tuple[int, int]
_ASPECT = 8  # the longest grid that is thought of
_CLEARLY = 0.05  # by how much neighbours in one grid must be more alike than in another


@contextmanager
def source_grid(module: nn.Module, state: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """Says to timm's translation of `module` from which grid it resamples the file's positions; yields what to remark.

    A table of the length that the model's own grid has is taken as it is, unless neighbouring positions say that it is
    another grid's. One of another length is that of the images that the architecture was made for, or else square.
    """
    patches: Any = getattr(module, "patch_embed", None)
    wanted, edge = getattr(patches, "grid_size", None), getattr(patches, "patch_size", None)
    table, own = state.get("pos_embed"), getattr(module, "pos_embed", None)
    if table is None or table.ndim != 3 or wanted is None or edge is None or own is None:
        yield []
        return
    wanted, edge = tuple(wanted), tuple(edge)
    if "register_tokens" in state:
        prefix = 1  # DINOv2's, whose registers have no positions
    else:
        prefix = 0 if getattr(module, "no_embed_class", False) else getattr(module, "num_prefix_tokens", 1)
    grid, remarks = _choose(table[0, prefix:], wanted, _own_grid(module, edge))
    before = getattr(module, "pretrained_model_args", None)
    if grid is not None:
        module.pretrained_model_args = {"img_size": (grid[0] * edge[0], grid[1] * edge[1])}  # type: ignore[assignment]
    try:
        yield remarks
    finally:
        if before is not None:
            module.pretrained_model_args = before  # type: ignore[assignment]
        elif grid is not None:
            del module.pretrained_model_args


def _own_grid(module: nn.Module, edge: Grid) -> Grid | None:
    """The grid of the images that an architecture was made for."""
    config: Any = getattr(module, "pretrained_cfg", None) or {}
    size = config.get("input_size")
    return (size[-2] // edge[0], size[-1] // edge[1]) if size else None


def _choose(table: Tensor, wanted: Grid, own: Grid | None) -> tuple[Grid | None, list[str]]:
    """The grid of a table `(patch, channel)`, None where it fills no grid; and what to remark."""
    count, side = len(table), math.isqrt(len(table))
    here, own_here = math.prod(wanted) == count, own is not None and math.prod(own) == count
    usual = wanted if here else own if own_here else (side, side) if side * side == count else None
    seen = _seen(table, usual)
    if usual is None:
        return seen, [] if seen is None else [f"the {count} positions in the file were taken as those of {_say(seen)}"]
    if seen is not None and here:
        return seen, [
            f"the {count} positions in the file look like those of {_say(seen)}, and were resampled to {_say(wanted)}"
        ]
    grid = seen or usual
    if here or (own_here and seen is None):
        return grid, []
    return grid, [
        f"the {count} positions in the file were taken as those of {_say(grid)} and resampled to {_say(wanted)}"
    ]


def _say(grid: Grid) -> str:
    return f"a grid of {grid[0]}×{grid[1]}"


def _seen(table: Tensor, usual: Grid | None) -> Grid | None:
    """The grid in which positions one below the other are clearly more alike than in the usual one; None without."""
    if table.is_meta:
        return None
    count = len(table)
    centred = F.normalize(table.detach().float().cpu() - table.detach().float().cpu().mean(dim=0), dim=1)
    if not torch.isfinite(centred).all():
        return None

    def alike(width: int) -> float:
        return (centred[:-width] * centred[width:]).sum(dim=1).mean().item() if 0 < width < count else 0.0

    grids = [
        (count // width, width)
        for width in range(2, count // 2 + 1)
        if count % width == 0 and max(width, count // width) <= _ASPECT * min(width, count // width)
    ]
    best = max(grids, key=lambda grid: alike(grid[1]), default=None)
    if best is None or best == usual:
        return None
    rest = alike(usual[1]) if usual else max((alike(grid[1]) for grid in grids if grid != best), default=0.0)
    noise = 4 / math.sqrt(table.shape[1] * (count - best[1]))
    return best if alike(best[1]) - rest > max(_CLEARLY, noise) else None
