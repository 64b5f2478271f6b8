"""Checkpoint files: reading the weights out of one without running code in it, and fitting them to a model."""

from __future__ import annotations

import inspect
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vitprobe.errors import UserError
from vitprobe.models.flax_files import RESAMPLING, is_archive, read_archive
from vitprobe.models.pickles import BadFileError, Foreign, one_line
from vitprobe.models.position_grids import source_grid
from vitprobe.models.roles import said, words_of
from vitprobe.models.saved_files import LEGACY_MAGIC, ZIP_MAGIC, read_legacy, read_zip, records_of
from vitprobe.models.shards import INDEX, files_of_index, require_whole
from vitprobe.models.weight_names import as_named, find_adapter, strip_prefix
from vitprobe.models.weight_sets import find_weights, under_prefix

# Where timm looks first in what it downloads: averaged weights, and of I-JEPA the context encoder.
_TIMMS_HOLDERS = ("state_dict_ema", "model_ema", "state_dict", "model", "encoder")
# What pre-training leaves behind that the encoder does not have.
_LEFTOVERS = (
    *("mask_token", "predictor.", "pred_head.", "lm_head.", "relative_position_index"),
    *("rel_pos_bias.relative_position_index", "n_averaged"),
)
# First words of names that belong to the encoder, so that a model without them is another one; and those that do not.
_ENCODER = {
    *("attn", "attention", "bias", "block", "blocks", "cls", "embed", "embedding", "embeddings", "encoder", "gamma"),
    *("ln", "layer", "layers", "ls", "mlp", "norm", "patch", "pos", "position", "positional", "reg", "register"),
    *("registers", "rel", "relative", "rope", "stem", "storage", "token", "tokens", "trunk"),
}
_BESIDE = {
    *("head", "heads", "projector", "projection", "predictor", "decoder", "classifier", "prototypes", "center"),
    *("queue", "text", "teacher", "momentum", "ema"),
}
_HEADS = ("head.", "head_dist.", "classifier.", "fc.", "attn_pool.")
OTHER_ARCHITECTURE = "give the architecture it was trained with (--arch NAME)"
_FEW = 8  # weights that may be left over; of a larger model a sixth of its own number
DOWNLOAD_AGAIN = "delete it to download it again"


