"""What a model says of the images that it was trained on, whichever of its parts says it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

# Keys of timm's config, and what a reader calls them.
_NAMES = {"mean": "mean", "std": "standard deviation", "interpolation": "interpolation", "crop_pct": "crop"}
# How open_clip names its ways to resize → how timm does.
_MODES = {"shortest": "center", "longest": "border", "squash": "squash"}


@dataclass(frozen=True)
class StatedImages:
    """What is known of a model's images.

    Attributes:
        model: the class of the model.
        config: what is known, in timm's words: `mean`, `std`, `interpolation`, `crop_pct`, `crop_mode`, `input_size`.
        normalizer: the module of the model that normalises its images itself; "" without one.
    """

    model: str
    config: dict[str, Any] = field(default_factory=dict)
    normalizer: str = ""

    def remark(self, taken: dict[str, Any], known: Collection[str] = ()) -> str:
        """One line that says which of the `taken` values are defaults; "" where the model, or a user, states them all.

        Args:
            taken: the value of each of the keys of timm's config.
            known: keys of which something else is known.
        """
        if self.normalizer and "mean" not in known:
            return (
                f"{self.model} normalizes its images itself ({self.normalizer}), so it is given pixels from 0 to 1, "
                f"without a mean and standard deviation"
            )
        missing = [key for key in _NAMES if not (self.config.get(key) or key in known)]
        if not missing:
            return ""
        imagenets = " (ImageNet's)"
        values = {
            "mean": f"mean {_shown(taken['mean'])}{imagenets}",
            "std": f"standard deviation {_shown(taken['std'])}{imagenets}",
            "interpolation": f"{taken['interpolation']} interpolation",
            "crop_pct": f"a crop of {taken['crop_pct']:g}",
        }
        return (
            f"{self.model} does not say the {_listed([_NAMES[key] for key in missing])} of its images; assumed: "
            f"{', '.join(values[key] for key in missing)}; if that is wrong, set model.pretrained_cfg = "
            f"dict(mean=(…), std=(…), interpolation=…, crop_pct=…) before loading"
        )


def state_images(parts: Sequence[nn.Module], normalizer: str = "") -> StatedImages:
    """What is known of a model's images.

    Args:
        parts: the part that holds the model's blocks, then what holds that part, up to the model. The first to state a
            value is believed; open_clip's own word, which is of the very weights, comes before the config of the timm
            model inside.
        normalizer: the class of a module by which the model normalises its images itself.
    """
    config: dict[str, Any] = {}
    for said in (_timms, _open_clips):
        for part in reversed(parts):
            config |= {key: value for key, value in said(part).items() if value is not None}
    if normalizer:
        channels = len(config.get("mean") or (0,) * 3)
        config |= {"mean": (0.0,) * channels, "std": (1.0,) * channels}
    return StatedImages(type(parts[-1]).__name__, config, normalizer)


def _timms(part: nn.Module) -> dict[str, Any]:
    """timm's config of a part; nothing where there is none."""
    config: Any = getattr(part, "pretrained_cfg", None)
    return config if isinstance(config, dict) else {}


def _open_clips(part: nn.Module) -> dict[str, Any]:
    """What open_clip says of the images of its model, in timm's words; nothing for any other."""
    said: Any = getattr(part, "preprocess_cfg", None)
    if isinstance(said, dict) and {"mean", "std"} <= said.keys():
        return {
            "mean": said["mean"],
            "std": said["std"],
            "interpolation": said.get("interpolation", "bicubic"),
            "crop_mode": _MODES.get(said.get("resize_mode", "shortest"), "center"),
            "crop_pct": 1.0,
        }
    mean, std = (getattr(part, name, None) for name in ("image_mean", "image_std"))
    if _is_numbers(mean) and _is_numbers(std):
        return {"mean": mean, "std": std}
    return {}


def _is_numbers(values: Any) -> bool:
    return isinstance(values, tuple | list) and len(values) > 0


def _shown(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"


def _listed(words: Sequence[str]) -> str:
    return " and ".join((", ".join(words[:-1]), words[-1])) if len(words) > 1 else words[0]
