"""From a file's bytes to an RGB picture, or a plain word on why not."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader, BytesIO

import numpy as np
from PIL import Image, UnidentifiedImageError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
# Named, so that a file that only calls itself .jpg never reaches Pillow's EPS reader, which starts another program.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "PPM")
LONGEST_ASPECT = 100  # a strip of 1×40,000 pixels, its shorter side made 256, would fill gigabytes


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


def decode(stream: BufferedReader | BytesIO, name: str) -> Image.Image:
    """The first picture in a file, as RGB; `name` is what an error calls it.

    The orientation tag of a camera is not applied: timm's and torchvision's own pipelines do not apply it either.

    Raises:
        BadImageError: for an empty, truncated, damaged, huge (Pillow's limit) or non-image file.
    """
    if not stream.read(1):
        raise BadImageError(name, "the file is empty")
    stream.seek(0)
    with _bad_image(name), Image.open(stream, formats=FORMATS) as image:
        return to_rgb(image)


def convert(image: Image.Image, name: str) -> Image.Image:
    """A user's picture as RGB; `name` is what an error calls it.

    Raises:
        BadImageError: where `to_rgb` cannot, or where its file, not decoded until now, is damaged.
    """
    with _bad_image(name):
        return to_rgb(image)


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
        raise ValueError(f"its pixels have 32 bits (mode {image.mode}) and no known range; save it with 8 or 16 bits")
    return image.convert("RGB")


@contextmanager
def _bad_image(name: str) -> Iterator[None]:
    """Whatever Pillow raises as a BadImageError; its remarks on odd metadata are no news to the user."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except Exception as error:  # its plugins raise OSError, SyntaxError, ValueError, struct.error, EOFError …
            raise BadImageError(name, _reason(error)) from error


def _reason(error: Exception) -> str:
    """Why decoding failed, in one line without object addresses."""
    if isinstance(error, UnidentifiedImageError):
        return "not a PNG, JPEG, WebP, BMP, TIFF, GIF or PPM image"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than the {2 * (Image.MAX_IMAGE_PIXELS or 0)} pixels that Pillow allows (a decompression bomb?)"
    return " ".join(str(error).split()) or type(error).__name__
