"""Pooled features as classifiers take them: finite, or a line that names the images."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from vitprobe.errors import UserError

_NAMED = 5


def check_features(features: Float[Tensor, "image dim"], which: str) -> None:
    """Refuse features that are not finite.

    Args:
        features: one row an image.
        which: what the images are, for the message.

    Raises:
        UserError: naming the first images that have NaN or infinity in their features.
    """
    bad = (~features.isfinite().all(dim=1)).nonzero().flatten().tolist()
    if bad:
        named = ", ".join(str(index) for index in bad[:_NAMED]) + (", …" if len(bad) > _NAMED else "")
        raise UserError(
            f"features of {len(bad)} of {len(features)} {which} images are not finite (numbers {named}): "
            f"look at these images, or compute in float32"
        )
