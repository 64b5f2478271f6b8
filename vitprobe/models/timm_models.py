"""Load timm's models: by timm's own names, and from repositories or folders that timm wrote ("hf-hub:…")."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
from torch import nn

from vitprobe.errors import UserError
from vitprobe.models.building import ImageSize, build, outline, spec_of
from vitprobe.models.caches import WEIGHT_FILES
from vitprobe.models.checkpoints import DOWNLOAD_AGAIN, load_downloaded
from vitprobe.models.downloads import fetch_from_address, fetch_from_hub, require_address, require_hub
from vitprobe.models.loaded import LoadedModel, finish, random_spec, with_remarks
from vitprobe.models.registered import SHIPPED
from vitprobe.models.registry import find_spec
from vitprobe.models.repositories import (
    TIMMS,
    at_commit,
    hub_repository,
    local_folder,
    name_of,
    remark_on_folder,
    source_of,
)


def load_from_timm(name: str, architecture: str, img_size: ImageSize, pretrained: bool) -> LoadedModel:
    """Load a model by timm's name: as the user gave it (`name`), and with the tag of its weights if known."""
    config = timm.get_pretrained_cfg(architecture)
    tagged = architecture if "." in architecture or not (config and config.tag) else f"{architecture}.{config.tag}"
    spec = find_spec(name) or find_spec(tagged)
    if not pretrained:
        module = build(architecture, img_size=img_size)
        return finish(module.eval(), random_spec(spec or spec_of(module, name, "random")), img_size)
    config = _timm_config(name, architecture)
    outline(architecture, img_size=img_size)  # before the download
    if config.hf_hub_id:
        path = fetch_from_hub(config.hf_hub_id, _timm_files(config))
    else:
        path = fetch_from_address(str(config.url), name)
    module = build(architecture, img_size=img_size)
    load_downloaded(module, path)
    return finish(module.eval(), spec or spec_of(module, name, f"timm:{tagged}"), img_size)


def require_timm(name: str, architecture: str, img_size: ImageSize) -> None:
    """Raise the error of `load_from_timm` for all that can be known without the weights."""
    config = _timm_config(name, architecture)
    outline(architecture, img_size=img_size)
    if config.hf_hub_id:
        require_hub(config.hf_hub_id, _timm_files(config))
    else:
        require_address(str(config.url), name)


def _timm_config(name: str, architecture: str) -> Any:
    """timm's config of weights that it has."""
    config = timm.get_pretrained_cfg(architecture)
    if config is None or not (config.hf_hub_id or config.url):
        raise UserError(f"timm has no weights for {name}: give some with --checkpoint FILE --arch {name}")
    return config


def _timm_files(config: Any) -> tuple[str, ...]:
    return (config.hf_hub_filename,) if config.hf_hub_filename else WEIGHT_FILES


def load_repository(repository: str, img_size: ImageSize, pretrained: bool) -> LoadedModel:
    """Load a repository of the Hugging Face hub, or a folder, that timm wrote."""
    folder, config = _hub_config(repository)
    weights = None
    if pretrained:
        _built_by_hub(repository, outline, folder, img_size)  # before the download
        weights = fetch_from_hub(repository, _hub_weights(config))
        # The cache may have held the config of an older commit: take the one beside the weights.
        folder, config = _hub_config(at_commit(repository, weights))
    module = _built_by_hub(repository, build, folder, img_size)
    remarks = remark_on_folder(TIMMS[0], repository)
    if weights is not None:
        remarks += load_downloaded(module, weights, "" if local_folder(repository) else DOWNLOAD_AGAIN)
    spec = next(
        (
            known
            for known in SHIPPED
            if known.architecture == config["architecture"] and hub_repository(known.source) == repository
        ),
        None,
    ) or spec_of(module, name_of(repository), source_of(TIMMS[0], repository))
    return with_remarks(finish(module.eval(), spec if pretrained else random_spec(spec), img_size), remarks)


def require_repository(repository: str, img_size: ImageSize) -> None:
    """Raise the error of `load_repository` for all that can be known without the weights."""
    folder, config = _hub_config(repository)
    _built_by_hub(repository, outline, folder, img_size)
    require_hub(repository, _hub_weights(config))


def _hub_config(repository: str) -> tuple[Path, dict[str, Any]]:
    """The folder of a repository's config.json, and what it holds; it names an architecture of timm's."""
    path = fetch_from_hub(repository, ("config.json",))
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if timm.is_model(config["architecture"]):
            return path.parent, config
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise UserError(
        f"hf-hub:{repository} holds no model of timm's: its config.json names no architecture that timm has; for a "
        f"model of transformers write hf:{repository}"
    )


def _hub_weights(config: dict[str, Any]) -> tuple[str, ...]:
    details = config.get("pretrained_cfg")
    filename = details.get("hf_hub_filename") if isinstance(details, dict) else None
    return (filename,) if filename else WEIGHT_FILES


def _built_by_hub(repository: str, make: Callable[..., nn.Module], folder: Path, img_size: ImageSize) -> nn.Module:
    """`build` or `outline` of what a repository's config.json describes."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        with TemporaryDirectory() as clean:
            if None in config.values():  # as transformers writes what it wraps; timm expects no such value
                folder = Path(clean)
                known = {name: value for name, value in config.items() if value is not None}
                (folder / "config.json").write_text(json.dumps(known), encoding="utf-8")
            return make(f"local-dir:{folder}", img_size=img_size)
    except UserError:
        raise
    except Exception as error:  # timm trusts its arguments
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(f"timm cannot build what the config.json of hf-hub:{repository} describes: {reason}") from error
