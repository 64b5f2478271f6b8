"""What the name of a repository means: one of the Hugging Face hub, or a folder on this machine; asks no network."""

from __future__ import annotations

import re
from pathlib import Path

from vitprobe.errors import UserError
from vitprobe.models.entries import ADDRESSES

TRANSFORMERS = "hf:"  # before a repository or folder that transformers wrote
TIMMS = ("hf-hub:", "hf_hub:")  # before one that timm wrote; the first is ours
CHECKPOINT_SUFFIXES = (
    *(".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar", ".pyth", ".npz"),
    ".index.json",
)


def hub_repository(source: str) -> str | None:
    """Return the Hugging Face repository (`owner/name` or `owner/name@revision`) of a spec's source, or None."""
    kind, _, name = source.partition(":")
    if kind in ("hf-hub", "hf"):
        return name
    if kind != "timm" or source in ADDRESSES:
        return None
    # The same weights with another activation: timm keeps one repository for both.
    return "timm/" + name.replace("_clip_quickgelu_", "_clip_")


def local_folder(repository: str) -> Path | None:
    """Return the folder on this machine that a repository's name means; None for a repository of the hub.

    A folder with a config.json comes before a repository of the same name.

    Raises:
        UserError: for a path without such a folder.
    """
    folder = Path(repository).expanduser()
    if repository and (folder / "config.json").is_file():
        return folder
    if not repository.startswith((".", "/", "~", "\\")) and repository.rstrip("/").count("/") < 2:
        return None
    if not folder.is_dir():
        raise UserError(f"there is no folder {repository}")
    raise UserError(f"the folder {repository} holds no config.json: {what_in(folder)}")


def what_in(folder: Path) -> str:
    """Say what to give instead of a folder without a config.json."""
    if (folder / "adapter_config.json").is_file():
        return "it is an adapter of PEFT: load it with its model, call merge_and_unload(), and save what that gives"
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    endings = (".safetensors.index.json", ".bin.index.json", ".safetensors", ".npz", ".bin", ".pth", ".pt", ".ckpt")
    files = [name for ending in endings for name in names if name.endswith(ending)]
    if files:
        return f"give the file {folder / files[0]} with its architecture (--arch NAME)"
    return "give a folder that save_pretrained wrote, or a checkpoint file"


def names_one_of_the_hub(repository: str) -> bool:
    """Return whether a repository of the hub may have this name."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repository) is not None


def at_commit(repository: str, file: Path) -> str:
    """Return the repository at the commit of one of its cached files; a local folder unchanged."""
    return repository if local_folder(repository) else f"{repository.partition('@')[0]}@{file.parent.name}"


def name_of(repository: str) -> str:
    """Return the last part of a repository's or folder's name."""
    folder = local_folder(repository)
    return folder.resolve().name if folder else repository.partition("@")[0].rpartition("/")[2]


def source_of(prefix: str, repository: str) -> str:
    """Return the `source` of a repository's or folder's `ModelSpec`."""
    return f"folder:{name_of(repository)}" if local_folder(repository) else f"{prefix}{repository}"


def remark_on_folder(prefix: str, repository: str) -> tuple[str, ...]:
    """Return the remark on a folder that is called like a repository of the hub."""
    if local_folder(repository) is None or not names_one_of_the_hub(repository):
        return ()
    return (f"read the folder {repository} that is here; for that of the hub write {prefix}{repository}@main",)
