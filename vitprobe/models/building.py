"""Architectures without their weights: timm's by name and the bundled ones, at an image size that they can take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import timm
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vitprobe.errors import UserError
from vitprobe.models.anatomy.find import find_anatomy
from vitprobe.models.anatomy.parts import Anatomy
from vitprobe.models.anatomy.unsupported import ISOTROPIC
from vitprobe.models.configs import describe_images
from vitprobe.models.entries import BUNDLED_ARCHITECTURES, NORMALISATIONS, ModelSpec
from vitprobe.models.meta import on_meta
from vitprobe.models.official.building import create_official
from vitprobe.models.official.entries import OFFICIAL
from vitprobe.models.registry import all_specs, find_spec, nearest

ImageSize = int | tuple[int, int] | None


def architecture_of(name: str) -> str:
    """Return what to build for a name: timm's name, with its tag where one is given, a bundled architecture, or the
    alias of an official checkpoint.

    Args:
        name: an alias, a bundled architecture, or a timm name with or without tag.

    Raises:
        UserError: for an unknown name (with the nearest ones), or a tag that the architecture does not have.
    """
    spec = find_spec(name)
    if spec is not None:
        kind, _, name_there = spec.source.partition(":")
        return name_there if kind in ("timm", "official") else spec.architecture
    if name in BUNDLED_ARCHITECTURES:
        return name
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        likely = nearest(name, (known.name for known in all_specs())) + nearest(architecture, _with_weights())
        hint = f"did you mean {', '.join(likely[:6])}?" if likely else "vitprobe models lists what there is"
        raise UserError(f"unknown model {name!r}: {hint}")
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        known = f"it has {', '.join(tags)}" if tags else "it has none"
        raise UserError(f"timm's {architecture} has no weights tagged {tag!r}: {known}")
    return name


def _with_weights() -> list[str]:
    """timm's names for what can be analysed and has weights: nothing else is worth suggesting."""
    names = (timm.list_models(module=module, pretrained=True) for module in ISOTROPIC)
    return sorted({name.partition(".")[0] for of_module in names for name in of_module})


def outline(architecture: str, *, img_size: ImageSize = None, **options: Any) -> nn.Module:
    """Build an architecture on the meta device: names and shapes without memory, to find mistakes before a download.

    Args and Raises: as `build`.
    """
    size = None if img_size is None else pair(img_size)
    with on_meta():
        module = _create(architecture, None, **options)
    require_size(find_anatomy(module), size, architecture)
    return module


def build(architecture: str, *, img_size: ImageSize = None, **options: Any) -> nn.Module:
    """Build a Vision Transformer with random weights.

    Args:
        architecture: from `architecture_of`.
        img_size: pixels, a side or (height, width); the architecture's own by default.
        options: more arguments of the constructor.

    Raises:
        UserError: for an image size that the architecture cannot take.
        AttentionNotSeenError: for an architecture that is no Vision Transformer.
    """
    outline(architecture, img_size=img_size)
    return _create(architecture, None if img_size is None else pair(img_size), **options)


def _create(architecture: str, img_size: tuple[int, int] | None, **options: Any) -> nn.Module:
    if architecture in BUNDLED_ARCHITECTURES:
        return _create_bundled(architecture, img_size, **options)
    if architecture in OFFICIAL:
        return create_official(OFFICIAL[architecture], img_size, **options)
    # timm leaves out arguments that are None.
    return timm.create_model(architecture, img_size=img_size, **options)


def _create_bundled(
    architecture: str, img_size: tuple[int, int] | None, *, num_classes: int = 0, **options: Any
) -> nn.Module:
    """One of our own architectures."""
    arguments = dict(BUNDLED_ARCHITECTURES[architecture])
    if img_size is not None:
        arguments["img_size"] = img_size
    module = VisionTransformer(**arguments, num_classes=num_classes, **options)
    describe_images(module, architecture, "cifar10", crop_pct=1.0, num_classes=num_classes)
    return module


def pair(img_size: Any) -> tuple[int, int]:
    """Return height and width of an image size, a side or (height, width).

    Raises:
        UserError: for anything that is not whole numbers of pixels.
    """
    size = img_size if isinstance(img_size, tuple) else (img_size, img_size)
    if len(size) != 2 or any(not isinstance(side, int) or isinstance(side, bool) for side in size):
        raise UserError(f"img_size is one side in whole pixels (224) or (height, width), not {img_size!r}")
    return size


def require_size(anatomy: Anatomy, img_size: tuple[int, int] | None, name: str) -> None:
    """Raise `UserError` unless whole patches tile an image of `img_size` (height, width).

    Raises:
        UserError: says which sizes the model takes.
    """
    if img_size is None:
        return
    usual = anatomy.image_size
    patch = anatomy.layout(usual).patch_size
    if any(side < edge or side % edge for side, edge in zip(img_size, patch, strict=True)):
        edge = patch[0]
        near = max(edge, round(img_size[0] / edge) * edge)
        sizes = (
            f"multiples of {edge}" if patch[0] == patch[1] else f"multiples of {patch[0]} (height), {patch[1]} (width)"
        )
        raise UserError(
            f"{name} cannot take images of {img_size[0]}×{img_size[1]} pixels: it takes {sizes}, such as {near}; "
            f"its own size is {usual[0]}×{usual[1]}"
        )


def spec_of(module: nn.Module | Sequence[nn.Module], name: str, source: str) -> ModelSpec:
    """Return a spec for a model that is not in the registry, as far as timm's config of it tells.

    The config says what was built, not which weights are in it: timm gives it to models with random weights too, and
    weights are trained further. So the method and the paradigm are unknown, whatever weights it names.

    Args:
        module: the model, or the part of it that holds its blocks followed by what holds that part; the first with a
            config of timm's is asked.
        name: what the model is called; "" for the architecture's name.
        source: where it came from.
    """
    parts = [module] if isinstance(module, nn.Module) else list(module)
    configs = (getattr(part, "pretrained_cfg", None) for part in parts)
    config = next((each for each in configs if isinstance(each, dict)), {})
    # A container of torch's says nothing of what it holds.
    classes = [type(part).__name__ for part in parts if not type(part).__module__.startswith("torch.nn.")]
    architecture = config.get("architecture") or next(iter(classes), type(parts[0]).__name__)
    numbers = (tuple(config.get("mean", ())), tuple(config.get("std", ())))
    return ModelSpec(
        name=name or architecture,
        method="unknown",
        paradigm="unknown",
        architecture=architecture,
        source=source,
        normalisation=next((known for known, value in NORMALISATIONS.items() if value == numbers), "other"),
        licence=config.get("license") or "",
        citation="",
    )
