"""What a training run is made of: one frozen dataclass, written out in full by each file of `zoo/recipes/`."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any

from vitprobe.models.entries import BUNDLED_ARCHITECTURES


@dataclass(frozen=True)
class Recipe:
    """All that decides a run's weights, beside the library versions and the device."""

    name: str
    method: str  # "mae" or "supervised"
    epochs: int
    batch_size: int = 128
    learning_rate: float = 6e-4
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    warmup_epochs: float = 1.0
    gradient_clip: float = 1.0
    crop_scale: tuple[float, float] = (0.4, 1.0)  # area share of RandomResizedCrop
    seed: int = 0
    # Arguments of timm's VisionTransformer: by default those that the package builds the bundled models with.
    architecture: dict[str, Any] = field(default_factory=lambda: dict(BUNDLED_ARCHITECTURES["vit_nano_patch4_32"]))
    # Masked autoencoder only.
    mask_ratio: float = 0.75
    decoder_dim: int = 96
    decoder_depth: int = 2
    decoder_heads: int = 3
    # Supervised only.
    num_classes: int = 10
    label_smoothing: float = 0.1
    drop_path: float = 0.0


def load_recipe(name: str) -> Recipe:
    """The recipe called `name`: `RECIPE` of `zoo/recipes/<name>.py`."""
    return importlib.import_module(f"zoo.recipes.{name}").RECIPE
