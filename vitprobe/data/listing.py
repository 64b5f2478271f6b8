"""Which files of a folder or a tar are images, and which are left out: hidden ones, and those of other kinds."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from timm.utils.misc import natural_key

from vitprobe.data.decoding import EXTENSIONS

_SYSTEM = frozenset({"__macosx", "thumbs.db", "desktop.ini"})  # what other systems leave beside files
_NAMED = 5  # files that a remark names
_LISTED = 1000  # and a manifest


class LeftOut(NamedTuple):
    """Files that were there and are not among the images.

    Attributes:
        others: those that are no images by their names.
        hidden: those that are hidden, and hidden folders, which are not looked into.
        source: the folder or tar.
    """

    others: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()
    source: str = ""

    @property
    def names(self) -> list[str]:
        """All of them, up to a thousand, for a manifest."""
        return [printable(name) for name in (*self.others, *self.hidden)[:_LISTED]]

    def describe(self) -> list[str]:
        """A remark for the reader, or none."""
        parts = [f"{len(names)} {word(len(names))}: {_some(names)}" for names, word in (
            (self.others, lambda count: "file that is no picture" if count == 1 else "files that are no pictures"),
            (self.hidden, lambda count: "hidden one" if count == 1 else "hidden ones"),
        ) if names]  # fmt: skip
        return [f"of {self.source} left out: {'; '.join(parts)}"] if parts else []


class Member(NamedTuple):
    """An image in a tar: its name (after that of the tar inside that holds it), and where its bytes are."""

    name: str
    start: int
    size: int


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or another system's."""
    return name.startswith(".") or name.casefold() in _SYSTEM


def list_folder(folder: Path) -> tuple[list[str], LeftOut]:
    """The images below a folder, in natural order, by their paths from there.

    Links are followed, but no folder is listed twice: a link to one that is listed already, or to one above, has no
    images of its own. Real folders come first, so theirs are the names that stay.

    Raises:
        ValueError: for a name that timm's natural order cannot place.
    """
    seen = set(folder.resolve().parents)
    names: list[str] = []
    others: list[str] = []
    hidden: list[str] = []
    pending = [folder]
    for start in pending:  # grows by the links found on the way
        for root, subfolders, files in os.walk(start):  # does not go into links
            here = Path(root)
            real = here.resolve()
            if real in seen:
                subfolders.clear()
                continue
            seen.add(real)
            within = here.relative_to(folder)
            hidden += [(within / name).as_posix() + "/" for name in subfolders if is_hidden(name)]
            subfolders[:] = sorted(name for name in subfolders if not is_hidden(name))
            pending += [here / name for name in subfolders if (here / name).is_symlink()]
            for name in files:
                kind = hidden if is_hidden(name) else names if _is_image(name) else others
                kind.append((within / name).as_posix())
    return _ordered(names), LeftOut(tuple(sorted(others)), tuple(sorted(hidden)), printable(str(folder)))


def list_tar(path: Path) -> tuple[list[Member], LeftOut]:
    """The images of a plain tar and of the tars inside it, in the natural order of their names there.

    Raises:
        tarfile.TarError, EOFError, OSError: for a broken tar.
        ValueError: for a name that timm's natural order cannot place.
    """
    others: list[str] = []
    hidden: list[str] = []

    def listed(tar: tarfile.TarFile, before: str, offset: int) -> Iterator[tuple[str, Member]]:
        own = []
        for member in tar:
            if not member.isfile():
                continue
            name, start = before + member.name, offset + member.offset_data
            if any(map(is_hidden, PurePosixPath(member.name).parts)):
                hidden.append(name)
            elif member.name.lower().endswith(".tar"):
                with tarfile.open(fileobj=tar.extractfile(member), mode="r:") as inner:
                    yield from listed(inner, f"{name}/", start)
            elif _is_image(member.name):
                own.append((member.name, Member(name, start, member.size)))
            else:
                others.append(name)
        yield from own

    with tarfile.open(path, "r:") as tar:
        found = list(listed(tar, "", 0))
    found.sort(key=lambda pair: natural_key(pair[0]))  # as timm, whose order is by the name in the inner tar
    return [member for _, member in found], LeftOut(tuple(sorted(others)), tuple(sorted(hidden)), printable(str(path)))


def printable(name: str) -> str:
    """A name without line breaks and bytes that are no text, which a message or a manifest could not hold."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def _is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in EXTENSIONS


def _ordered(names: Iterable[str]) -> list[str]:
    # timm's order ignores upper and lower case, so names that differ in nothing else come as the disk has them
    return sorted(names, key=lambda name: (natural_key(name), name))


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(map(printable, names[:_NAMED])) + (", …" if len(names) > _NAMED else "")
