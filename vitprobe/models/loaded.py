"""`LoadedModel`: a model ready to be probed, and what every way of loading ends with."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from vitprobe.data.transforms import ImageTransform, model_transform
from vitprobe.errors import UserError
from vitprobe.layout import TokenLayout
from vitprobe.models.anatomy.find import find_anatomy
from vitprobe.models.anatomy.measured import noise_for
from vitprobe.models.anatomy.normalizing import find_normalizer
from vitprobe.models.anatomy.order import measure_order
from vitprobe.models.anatomy.parts import Anatomy
from vitprobe.models.building import ImageSize
from vitprobe.models.entries import ModelSpec
from vitprobe.models.identity import plain_parts
from vitprobe.models.normalization import Normalization
from vitprobe.models.remembered import remember


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
        normalization: mean and standard deviation of its images by the user's word; None for what the model states.
    """

    module: nn.Module
    layout: TokenLayout
    transform: ImageTransform
    spec: ModelSpec
    anatomy: Anatomy
    remarks: tuple[str, ...] = ()
    normalization: Normalization | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward pass."""
        return self.module(*args, **kwargs)


def finish(module: nn.Module, spec: ModelSpec, img_size: ImageSize, anatomy: Anatomy | None = None) -> LoadedModel:
    """Return a module with what belongs to it.

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
    anatomy = replace(anatomy, normalizer=find_normalizer(anatomy))
    if spec.source != "module":
        remember(anatomy.tower, spec)
    transform = _transform(anatomy, "model", img_size or anatomy.image_size)
    anatomy = _measured(anatomy, transform.size)
    layout = anatomy.layout(transform.size)
    return LoadedModel(module, layout, transform, spec, anatomy, _remarks(anatomy, layout, transform))


def _remarks(anatomy: Anatomy, layout: TokenLayout, transform: ImageTransform) -> tuple[str, ...]:
    order = (f"its tokens stand in an order of their own: {layout}",) if layout.positions else ()
    return (*anatomy.remarks, *order, *transform.remarks)


def remarks_on_weights(model: LoadedModel) -> tuple[str, ...]:
    """Return the remarks on where a model's weights come from, which hold for any image size and layout."""
    others = _remarks(model.anatomy, model.layout, model.transform)
    return tuple(line for line in model.remarks if line not in others)


def with_transform(
    model: LoadedModel,
    mode: str,
    img_size: ImageSize,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> LoadedModel:
    """Return the model with another transform, and with the remarks that belong to it.

    Args:
        model: the model.
        mode: "model" or "paper" (see `model_transform`).
        img_size: pixels of its images, a side or (height, width).
        mean: of each channel, where the user gives it.
        std: the same.
    """
    transform = _transform(model.anatomy, mode, img_size, mean, std, model.normalization)
    bare = replace(without_transform(model), layout=model.anatomy.layout(transform.size), transform=transform)
    return with_remarks(bare, transform.remarks)


def without_transform(model: LoadedModel) -> LoadedModel:
    """Return the model without remarks on its transform, which images that come as tensors do not pass."""
    return replace(model, remarks=tuple(line for line in model.remarks if line not in model.transform.remarks))


def _transform(
    anatomy: Anatomy,
    mode: str,
    img_size: ImageSize,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    normalization: Normalization | None = None,
) -> ImageTransform:
    transform = model_transform(anatomy.lineage or anatomy.module, mode, img_size, anatomy.normalizer)
    if normalization is not None and mode == "model":
        transform = normalization.apply(transform, anatomy.channels)
    return transform.for_channels(anatomy.channels, mean, std)


def _measured(anatomy: Anatomy, size: tuple[int, int]) -> Anatomy:
    """The anatomy with the order of tokens that the model is seen to have on images of `size`."""
    if anatomy.measured:
        return anatomy
    with ExitStack() as stack:
        anatomy.prepare(stack)
        return measure_order(anatomy, noise_for(anatomy.module, anatomy.channels, size))


def with_remarks(model: LoadedModel, remarks: Iterable[str]) -> LoadedModel:
    """Return the model with more remarks, after those that it has."""
    return replace(model, remarks=(*model.remarks, *remarks))


def _require_finite(module: nn.Module, name: str) -> None:
    """Raises a UserError for weights that are NaN or infinite, or are not there at all (meta device, lazy modules).

    Weights are parameters and the statistics that batch norms keep; other buffers may hold -inf, as masks do.
    """
    parameters = dict(module.named_parameters())
    for key, tensor in (parameters | dict(module.named_buffers())).items():
        if tensor.is_meta:
            raise UserError(f"{name} has no weights: {key} is on the meta device")
        if nn.parameter.is_lazy(tensor):
            raise UserError(f"{name} has no weights: {key} gets its shape from the first images; run the model once")
        if key not in parameters and not key.endswith(("running_mean", "running_var")):
            continue
        for part in plain_parts(tensor):
            if torch.isfinite(part).all():
                continue
            block = re.search(r"blocks\.(\d+)\.", key)
            where = f" (block {block.group(1)})" if block else ""
            kind = "NaN" if torch.isnan(part).any() else "infinity"
            raise UserError(f"the weights of {name} hold {kind}, first in {key}{where}: its attention means nothing")


def random_spec(spec: ModelSpec) -> ModelSpec:
    """Return the spec of the same architecture with random weights."""
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
