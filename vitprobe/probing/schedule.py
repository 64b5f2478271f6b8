"""The learning rate over the steps of a training: a linear warm-up, then half a cosine to 0."""

from __future__ import annotations

import math


def rate_factor(step: int, *, steps: int, warmup_steps: int) -> float:
    """What the learning rate is multiplied by at a step, 0..1.

    It rises linearly from 0 at step 0 to 1 at step `warmup_steps`, then falls as half a cosine to 0 at step `steps`.

    Args:
        step: the step, from 0 to `steps` - 1.
        steps: steps of the whole training.
        warmup_steps: steps of the warm-up; 0 for none.
    """
    if step < warmup_steps:
        return step / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (steps - warmup_steps)))
