"""Vision models of Hugging Face transformers by their repository: "hf:facebook/vit-mae-base" (the extra `hf`)."""

from __future__ import annotations

import inspect
import json
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitprobe.errors import UserError
from vitprobe.models.anatomy.find import find_anatomy
from vitprobe.models.building import ImageSize, pair, require_size, spec_of
from vitprobe.models.checkpoints import open_checkpoint
from vitprobe.models.downloads import fetch_from_hub, require_hub
from vitprobe.models.loaded import LoadedModel, finish, random_spec, with_remarks
from vitprobe.models.pickles import BadFileError, one_line
from vitprobe.models.repositories import (
    TRANSFORMERS,
    at_commit,
    local_folder,
    name_of,
    remark_on_folder,
    source_of,
)
from vitprobe.models.roles import role, said
from vitprobe.models.shards import INDEX, names_in_index
from vitprobe.models.transformers_images import describe_preprocessing, require_images
from vitprobe.models.weight_names import without_wrappers

_WEIGHTS = tuple(name + ending for name in ("model.safetensors", "pytorch_model.bin") for ending in ("", INDEX))
# How the convolution that cuts patches is called; its place tells where the image tower is among all weights.
_PATCHES = "embeddings.patch_embedding"
# What a tower may lack, or have too much, and see the same.
_OPTIONAL = ("mask_token", "pooler.", "position_ids", "relative_position_index")
_HEADS = ("classifier.", "cls_classifier.", "distillation_classifier.", "head.", "lm_head.", "decoder.")
_INSTEAD = "use a Vision Transformer, such as hf:facebook/dinov2-base"


def load_from_transformers(
    name: str, path: Path | None, img_size: ImageSize, pretrained: bool, weights_key: str | None = None
) -> LoadedModel:
    """Load a repository of the hub that transformers wrote, or its architecture with weights from a file."""
    repository = name.removeprefix(TRANSFORMERS)
    module, remarks = load_image_tower(
        repository, img_size=img_size, weights=path, weights_key=weights_key, pretrained=pretrained
    )
    spec = spec_of(module, name_of(repository), source_of(TRANSFORMERS, repository))
    if path is not None:
        spec = replace(spec, name=path.name.partition(".")[0] or path.name, source=f"file:{path.name}")
    size = img_size or describe_preprocessing(module)
    model = finish(module, spec if pretrained else random_spec(spec), size)
    return with_remarks(model, (*remark_on_folder(TRANSFORMERS, repository), *remarks))


def load_image_tower(
    repository: str,
    *,
    img_size: ImageSize = None,
    weights: Path | None = None,
    weights_key: str | None = None,
    pretrained: bool = True,
) -> tuple[nn.Module, tuple[str, ...]]:
    """Load the image tower of a repository of the Hugging Face hub: float32, in eval mode; and remarks on it.

    A ViTMAE shows all patches in their order, and position embeddings are interpolated for images of another size.
    Its `pretrained_cfg` says, as timm's does, how the repository prepares images. No code of the repository is run.

    Args:
        repository: `owner/name` or `owner/name@revision`, or a folder that `save_pretrained` wrote.
        img_size: what its images are to be, in pixels, a side or (height, width).
        weights: a file to take them from instead.
        weights_key: which of several sets of weights in that file.
        pretrained: False for random weights (from torch's global seed).

    Raises:
        UserError: where transformers or the repository is missing, holds no vision model, or does not fit.
        AttentionNotSeenError: for a vision model whose attention cannot be captured.
    """
    outline = _outline(repository, img_size)  # before the download
    remarks: tuple[str, ...] = ()
    if not pretrained:
        module = type(outline)(outline.config)
    else:
        file = weights or _fetch_weights(repository)
        if weights is None:
            # The cache may have held the config of an older commit: take the one beside the weights.
            repository = at_commit(repository, file)
            outline = _outline(repository, img_size)
        found = open_checkpoint(file, key=weights_key)
        names = outline.state_dict()
        roots = _roots(without_wrappers(found.state, names))
        remarks = found.remarks + (
            said(roots[0].rstrip("."), [root.rstrip(".") for root in roots[1:]]) if roots else ()
        )
        module = _filled(outline, found.state, str(file))
    describe_preprocessing(module, repository)
    # For good, not for one capture: this module is ours.
    find_anatomy(module).prepare(ExitStack())
    return module.float().eval(), remarks


def require_image_tower(repository: str, *, img_size: ImageSize = None, weights: Path | None = None) -> None:
    """Raise the error of `load_image_tower` for all that can be known without the weights.

    Args and Raises: as `load_image_tower`.
    """
    _outline(repository, img_size)
    if weights is None:
        require_hub(repository, _WEIGHTS)


