"""From a file's bytes to a picture of the channels that a model takes, or a plain word on why not."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, UnidentifiedImageError

from vitprobe.data.bands import (
    LONGEST_ASPECT,
    NPY_MAGIC,
    RGB,
    TIFF_MAGIC,
    ByteStream,
    ChannelsError,
    Picture,
    Wanted,
    picture_of,
    read_npy,
    read_tiff,
)

# EPS and WMF start other programs or Windows' own reader; of the others Pillow knows the name and reads nothing.
_UNREAD = frozenset({"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"})
_USUAL = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF")  # tried first
_KNOWN = {
    suffix: kind
    for suffix, kind in Image.registered_extensions().items()
    if kind in Image.OPEN and kind not in _UNREAD
}  # fmt: skip
# Named, so that a file that only calls itself .jpg never reaches Pillow's EPS reader, which starts another program.
FORMATS = tuple(dict.fromkeys((*_USUAL, *sorted(_KNOWN.values()))))
# What the name of an image may end with; of a sample with several files the first of these is its image.
EXTENSIONS = (*sorted(_KNOWN, key=lambda suffix: (FORMATS.index(_KNOWN[suffix]), suffix)), ".npy")
NO_IMAGE = "not an image that Pillow reads here"


class BadImageError(Exception):
    """One image that cannot be read: skipped and reported by those who read many.

    Attributes:
        name: the image's name in its source.
        reason: why, in one line.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)  # both as arguments, so that it survives pickling
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        """`name: reason`, one line."""
        return f"{self.name}: {self.reason}"


class BadChannelsError(BadImageError):
    """One image whose channels are not those that the model takes."""


def decode(stream: ByteStream, name: str, wanted: Wanted = RGB) -> Picture:
    """The first picture in a file, with the channels that are wanted.

    The orientation tag of a camera is not applied: timm's and torchvision's own pipelines do not apply it either.

    Args:
        stream: the file: what Pillow reads, a NumPy array (.npy), or a TIFF with any number of bands.
        name: what an error calls it.
        wanted: what the model takes.

    Raises:
        BadImageError: for an empty, truncated, damaged, huge (Pillow's limit) or non-image file, for values without a
            known range, and (`BadChannelsError`) for channels that cannot be made those wanted.
    """
    with bad_image(name):
        head = stream.read(len(NPY_MAGIC))
        if not head:
            raise BadImageError(name, "the file is empty")
        stream.seek(0)
        if head == NPY_MAGIC:
            return picture_of(read_npy(stream), wanted)
        if head.startswith(TIFF_MAGIC):
            return _decode_tiff(stream, wanted)
        with Image.open(stream, formats=FORMATS) as image:
            return to_wanted(image, wanted)


def _decode_tiff(stream: ByteStream, wanted: Wanted) -> Picture:
    """By Pillow, or where that would lose bands or bits by tifffile, which lacks some compressions."""
    unread: Exception | None = None
    if wanted.channels not in (1, 3):
        try:
            return picture_of(read_tiff(stream), wanted)
        except ChannelsError:
            raise
        except ValueError as error:
            unread = error
        stream.seek(0)
    try:
        with Image.open(stream, formats=("TIFF",)) as image:
            if not (wanted.given and max(image.tag_v2.get(258, (1,))) > 8):  # type: ignore[attr-defined]
                return to_wanted(image, wanted)
    except UnidentifiedImageError:
        if unread is not None:
            raise unread from None
    stream.seek(0)
    return picture_of(read_tiff(stream), wanted)


def convert(image: Image.Image, name: str, wanted: Wanted = RGB) -> Picture:
    """A user's picture with the channels that are wanted; `name` is what an error calls it.

    Raises:
        BadImageError: where `to_wanted` cannot, or where its file, not decoded until now, is damaged.
    """
    with bad_image(name):
        return to_wanted(image, wanted)


