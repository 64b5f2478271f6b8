"""WebDataset tars as a stream, a tar a part; which tars there are, timm's reader says."""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import closing, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from timm.data.readers.reader_factory import create_reader
from timm.utils.misc import natural_key

from vitprobe.data.decoding import EXTENSIONS
from vitprobe.data.images import Groups, digest, file_size, printable
from vitprobe.data.streams import Sample, StreamImages, quiet, require, whole_part
from vitprobe.errors import UserError


class WebDatasetImages(StreamImages):
    """The samples of WebDataset tars, the first image of each; its name is the tar's and the sample's key."""

    def __init__(self, source: str, urls: list[str], groups: Groups = None) -> None:
        super().__init__(source, len(urls), groups)
        self.urls = urls

    def samples(self, part: int) -> Generator[Sample, None, None]:
        """The samples of a tar."""
        from webdataset.gopen import gopen
        from webdataset.tariterators import group_by_keys, tar_file_expander

        url = self.urls[part]
        _require_end(url)
        with whole_part(url), closing(gopen(url)) as stream:
            for sample in group_by_keys(tar_file_expander([{"url": url, "stream": stream}])):
                content = next((sample[kind[1:]] for kind in EXTENSIONS if kind[1:] in sample), None)
                name = printable(f"{_name(url)}/{sample['__key__']}")
                yield Sample(name, content, "its sample holds no image", _label(sample))

    def fingerprint(self) -> str:
        """sha256 over the tars' names, and the sizes of those on a disk."""
        return digest(f"{_name(url)}\0{file_size(Path(url))}" for url in self.urls)


def open_webdataset(spec: str, groups: Groups = None) -> WebDatasetImages:
    """The tars that `spec` names: "DIR/{0000..0063}.tar" (or URLs), a folder of tars, or "DIR#SPLIT" of its _info.json.

    Raises:
        UserError: for none, for one that is not there, or without the package webdataset.
    """
    require("webdataset", "wds:…")
    shown = f"wds:{printable(spec)}"
    path, _, split = spec.partition("#")
    if Path(path).is_dir() and not split:
        urls = [str(tar) for tar in tars_of(Path(path))]
    else:
        root, pattern = (path, split) if split else path.rpartition("/")[::2]
        try:
            with quiet("timm.data.readers.reader_wds"):  # which says that there is no _info.json
                reader: Any = create_reader("wds/", root=root, split=pattern, is_training=False)
        except (RuntimeError, KeyError, ValueError, AttributeError) as error:
            raise UserError(f"{shown} cannot be opened: {' '.join(str(error).split())}") from None
        urls = [f"{root}/{name}" if root else name for name in reader.split_info.filenames]
    if not urls:
        raise UserError(f"{shown} holds no .tar")
    absent = [url for url in urls if ":" not in url and not Path(url).is_file()]
    if absent:
        raise UserError(
            f"{shown}: {printable(absent[0])} does not exist; give DIR/{{0000..0063}}.tar, or a folder of tars"
        )
    return WebDatasetImages(shown, urls, groups)


def tars_of(folder: Path) -> list[Path]:
    """The tars in a folder, in natural order."""
    return sorted(folder.glob("[!.]*.tar"), key=lambda tar: (natural_key(tar.name), tar.name))


def _label(sample: dict[str, Any]) -> str | None:
    """The class of a sample: its .cls, or "label" or "cls" of its .json."""
    if "cls" in sample:
        return sample["cls"].decode(errors="replace").strip()
    with suppress(KeyError, ValueError):
        said = json.loads(sample["json"])
        found = next((said[key] for key in ("label", "cls") if key in said), None) if isinstance(said, dict) else None
        return None if found is None else str(found)
    return None


def _require_end(url: str) -> None:
    """A tar ends with blocks of zeros; of one cut off between two files nothing else would tell.

    Raises:
        UserError: for one on a disk that does not.
    """
    if PurePosixPath(url).suffix == ".tar" and Path(url).is_file():
        with whole_part(url), Path(url).open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - 512))
            if any(file.read()):
                raise UserError(f"{url} cannot be read to its end (it is cut off); mend it, and --resume goes on")


def _name(url: str) -> str:
    return PurePosixPath(url).name