def _outline(repository: str, img_size: ImageSize) -> Any:
    """The image tower on the meta device: names and shapes, from the repository's config.json alone."""
    called = f"{TRANSFORMERS}{repository}"
    try:
        import transformers
    except ImportError as error:
        raise UserError(f"{called} needs the library transformers: pip install 'vitprobe[hf]'") from error

    path = fetch_from_hub(repository, ("config.json",))
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        kind = content.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        again = "" if local_folder(repository) else "; delete it to download it again"
        raise UserError(f"{path} is damaged: it is no JSON of a model{again}") from error
    if (not isinstance(kind, str) or kind == "timm_wrapper") and "architecture" in content:
        raise UserError(f"{called} holds a model of timm's: write hf-hub:{repository}")
    what = f"{called} holds no vision model"
    known = (content.get("architectures") or [kind])[0]
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        raise UserError(
            f"{what} that transformers {transformers.__version__} knows: its config.json is of a {known}; {_INSTEAD}"
        )
    for name in ("dtype", "torch_dtype"):  # how the weights were saved; here they are float32
        content.pop(name, None)
    try:
        with _quiet():
            config: Any = transformers.CONFIG_MAPPING[kind].from_dict(content)
            config = getattr(config, "vision_config", config)
            tower = transformers.MODEL_MAPPING.get(type(config), None)
            if getattr(tower, "main_input_name", "") != "pixel_values":
                raise UserError(f"{what}: its config.json is of a {known}; {_INSTEAD}")
            with torch.device("meta"):
                module = tower(config)  # type: ignore[misc]
    except UserError:
        raise
    except Exception as error:  # transformers trusts its arguments
        raise UserError(
            f"transformers cannot build what the config.json of {called} describes: {one_line(error, 160)}"
        ) from error
    anatomy = find_anatomy(module)
    require_images(anatomy.module)
    require_size(anatomy, None if img_size is None else pair(img_size), called)
    return module


def _fetch_weights(repository: str) -> Path:
    """The file of a repository's weights, or the index of several that are all here."""
    path = fetch_from_hub(repository, _WEIGHTS)
    if path.name.endswith(INDEX) and not local_folder(repository):
        try:
            names = names_in_index(path)
        except BadFileError as error:
            raise UserError(f"{path} {error}; delete it to download it again") from error
        for name in names:
            fetch_from_hub(at_commit(repository, path), (name,))
    return path


def _filled(outline: Any, state: dict[str, Tensor], source: str) -> nn.Module:
    """The model with weights in it, which transformers translates from the names of its older versions.

    Raises:
        UserError: where names are missing or unexpected, or shapes differ.
    """
    tower: Any = type(outline)
    own = outline.state_dict()
    state = without_wrappers(state, own)
    root, own_root = _root(state), _root(own)
    state = {own_root + name.removeprefix(root): tensor for name, tensor in state.items() if name.startswith(root)}
    options = {}
    if "add_pooling_layer" in inspect.signature(tower).parameters and not any("pooler." in name for name in state):
        options["add_pooling_layer"] = False
    faults = {}
    try:
        with _quiet():
            module, report = tower.from_pretrained(
                None,
                config=outline.config,
                state_dict={name: tensor.float() for name, tensor in state.items()},
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **options,
            )
    except Exception as error:
        raise UserError(f"{source} does not fit {tower.__name__}: {one_line(error, 160)}") from error
    for what, names in (
        ("missing", [name for name in report["missing_keys"] if not _any_of(_OPTIONAL, name)]),
        ("unexpected", [name for name in report["unexpected_keys"] if not _any_of(_OPTIONAL + _HEADS, name)]),
        # Names in version 4, with both shapes in version 5.
        ("of another shape", [key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]]),
    ):
        if names:
            faults[what] = f"{len(names)} {what}: {_some(sorted(names))}"
    if faults:
        raise UserError(f"{source} does not fit {tower.__name__}: {'; '.join(faults.values())}")
    return module


def _root(names: Collection[str]) -> str:
    """What precedes the names of an image tower's parts: "", "vit.", "vision_model." and the like."""
    return next(iter(_roots(names)), "")


def _roots(names: Collection[str]) -> list[str]:
    """The same of each tower that there is, the one to take first."""
    found = list(dict.fromkeys(name.partition(_PATCHES)[0] for name in names if _PATCHES in name))
    return sorted(found, key=lambda root: role(root, found))


def _any_of(parts: tuple[str, ...], name: str) -> bool:
    return any(part in name for part in parts)


def _some(names: list[str]) -> str:
    return ", ".join(one_line(name, 80) for name in names[:3]) + (", …" if len(names) > 3 else "")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own progress bar and report: what there is to say, we say."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
