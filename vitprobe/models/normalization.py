"""The mean and standard deviation of a model's images, where the user says them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from vitprobe.data.stated import StatedImages
from vitprobe.data.transforms import ImageTransform, check_normalisation
from vitprobe.errors import UserError
from vitprobe.models.entries import NORMALISATIONS

NONE = "none"  # pixels from 0 to 1


@dataclass(frozen=True)
class Normalization:
    """Mean and standard deviation by the user's word.

    Attributes:
        name: a key of `NORMALISATIONS`, "none", or "other".
        mean: subtracted from each channel of pixels in 0..1; one value stands for all channels.
        std: each channel is divided by it; as many values as `mean`.
    """

    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def apply(self, transform: ImageTransform, channels: int) -> ImageTransform:
        """Return a model's transform with these values, as if the model had stated them."""
        mean, std = (part * (channels if len(part) == 1 else 1) for part in (self.mean, self.std))
        stated = transform.stated or StatedImages("")
        stated = replace(stated, config=stated.config | {"mean": mean, "std": std})
        return replace(transform, mean=mean, std=std, stated=stated)


def find_normalization(given: Any) -> Normalization:
    """Return what a user means by a normalization.

    Args:
        given: "imagenet", "inception", "clip", "satellite", "cifar10", "none" (pixels from 0 to 1), or a pair
            `(mean, std)`, each a number in 0..1 or one for each channel.

    Raises:
        UserError: for another word, or what is no such pair.

    Example:
        >>> find_normalization("inception").mean
        (0.5, 0.5, 0.5)
        >>> find_normalization((0.5, 0.25)).std
        (0.25,)
    """
    if isinstance(given, Normalization):
        return given
    known = {name: (mean, std) for name, (mean, std) in NORMALISATIONS.items()} | {NONE: ((0.0,), (1.0,))}
    if isinstance(given, str):
        if given.casefold() not in known:
            raise UserError(f"unknown normalization {given!r}: use one of {', '.join(known)}, or a pair (mean, std)")
        return Normalization(given.casefold(), *known[given.casefold()])
    if not isinstance(given, tuple | list) or len(given) != 2:
        raise UserError(f"normalization is {given!r}: give one of {', '.join(known)}, or a pair (mean, std)")
    mean, std = (
        tuple(check_normalisation(name, part) or ()) for name, part in zip(("mean", "std"), given, strict=True)
    )
    if not mean or len({len(mean), len(std), 1}) > 2:
        raise UserError(f"normalization is {given!r}: give as many values for the mean as for the std")
    if max(*mean, *std) > 1:
        raise UserError(
            f"normalization is {given!r}, and it is of pixels from 0 to 1: divide it by 255, or give mean and std of "
            f"the values in the files with mean= and std= of analyze and verify"
        )
    length = max(len(mean), len(std))
    mean, std = (part * (length if len(part) == 1 else 1) for part in (mean, std))
    return Normalization(next((name for name, value in known.items() if value == (mean, std)), "other"), mean, std)
