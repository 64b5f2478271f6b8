"""`LoadedModel`: a model ready to be probed, and what every way of loading ends with."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vitprobe.data.transforms import ImageTransform, model_transform
from vitprobe.errors import UserError
from vitprobe.models.anatomy.find import find_anatomy
from vitprobe.models.anatomy.parts import Anatomy
from vitprobe.models.building import ImageSize
from vitprobe.models.entries import ModelSpec
from vitprobe.models.tokens import TokenLayout


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model ready to be probed.

    Attributes:
        module: the model; float32 and in eval mode where it was built here.
        layout: its tokens for the images that `transform` makes.
        transform: from a picture to the tensor it expects.
        spec: what is known of it.
        anatomy: where it keeps its blocks and takes its images.
        remarks: lines that a user must read about how the model was taken: a default that was assumed, which of
            several sets of weights was loaded. A run prints them first and keeps them in its manifest.
    """

    module: nn.Module
    layout: TokenLayout
    transform: ImageTransform
    spec: ModelSpec
    anatomy: Anatomy
    remarks: tuple[str, ...] = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward pass."""
        return self.module(*args, **kwargs)


def finish(module: nn.Module, spec: ModelSpec, img_size: ImageSize, anatomy: Anatomy | None = None) -> LoadedModel:
    """A module with what belongs to it.

    Args:
        module: the model.
        spec: what is known of it.
        img_size: pixels of its images, a side or (height, width); what it was built for by default.
        anatomy: where it keeps its parts, if that has been found already.

    Raises:
        UserError: for weights that are NaN or infinite, or not there.
        AttentionNotSeenError: for a model whose attention cannot be captured.
    """
    _require_finite(module, spec.name)
    anatomy = anatomy or find_anatomy(module)
    transform = model_transform(module, img_size=img_size or anatomy.image_size).for_channels(anatomy.channels)
    return LoadedModel(module, anatomy.layout(transform.size), transform, spec, anatomy)


def _require_finite(module: nn.Module, name: str) -> None:
    """Raises a UserError for weights that are NaN or infinite, or are not there at all (on the meta device)."""
    for key, tensor in module.state_dict().items():
        if not isinstance(tensor, Tensor):
            continue
        if tensor.is_meta:
            raise UserError(f"{name} has no weights: {key} is on the meta device")
        if not torch.isfinite(tensor).all():
            block = re.search(r"blocks\.(\d+)\.", key)
            where = f" (block {block.group(1)})" if block else ""
            kind = "NaN" if torch.isnan(tensor).any() else "infinity"
            raise UserError(f"the weights of {name} hold {kind}, first in {key}{where}: its attention means nothing")


def random_spec(spec: ModelSpec) -> ModelSpec:
    """The spec of the same architecture with random weights."""
    return replace(
        spec,
        name=f"{spec.name}-random",
        method="random",
        paradigm="random",
        source="random",
        licence="",
        citation="",
        notes="random weights",
    )


def weights_sha256(module: nn.Module) -> str:
    """The SHA-256 of a model's weights: names in order, kind of number, shape and bytes; the same on every device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if isinstance(tensor, Tensor):
            header = json.dumps([name, str(tensor.dtype), list(tensor.shape)])
            digest.update(f"{len(header)}:{header}".encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