@dataclass(frozen=True)
class Checkpoint:
    """The weights in a file.

    Attributes:
        state: by name; of several sets in the file the one that was taken.
        others: keys of the sets that were not.
        remarks: what a user must read of the choice.
        resampling: how a table of positions in it is resampled, where not as usual.
    """

    state: dict[str, Tensor]
    others: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    resampling: Mapping[str, Any] = field(default_factory=dict)

    def named(self, names: Iterable[str]) -> Checkpoint:
        """The same under the names of a model, without a wrapper's prefix; of several prefixes the one to take."""
        found = as_named(self.state, set(names))
        remarks = self.remarks + said(found.taken, found.others)
        return replace(self, state=found.state, others=(*self.others, *found.others), remarks=remarks)

    @property
    def choice(self) -> str:
        """What to add to a message that the weights do not fit."""
        known = [key for key in self.others if key]
        return f"; the file also holds {', '.join(known[:4])} (--weights-key {known[0]})" if known else ""


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The weights in a checkpoint file, by name, see `open_checkpoint`."""
    return open_checkpoint(path).state


def open_checkpoint(path: str | Path, *, key: str | None = None, first: tuple[str, ...] = ()) -> Checkpoint:
    """The weights in a checkpoint file: safetensors, what `torch.save` wrote (also before torch 1.6), Google's .npz, or
    the index of several files.

    Nothing in the file is ever run or imported. A training checkpoint may hold the weights under "model",
    "state_dict", "teacher" and the like; its other content is left unread.

    Args:
        path: the file.
        key: which of several sets of weights to take; averaged ones before others without.
        first: names to look under before all others.

    Raises:
        UserError: for a file that is missing, no checkpoint, damaged, or holds no weights; for an adapter that was not
            merged into the weights.
    """
    path = Path(path)
    try:
        require_file(path)
        if path.name.endswith(INDEX):
            state = {name: tensor for file in files_of_index(path) for name, tensor in _open(file).state.items()}
            found = _under(Checkpoint(state), key)
        else:
            require_whole(path)
            found = _open(path, key, first)
        adapter = find_adapter(found.state)
        if adapter is not None:
            raise BadFileError(
                f"holds an adapter that is not merged into the weights ({one_line(adapter, 80)}): call "
                f"merge_and_unload() on the PEFT model, and save the state_dict() of what that gives"
            )
    except BadFileError as error:
        raise UserError(f"{path} {error}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    return found


def require_file(path: Path) -> None:
    """Returns where a path is a file's.

    Raises:
        UserError: where it is a folder's or nothing is there.
    """
    if not path.exists():
        raise UserError(f"there is no checkpoint file {path}")
    if (path / "config.json").is_file():
        raise UserError(f"{path} is a folder with a model's weights and its config.json: give it as --model {path}")
    if not path.is_file():
        raise UserError(f"{path} is not a file: give a checkpoint (.safetensors, .pth, .pt, .bin)")


def _open(path: Path, key: str | None = None, first: tuple[str, ...] = ()) -> Checkpoint:
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(ZIP_MAGIC):
        if is_archive(records_of(path)):
            return _under(Checkpoint(read_archive(path), resampling=RESAMPLING), key)
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
        return _under(Checkpoint(state), key)
    else:
        raise BadFileError(_what_instead(head))
    if isinstance(saved.content, Foreign):
        name = one_line(saved.content.label)
        raise BadFileError(
            f"holds a whole pickled object ({name}), which is code to run: save its state_dict() instead"
        )
    found = find_weights(saved.content, first, key)
    return Checkpoint(saved.tensors(found.records), found.others, found.remarks)


def _under(found: Checkpoint, key: str | None) -> Checkpoint:
    """The weights of a file without dictionaries in it whose names begin with a key."""
    return found if key is None else replace(found, state=under_prefix({"": found.state}, key)[1])


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


def load_downloaded(module: nn.Module, path: Path, hint: str = DOWNLOAD_AGAIN) -> tuple[str, ...]:
    """Loads a file that was downloaded for timm's own config of a model: by timm's rules, but no code in it runs.

    Where that config counts other classes than the model has, the model keeps its own classifier. `hint` says what to
    do with a file that does not fit; the remarks that it gives are those of `load_into`.

    Raises:
        UserError: for a file that is damaged or does not fit.
    """
    try:
        state = open_checkpoint(path, first=_TIMMS_HOLDERS).state
    except UserError as error:
        raise UserError(f"{error}; {hint}" if hint else str(error)) from error
    target = module.state_dict()
    config: Any = module.pretrained_cfg
    if getattr(module, "num_classes", config["num_classes"]) != config["num_classes"]:
        heads = tuple(f"{name}." for name in _classifiers(module))
        state = {name: value for name, value in strip_prefix(state, target).items() if not name.startswith(heads)}
        state |= {name: value for name, value in target.items() if name.startswith(heads)}
    return load_into(module, state, source=str(path), hint=hint or OTHER_ARCHITECTURE)


def load_into(
    module: nn.Module,
    state: dict[str, Tensor],
    *,
    source: str,
    hint: str = OTHER_ARCHITECTURE,
    resampling: Mapping[str, Any] | None = None,
) -> tuple[str, ...]:
    """Loads weights into a model: the architecture's own translation in timm first, then every name must fit.

    Dropped are a wrapper's prefix, what pre-training leaves behind (mask token, decoder), and a classifier or attention
    pooling where the model has none; a few other weights that are no encoder's. Position embeddings are resampled to
    the model's grid.

    Args:
        module: the model; changed only if everything fits.
        state: the weights by name, from `read_checkpoint`.
        source: what the message calls them.
        hint: what the message says to do.
        resampling: how, where not as timm does it for the architecture.

    Returns:
        What a user must read of it: a grid that was assumed, weights that were left out.

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

    remarks: list[str] = []
    try:
        with warnings.catch_warnings(), source_grid(module, state) as remarks:
            warnings.filterwarnings("ignore", module="timm")  # of what torch will drop, where it resamples tables
            translated = dict(_translation(module, state, resampling)(dict(state), module))
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
    beside = [name for name in unexpected if not _is_encoders(name, target)]
    if len(beside) == len(unexpected) <= max(_FEW, len(target) // 6) and beside:
        remarks.append(
            f"{len(beside)} weights in the file are no part of the encoder and were left out: {_some(beside)}"
            if len(beside) > 1
            else f"{one_line(beside[0], 80)} in the file is no part of the encoder and was left out"
        )
        translated = {name: value for name, value in translated.items() if name in target}
        unexpected = []
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
    return tuple(remarks)


def _is_encoders(name: str, target: Mapping[str, Any]) -> bool:
    """Whether a weight that a model lacks is of an encoder: then the file is of another architecture."""
    first = name.partition(".")[0]
    words = words_of(first)
    return (
        not re.fullmatch(r"[\w.-]+", name)
        or any(own.partition(".")[0] == first for own in target)
        or (bool(words & _ENCODER) and not words & _BESIDE)
    )


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


def _translation(
    module: nn.Module, state: dict[str, Tensor], resampling: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
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
                return partial(function, **_options(function, architecture, state, resampling or {}))
    return lambda state, module: state


def _options(
    function: Callable[..., Any], architecture: str, state: dict[str, Tensor], resampling: Mapping[str, Any]
) -> dict[str, Any]:
    """What timm's own models ask of their translation one by one."""
    known = inspect.signature(function).parameters
    options: dict[str, Any] = {}
    if "adapt_layer_scale" in known and any(".gamma_" in name for name in state):  # DeiT III's LayerScale
        options["adapt_layer_scale"] = True
    if "interpolation" in known and ("flexi" in architecture or "radio" in architecture):
        options |= {"interpolation": "bilinear", "antialias": False}
    if "align_corners" in known and architecture.endswith(("base_patch16_radio_v3", "huge_patch16_radio_v3")):
        options["align_corners"] = True
    return options | {name: value for name, value in resampling.items() if name in known}


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
