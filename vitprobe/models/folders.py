"""Models in a folder on this machine, as `save_pretrained` of transformers or timm's `save_for_hf` writes them."""

from __future__ import annotations

import json
from pathlib import Path

import timm

from vitprobe.errors import UserError
from vitprobe.models.registry import find_spec
from vitprobe.models.repositories import TIMMS, TRANSFORMERS, what_in

_TIMMS_OWN = "local-dir:"


def in_folder(name: str | Path) -> str | Path:
    """Return the name under which a folder's model is loaded, "hf:DIR" or "hf-hub:DIR"; any other name unchanged.

    A folder that is called like a known model does not hide it.

    Raises:
        UserError: for a path of a folder that does not say what model it holds.
    """
    text = str(name)
    if text.startswith(_TIMMS_OWN):
        folder = Path(text.removeprefix(_TIMMS_OWN)).expanduser()
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder}")
    elif isinstance(name, str) and (
        name.startswith((*TIMMS, TRANSFORMERS)) or find_spec(name) or timm.is_model(name.partition(".")[0])
    ):
        return name
    else:
        folder = Path(name).expanduser()
    if not text or not folder.is_dir():
        return name
    path = f"./{folder}" if not folder.is_absolute() else str(folder)
    if not (folder / "config.json").is_file():
        if not isinstance(name, Path) and "/" not in text and text not in (".", ".."):
            return name  # a word that may be a model's
        raise UserError(f"the folder {folder} holds no config.json: {what_in(folder)}")
    return (TIMMS[0] if _is_timms(folder / "config.json") else TRANSFORMERS) + path


def _is_timms(path: Path) -> bool:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        return "architecture" in config and config.get("model_type", "timm_wrapper") == "timm_wrapper"
    except (OSError, ValueError, AttributeError, TypeError):
        return False  # what is wrong with it is said when it is read
