"""What the arguments of `load_model` ask for: a model's name, the file of its weights, the architecture in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import timm

from vitprobe.errors import UserError
from vitprobe.models.anatomy.copies import why_copy
from vitprobe.models.building import architecture_of
from vitprobe.models.checkpoints import require_file
from vitprobe.models.folders import in_folder
from vitprobe.models.registered import Registration, find_registration
from vitprobe.models.registry import find_spec
from vitprobe.models.repositories import CHECKPOINT_SUFFIXES, TIMMS, TRANSFORMERS, names_one_of_the_hub


@dataclass(frozen=True)
class Request:
    """A model that is asked for by name.

    Attributes:
        name: of the model, no alias of a user's.
        file: with the weights; None for those that belong to the name.
        arch: the architecture in the file, where it was given beside the model's name.
        registration: what an alias of a user's says of the model; None for other names.
    """

    name: str
    file: Path | None = None
    arch: str | None = None
    registration: Registration | None = None

    @property
    def built(self) -> str:
        """The name of what is to be built."""
        return self.arch or self.name


def resolve(
    model: object, checkpoint: str | Path | None, arch: str | None, weights_key: str | None, pretrained: bool = True
) -> Request:
    """Say what is asked for, whatever mixture of aliases, names, files, and folders asks for it.

    Args: as `load_model`.

    Raises:
        UserError: for what is no name or file, a file that is not there or has no architecture, and arguments that
            exclude each other.
    """
    registration = find_registration(model)
    if registration is None:
        return _resolve(model, checkpoint, _unaliased(arch), weights_key, pretrained)
    alias = registration.spec.name
    if timm.is_model(alias):
        raise UserError(f"the alias {alias} was registered, and timm has a model of this name: choose another alias")
    if checkpoint is None:
        if arch is not None:
            raise UserError(_no_file("arch", alias))
        found = _resolve(registration.source, None, registration.arch, weights_key, pretrained)
    else:
        found = _resolve(_unaliased(alias), checkpoint, _unaliased(arch), weights_key, pretrained)
    return Request(found.name, found.file, found.arch, registration)


def _unaliased(name: str | None) -> str | None:
    """The architecture that a user's alias stands for; any other name itself."""
    registration = find_registration(name)
    return name if registration is None else registration.arch or str(registration.source)


def _resolve(
    model: object, checkpoint: str | Path | None, arch: str | None, weights_key: str | None, pretrained: bool
) -> Request:
    """The same without aliases of a user's."""
    if not isinstance(model, str | Path):
        raise UserError(
            why_copy(model) or f"a model is a name, a checkpoint file, an nn.Module or a LoadedModel, not {model!r}"
        )
    name, arch = in_folder(model), None if arch is None else str(in_folder(arch))
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
        for given, argument in ((arch, "arch"), (weights_key, "weights_key")):
            if given is not None:
                raise UserError(_no_file(argument, name))
        return Request(name)
    if not pretrained:
        raise UserError(f"random weights (pretrained=False) and those of {checkpoint} exclude each other")
    require_file(Path(checkpoint))
    return Request(name, Path(checkpoint), arch)


def _no_file(argument: str, name: str) -> str:
    return f"{argument} is for a checkpoint file: leave it out, or give the weights of {name} with --checkpoint FILE"


def _require_one_architecture(name: str, arch: str) -> None:
    """Raise a UserError where a model's name and --arch say different things of one file."""

    def architecture(named: str) -> str:
        if named.startswith((*TIMMS, TRANSFORMERS)):
            return named
        spec = find_spec(named)
        return (spec.architecture if spec else architecture_of(named)).partition(".")[0]

    if architecture(name) != architecture(arch):
        raise UserError(
            f"--model {name} and --arch {arch} are two architectures for one file: leave one of the two out"
        )


def _looks_like_file(name: str) -> bool:
    """Whether a name means a file: an existing one, or one with a checkpoint's suffix; never a known model."""
    if find_spec(name) is not None or name.startswith((*TIMMS, TRANSFORMERS)):
        return False
    if name.endswith(CHECKPOINT_SUFFIXES):
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
