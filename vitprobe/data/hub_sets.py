"""Hugging Face data sets through timm's readers: on disk, read in any order, or streamed, read part by part."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

from timm.data.readers.reader_factory import create_reader

from vitprobe.data.bands import Picture
from vitprobe.data.decoding import BadImageError, decode
from vitprobe.data.images import Groups, Images, digest, printable
from vitprobe.data.streams import Sample, StreamImages, require, whole_part
from vitprobe.errors import UserError

LABELS = ("label", "labels", "fine_label", "class", "target", "cls")  # columns that may hold a class
NAMES = ("file_name", "filename", "id", "image_id", "__key__")  # columns that name an image, as in timm
SPLIT = "train"  # as timm, and what a set without splits is called


class HubImages(Images):
    """A data set on disk; an image's name is its file's, where the set keeps it, or its row."""

    def __init__(self, source: str, dataset: Any, column: str, groups: Groups = None) -> None:
        self.dataset, self.column = dataset, column
        self._files = dataset.data.column(column).combine_chunks()
        paths = self._files.field("path").to_pylist()
        names = [str(row) if path is None else Path(path).name for row, path in enumerate(paths)]
        super().__init__(source, names, groups)

    def read(self, index: int) -> Picture:
        """The picture of a row."""
        return decode(self.open(index), self.names[index], self.wanted)

    def open(self, index: int) -> BytesIO:
        """The file in a row."""
        return BytesIO(_content(self.dataset[index][self.column], self.names[index]))

    def fingerprint(self) -> str:
        """sha256 over names and byte sizes."""
        from pyarrow.compute import call_function

        sizes = call_function("binary_length", [self._files.field("bytes")]).to_pylist()
        return digest(f"{name}\0{size}" for name, size in zip(self.names, sizes, strict=True))


class HubStreamImages(StreamImages):
    """A data set that is streamed, one of its files a part."""

    def __init__(self, source: str, dataset: Any, column: str, groups: Groups = None) -> None:
        super().__init__(source, dataset.num_shards, groups)
        self.dataset, self.column = dataset, column

    def samples(self, part: int) -> Generator[Sample, None, None]:
        """The rows of a part."""
        column = _label_column(self.dataset.features or {})
        names = class_names(self.dataset.features, column) if column else None
        with whole_part(f"part {part} of {self.source}"):
            for row, sample in enumerate(self.dataset.shard(num_shards=self.parts, index=part)):
                said = next((sample[key] for key in NAMES if sample.get(key) is not None), row)
                name = printable(f"{part}/{said}")
                label = names([sample[column]])[0] if names and sample.get(column) is not None else None
                try:
                    yield Sample(name, _content(sample[self.column], name), label=label)
                except BadImageError as error:
                    yield Sample(name, None, error.reason, label)

    def fingerprint(self) -> str:
        """sha256 over the source, its parts and what the set says of itself."""
        info = self.dataset.info
        return digest(map(str, (self.source, self.parts, info.version, info.dataset_size, info.features)))


def open_hub(spec: str, groups: Groups, streamed: bool) -> Images:
    """The data set "NAME" or "NAME#SPLIT" (train without): of the hub, or a folder that `datasets` can load.

    Raises:
        UserError: without the package datasets, for a set that cannot be loaded, or one without a column of images.
    """
    name, _, split = spec.partition("#")
    split = split or SPLIT
    shown = f"{'hfids' if streamed else 'hfds'}:{printable(spec)}"
    with _one_line(shown):
        import datasets

        if _is_saved(name):
            dataset = _saved(name, split)
            column = _image_column(dataset.features, shown)
            dataset = dataset.cast_column(column, datasets.Image(decode=False))
            if streamed:
                return HubStreamImages(shown, dataset.to_iterable_dataset(), column, groups)
            return HubImages(
                shown, dataset.flatten_indices() if dataset._indices is not None else dataset, column, groups
            )
        stream: Any = datasets.load_dataset_builder(name).as_streaming_dataset(split=split)
        column = _image_column(stream.features, shown)
        if streamed:
            # num_samples is a need of training, not ours
            reader: Any = create_reader(f"hfids/{name}", split=split, input_key=column, num_samples=1)
            stream = reader.builder.as_streaming_dataset(split=split)
            return HubStreamImages(shown, stream.cast_column(column, datasets.Image(decode=False)), column, groups)
        reader = create_reader(f"hfds/{name}", split=split, input_key=column)
        return HubImages(shown, reader.dataset, column, groups)
    raise AssertionError  # the context lets no error pass


def split_names(name: str, shown: str) -> list[str]:
    """The splits that a data set has; none where it was saved without.

    Raises:
        UserError: as `open_hub`.
    """
    with _one_line(shown):
        import datasets

        if _is_saved(name):
            saved = datasets.load_from_disk(name)
            return list(map(str, saved)) if isinstance(saved, datasets.DatasetDict) else []
        return list(map(str, datasets.get_dataset_split_names(name)))
    raise AssertionError  # the context lets no error pass


def label_column(features: Any, shown: str) -> str:
    """The column of classes: the first of a data set's own kind for them, or one with a usual name.

    Raises:
        UserError: where there is none.
    """
    column = _label_column(features)
    if column is None:
        raise UserError(f"{shown} has no column of labels (a ClassLabel, or {', '.join(LABELS)}); it has "
                        f"{', '.join(features)}")  # fmt: skip
    return column


def class_names(features: Any, column: str) -> Callable[[Any], list[str]]:
    """Values of a column of labels → the names of their classes."""
    names = getattr((features or {}).get(column), "names", None)
    return lambda values: [names[value] if names and value >= 0 else str(value) for value in values]


def _label_column(features: Any) -> str | None:
    import datasets

    own = (key for key, kind in features.items() if isinstance(kind, datasets.ClassLabel))
    return next(own, None) or next((name for name in LABELS if name in features), None)


def _is_saved(name: str) -> bool:
    """Whether a folder was written by `save_to_disk`."""
    return any((Path(name) / mark).is_file() for mark in ("state.json", "dataset_dict.json"))


def _saved(name: str, split: str) -> Any:
    """A split of a data set that was written by `save_to_disk`; of one without splits all of it."""
    import datasets

    found = datasets.load_from_disk(name)
    return found[split] if isinstance(found, datasets.DatasetDict) else found


@contextmanager
def _one_line(shown: str) -> Iterator[None]:
    """Whatever `datasets` raises as a UserError."""
    require("datasets", f"{shown.partition(':')[0]}:…")
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # whatever the hub, a disk, or a table has to say
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{shown} cannot be loaded ({reason}); give NAME#SPLIT of a data set of images") from None


def _image_column(features: Any, shown: str) -> str:
    """The first column of images; timm's default where the set does not say."""
    import datasets

    if features is None:
        return "image"
    column = next((key for key, kind in features.items() if isinstance(kind, datasets.Image)), None)
    if column is None:
        raise UserError(f"{shown} has no column of images; it has {', '.join(features)}")
    return column


def _content(image: Any, name: str) -> bytes:
    """The file of a row's image: its bytes, or what lies where it says."""
    image = image or {}
    if image.get("bytes") is None and image.get("path"):
        try:
            return Path(image["path"]).read_bytes()
        except OSError as error:
            raise BadImageError(name, f"cannot be opened: {error.strerror or error}") from error
    if image.get("bytes") is None:
        raise BadImageError(name, "the row holds no image")
    return image["bytes"]
