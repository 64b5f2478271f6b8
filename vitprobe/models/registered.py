"""Aliases that users and plugins add to those that vitprobe ships. Imports neither torch nor timm."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vitprobe.errors import UserError
from vitprobe.models.entries import BUNDLED_ARCHITECTURES, ENTRIES, ModelSpec
from vitprobe.models.official.entries import OFFICIAL
from vitprobe.models.paradigms import find_paradigm
from vitprobe.models.repositories import CHECKPOINT_SUFFIXES, TIMMS, TRANSFORMERS, names_one_of_the_hub
from vitprobe.plugins import load_plugins

if TYPE_CHECKING:
    from vitprobe.layout import TokenLayout

SHIPPED = (*ENTRIES, *(entry.spec for entry in OFFICIAL.values()))
_SHIPPED = {spec.name: spec for spec in SHIPPED} | {spec.source.removeprefix("timm:"): spec for spec in SHIPPED}
_PREFIXES = (*TIMMS, TRANSFORMERS)
_REGISTERED: dict[str, Registration] = {}


@dataclass(frozen=True)
class Registration:
    """What an alias stands for.

    Attributes:
        spec: the entry of the registry; its name is the alias.
        source: what to load: a name that `load_model` knows, or the absolute path of a checkpoint file or folder.
        arch: the architecture of the weights in a file; None where `source` is no file.
        layout: which token is what; None to find that.
    """

    spec: ModelSpec
    source: str | Path
    arch: str | None = None
    layout: TokenLayout | None = None

    @property
    def path(self) -> Path | None:
        """The file or folder on this machine that is meant; None for a name."""
        text = str(self.source)
        path = Path(text.partition(":")[2] if text.startswith(_PREFIXES) else text)
        return path if isinstance(self.source, Path) or path.is_absolute() else None


def register(
    alias: str,
    source: str | Path,
    *,
    arch: str | None = None,
    layout: TokenLayout | None = None,
    paradigm: str = "other",
    method: str | None = None,
    licence: str | None = None,
    replace_earlier: bool = False,
) -> None:
    """Give a model an alias, for this process: in `load_model`, `analyze`, `verify`, `list_models`, and `--model`.

    Nothing is loaded or downloaded, and no file needs to exist yet.

    Args:
        alias: the new name: letters, digits, and `_ . + -`. It may not be one that vitprobe ships, or a timm name.
        source: a timm name with or without tag, "hf-hub:owner/name" (a repository of timm), "hf:owner/name" (of
            transformers), a folder that either wrote, or a checkpoint file, which needs `arch`. A relative path is
            relative to the current folder of this call.
        arch: the architecture of a checkpoint file: an alias or a timm name. Default None: `source` is no file.
        layout: which token is what. Default None: it is found.
        paradigm: a key of `PARADIGMS`: "MIM", "JEA", "hybrid", "supervised", "VLM", or "other" (default). With "other"
            a source that vitprobe knows keeps its own paradigm.
        method: how the model was trained, such as "MAE". Default None: that of a source that vitprobe knows, else
            "unknown".
        licence: of the weights. Default None: what the source states.
        replace_earlier: whether the alias may have been registered before for something else. Default False.

    Raises:
        UserError: for an alias that is taken or cannot be typed, an unknown paradigm, a file without `arch`, an `arch`
            without a file, or a layout that is none.

    Example:
        >>> import vitprobe as vp
        >>> vp.models.register("ours_vit_b", "runs/ours.pth", arch="vit_base_patch16_224", paradigm="MIM")
        >>> vp.list_models("ours_vit_b")[["name", "paradigm", "architecture"]].to_dict("records")
        [{'name': 'ours_vit_b', 'paradigm': 'MIM', 'architecture': 'vit_base_patch16_224'}]
    """
    if earlier := find_registration(source):
        source, arch, layout = earlier.source, arch or earlier.arch, layout or earlier.layout
    if not isinstance(alias, str) or not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", alias):
        raise UserError(f"{alias!r} cannot be an alias: use letters, digits, and _ . + -")
    if alias in _SHIPPED or alias in BUNDLED_ARCHITECTURES:
        raise UserError(f"{alias} is the name of a model that vitprobe ships: choose another alias")
    if layout is not None:
        from vitprobe.layout import TokenLayout  # needs torch

        if not isinstance(layout, TokenLayout):
            raise UserError(f"the layout of {alias} is {layout!r}: give a vitprobe.TokenLayout")
    source = _absolute(alias, source, arch)
    known = _SHIPPED.get(str(source))
    paradigm = find_paradigm(paradigm)
    architecture, where = _what_and_where(source, arch)
    spec = ModelSpec(
        name=alias,
        method=method or (known.method if known else "unknown"),
        paradigm=known.paradigm if known and paradigm == "other" else paradigm,
        architecture=architecture,
        source=where,
        normalisation=known.normalisation if known else "other",
        licence=(known.licence if known else "") if licence is None else licence,
        citation=known.citation if known else "",
        notes="registered in this process",
    )
    made = Registration(spec, source, arch, layout)
    if _REGISTERED.get(alias, made) != made and not replace_earlier:
        raise UserError(
            f"the alias {alias} is registered already, for {_REGISTERED[alias].source}: choose another, or pass "
            f"replace_earlier=True"
        )
    _REGISTERED[alias] = made


def find_registration(alias: object) -> Registration | None:
    """Return what an alias was registered for, here or by a plugin; None for any other name or object."""
    if not isinstance(alias, str):
        return None
    if alias not in _REGISTERED and alias not in _SHIPPED:
        load_plugins()
    return _REGISTERED.get(alias)


def registered_specs() -> tuple[ModelSpec, ...]:
    """Return the entries of all registered aliases, in the order of their registration; plugins' are among them."""
    load_plugins()
    return tuple(made.spec for made in _REGISTERED.values())


