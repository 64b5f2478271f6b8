"""Several images in one `.npy` file: an array whose first axis counts them."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np

from vitprobe.data.bands import NPY_MAGIC, Picture, Wanted, picture_of
from vitprobe.data.decoding import bad_image
from vitprobe.data.images import Groups, Images, digest, file_size, printable, resolve_groups
from vitprobe.errors import UserError

MOST_BANDS = 16  # an axis up to that may count channels


class StackImages(Images):
    """The images of an array (n, H, W, C), (n, C, H, W) or (n, H, W), read one by one from the file.

    An array of three axes is one image where the first or the last of them is the model's number of channels.
    """

    def __init__(self, path: Path, groups: Groups = None) -> None:
        self.path, self._given = path, groups
        self.shape = _mapped(path).shape
        super().__init__(str(path), map(str, range(self.count)), groups)

    @property
    def count(self) -> int:
        """How many images there are."""
        if len(self.shape) != 3:
            return self.shape[0]
        takes = (1, 3) if self.wanted.channels in (1, 3) else (self.wanted.channels,)
        return 1 if self.shape[0] in takes or self.shape[-1] in takes else self.shape[0]

    def for_model(self, wanted: Wanted) -> Images:
        """The same file as images of a model's channels.

        Raises:
            UserError: where the first axis may count images or channels.
        """
        again = copy.copy(self)
        again.wanted = wanted
        if len(self.shape) == 3 and again.count > 1 and min(self.shape[0], self.shape[-1]) <= MOST_BANDS:
            images = (self.shape[0], *self.shape[1:], 1)
            raise UserError(
                f"{self.source} has the shape {self.shape}, and the model takes {wanted.channels} "
                f"channel{'s' * (wanted.channels > 1)}: save grey images as {images}, and others as (images, height, "
                f"width, channels)"
            )
        if again.count != len(self.names):
            Images.__init__(again, again.source, map(str, range(again.count)), self._given)
        return again

    def regrouped(self, groups: Groups) -> Images:
        """Return the same file with other groups, which hold for any model's channels."""
        again = copy.copy(self)
        again._given = groups
        again.groups = resolve_groups(self.names, groups)
        return again

    def read(self, index: int) -> Picture:
        """The image at a position."""
        with bad_image(self.names[index]):
            array = _mapped(self.path)
            return picture_of(np.array(array if len(self) == 1 and array.ndim == 3 else array[index]), self.wanted)

    def fingerprint(self) -> str:
        """sha256 over the file's name and byte size."""
        return digest([printable(self.path.name), str(file_size(self.path))])


def is_stack(path: Path) -> bool:
    """Whether a file is an array of three or four axes."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        if file.read(len(NPY_MAGIC)) != NPY_MAGIC:
            return False
    try:
        return _mapped(path).ndim in (3, 4)
    except (ValueError, OSError, EOFError):  # damaged: reading it says so
        return False


def _mapped(path: Path) -> np.ndarray:
    """The array, of which nothing is read until it is needed."""
    return np.load(path, mmap_mode="r", allow_pickle=False)
