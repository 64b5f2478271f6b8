"""Build the architecture of an official checkpoint: timm's parts where they fit, our own where they do not."""

from __future__ import annotations

from typing import Any

from torch import nn

from vitprobe.models.configs import describe_images
from vitprobe.models.official.entries import OfficialCheckpoint
from vitprobe.models.official.layouts import LAYOUTS


def create_official(
    entry: OfficialCheckpoint, img_size: tuple[int, int] | None = None, *, num_classes: int = 0, **options: Any
) -> nn.Module:
    """Build the architecture of an official checkpoint, with random weights.

    Args:
        entry: the checkpoint.
        img_size: height and width of its images, in pixels; the architecture's own by default.
        num_classes: of its classifier; 0 for none.
        options: arguments of the constructor that replace the entry's.
    """
    arguments = entry.arguments | options
    if img_size is not None:
        arguments["img_size"] = img_size
    layout = LAYOUTS[entry.layout]
    if layout.has_classifier:
        arguments["num_classes"] = num_classes
    module = layout.build(**arguments)
    describe_images(module, entry.spec.name, entry.spec.normalisation, crop_pct=entry.crop_pct, num_classes=num_classes)
    return module
