"""From a name, a file or a module to a model that is ready to be probed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from vitprobe.errors import UserError
from vitprobe.layout import TokenLayout
from vitprobe.models.anatomy.copies import why_copy
from vitprobe.models.anatomy.find import find_anatomy
from vitprobe.models.building import ImageSize, architecture_of, build, outline, pair, require_size, spec_of
from vitprobe.models.checkpoints import (
    DOWNLOAD_AGAIN,
    OTHER_ARCHITECTURE,
    classifier_size,
    load_into,
    open_checkpoint,
    read_checkpoint,
    require_file,
)
from vitprobe.models.entries import BUNDLED_ARCHITECTURES, BUNDLED_CLASSES, ModelSpec
from vitprobe.models.folders import PREFIXES, in_folder
from vitprobe.models.from_hub import (
    load_from_hub,
    load_from_timm,
    load_from_transformers,
    require_repository,
    require_timm,
)
from vitprobe.models.hub import fetch_official, names_one_of_the_hub, require_official
from vitprobe.models.huggingface import PREFIX, require_huggingface
from vitprobe.models.huggingface_images import describe_preprocessing
from vitprobe.models.known import recall
from vitprobe.models.loaded import LoadedModel, finish, random_spec, with_remarks
from vitprobe.models.official.checks import require_heads
from vitprobe.models.official.entries import OfficialCheckpoint, find_official
from vitprobe.models.official.weights import load_official
from vitprobe.models.registry import find_spec
from vitprobe.models.shards import INDEX

BUNDLED_FOLDER = Path(__file__).parent / "bundled"
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar", ".pyth", ".npz", INDEX)


def load_model(
    name: str | Path | nn.Module | LoadedModel,
    *,
    checkpoint: str | Path | None = None,
    arch: str | None = None,
    weights_key: str | None = None,
    img_size: ImageSize = None,
    pretrained: bool = True,
    layout: TokenLayout | None = None,
    blocks: Sequence[nn.Module] | None = None,
) -> LoadedModel:
    """A model ready to be probed.

    Args:
        name: an alias ("mae_vit_b"; `list_models` has them), any timm name with or without tag, a repository of the
            Hugging Face hub ("hf:owner/name" for transformers, "hf-hub:owner/name" for timm), a folder that either
            wrote ("DIR", "hf:DIR"), a checkpoint file or the index of several (with `arch`), an `nn.Module` (in its own
            mode; of one of images and texts, or with a head of transformers around it, the image tower; a model that
            holds a Vision Transformer at any depth is run as a whole where it takes images alone), or a LoadedModel
            (returned).
        checkpoint: a file whose weights to take instead of downloading the named model's.
        arch: the architecture of the weights in a file: an alias or a timm name.
        weights_key: of a file with several sets of weights the one to take, such as "state_dict" or
            "teacher.backbone"; without it the averaged or teacher's set, which a remark of the model names.
        img_size: pixels of the input, a side or (height, width); position embeddings are resampled to it.
        pretrained: False for random weights (from torch's global seed).
        layout: of a module, which token is what, where that is not found; its grid times its patch size is the
            model's image size.
        blocks: of a module, its transformer blocks in the order in which they run, where they are not found.

    Raises:
        UserError: for an unknown name, weights that cannot be had, read or fitted, or that hold NaN or infinity, an
            image size that the model cannot take, or options that contradict each other.
        AttentionNotSeenError: for a model whose attention cannot be captured.

    Example:
        >>> model = load_model("mae_vit_nano")
        >>> model.spec.paradigm, model.transform.size
        ('MIM', (32, 32))
        >>> print(model.layout)
        1 prefix + 8x8 patches
    """
    if img_size is not None:
        pair(img_size)
    if isinstance(name, LoadedModel | nn.Module):
        if checkpoint is not None or arch is not None or not pretrained:
            raise UserError("checkpoint, arch and pretrained are for models by name: this one is built already")
        if weights_key is not None:
            raise UserError("weights_key is for a checkpoint file: this model is built already")
        return _wrap(name, img_size, layout, blocks)
    if layout is not None or blocks is not None:
        raise UserError("layout and blocks are for a module of your own: of a model by name they are known")
    name, path, arch = _sort_out(name, checkpoint, arch, weights_key, pretrained)
    if (arch or name).startswith(PREFIX):
        return load_from_transformers(arch or name, path, img_size, pretrained, weights_key)
    if path is not None:
        # "This alias, from this file" says what the weights are; --arch says only how they are laid out.
        return _load_file(path, arch or name, None if arch else find_spec(name), img_size, weights_key)
    if name.startswith(PREFIXES):
        return load_from_hub(name.partition(":")[2], img_size, pretrained)
    if entry := find_official(name):
        return _load_official(entry, img_size, pretrained)
    architecture = architecture_of(name)
    if architecture in BUNDLED_ARCHITECTURES:
        return _load_bundled(name, architecture, img_size, pretrained)
    return load_from_timm(name, architecture, img_size, pretrained)


def require_loadable(
    name: str | Path,
    *,
    checkpoint: str | Path | None = None,
    arch: str | None = None,
    weights_key: str | None = None,
    img_size: ImageSize = None,
) -> None:
    """Returns where nothing that can be known without the weights keeps `load_model` from loading a model.

    Args and Raises: as `load_model`. Weights that are not here are not downloaded, but asked for: their place answers.
    """
    if img_size is not None:
        pair(img_size)
    name, path, arch = _sort_out(name, checkpoint, arch, weights_key, pretrained=True)
    if (arch or name).startswith(PREFIX):
        require_huggingface((arch or name).removeprefix(PREFIX), img_size=img_size, weights=path)
    elif path is not None:
        outline(architecture_of(arch or name), img_size=img_size, num_classes=0)
    elif name.startswith(PREFIXES):
        require_repository(name.partition(":")[2], img_size)
    elif entry := find_official(name):
        outline(entry.spec.name, img_size=img_size)
        require_official(entry)
    elif (architecture := architecture_of(name)) in BUNDLED_ARCHITECTURES:
        _bundled_spec(name)
        outline(architecture, img_size=img_size)
    else:
        require_timm(name, architecture, img_size)


def _sort_out(
    name: object, checkpoint: str | Path | None, arch: str | None, weights_key: str | None, pretrained: bool
) -> tuple[str, Path | None, str | None]:
    """The name of a model, the file of its weights or None, and the architecture in it where one was given."""
    if not isinstance(name, str | Path):
        raise UserError(
            why_copy(name) or f"a model is a name, a checkpoint file, an nn.Module or a LoadedModel, not {name!r}"
        )
    name, arch = in_folder(name), None if arch is None else str(in_folder(arch))
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
    elif arch is not None and checkpoint is not None:
        _require_one_architecture(name, arch)
    if checkpoint is None:
        if arch is not None:
            raise UserError(
                f"arch is for a checkpoint file: leave it out, or give the weights of {name} with --checkpoint FILE"
            )
        if weights_key is not None:
            raise UserError(
                f"weights_key is for a checkpoint file: leave it out, or give the weights of {name} with "
                f"--checkpoint FILE"
            )
        return name, None, None
    if not pretrained:
        raise UserError(f"random weights (pretrained=False) and those of {checkpoint} exclude each other")
    require_file(Path(checkpoint))
    return name, Path(checkpoint), arch


def _require_one_architecture(name: str, arch: str) -> None:
    """Raises a UserError where a model's name and --arch say different things of one file."""

    def architecture(named: str) -> str:
        if named.startswith((*PREFIXES, PREFIX)):
            return named
        spec = find_spec(named)
        return (spec.architecture if spec else architecture_of(named)).partition(".")[0]

    if architecture(name) != architecture(arch):
        raise UserError(
            f"--model {name} and --arch {arch} are two architectures for one file: leave one of the two out"
        )


def _looks_like_file(name: str) -> bool:
    """Whether a name means a file: an existing one, or one with a checkpoint's suffix; never a known model."""
    if find_spec(name) is not None or name.startswith((*PREFIXES, PREFIX)):
        return False
    if name.endswith(_SUFFIXES):
        return True
    if timm.is_model(name.partition(".")[0]):
        return False
    if Path(name).is_file():
        return True
    if ("/" in name or "\\" in name) and not names_one_of_the_hub(name):
        raise UserError(f"there is no file or folder {name}")
    if "/" in name:
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
    spec = loaded.spec if loaded else recall(anatomy.tower) or spec_of(anatomy.lineage, "", "module")
    if size is not None and size != anatomy.image_size:
        require_size(anatomy, size, spec.name)
        if not anatomy.any_size:
            usual = anatomy.image_size
            raise UserError(
                f"{spec.name} is built for images of {usual[0]}×{usual[1]} pixels: for {size[0]}×{size[1]}, load it by "
                f"name with img_size, or build it so"
            )
    return finish(anatomy.module, spec, size or describe_preprocessing(anatomy.tower), anatomy)


def _load_bundled(name: str, architecture: str, img_size: ImageSize, pretrained: bool) -> LoadedModel:
    spec = _bundled_spec(name)
    kind, _, seed = spec.source.partition(":")
    with torch.random.fork_rng(devices=[], enabled=pretrained):
        if pretrained and kind == "seed":
            torch.manual_seed(int(seed))
        module = build(architecture, img_size=img_size, num_classes=BUNDLED_CLASSES[spec.name])
    if not pretrained:
        return finish(module.eval(), random_spec(spec), img_size)
    if kind == "seed":
        return finish(module.eval(), spec, img_size)
    path = BUNDLED_FOLDER / f"{spec.name}.safetensors"
    load_into(module, read_checkpoint(path), source=str(path))
    return finish(module.eval(), spec, img_size)


def _bundled_spec(name: str) -> ModelSpec:
    spec = find_spec(name)
    if spec is None:
        raise UserError(f"{name} is an architecture without weights: use it as --arch for a checkpoint file")
    return spec


def _load_file(
    path: Path, arch: str, spec: ModelSpec | None, img_size: ImageSize, weights_key: str | None
) -> LoadedModel:
    entry = find_official(arch)
    if entry is not None:
        module, remarks = load_official(entry, path, img_size=img_size, weights_key=weights_key)
    else:
        module, remarks = _load_plain_file(path, architecture_of(arch), img_size, weights_key)
    if spec is None:
        spec = spec_of(module, path.name.partition(".")[0] or path.name, f"file:{path.name}")
        spec = replace(spec, licence="")  # the config's is that of timm's weights, not of these
    return with_remarks(finish(module.eval(), replace(spec, source=f"file:{path.name}"), img_size), remarks)


def _load_plain_file(
    path: Path, architecture: str, img_size: ImageSize, weights_key: str | None
) -> tuple[nn.Module, tuple[str, ...]]:
    bare = outline(architecture, img_size=img_size, num_classes=0)
    found = open_checkpoint(path, key=weights_key)
    require_heads(found.state, bare, str(path))
    names = bare.state_dict().keys()
    found = found.named(names)
    options: dict[str, Any] = {"num_classes": classifier_size(found.state, bare)}
    if "fc_norm.weight" in found.state and "fc_norm.weight" not in names:
        options["global_pool"] = "avg"  # a fine-tuned MAE: the norm that timm places after the pooling
    module = build(architecture, img_size=img_size, **options)
    left = load_into(
        module,
        found.state,
        source=str(path),
        hint=OTHER_ARCHITECTURE + found.choice,
        resampling=found.resampling,
    )
    return module, found.remarks + left


def _load_official(entry: OfficialCheckpoint, img_size: ImageSize, pretrained: bool) -> LoadedModel:
    """A checkpoint that timm lacks, from where its authors released it."""
    if not pretrained:
        return finish(build(entry.spec.name, img_size=img_size).eval(), random_spec(entry.spec), img_size)
    outline(entry.spec.name, img_size=img_size)  # before the download
    path = fetch_official(entry)
    module, remarks = load_official(entry, path, img_size=img_size, hint=DOWNLOAD_AGAIN)
    return with_remarks(finish(module.eval(), entry.spec, img_size), remarks)
