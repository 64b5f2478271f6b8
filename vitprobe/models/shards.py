"""Weights in several files, and the index that lists them: what `save_pretrained` writes of large models."""

from __future__ import annotations

import json
import re
from pathlib import Path

from vitprobe.models.pickles import BadFileError, one_line

INDEX = ".index.json"
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.\w+)$")


def names_in_index(path: Path) -> list[str]:
    """The files that an index lists, each once.

    Raises:
        BadFileError: where it lists none, or files of other folders.
    """
    try:
        names = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadFileError("is damaged: it lists no weights") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise BadFileError(f"lists {one_line(name, 80)}, which is no file beside it")
    if not names:
        raise BadFileError("is damaged: it lists no weights")
    return names


def files_of_index(path: Path) -> list[Path]:
    """The files that an index lists; all of them are there.

    Raises:
        BadFileError: where one is not, and as `names_in_index`.
    """
    files = [path.with_name(name) for name in names_in_index(path)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise BadFileError(
            f"lists {len(files)} files, and {len(missing)} of them are not beside it: {one_line(missing[0], 80)}"
            + (", …" if len(missing) > 1 else "")
        )
    return files


def require_whole(path: Path) -> None:
    """Returns where a file's name does not say that it is one of several.

    Raises:
        BadFileError: where it does; says what to give.
    """
    match = _SHARD.match(path.name)
    if match is None or int(match[3]) < 2:
        return
    index = path.with_name(f"{match[1]}{match[4]}{INDEX}")
    what = f"is one of {int(match[3])} files that hold the weights together: give their index, {index}"
    raise BadFileError(what if index.is_file() else f"{what} (it is not here, but beside them where they are from)")
