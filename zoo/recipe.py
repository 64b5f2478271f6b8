"""What a training run is made of: one frozen dataclass, written out in full by each file of `zoo/recipes/`."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field, replace
from typing import Any

from vitprobe.models.entries import BUNDLED_ARCHITECTURES


def bundled_architecture(name: str = "vit_nano_patch4_32") -> dict[str, Any]:
    """Arguments of timm's VisionTransformer, as the package builds the bundled models with."""
    return dict(BUNDLED_ARCHITECTURES[name])


@dataclass(frozen=True)
class Recipe:
    """All that decides a run's weights, beside the library versions and the device."""

    name: str
    method: str  # a key of `zoo.objectives.OBJECTIVES`
    epochs: int
    batch_size: int = 128
    learning_rate: float = 6e-4
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    warmup_epochs: float = 1.0
    gradient_clip: float = 1.0
    layer_decay: float = 1.0  # learning rate of a block over that of the block after it
    crop_scale: tuple[float, float] = (0.4, 1.0)  # area share of RandomResizedCrop
    seed: int = 0
    start: str = ""  # the bundled model whose weights the ViT begins with; "" for random ones
    architecture: dict[str, Any] = field(default_factory=bundled_architecture)
    # Masked image modelling, and I-JEPA's predictor.
    initial: str = "timm"  # MAE's ViT: timm's narrow normal weights, or "xavier" as in the paper's code
    mask_ratio: float = 0.75
    mask_square: int = 1  # side, in patches, of what is hidden together
    decoder_dim: int = 96
    decoder_depth: int = 2
    decoder_heads: int = 3
    # Labels.
    num_classes: int = 10
    label_smoothing: float = 0.1
    drop_path: float = 0.0
    # Two views, and a network that follows.
    momentum: float = 0.99  # of the following network at the first step; 1 at the last
    head_hidden: int = 512
    head_dim: int = 128
    temperature: float = 0.2  # MoCo v3's
    prototypes: int = 2048  # DINO's and iBOT's
    teacher_temperature: float = 0.04


def load_recipe(name: str, seed: int | None = None) -> Recipe:
    """The recipe called `name`, `RECIPE` of `zoo/recipes/<name>.py`; with another seed it is `<name>_seed<seed>`."""
    recipe = importlib.import_module(f"zoo.recipes.{name}").RECIPE
    return recipe if seed in (None, recipe.seed) else replace(recipe, name=f"{name}_seed{seed}", seed=seed)
