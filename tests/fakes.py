"""Profiles made of chosen numbers, for tests of what is said and drawn of them."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np

from vitprobe.layout import TokenLayout
from vitprobe.profile.profile import KIND, Profile
from vitprobe.profile.values import Shard, ShardValues
from vitprobe.runs.folder import RunFolder
from vitprobe.statistics import STATISTICS


def make_profile(
    curves: dict[str, list[float] | np.ndarray],
    *,
    name: str = "toy",
    paradigm: str = "MIM",
    layout: TokenLayout | None = None,
    heads: int = 2,
    images: int = 40,
    spread: float = 0.01,
    groups: int | None = None,
    signature: str = "Toy depth 3",
    weights: str = "0" * 64,
    undefined: dict[str, str] | None = None,
    values: dict[str, np.ndarray] | None = None,
) -> Profile:
    """A profile whose means over heads and images are exactly `curves` (one number a block).

    With `values`, `(images, blocks, heads)` by statistic, these are its values.
    """
    layout = layout or TokenLayout(grid=(8, 8), has_cls=True, patch_size=(4, 4))
    rng, arrays = np.random.default_rng(0), {}
    for statistic, curve in curves.items():
        count = heads if STATISTICS[statistic].per_head else 1
        noise = rng.normal(0, spread, (images, len(curve), count))
        noise -= noise.mean(axis=(0, 2), keepdims=True)
        arrays[statistic] = (np.asarray(curve)[None, :, None] + noise).astype(np.float32)
    if values is not None:
        arrays |= values
    names = [f"{i:03d}.png" for i in range(images)]
    group_names = names if groups is None else [f"g{i * groups // images}" for i in range(images)]
    manifest = {
        "format_version": 2,
        "command": "analyze",
        "status": "complete",
        "arguments": {},
        "model": {
            "name": name,
            "paradigm": paradigm,
            "num_blocks": len(next(iter(curves.values()))),
            "signature": signature,
            "weights_sha256": weights,
        },
        "layout": asdict(layout),
        "undefined": undefined or {},
        "data": {"skipped": [], "source": "numbers made up for a test"},
    }
    folder = RunFolder.of(None, KIND)
    shards = ShardValues(folder.path, folder.keeper)
    shards.add(Shard(names, group_names, arrays))
    return Profile(manifest, shards)