def to_wanted(image: Image.Image, wanted: Wanted) -> Picture:
    """A copy with the channels that are wanted: RGB from grey, grey from RGB; any other number only as it is there.

    Raises:
        ValueError: as `to_rgb`, and (`ChannelsError`) for another number of channels.
    """
    if wanted.given and (image.mode.startswith("I") or image.mode == "F"):
        return picture_of(np.array(image), wanted)
    if wanted.stored and _lost_bits(image):
        raise ValueError(
            "Pillow gives its 16-bit colours with 8 bits, and mean and std are of the values in the file: save it as "
            ".npy or TIFF"
        )
    samples = getattr(image, "tag_v2", {}).get(277, 1)  # of a TIFF; Pillow drops those behind the fourth
    if wanted.channels == 3 and samples <= 4:
        return to_rgb(image)
    if wanted.channels == 1 and samples <= 4:
        return to_rgb(image).convert("L")
    bands = len(image.getbands()) if samples <= 4 else samples
    if bands != wanted.channels:
        raise ChannelsError(f"it has {bands} channel{'s' * (bands > 1)} ({image.mode})", wanted)
    return picture_of(np.array(image), wanted)


def to_rgb(image: Image.Image) -> Image.Image:
    """A copy with three channels of 8 bits; 16-bit grey is scaled (not clipped), transparency is dropped.

    Raises:
        ValueError: for pixels of 32 bits, whose range nobody knows, and for a strip over 100 times as long as wide.
    """
    if max(image.size) > LONGEST_ASPECT * min(image.size):
        raise ValueError(f"{image.width}×{image.height} pixels: over {LONGEST_ASPECT} times as long as wide")
    # a 16-bit PNG had the mode "I" before Pillow 11
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        wide = np.asarray(image).astype(np.int64)
        image = Image.fromarray(((wide + 128) // 257).astype(np.uint8))  # 65535 / 255 = 257, rounded
    elif image.mode in ("I", "F"):
        raise ValueError(
            f"its pixels have 32 bits (mode {image.mode}) and no known range; save it with 8 or 16 bits, or give "
            f"--mean and --std of its values"
        )
    return image.convert("RGB")


@dataclass(frozen=True)
class FileFacts:
    """What a file says of itself, beside its first picture.

    Attributes:
        frames: pictures in it.
        bits: of a value.
        largest: the largest value as a share of the range that its bits have; None of 8 bits, and where unknown.
    """

    frames: int = 1
    bits: int = 8
    largest: float | None = None


def file_facts(stream: ByteStream) -> FileFacts:
    """The facts of an image file; of one that cannot be read those of an ordinary one."""
    try:
        with bad_image(""):
            head = stream.read(25)
            stream.seek(0)
            if head.startswith(NPY_MAGIC):
                return _of_array(read_npy(stream))
            with Image.open(stream, formats=FORMATS) as image:
                bits = max(getattr(image, "tag_v2", {}).get(258, (8,)))
                bits = head[24] if image.format == "PNG" else 16 if image.mode.startswith("I;16") else bits
                facts = FileFacts(getattr(image, "n_frames", 1), bits)
                if bits <= 8:
                    return facts
                image.seek(0)
                if image.format != "TIFF":
                    values = np.asarray(image)
                    return replace(facts, largest=float(values.max()) / (65535 if values.dtype.itemsize > 1 else 255))
            stream.seek(0)
            return replace(facts, largest=_of_array(read_tiff(stream)).largest)
    except BadImageError:
        return FileFacts()


def _of_array(array: np.ndarray) -> FileFacts:
    bits = 8 * array.dtype.itemsize
    if array.dtype == np.uint16:
        return FileFacts(1, bits, float(array.max()) / 65535)
    return FileFacts(1, bits, float(array.max()) if array.dtype.kind == "f" else None)


def _lost_bits(image: Image.Image) -> bool:
    """Whether Pillow reads a picture's 16 bits a channel as 8, as it does of a PNG in colour."""
    return image.format == "PNG" and any("16" in str(tile[3]) for tile in getattr(image, "tile", ()) or ())


@contextmanager
def bad_image(name: str) -> Iterator[None]:
    """Whatever Pillow raises as a BadImageError; its remarks on odd metadata are no news to the user."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except BadImageError:
            raise
        except ChannelsError as error:
            raise BadChannelsError(name, str(error)) from error
        except Exception as error:  # its plugins raise OSError, SyntaxError, ValueError, struct.error, EOFError …
            raise BadImageError(name, _reason(error)) from error


def _reason(error: Exception) -> str:
    """Why decoding failed, in one line without object addresses."""
    if isinstance(error, UnidentifiedImageError):
        return NO_IMAGE
    if isinstance(error, Image.DecompressionBombError):
        return f"more than the {2 * (Image.MAX_IMAGE_PIXELS or 0)} pixels that Pillow allows (a decompression bomb?)"
    return " ".join(str(error).split()) or type(error).__name__
