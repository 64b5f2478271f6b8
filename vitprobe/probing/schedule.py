"""The learning rate over the steps of a training: a linear warm-up, then half a cosine to 0."""

from __future__ import annotations

import math


def rate_factor(step: float | int, *, steps: float | int, warmup_steps: float | int) -> float:
    """Return what the learning rate is multiplied by at a step, 0..1.

    It rises linearly from 0 at step 0 to 1 at step `warmup_steps`, then falls as half a cosine to 0 at step `steps`.

    Args:
        step: steps so far, or any other measure of time, such as epochs and their fractions; 0 to `steps`.
        steps: the whole training, in the same unit.
        warmup_steps: the warm-up, in the same unit; 0 for none.
    """
    if step < warmup_steps:
        return step / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (steps - warmup_steps)))
