"""From a name, a file or a module to a model that is ready to be probed."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from vitprobe.data.transforms import ImageTransform, model_transform
from vitprobe.errors import UserError
from vitprobe.models.anatomy.find import find_anatomy
from vitprobe.models.anatomy.parts import Anatomy
from vitprobe.models.building import ImageSize, architecture_of, build, outline, pair, require_size, spec_of
from vitprobe.models.checkpoints import (
    DOWNLOAD_AGAIN,
    classifier_size,
    load_downloaded,
    load_into,
    read_checkpoint,
    require_file,
    strip_prefix,
)
from vitprobe.models.entries import BUNDLED_ARCHITECTURES, BUNDLED_CLASSES, ModelSpec
from vitprobe.models.hub import (
    WEIGHT_FILES,
    fetch_from_address,
    fetch_from_hub,
    fetch_official,
    hub_repository,
    require_address,
    require_hub,
    require_official,
)
from vitprobe.models.huggingface import load_huggingface, require_huggingface
from vitprobe.models.huggingface_images import describe_preprocessing
from vitprobe.models.official.checks import require_heads
from vitprobe.models.official.entries import OfficialCheckpoint, find_official
from vitprobe.models.official.weights import load_official
from vitprobe.models.registry import all_specs, find_spec
from vitprobe.models.tokens import TokenLayout

BUNDLED_FOLDER = Path(__file__).parent / "bundled"
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar", ".pyth", ".npz")
_HUB_PREFIXES = ("hf-hub:", "hf_hub:")
_HUGGINGFACE = "hf:"


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model ready to be probed.

    Attributes:
        module: the model; float32 and in eval mode where it was built here.
        layout: its tokens for the images that `transform` makes.
        transform: from a picture to the tensor it expects.
        spec: what is known of it.
        anatomy: where it keeps its blocks and takes its images.
    """

    module: nn.Module
    layout: TokenLayout
    transform: ImageTransform
    spec: ModelSpec
    anatomy: Anatomy

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward pass."""
        return self.module(*args, **kwargs)


def load_model(
    name: str | Path | nn.Module | LoadedModel,
    *,
    checkpoint: str | Path | None = None,
    arch: str | None = None,
    img_size: ImageSize = None,
    pretrained: bool = True,
    layout: TokenLayout | None = None,
    blocks: Sequence[nn.Module] | None = None,
) -> LoadedModel:
    """A model ready to be probed.

    Args:
        name: an alias ("mae_vit_b"; `list_models` has them), any timm name with or without tag, a repository of the
            Hugging Face hub ("hf:owner/name" for transformers, "hf-hub:owner/name" for timm), a checkpoint file (with
            `arch`), an `nn.Module` (wrapped as it is, its mode too), or a LoadedModel (returned).
        checkpoint: a file whose weights to take instead of downloading the named model's.
        arch: the architecture of the weights in a file: an alias or a timm name.
        img_size: pixels of the input, a side or (height, width); position embeddings are resampled to it.
        pretrained: False for random weights (from torch's global seed).
        layout: of a module, which token is what, where that is not found; its grid times its patch size is the
            model's image size.
        blocks: of a module, its transformer blocks in the order in which they run, where they are not found.

    Raises:
        UserError: for an unknown name, weights that cannot be had, read or fitted, or that hold NaN or infinity, an
            image size that the model cannot take, or options that contradict each other.
        AttentionNotSeenError: for a model whose attention cannot be captured.
    """
    if img_size is not None:
        pair(img_size)
    if isinstance(name, LoadedModel | nn.Module):
        if checkpoint is not None or arch is not None or not pretrained:
            raise UserError("checkpoint, arch and pretrained are for models by name: this one is built already")
        return _wrap(name, img_size, layout, blocks)
    if layout is not None or blocks is not None:
        raise UserError("layout and blocks are for a module of your own: of a model by name they are known")
    name, path, arch = _sort_out(name, checkpoint, arch, pretrained)
    if (arch or name).startswith(_HUGGINGFACE):
        return _load_from_transformers(arch or name, path, img_size, pretrained)
    if path is not None:
        # "This alias, from this file" says what the weights are; --arch says only how they are laid out.
        return _load_file(path, arch or name, None if arch else find_spec(name), img_size)
    if name.startswith(_HUB_PREFIXES):
        return _load_from_hub(name.partition(":")[2], img_size, pretrained)
    if entry := find_official(name):
        return _load_official(entry, img_size, pretrained)
    architecture = architecture_of(name)
    if architecture in BUNDLED_ARCHITECTURES:
        return _load_bundled(name, architecture, img_size, pretrained)
    return _load_from_timm(name, architecture, img_size, pretrained)


def require_loadable(
    name: str | Path,
    *,
    checkpoint: str | Path | None = None,
    arch: str | None = None,
    img_size: ImageSize = None,
) -> None:
    """Returns where nothing that can be known without the weights keeps `load_model` from loading a model.

    Args and Raises: as `load_model`. Weights that are not here are not downloaded, but asked for: their place answers.
    """
    if img_size is not None:
        pair(img_size)
    name, path, arch = _sort_out(name, checkpoint, arch, pretrained=True)
    if (arch or name).startswith(_HUGGINGFACE):
        require_huggingface((arch or name).removeprefix(_HUGGINGFACE), img_size=img_size, weights=path)
    elif path is not None:
        outline(architecture_of(arch or name), img_size=img_size, num_classes=0)
    elif name.startswith(_HUB_PREFIXES):
        repository = name.partition(":")[2]
        folder, config = _hub_config(repository)
        _built_by_hub(repository, outline, folder, img_size)
        require_hub(repository, _hub_weights(config))
    elif entry := find_official(name):
        outline(entry.spec.name, img_size=img_size)
        require_official(entry)
    elif (architecture := architecture_of(name)) in BUNDLED_ARCHITECTURES:
        _bundled_spec(name)
        outline(architecture, img_size=img_size)
    else:
        config = _timm_config(name, architecture)
        outline(architecture, img_size=img_size)
        if config.hf_hub_id:
            require_hub(config.hf_hub_id, _timm_files(config))
        else:
            require_address(str(config.url), name)


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


def _sort_out(
    name: object, checkpoint: str | Path | None, arch: str | None, pretrained: bool
) -> tuple[str, Path | None, str | None]:
    """The name of a model, the file of its weights or None, and the architecture in it where one was given."""
    if not isinstance(name, str | Path):
        raise UserError(f"a model is a name, a checkpoint file, an nn.Module or a LoadedModel, not {name!r}")
    if isinstance(name, Path) or _looks_like_file(name):
        if checkpoint is not None:
            raise UserError(f"{name} and {checkpoint} are both files: give one, and its architecture (--arch NAME)")
        require_file(Path(name))
        if not arch:
            raise UserError(
                f"{name} needs the name of its architecture: --arch with an alias (mae_vit_b) or a timm name "
                f"(vit_base_patch16_224)"
            )
        checkpoint, name = name, arch
    if checkpoint is None:
        if arch is not None:
            raise UserError(
                f"arch is for a checkpoint file: leave it out, or give the weights of {name} with --checkpoint FILE"
            )
        return name, None, None
    if not pretrained:
        raise UserError(f"random weights (pretrained=False) and those of {checkpoint} exclude each other")
    require_file(Path(checkpoint))
    return name, Path(checkpoint), arch


def _looks_like_file(name: str) -> bool:
    """Whether a name means a file: an existing one, or one with a checkpoint's suffix; never a known model."""
    if find_spec(name) is not None or name.startswith((*_HUB_PREFIXES, _HUGGINGFACE)):
        return False
    if name.endswith(_SUFFIXES):
        return True
    if timm.is_model(name.partition(".")[0]):
        return False
    if Path(name).is_file():
        return True
    if "/" in name or "\\" in name:
        raise UserError(
            f"there is no file {name}; for a repository of the Hugging Face hub write hf:{name} (a model of "
            f"transformers) or hf-hub:{name} (of timm)"
        )
    return False


def _wrap(
    model: nn.Module | LoadedModel,
    img_size: ImageSize,
    layout: TokenLayout | None,
    blocks: Sequence[nn.Module] | None,
) -> LoadedModel:
    """A module that is built already, for its own image size or, where it takes any, for another."""
    size = None if img_size is None else pair(img_size)
    loaded = model if isinstance(model, LoadedModel) else None
    if loaded is not None and layout is None and blocks is None and (size is None or size == loaded.transform.size):
        return loaded
    if loaded is not None and layout is None and blocks is None:
        anatomy = loaded.anatomy
    else:
        anatomy = find_anatomy(loaded.module if loaded else model, layout, blocks)  # type: ignore[arg-type]
    spec = loaded.spec if loaded else spec_of(anatomy.module, "", "module")
    if size is not None and size != anatomy.image_size:
        require_size(anatomy, size, spec.name)
        if not anatomy.any_size:
            usual = anatomy.image_size
            raise UserError(
                f"{spec.name} is built for images of {usual[0]}×{usual[1]} pixels: for {size[0]}×{size[1]}, load it by "
                f"name with img_size, or build it so"
            )
    return _finish(anatomy.module, spec, size or describe_preprocessing(anatomy.module), anatomy)


def _load_bundled(name: str, architecture: str, img_size: ImageSize, pretrained: bool) -> LoadedModel:
    spec = _bundled_spec(name)
    module = build(architecture, img_size=img_size, num_classes=BUNDLED_CLASSES[spec.name])
    if not pretrained:
        return _finish(module.eval(), _random(spec), img_size)
    path = BUNDLED_FOLDER / f"{spec.name}.safetensors"
    load_into(module, read_checkpoint(path), source=str(path))
    return _finish(module.eval(), spec, img_size)


def _bundled_spec(name: str) -> ModelSpec:
    spec = find_spec(name)
    if spec is None:
        raise UserError(f"{name} is an architecture without weights: use it as --arch for a checkpoint file")
    return spec


def _load_file(path: Path, arch: str, spec: ModelSpec | None, img_size: ImageSize) -> LoadedModel:
    entry = find_official(arch)
    if entry is not None:
        module = load_official(entry, path, img_size=img_size)
    else:
        module = _load_plain_file(path, architecture_of(arch), img_size)
    if spec is None:
        spec = spec_of(module, path.name.partition(".")[0] or path.name, f"file:{path.name}")
        spec = replace(spec, licence="")  # the config's is that of timm's weights, not of these
    return _finish(module.eval(), replace(spec, source=f"file:{path.name}"), img_size)


def _load_plain_file(path: Path, architecture: str, img_size: ImageSize) -> nn.Module:
    bare = outline(architecture, img_size=img_size, num_classes=0)
    state = read_checkpoint(path)
    require_heads(state, bare, str(path))
    options: dict[str, Any] = {"num_classes": classifier_size(state, bare)}
    names = bare.state_dict().keys()
    if "fc_norm.weight" in strip_prefix(state, names) and "fc_norm.weight" not in names:
        options["global_pool"] = "avg"  # a fine-tuned MAE: the norm that timm places after the pooling
    module = build(architecture, img_size=img_size, **options)
    load_into(module, state, source=str(path))
    return module


def _load_official(entry: OfficialCheckpoint, img_size: ImageSize, pretrained: bool) -> LoadedModel:
    """A checkpoint that timm lacks, from where its authors released it."""
    if not pretrained:
        return _finish(build(entry.spec.name, img_size=img_size).eval(), _random(entry.spec), img_size)
    outline(entry.spec.name, img_size=img_size)  # before the download
    path = fetch_official(entry)
    return _finish(load_official(entry, path, img_size=img_size, hint=DOWNLOAD_AGAIN).eval(), entry.spec, img_size)


def _load_from_timm(name: str, architecture: str, img_size: ImageSize, pretrained: bool) -> LoadedModel:
    config = timm.get_pretrained_cfg(architecture)
    tagged = architecture if "." in architecture or not (config and config.tag) else f"{architecture}.{config.tag}"
    spec = find_spec(name) or find_spec(tagged)
    if not pretrained:
        module = build(architecture, img_size=img_size)
        return _finish(module.eval(), _random(spec or spec_of(module, name, "random")), img_size)
    config = _timm_config(name, architecture)
    outline(architecture, img_size=img_size)  # before the download
    if config.hf_hub_id:
        path = fetch_from_hub(config.hf_hub_id, _timm_files(config))
    else:
        path = fetch_from_address(str(config.url), name)
    module = build(architecture, img_size=img_size)
    load_downloaded(module, path)
    return _finish(module.eval(), spec or spec_of(module, name, f"timm:{tagged}"), img_size)


def _timm_config(name: str, architecture: str) -> Any:
    """timm's config of weights that it has."""
    config = timm.get_pretrained_cfg(architecture)
    if config is None or not (config.hf_hub_id or config.url):
        raise UserError(f"timm has no weights for {name}: give some with --checkpoint FILE --arch {name}")
    return config


def _timm_files(config: Any) -> tuple[str, ...]:
    return (config.hf_hub_filename,) if config.hf_hub_filename else WEIGHT_FILES


def _load_from_hub(repository: str, img_size: ImageSize, pretrained: bool) -> LoadedModel:
    """A repository of the Hugging Face hub that timm wrote."""
    folder, config = _hub_config(repository)
    weights = None
    if pretrained:
        _built_by_hub(repository, outline, folder, img_size)  # before the download
        weights = fetch_from_hub(repository, _hub_weights(config))
        # The cache may have held the config of an older commit: take the one beside the weights.
        folder, config = _hub_config(f"{repository.partition('@')[0]}@{weights.parent.name}")
    module = _built_by_hub(repository, build, folder, img_size)
    if weights is not None:
        load_downloaded(module, weights)
    # The cache's folder is named by commit; the model is known by its repository.
    name = repository.partition("@")[0].rpartition("/")[2]
    spec = next(
        (
            known
            for known in all_specs()
            if known.architecture == config["architecture"] and hub_repository(known.source) == repository
        ),
        None,
    ) or spec_of(module, name, f"hf-hub:{repository}")
    return _finish(module.eval(), spec if pretrained else _random(spec), img_size)


def _load_from_transformers(name: str, path: Path | None, img_size: ImageSize, pretrained: bool) -> LoadedModel:
    """A repository of the Hugging Face hub that transformers wrote, or its architecture with weights from a file."""
    repository = name.removeprefix(_HUGGINGFACE)
    module = load_huggingface(repository, img_size=img_size, weights=path, pretrained=pretrained)
    spec = spec_of(module, repository.partition("@")[0].rpartition("/")[2], name)
    if path is not None:
        spec = replace(spec, name=path.name.partition(".")[0] or path.name, source=f"file:{path.name}")
    size = img_size or describe_preprocessing(module)
    return _finish(module, spec if pretrained else _random(spec), size)


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
        return make(f"local-dir:{folder}", img_size=img_size)
    except UserError:
        raise
    except Exception as error:  # timm trusts its arguments
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(f"timm cannot build what the config.json of hf-hub:{repository} describes: {reason}") from error


def _random(spec: ModelSpec) -> ModelSpec:
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


def _finish(module: nn.Module, spec: ModelSpec, img_size: ImageSize, anatomy: Anatomy | None = None) -> LoadedModel:
    _require_finite(module, spec.name)
    anatomy = anatomy or find_anatomy(module)
    transform = model_transform(module, img_size=img_size or anatomy.image_size)
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
