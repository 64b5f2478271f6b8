"""Labelled images from Hugging Face data sets and WebDatasets; a stream is read once into memory, encoded."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from io import BytesIO
from pathlib import Path
from typing import Any

from vitprobe.data.bands import Picture
from vitprobe.data.decoding import BadImageError, decode
from vitprobe.data.hub_sets import SPLIT, class_names, label_column, open_hub, split_names
from vitprobe.data.images import Images, digest
from vitprobe.data.parts import Part, Parts, test_among
from vitprobe.data.streams import StreamImages
from vitprobe.data.webdatasets import WebDatasetImages, open_webdataset, tars_of
from vitprobe.errors import UserError
from vitprobe.memory import available_memory

_SHARE = 0.5  # of the memory that is available, for the files of a stream


class StoredImages(Images):
    """The images of a stream, held as the files that they came in."""

    def __init__(self, source: str, names: list[str], contents: list[bytes | str]) -> None:
        """`contents` has a file's bytes, or why there are none."""
        super().__init__(source, names)
        self.contents = contents

    def read(self, index: int) -> Picture:
        """The picture."""
        return decode(self.open(index), self.names[index], self.wanted)

    def open(self, index: int) -> BytesIO:
        """The file."""
        content = self.contents[index]
        if isinstance(content, str):
            raise BadImageError(self.names[index], content)
        return BytesIO(content)

    def fingerprint(self) -> str:
        """sha256 over names and byte sizes."""
        return digest(f"{name}\0{len(content)}" for name, content in zip(self.names, self.contents, strict=True))


def hub_parts(spec: str) -> Parts:
    """The parts of "hfds:NAME", "hfids:NAME": its splits train and validation (or test), or one split "#SPLIT".

    Raises:
        UserError: as `open_hub`, and for a set without a column of labels.
    """
    kind, _, rest = spec.partition(":")
    name, _, split = rest.partition("#")

    def part(of: str) -> Part:
        images = open_hub(f"{name}#{of}" if of else name, None, streamed=kind == "hfids")
        if isinstance(images, StreamImages):
            return _stored(images)
        dataset: Any = images.dataset  # type: ignore[attr-defined]
        column = label_column(dataset.features, images.source)
        labels = class_names(dataset.features, column)(dataset[column])
        return Part(images.source, images, labels)

    return _in_parts(spec, split, split_names(name, f"{kind}:{name}"), part)


def webdataset_parts(spec: str) -> Parts:
    """The parts of "wds:DIR": tars in DIR/train and DIR/val, tars of these names, or splits of its _info.json.

    Otherwise all tars are one part. A sample's label is its .cls, or "label" in its .json.

    Raises:
        UserError: as `open_webdataset`, and for samples without labels.
    """
    path, _, split = spec.removeprefix("wds:").partition("#")
    folder = Path(path)
    groups: dict[str, Callable[[], WebDatasetImages]] = {}
    if folder.is_dir() and not split:
        groups = {name: lambda name=name: open_webdataset(f"{path}#{name}") for name in _info_splits(folder)}
        if not groups:
            groups = {
                sub.name: lambda sub=sub: open_webdataset(str(sub))
                for sub in sorted(folder.iterdir())
                if sub.is_dir() and any(sub.glob("*.tar"))
            }
        if not groups:
            for tar in tars_of(folder):
                word = next((w for w in ("train", "validation", "valid", "val", "test") if tar.name.startswith(w)), "")
                groups.setdefault(word, lambda word=word: WebDatasetImages(
                    f"{spec} ({word})", [str(tar) for tar in tars_of(folder) if tar.name.startswith(word)]
                ))  # fmt: skip
            if "" in groups:
                groups = {}
    if "train" not in groups or test_among(spec, groups)[0] is None:
        images = _stored(open_webdataset(spec.removeprefix("wds:")))
        return Parts(spec, images)
    return _in_parts(spec, "", list(groups), lambda name: _stored(groups[name]()))


def _in_parts(spec: str, split: str, names: list[str], part: Callable[[str], Part]) -> Parts:
    """The split that was asked for, or those to train on and to test on, or the only one."""
    if split or len(names) < 2:
        return Parts(spec, part(split or (names[0] if names else "")))
    test, said = test_among(spec, names)
    if SPLIT not in names or test is None:
        raise UserError(f"the splits of {spec} are {', '.join(names)}: name two, {spec}#A,{spec}#B")
    return Parts(spec, part(SPLIT), part(test), said)


def _stored(stream: StreamImages) -> Part:
    """A stream read to its end."""
    names: list[str] = []
    contents: list[bytes | str] = []
    labels: list[str] = []
    room = _SHARE * available_memory()
    for number in range(stream.parts):
        with closing(stream.samples(number)) as samples:
            for sample in samples:
                if sample.label is None:
                    raise UserError(f"{sample.name} of {stream.source} has no label: give one with every image")
                names.append(sample.name)
                contents.append(sample.reason if sample.content is None else sample.content)
                labels.append(sample.label)
                room -= len(contents[-1])
                if room < 0:
                    raise UserError(
                        f"{stream.source} does not fit into memory (it was left at {len(names):,} images), where a "
                        f"stream is held for verify: give a folder or tars of class folders, or hfds:NAME"
                    )
    if not names:
        raise UserError(f"{stream.source} holds no image")
    return Part(stream.source, StoredImages(stream.source, names, contents), labels)


def _info_splits(folder: Path) -> list[str]:
    """The splits that the _info.json of a folder names."""
    try:
        splits = json.loads((folder / "_info.json").read_text(encoding="utf-8"))["splits"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return list(splits)
