"""Weights in the local caches of the Hugging Face hub and of torch.hub; needs no network, torch, or timm."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlsplit

from vitprobe.errors import UserError
from vitprobe.models.entries import ADDRESSES, ModelSpec
from vitprobe.models.official.entries import find_official
from vitprobe.models.repositories import hub_repository, local_folder

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # in timm's order of preference


def cached_weights(repository: str, filenames: tuple[str, ...] = WEIGHT_FILES) -> Path | None:
    """Return the first of `filenames` in the local Hugging Face cache, or in a folder; None without one.

    Raises:
        UserError: for what cannot be a repository's name.
    """
    if (folder := local_folder(repository)) is not None:
        return next((folder / name for name in filenames if (folder / name).is_file()), None)
    from huggingface_hub import try_to_load_from_cache

    name, _, revision = repository.partition("@")
    for filename in filenames:
        try:
            found = try_to_load_from_cache(name, filename, revision=revision or None)
        except ValueError as error:
            raise UserError(f"{repository!r} is no repository of the Hugging Face hub: write owner/name") from error
        if isinstance(found, str):
            return Path(found)
    return None


def address_path(address: str, filename: str = "") -> Path:
    """Return the path at which torch.hub and timm cache the file of a plain address, or a file of this name."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("TORCH_HOME") or os.path.join(cache, "torch")  # noqa: PTH118 - "~" is expanded below
    return Path(home).expanduser() / "hub" / "checkpoints" / (filename or Path(urlsplit(address).path).name)


def is_downloaded(spec: ModelSpec) -> bool:
    """Return whether a model's weights are in a local cache."""
    if spec.source in ADDRESSES:
        return address_path(ADDRESSES[spec.source]).is_file()
    if entry := find_official(spec.source):
        return address_path(entry.address, entry.cached_name).is_file()
    repository = hub_repository(spec.source)
    return repository is not None and cached_weights(repository) is not None
