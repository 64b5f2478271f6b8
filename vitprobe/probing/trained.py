"""Whether a probe is trained to its end: against its anchor, or by the loss on held-out images over the training.

Where an aggregator has weights there is no convex problem to compare with. Then the loss on held-out images is looked
at half way and at the end, and what it fell by between is compared with all that it fell by since the start. The
learning rate rises for a tenth of the steps and falls as half a cosine, so the second half of the steps has 22 % of the
sum of all learning rates: a loss that still falls as fast as it fell on average makes 22 % of its way there. More than
10 %, about half of that, is called steep.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

BELOW = 0.01  # share of the test images by which a trained probe may be below its anchor
STEEP = 0.1  # share of a loss's whole fall that may fall in the second half of the steps
CERTAIN = 2.0  # standard errors by which it must be more than that


def fall(
    halfway: Float[np.ndarray, "seed image"], end: Float[np.ndarray, "seed image"], start: float
) -> tuple[float, bool]:
    """What share of a loss's fall came in the second half of a training, and whether that is still steep.

    It is steep where it is more than `STEEP`, and not by the chance of which images are held out.

    Args:
        halfway: the loss of each seed's probe on each held-out image after half of the steps.
        end: the same at the end.
        start: the loss before training, of a classifier that cannot tell.
    """
    before, after = halfway.mean(axis=0), end.mean(axis=0)
    beyond = (before - after) - STEEP * (start - after)  # paired by image; its mean is above 0 where the share is more
    error = beyond.std(ddof=1) / np.sqrt(len(beyond)) if len(beyond) > 1 else np.inf
    fallen = before.mean() - after.mean()
    share = float(fallen / (abs(fallen) + max(0.0, start - before.mean()))) if fallen else 0.0
    return share, bool(fallen > 0 and beyond.mean() > CERTAIN * error)


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
    if below is not None and anchor is not None:
        lines.append(
            f"{name} is {below:.1f} points below logistic regression on the same vectors ({100 * anchor:.2f} %): its "
            f"probes are not trained to their end, and gains over it are partly a difference in speed"
        )
    if _still_falls(chosen):
        lines.append(
            f"{name} is not converged: {chosen['loss_fall']:.0%} of the fall of its loss on held-out images came in "
            f"the second half of the training; more steps would give it more"
        )
    return lines


def _still_falls(chosen: Mapping[str, Any]) -> bool:
    return "loss_fall" in chosen and not chosen["converged"]  # logistic regression says "converged" of its solver
