"""The slice of the training images on which all that is selected is selected: the test images select nothing."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Int

SHARE = 0.1  # as CAPI's


def held_out(labels: Int[np.ndarray, " image"], share: float = SHARE, seed: int = 0) -> Bool[np.ndarray, " image"]:
    """Which training images are held out: this share of every class, drawn by `seed`.

    Of a class at least one image is held out and at least one is left; of one with a single image none is held out.
    """
    rng = np.random.default_rng(seed)
    chosen = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = min(max(1, round(share * len(members))), len(members) - 1)
        chosen[rng.permutation(members)[:count]] = True
    return chosen
