"""Checkpoint files: reading the weights out of one without running code in it, and fitting them to a model."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vitprobe.errors import UserError
from vitprobe.models.pickles import BadFileError, Foreign, TensorRecord, one_line
from vitprobe.models.saved_files import LEGACY_MAGIC, ZIP_MAGIC, read_legacy, read_zip

# Where official training checkpoints keep the weights, the likeliest first.
_HOLDERS = (
    *("model", "state_dict", "teacher", "student", "model_state", "model_state_dict", "model_ema", "state_dict_ema"),
    *("module", "net", "network", "target_encoder", "encoder", "backbone", "ema"),
)
# Where timm looks first in what it downloads: averaged weights, and of I-JEPA the context encoder.
_TIMMS_HOLDERS = ("state_dict_ema", "model_ema", "state_dict", "model", "encoder")
# Parts of key prefixes that wrappers put before a Vision Transformer's own names, the likeliest first.
_WRAPPERS = (
    *("module", "_orig_mod", "model", "teacher", "target_encoder", "base_encoder", "encoder", "student", "backbone"),
    *("vit", "visual", "trunk", "vision_model", "net", "network"),
)
# What pre-training leaves behind that the encoder does not have.
_LEFTOVERS = (
    *("mask_token", "predictor.", "pred_head.", "lm_head.", "relative_position_index"),
    "rel_pos_bias.relative_position_index",
)
_HEADS = ("head.", "head_dist.", "classifier.", "fc.", "attn_pool.")
_OTHER_ARCHITECTURE = "give the architecture it was trained with (--arch NAME)"
DOWNLOAD_AGAIN = "delete it to download it again"


def read_checkpoint(path: str | Path, *, first: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """The weights in a checkpoint file, by name: safetensors, or what `torch.save` wrote (also before torch 1.6).

    Nothing in the file is ever run or imported. A training checkpoint may hold the weights under "model",
    "state_dict", "teacher" and the like; its other content is left unread.

    Args:
        path: the file.
        first: names to look under before those.

    Raises:
        UserError: for a file that is missing, no checkpoint, damaged, or holds no weights.
    """
    path = Path(path)
    try:
        require_file(path)
        with path.open("rb") as file:
            head = file.read(64)
        return _read(path, head, (*first, *_HOLDERS))
    except BadFileError as error:
        raise UserError(f"{path} {error}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def require_file(path: Path) -> None:
    """Returns where a path is a file's.

    Raises:
        UserError: where it is a folder's or nothing is there.
    """
    if not path.exists():
        raise UserError(f"there is no checkpoint file {path}")
    if not path.is_file():
        raise UserError(f"{path} is not a file: give a checkpoint (.safetensors, .pth, .pt, .bin)")


def _read(path: Path, head: bytes, holders: tuple[str, ...]) -> dict[str, Tensor]:
    if head.startswith(ZIP_MAGIC):
        saved = read_zip(path)
    elif LEGACY_MAGIC in head[:32]:
        saved = read_legacy(path)
    elif path.suffix == ".safetensors" or head[8:9] == b"{":  # its header's length (8 bytes), then the header: JSON
        try:
            state = load_file(path)
        except (SafetensorError, ValueError, KeyError) as error:  # the last for kinds of numbers it does not know
            raise BadFileError(f"is no safetensors file, or a damaged one ({one_line(error)})") from error
        if not state:
            raise BadFileError("holds no weights")
        return state
    else:
        raise BadFileError(_what_instead(head))
    if isinstance(saved.content, Foreign):
        name = one_line(saved.content.label)
        raise BadFileError(
            f"holds a whole pickled object ({name}), which is code to run: save its state_dict() instead"
        )
    return saved.tensors(_find_records(saved.content, holders))


def _what_instead(head: bytes) -> str:
    """What a file that is no checkpoint looks like."""
    if not head:
        return "is empty"
    if head.lstrip()[:1] == b"<":
        return "is no checkpoint but a web page: download the file itself"
    if head.startswith(b"version https://git-lfs"):
        return "is no checkpoint but a Git LFS pointer to one: fetch it with git lfs pull"
    if head.startswith((b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM")):
        return "is no checkpoint but a picture"
    return "is no checkpoint: neither safetensors nor a file that torch.save wrote"


def _find_records(content: Any, likely: tuple[str, ...], depth: int = 3) -> dict[str, TensorRecord]:
    """The weights in a checkpoint's content: at the top, or under a known name, or under the only name that has any."""
    if not isinstance(content, dict):
        kind = "single tensor" if isinstance(content, TensorRecord) else type(content).__name__
        raise BadFileError(f"holds no weights by name but a {kind}")
    holders = [name for name in likely if _holds_weights(content.get(name), depth - 1)]
    records = {name: value for name, value in content.items() if _is_weight(name, value)}
    if not holders and not records:
        holders = [name for name, value in content.items() if _holds_weights(value, depth - 1)]
        if len(holders) > 1:
            raise BadFileError(f"holds several sets of weights ({_some(holders)}): save the one to use in a file alone")
    if holders:
        return _find_records(content[holders[0]], likely, depth - 1)
    if not records:
        raise BadFileError(f"holds no weights{': only ' + _some(map(str, content)) if content else ''}")
    return records


