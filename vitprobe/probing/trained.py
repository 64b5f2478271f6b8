"""Whether a probe is trained to its end: against its anchor, or by the loss on held-out images over the training.

Where an aggregator has weights there is no convex problem to compare with. Then the loss on held-out images is looked
at half way and at the end. The learning rate falls as half a cosine, so the second half has 18 % of the sum of all
learning rates: what a probe still gains in it beyond what the settling of the noise gives, it would gain again from a
longer training. docs/verification.md says where the bound comes from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

BELOW = 0.01  # share of the test images by which a trained probe may be below its anchor
STEEP = 0.05  # share of the loss half way by which it may fall until the end
CERTAIN = 2.0  # standard errors by which a fall must be more than that


def fall(halfway: Float[np.ndarray, "seed image"], end: Float[np.ndarray, "seed image"]) -> tuple[float, bool]:
    """By what share of itself a loss fell over the second half of a training, and whether that is still steep.

    It is steep where it fell by more than `STEEP`, and not by the chance of which images are held out.

    Args:
        halfway: the loss of each seed's probe on each held-out image after half of the steps.
        end: the same at the end.
    """
    before, after = halfway.mean(axis=0), end.mean(axis=0)
    beyond = (1 - STEEP) * before - after  # paired by image; its mean is above 0 where the fall is above the bound
    error = beyond.std(ddof=1) / np.sqrt(len(beyond)) if len(beyond) > 1 else np.inf
    return float(1 - after.mean() / before.mean()), bool(beyond.mean() > CERTAIN * error)


def points_below(accuracy: float, anchor: float | None) -> float | None:
    """By how many points a trained probe is below its anchor, where that is more than `BELOW`; both are shares."""
    return 100 * (anchor - accuracy) if anchor is not None and anchor - accuracy > BELOW else None


def in_words(accuracy: float, anchor: float | None, chosen: Mapping[str, Any]) -> str:
    """For a table: in what a probe is not trained to its end; empty where it is."""
    below = points_below(accuracy, anchor)
    if below is not None:
        return f"{below:.1f} below anchor"
    return "not converged" if _still_falls(chosen) else ""


def shortfalls(name: str, accuracy: float, anchor: float | None, chosen: Mapping[str, Any]) -> list[str]:
    """The same as lines for a reader.

    Args:
        name: of the result.
        accuracy: of the trained probes, their mean over seeds.
        anchor: of logistic regression on the same vectors; None where the aggregator has weights.
        chosen: the result's hyperparameters, with what `fall` found where the aggregator has weights.
    """
    lines = []
    below = points_below(accuracy, anchor)
    if below is not None:
        assert anchor is not None
        lines.append(
            f"{name} is {below:.1f} points below logistic regression on the same vectors ({100 * anchor:.2f} %): its "
            f"probes are not trained to their end, and gains over it are partly a difference in speed"
        )
    if _still_falls(chosen):
        lines.append(
            f"{name} is not converged: its loss on held-out images fell by {chosen['loss_fall']:.1%} over the second "
            f"half of the training; more steps would give it more"
        )
    return lines


def _still_falls(chosen: Mapping[str, Any]) -> bool:
    return "loss_fall" in chosen and not chosen["converged"]  # logistic regression says "converged" of its solver
