"""Pictures with any number of channels: what a model wants of them, and arrays of `.npy` files and TIFFs as such."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from io import BufferedReader, BytesIO

import numpy as np
from jaxtyping import Shaped
from numpy.lib import format as npy
from PIL import Image

NPY_MAGIC = b"\x93NUMPY"
TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
LONGEST_ASPECT = 100  # a strip of 1×40,000 pixels, its shorter side made 256, would fill gigabytes
LUMINANCE = (0.299, 0.587, 0.114)  # of red, green, blue, as Pillow's

ByteStream = BufferedReader | BytesIO
# A picture of Pillow's in grey or RGB, or an array (height, width, channels) of uint8, uint16 or float32.
Picture = Image.Image | Shaped[np.ndarray, "height width channel"]


@dataclass(frozen=True)
class Wanted:
    """What a model takes of a picture.

    Attributes:
        channels: how many.
        given: whether the user gave mean and standard deviation, so that floats may be of any range.
        stored: whether these are of the values in the files (above 1), so that whole numbers may be of any range.
    """

    channels: int = 3
    given: bool = False
    stored: bool = False


RGB = Wanted()


class ChannelsError(ValueError):
    """Another number of channels than the model takes."""

    def __init__(self, came: str, wanted: Wanted) -> None:
        super().__init__(f"{came}, and the model takes {wanted.channels}")


def picture_of(array: np.ndarray, wanted: Wanted) -> Picture:
    """An array as a picture: `(H, W)`, `(H, W, C)` or `(C, H, W)`, also with one image in front.

    Of 8 and 16 bits the largest value stands for 1; floats are taken as they are, from −1 to 1 where nobody says more.
    For a model of one or three channels whole numbers become a picture of Pillow's, as a PNG of them would.

    Raises:
        ValueError: for numbers of unknown range, NaN, or a strip; `ChannelsError` for other channels.
    """
    bands = _channels_last(array, wanted)
    height, width, channels = bands.shape
    if min(height, width) < 1 or max(height, width) > LONGEST_ASPECT * min(height, width):
        raise ValueError(f"{width}×{height} pixels: over {LONGEST_ASPECT} times as long as wide")
    bands = _ranged(bands, wanted)
    whole = bands.dtype != np.float32
    if whole and wanted.channels in (1, 3) and not (wanted.stored and bands.dtype == np.uint16):
        if bands.dtype == np.uint16:
            bands = ((bands.astype(np.int64) + 128) // 257).astype(np.uint8)  # as of a 16-bit PNG
        picture = Image.fromarray(bands[..., 0] if channels == 1 else np.ascontiguousarray(bands))
        return picture.convert("L" if wanted.channels == 1 else "RGB")
    if channels == wanted.channels:
        return np.ascontiguousarray(bands)
    if channels == 1:
        return np.repeat(bands, wanted.channels, axis=2)
    return (bands.astype(np.float32) @ np.array(LUMINANCE, np.float32)).astype(bands.dtype)[..., None]


def _channels_last(array: np.ndarray, wanted: Wanted) -> np.ndarray:
    """`(H, W, C)` of an array, with channels that the model takes or that can be made those."""
    shape, count = array.shape, wanted.channels
    while array.ndim > 3 and array.shape[0] == 1:
        array = array[0]
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3:
        raise ValueError(f"an array of shape {shape}: an image is (height, width), (height, width, channels) or "
                         f"(channels, height, width); give a file of several images as --data itself")  # fmt: skip
    takes = (1, 3) if count in (1, 3) else (count,)
    for wished in ((count,), takes):
        first, last = array.shape[0] in wished, array.shape[-1] in wished
        if first and last and array.shape[0] > 1 and array.shape[-1] > 1:
            raise ValueError(f"an array of shape {shape} may be (height, width, channels) or (channels, height, width)")
        if last:
            return array
        if first:
            return np.moveaxis(array, 0, -1)
    came = min(array.shape[0], array.shape[-1])
    raise ChannelsError(f"an array of shape {shape} has {came} channels", wanted)


def _ranged(bands: np.ndarray, wanted: Wanted) -> np.ndarray:
    """As uint8, uint16 or float32, of a known range.

    Raises:
        ValueError: where the range is not known, or for NaN and infinity.
    """
    if bands.dtype == bool:
        return bands.astype(np.uint8) * np.uint8(255)
    if bands.dtype in (np.uint8, np.uint16):
        return bands.astype(bands.dtype.newbyteorder("="))
    if bands.dtype.kind in "iu" and wanted.stored:
        return bands.astype(np.float32)
    if bands.dtype.kind != "f":
        raise ValueError(f"its numbers are {bands.dtype}, of no known range: save them as uint8, uint16 or floats from "
                         f"0 to 1, or give --mean and --std of its values")  # fmt: skip
    bands = bands.astype(np.float32)
    if not np.isfinite(bands).all():
        raise ValueError("its values hold NaN or infinity")
    largest = float(np.abs(bands).max())
    if largest > 1 and not wanted.given:
        raise ValueError(f"its values reach {largest:g} and have no known range: save them from 0 to 1, or give --mean "
                         f"and --std of its values")  # fmt: skip
    return bands


def read_npy(stream: ByteStream) -> np.ndarray:
    """The array in a `.npy` file; nothing that would run code is read.

    Raises:
        ValueError: for a damaged file, or one of Python objects.
    """
    try:
        return npy.read_array(stream, allow_pickle=False)
    except (ValueError, EOFError) as error:
        if "allow_pickle" in str(error) or "Object arrays" in str(error):
            raise ValueError("the array holds Python objects, which are not read") from None
        raise ValueError(f"the .npy file is damaged: {' '.join(str(error).split())}") from None


def read_tiff(stream: ByteStream) -> np.ndarray:
    """All bands of the first picture in a TIFF: samples of one page, or pages of one shape that belong together.

    Raises:
        ValueError: for what tifffile cannot read, such as a compression that needs the package imagecodecs.
    """
    import tifffile  # takes a third of a second to import

    log = logging.getLogger("tifffile")
    before, log.disabled = log.disabled, True
    try:
        with tifffile.TiffFile(stream) as tiff:
            return np.asarray(tiff.series[0].asarray())
    except Exception as error:  # its own, zlib's, struct's
        raise ValueError(f"the TIFF cannot be read: {' '.join(str(error).split())}") from error
    finally:
        log.disabled = before