def _is_weight(name: Any, value: Any) -> bool:
    return isinstance(name, str) and isinstance(value, TensorRecord)


def _holds_weights(content: Any, depth: int) -> bool:
    if not isinstance(content, dict) or depth <= 0:
        return False
    return any(
        _is_weight(name, value) or (name in _HOLDERS and _holds_weights(value, depth - 1))
        for name, value in content.items()
    )


def strip_prefix(state: dict[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """The weights without the prefix of a wrapper ("module.", "backbone." …), where more `names` match without it.

    Where a prefix goes, so does what does not carry it (a projection head beside the backbone).
    """
    names = set(names)
    matches = Counter[str]()
    for key in state:
        parts = key.split(".")
        for count in range(1, min(len(parts), 5)):
            if parts[count - 1] not in _WRAPPERS:
                break
            if ".".join(parts[count:]) in names:
                matches[".".join(parts[:count]) + "."] += 1
    best = max(
        matches,
        key=lambda prefix: (matches[prefix], [-_WRAPPERS.index(part) for part in prefix[:-1].split(".")]),
        default="",
    )
    if matches[best] > sum(key in names for key in state):
        return {key[len(best) :]: value for key, value in state.items() if key.startswith(best)}
    # Names of another layout, which timm translates; these two prefixes never mean anything.
    for prefix in ("_orig_mod.", "module.", "_orig_mod."):
        if state and all(key.startswith(prefix) for key in state):
            state = {key[len(prefix) :]: value for key, value in state.items()}
    return state


def load_downloaded(module: nn.Module, path: Path) -> None:
    """Loads a file that was downloaded for timm's own config of a model: by timm's rules, but no code in it runs.

    Where that config counts other classes than the model has, the model keeps its own classifier.

    Raises:
        UserError: for a file that is damaged or does not fit.
    """
    try:
        state = read_checkpoint(path, first=_TIMMS_HOLDERS)
    except UserError as error:
        raise UserError(f"{error}; {DOWNLOAD_AGAIN}") from error
    target = module.state_dict()
    config: Any = module.pretrained_cfg
    if getattr(module, "num_classes", config["num_classes"]) != config["num_classes"]:
        heads = tuple(f"{name}." for name in _classifiers(module))
        state = {name: value for name, value in strip_prefix(state, target).items() if not name.startswith(heads)}
        state |= {name: value for name, value in target.items() if name.startswith(heads)}
    load_into(module, state, source=str(path), hint=DOWNLOAD_AGAIN)


def load_into(module: nn.Module, state: dict[str, Tensor], *, source: str, hint: str = _OTHER_ARCHITECTURE) -> None:
    """Loads weights into a model: the architecture's own translation in timm first, then every name must fit.

    Dropped are a wrapper's prefix, what pre-training leaves behind (mask token, decoder), and a classifier or attention
    pooling where the model has none. Position embeddings are resampled to the model's grid.

    Args:
        module: the model; changed only if everything fits.
        state: the weights by name, from `read_checkpoint`.
        source: what the message calls them.
        hint: what the message says to do.

    Raises:
        UserError: where names are missing or unexpected, or shapes differ; names the first three of each.
    """
    target = module.state_dict()
    state = strip_prefix(state, target)
    if any(name.startswith("decoder") for name in state):
        # With the decoder beside it a mask token is MAE's; timm would take the checkpoint for one of DINOv2.
        state = {name: value for name, value in state.items() if name != "mask_token"}
    state = {name: value for name, value in state.items() if not name.startswith("decoder") or name in target}
    _require_patch_size(state, target, module, source, hint)

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="timm")  # of what torch will drop, where it resamples tables
            translated = dict(_translation(module, state)(dict(state), module))
        trouble = ""
    except Exception as error:  # timm's translations trust the shapes they are given
        translated, trouble = dict(state), f" ({type(error).__name__}: {one_line(error)})"
    translated = {
        name: value
        for name, value in translated.items()
        if name in target or not (name.startswith((*_LEFTOVERS, *_HEADS)) or name.endswith("relative_position_index"))
    }
    missing = [name for name in target if name not in translated]
    unexpected = [name for name in translated if name not in target]
    unfit = [
        f"{one_line(name, 80)} (has {_describe(value)}, needs {_describe(target[name])})"
        for name, value in translated.items()
        if name in target and _describe(value) != _describe(target[name])
    ]
    faults = [
        f"{len(names)} {what}: {_some(names)}"
        for names, what in ((missing, "missing"), (unexpected, "unexpected"), (unfit, "of another shape"))
        if names
    ]
    if faults or trouble:
        raise UserError(
            f"{source} does not fit {_architecture(module)}: {'; '.join(faults) or 'it cannot be translated'}{trouble}"
            f" - {hint}"
        )
    module.load_state_dict(translated)


def classifier_size(state: dict[str, Tensor], module: nn.Module) -> int:
    """Classes of the linear classifier in weights for a model like `module`; 0 where there is none that fits."""
    state = strip_prefix(state, module.state_dict())
    sizes = set()
    for name in _classifiers(module):
        weight, bias = state.get(f"{name}.weight"), state.get(f"{name}.bias")
        if weight is None or bias is None or weight.ndim != 2:
            return 0
        if weight.shape[1] != getattr(module, "num_features", weight.shape[1]):
            return 0
        sizes.add(weight.shape[0])
    return sizes.pop() if len(sizes) == 1 else 0


def _classifiers(module: nn.Module) -> tuple[str, ...]:
    """Names of a model's linear classifiers."""
    names = (getattr(module, "pretrained_cfg", None) or {}).get("classifier") or "head"
    return (names,) if isinstance(names, str) else tuple(names)


def _translation(module: nn.Module, state: dict[str, Tensor]) -> Callable[..., Any]:
    """timm's `checkpoint_filter_fn` for an architecture or, where timm does not have it, for the class; or none."""
    architecture = _architecture(module)
    homes = [kind.__module__ for kind in type(module).__mro__]
    if timm.is_model(architecture):
        homes.insert(0, timm.model_entrypoint(architecture).__module__)
    part = "classifier" if type(module).__name__.endswith("Classifier") else "encoder"
    for home in homes:
        for name in ("checkpoint_filter_fn", f"checkpoint_filter_fn_{part}"):
            function = getattr(sys.modules.get(home), name, None)
            if function is not None:
                return partial(function, **_options(function, architecture, state))
    return lambda state, module: state


def _options(function: Callable[..., Any], architecture: str, state: dict[str, Tensor]) -> dict[str, Any]:
    """What timm's own models ask of their translation one by one."""
    known = inspect.signature(function).parameters
    options: dict[str, Any] = {}
    if "adapt_layer_scale" in known and any(".gamma_" in name for name in state):  # DeiT III's LayerScale
        options["adapt_layer_scale"] = True
    if "interpolation" in known and ("flexi" in architecture or "radio" in architecture):
        options |= {"interpolation": "bilinear", "antialias": False}
    if "align_corners" in known and architecture.endswith(("base_patch16_radio_v3", "huge_patch16_radio_v3")):
        options["align_corners"] = True
    return options


def _require_patch_size(
    state: dict[str, Tensor], target: dict[str, Tensor], module: nn.Module, source: str, hint: str
) -> None:
    """timm would resample another patch size's weights without a word, and the result is another model."""
    name = "patch_embed.proj.weight"
    if name in state and name in target and state[name].ndim == target[name].ndim == 4:
        found, wanted = state[name].shape[2:], target[name].shape[2:]
        if found != wanted:
            raise UserError(
                f"{source} does not fit {_architecture(module)}: its patches are {found[0]}×{found[1]} pixels, "
                f"the architecture's {wanted[0]}×{wanted[1]} ({name}) - {hint}"
            )


def _architecture(module: nn.Module) -> str:
    config = getattr(module, "pretrained_cfg", None) or {}
    return config.get("architecture") or type(module).__name__


def _describe(tensor: Tensor) -> str:
    """Shape, and the kind of number where it is not a real one."""
    shape = "×".join(map(str, tensor.shape)) or "one number"
    return shape if tensor.is_floating_point() else f"{shape} {str(tensor.dtype).removeprefix('torch.')}"


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(one_line(name, 80) for name in names[:3]) + (", …" if len(names) > 3 else "")
