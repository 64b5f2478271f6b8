"""`load_model`: from a name, a file or a module to a model that is ready to be probed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitprobe.errors import UserError
from vitprobe.layout import TokenLayout
from vitprobe.models.anatomy.find import find_anatomy
from vitprobe.models.building import ImageSize, architecture_of, build, outline, pair, require_size, spec_of
from vitprobe.models.checkpoints import (
    DOWNLOAD_AGAIN,
    OTHER_ARCHITECTURE,
    classifier_size,
    load_into,
    open_checkpoint,
    read_checkpoint,
)
from vitprobe.models.describing import check_name, described, normalized
from vitprobe.models.downloads import fetch_official, require_official
from vitprobe.models.entries import BUNDLED_ARCHITECTURES, BUNDLED_CLASSES, ModelSpec
from vitprobe.models.loaded import LoadedModel, finish, random_spec, remarks_on_weights, with_remarks
from vitprobe.models.normalization import find_normalization
from vitprobe.models.official.entries import OfficialCheckpoint, find_official
from vitprobe.models.official.loading import load_official
from vitprobe.models.official.moco_v3 import require_heads
from vitprobe.models.paradigms import find_paradigm
from vitprobe.models.registered import Registration
from vitprobe.models.registry import find_spec
from vitprobe.models.remembered import recall
from vitprobe.models.repositories import TIMMS, TRANSFORMERS
from vitprobe.models.requested import Request, resolve
from vitprobe.models.timm_models import load_from_timm, load_repository, require_repository, require_timm
from vitprobe.models.transformers_images import describe_preprocessing
from vitprobe.models.transformers_models import load_from_transformers, require_image_tower

BUNDLED_FOLDER = Path(__file__).parent / "bundled"


def load_model(
    model: str | Path | nn.Module | LoadedModel,
    *,
    checkpoint: str | Path | None = None,
    arch: str | None = None,
    weights_key: str | None = None,
    img_size: ImageSize = None,
    pretrained: bool = True,
    layout: TokenLayout | None = None,
    blocks: Sequence[nn.Module] | None = None,
    name: str | None = None,
    paradigm: str | None = None,
    normalization: str | Sequence[Any] | None = None,
) -> LoadedModel:
    """Load a model, ready to be probed.

    Args:
        model: an alias ("mae_vit_b"; `list_models` has them, `vitprobe.models.register` adds to them), any timm name
            with or without tag, a repository of the Hugging Face hub ("hf:owner/name" for transformers,
            "hf-hub:owner/name" for timm), a folder that either wrote ("DIR", "hf:DIR"), a checkpoint file or the index
            of several (with `arch`), an `nn.Module` (in its own mode; of one of images and texts, or with a head of
            transformers around it, the image tower; a model that holds a Vision Transformer at any depth is run as a
            whole where it takes images alone), or a LoadedModel.
        checkpoint: a file whose weights to take instead of downloading the named model's. Default: the model's own.
        arch: the architecture of the weights in a file: an alias or a timm name. Default None: `model` says it.
        weights_key: of a file with several sets of weights the one to take, such as "state_dict" or
            "teacher.backbone". Default None: the averaged or teacher's set, which a remark of the model names.
        img_size: pixels of the input, a side or (height, width); position embeddings are resampled to it. Default
            None: the model's own.
        pretrained: False for random weights (from torch's global seed). Default True.
        layout: of a module, which token is what; its grid times its patch size is the model's image size. Default
            None: it is found.
        blocks: of a module, its transformer blocks in the order in which they run. Default None: they are found.
        name: what tables and figures call the model. Default None: its alias, its file's name, or its architecture.
        paradigm: how it was trained, which places it in the paper's comparison: "MIM", "JEA", "hybrid", "supervised",
            "VLM", "other", or "random". Default None: what the registry knows, else "unknown".
        normalization: mean and standard deviation of its images: "imagenet", "inception", "clip", "satellite",
            "cifar10", "none" (pixels from 0 to 1), or a pair `(mean, std)` of numbers in 0..1, one for all channels or
            one for each. Default None: what the model states, else ImageNet's, which a remark of the model says.

    Returns:
        The module with its token layout, its image transform, and what is known of it.

    Raises:
        UserError: for an unknown name, weights that cannot be had, read or fitted, or that hold NaN or infinity, an
            image size that the model cannot take, or options that contradict each other.
        AttentionNotSeenError: for a model whose attention cannot be captured.

    Example:
        >>> import vitprobe as vp
        >>> model = vp.load_model("mae_vit_nano", name="ours", paradigm="MIM")
        >>> model.spec.name, model.spec.paradigm, str(model.layout)
        ('ours', 'MIM', '1 prefix + 8x8 patches')
    """
    if img_size is not None:
        pair(img_size)
    said = {"name": check_name(name), "paradigm": None if paradigm is None else find_paradigm(paradigm)}
    values = None if normalization is None else find_normalization(normalization)
    if isinstance(model, LoadedModel | nn.Module):
        if checkpoint is not None or arch is not None or not pretrained:
            raise UserError("checkpoint, arch and pretrained are for models by name: this one is built already")
        if weights_key is not None:
            raise UserError("weights_key is for a checkpoint file: this model is built already")
        loaded = _wrap(model, img_size, layout, blocks)
    else:
        if layout is not None or blocks is not None:
            raise UserError("layout and blocks are for a module of your own: of a model by name they are known")
        request = resolve(model, checkpoint, arch, weights_key, pretrained)
        loaded = _load(request, img_size, weights_key, pretrained)
        if request.registration is not None:
            loaded = _as_registered(loaded, request.registration, img_size, pretrained)
    return normalized(described(loaded, **said), values)


def require_loadable(
    model: str | Path,
    *,
    checkpoint: str | Path | None = None,
    arch: str | None = None,
    weights_key: str | None = None,
    img_size: ImageSize = None,
    name: str | None = None,
    paradigm: str | None = None,
    normalization: str | Sequence[Any] | None = None,
) -> None:
    """Raise the error of `load_model` for all that can be known without the weights.

    Args and Raises: as `load_model`. Weights that are not here are not downloaded, but asked for: their place answers.
    """
    if img_size is not None:
        pair(img_size)
    check_name(name)
    if paradigm is not None:
        find_paradigm(paradigm)
    if normalization is not None:
        find_normalization(normalization)
    request = resolve(model, checkpoint, arch, weights_key)
    if request.built.startswith(TRANSFORMERS):
        require_image_tower(request.built.removeprefix(TRANSFORMERS), img_size=img_size, weights=request.file)
    elif request.file is not None:
        outline(architecture_of(request.built), img_size=img_size, num_classes=0)
    elif request.name.startswith(TIMMS):
        require_repository(request.name.partition(":")[2], img_size)
    elif entry := find_official(request.name):
        outline(entry.spec.name, img_size=img_size)
        require_official(entry)
    elif (architecture := architecture_of(request.name)) in BUNDLED_ARCHITECTURES:
        _bundled_spec(request.name)
        outline(architecture, img_size=img_size)
    else:
        require_timm(request.name, architecture, img_size)


def _load(request: Request, img_size: ImageSize, weights_key: str | None, pretrained: bool) -> LoadedModel:
    """Load what is asked for by name."""
    if request.built.startswith(TRANSFORMERS):
        return load_from_transformers(request.built, request.file, img_size, pretrained, weights_key)
    if request.file is not None:
        # "This alias, from this file" says what the weights are; --arch says only how they are laid out.
        spec = None if request.arch else find_spec(request.name)
        return _load_file(request.file, request.built, spec, img_size, weights_key)
    if request.name.startswith(TIMMS):
        return load_repository(request.name.partition(":")[2], img_size, pretrained)
    if entry := find_official(request.name):
        return _load_official(entry, img_size, pretrained)
    architecture = architecture_of(request.name)
    if architecture in BUNDLED_ARCHITECTURES:
        return _load_bundled(request.name, architecture, img_size, pretrained)
    return load_from_timm(request.name, architecture, img_size, pretrained)


def _as_registered(
    model: LoadedModel, registration: Registration, img_size: ImageSize, pretrained: bool
) -> LoadedModel:
    """The model with what its registration says of it."""
    spec = registration.spec
    if registration.layout is not None:
        model = _wrap(model, img_size, registration.layout, None)
    if not pretrained:
        return described(model, name=f"{spec.name}-random")
    return described(model, name=spec.name, paradigm=spec.paradigm, method=spec.method, licence=spec.licence or None)


def _wrap(
    model: nn.Module | LoadedModel,
    img_size: ImageSize,
    layout: TokenLayout | None,
    blocks: Sequence[nn.Module] | None,
) -> LoadedModel:
    """Wrap a module that is built already, for its own image size or, where it takes any, for another."""
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
    made = finish(anatomy.module, spec, size or describe_preprocessing(anatomy.tower), anatomy)
    if loaded is None:
        return made
    return normalized(with_remarks(made, remarks_on_weights(loaded)), loaded.normalization)


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
