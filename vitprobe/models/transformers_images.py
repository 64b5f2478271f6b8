"""How the image processors of transformers prepare images, as timm writes it: a module's `pretrained_cfg`."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

from PIL.Image import Resampling
from torch import nn

from vitprobe.errors import UserError
from vitprobe.models.anatomy.find import find_anatomy
from vitprobe.models.anatomy.parts import Size, pair
from vitprobe.models.anatomy.transformers_vit import from_transformers, takes_patches
from vitprobe.models.caches import cached_weights
from vitprobe.models.downloads import fetch_from_hub
from vitprobe.models.pickles import one_line
from vitprobe.models.repositories import local_folder

_FILES = ("preprocessor_config.json", "processor_config.json")


def describe_preprocessing(module: nn.Module, repository: str | None = None) -> Size | None:
    """Give an image tower of transformers the `pretrained_cfg` that says how its images are prepared.

    It is what the image processor of its repository does. Where there is none: what the processor made for its class
    does by default, at the size that the model was built for; and timm's defaults for a class that borrows another's.

    Args:
        module: the model.
        repository: where to ask for the processor's settings. Without one, files already here are looked through for
            those of the repository or folder that the model came from.

    Returns:
        Height and width of the images, in pixels; None for any other model, which is left alone.

    Raises:
        UserError: for settings that are damaged, or that cannot be asked for, and for a model that takes no images.
    """
    config: Any = getattr(module, "config", None)
    if not from_transformers(module) or config is None:
        return None
    require_images(module)
    size = find_anatomy(module).image_size
    if hasattr(module, "pretrained_cfg"):
        return pair(module.pretrained_cfg.get("input_size", size)[-2:])  # type: ignore[union-attr]
    came_from = str(getattr(config, "_name_or_path", ""))
    folder = _found(came_from) if repository is None else _fetched(repository)
    if folder is not None:
        described = _describe(_processor(folder), None)
    else:
        processor = _own_processor(config)
        described = {} if processor is None else _describe(processor, size)
    module.pretrained_cfg = {"input_size": (3, *size)} | described  # type: ignore[assignment]
    return pair(module.pretrained_cfg["input_size"][-2:])


def require_images(module: nn.Module) -> None:
    """Raise `UserError` for a model that takes patches of its own processor instead of images.

    Raises:
        UserError: says what to do instead.
    """
    if takes_patches(module):
        raise UserError(
            f"{type(module).__name__} takes patches that its own processor makes, not images: run it yourself, inside "
            f"capture(model)"
        )


def _fetched(repository: str) -> Path | None:
    """The folder of a repository's settings; None where it is known to have none."""
    try:
        return fetch_from_hub(repository, _FILES).parent
    except UserError:
        if _known_absent(repository):
            return None
        raise


def _known_absent(repository: str) -> bool:
    """Whether the hub once said that it has no such files: its client notes that in the cache."""
    from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache

    if local_folder(repository):
        return True
    name, _, revision = repository.partition("@")
    return all(try_to_load_from_cache(name, file, revision=revision or None) is _CACHED_NO_EXIST for file in _FILES)


def _found(name: str) -> Path | None:
    """The folder of the settings of a repository or folder, if they are here already."""
    folder = Path(name)
    if name and any((folder / file).is_file() for file in _FILES):
        return folder
    try:
        path = cached_weights(name, _FILES)
    except UserError:  # not a repository's name
        return None
    return None if path is None else path.parent


def _processor(folder: Path) -> Any:
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers trusts its arguments
        raise UserError(f"{folder} says how to prepare images, but not so that it can be: {one_line(error)}") from error


def _own_processor(config: Any) -> Any:
    """A processor of the very package that a config is of, with its defaults; None where that has none."""
    path = type(config).__module__.rpartition(".")[0]
    if not path.startswith("transformers.models."):
        return None
    package = importlib.import_module(path)
    names = [name for name in dir(package) if "ImageProcessor" in name]
    return getattr(package, min(names, key=len))() if names else None


def _describe(processor: Any, size: Size | None) -> dict[str, Any]:
    """timm's words for what a processor does; for images of another `size`, with the same share cut away."""
    resized, edges = _sides(processor.size)
    cropped = _sides(processor.crop_size)[0] if getattr(processor, "do_center_crop", False) else resized
    size = size or cropped
    interpolation = Resampling(int(processor.resample)).name.lower()
    described = {
        "input_size": (3, *size),
        "interpolation": interpolation,
        "crop_pct": _share(size[0], round(size[0] * resized[0] / cropped[0])),
        "crop_mode": "squash" if edges else "center",
    }
    if not processor.do_normalize:
        return described | {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    return described | {"mean": tuple(processor.image_mean), "std": tuple(processor.image_std)}


def _sides(size: Any) -> tuple[Size, bool]:
    """Height and width of a processor's size, and whether both are given and not the shorter side alone."""
    given = size if isinstance(size, dict) else vars(size)
    if given.get("height") and given.get("width"):
        return (given["height"], given["width"]), True
    return (given["shortest_edge"], given["shortest_edge"]), False


def _share(side: int, resized: int) -> float:
    """`side / resized`, such that the whole number below `side / share` is `resized` in floating point too."""
    share = side / resized
    return share if math.floor(side / share) == resized else math.nextafter(share, 0)