def _absolute(alias: str, source: str | Path, arch: str | None) -> str | Path:
    """The source, with the absolute path of what is a file or a folder."""
    if not isinstance(source, str | Path) or not str(source):
        raise UserError(f"the source of {alias} is {source!r}: give a model's name, a folder, or a checkpoint file")
    text = str(source)
    if text.startswith(_PREFIXES):
        if arch is not None:
            raise UserError(f"arch is for a checkpoint file, and {text} says its own: leave it out")
        return _repository(text)
    is_file = isinstance(source, Path) or arch is not None or text.endswith(CHECKPOINT_SUFFIXES)
    path = Path(text).expanduser().absolute()
    if path.is_dir():
        if arch is not None:
            raise UserError(f"arch is for a checkpoint file, and {text} is a folder: leave it out")
        return path
    if not is_file and ("/" in text or "\\" in text) and not path.is_file():
        raise UserError(
            f"there is no file or folder {text}; for a repository of the Hugging Face hub write hf:{text} or "
            f"hf-hub:{text}"
        )
    if not is_file and (text in _SHIPPED or not path.is_file()):
        return text
    if arch is None:
        raise UserError(
            f"{text} needs the name of its architecture: arch= with an alias (mae_vit_b) or a timm name "
            f"(vit_base_patch16_224)"
        )
    return path


def _repository(text: str) -> str:
    """A repository with its prefix in one spelling, and with the absolute path of a folder."""
    prefix, _, name = text.replace("hf_hub:", "hf-hub:", 1).partition(":")
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file() or name.startswith((".", "/", "~", "\\")):
        return f"{prefix}:{folder.absolute()}"
    if not names_one_of_the_hub(name.partition("@")[0]):
        raise UserError(f"{text} names no repository: write {prefix}:owner/name, or {prefix}:./DIR for a folder")
    return f"{prefix}:{name}"


def _what_and_where(source: str | Path, arch: str | None) -> tuple[str, str]:
    """The architecture ("" where only a load tells) and the `source` of an alias's entry, as `ModelSpec` has them."""
    text = str(source)
    if isinstance(source, Path):
        return arch or "", f"{'file' if arch else 'folder'}:{source.name}"
    if known := _SHIPPED.get(text):
        return known.architecture, known.source
    if text.startswith(_PREFIXES):
        return "", text
    architecture, _, tag = text.partition(".")
    return architecture, f"timm:{text}" if tag else text  # which weights an untagged name means, only timm knows
