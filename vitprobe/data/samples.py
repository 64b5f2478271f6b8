"""Photographs that come packaged with scikit-image and scikit-learn: something to look at before any data is there."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

from vitprobe.data.bands import Picture
from vitprobe.data.decoding import convert, decode
from vitprobe.data.images import FileImages, Images
from vitprobe.errors import UserError

FEWEST = 8  # photographs; below that no interval over them means much


@dataclass(frozen=True)
class Photograph:
    """One packaged photograph.

    Attributes:
        name: its name, and the group of its crops.
        package: the top-level package that holds it.
        file: its path inside that package.
        credit: who made it or where it was taken from, as that package states it.
        licence: as that package states it.
    """

    name: str
    package: str
    file: str
    credit: str
    licence: str

    @property
    def path(self) -> Path | None:
        """Where it lies; None where this installation lacks it."""
        spec = find_spec(self.package)  # finds the folder without importing the package
        for folder in (spec.submodule_search_locations or []) if spec else []:
            if (path := Path(folder) / self.file).is_file():
                return path
        return None


# Facts from the docstrings of skimage.data (0.26) and the README beside scikit-learn's images (1.9). Left out:
# drawings, text, patterns and logos; `cell` (a hologram's phase), `microaneurysms` (102 pixels), `clock_motion`
# (blurred until nothing is left to see), `brick` (warped after it was taken), and the second of the stereo pair.
PHOTOGRAPHS = (
    Photograph("astronaut", "skimage", "data/astronaut.png", "NASA, Great Images database", "public domain"),
    Photograph("camera", "skimage", "data/camera.png", "Lav Varshney", "CC0"),
    Photograph("chelsea", "skimage", "data/chelsea.png", "Stefan van der Walt", "CC0"),
    Photograph("coffee", "skimage", "data/coffee.png", "Rachel Michetti, courtesy of Pikolo Espresso Bar", "CC0"),
    Photograph("coins", "skimage", "data/coins.png", "Brooklyn Museum Collection", "no known copyright restrictions"),
    Photograph("grass", "skimage", "data/grass.png", "linolafett on DeviantArt", "CC0"),
    Photograph("gravel", "skimage", "data/gravel.png", "CC0Textures", "CC0"),
    Photograph("hubble", "skimage", "data/hubble_deep_field.jpg", "NASA, HubbleSite", "public domain"),
    Photograph("ihc", "skimage", "data/ihc.png", "CMMI (microscopy)", "no known copyright restrictions"),
    Photograph("moon", "skimage", "data/moon.png", "not stated", "not stated"),
    Photograph("motorcycle", "skimage", "data/motorcycle_left.png", "Middlebury 2014 stereo benchmark", "not stated"),
    Photograph("retina", "skimage", "data/retina.jpg", "Mikael Häggström, Wikimedia Commons", "CC0"),
    Photograph("rocket", "skimage", "data/rocket.jpg", "SpaceX", "public domain"),
    Photograph("china", "sklearn", "datasets/images/china.jpg", "danielbuechele on Flickr", "CC BY 2.0"),
    Photograph("flower", "sklearn", "datasets/images/flower.jpg", "vultilion on Flickr", "CC BY 2.0"),
)


class SampleImages(FileImages):
    """Square crops of photographs; a crop's photograph is its group."""

    def __init__(self, photographs: Sequence[tuple[str, Path]], crops: int) -> None:
        pairs = [(name, path, crop) for name, path in photographs for crop in range(crops)]
        super().__init__(
            f"{len(pairs)} crops of {len(photographs)} photographs packaged with scikit-image and scikit-learn",
            [path for _, path, _ in pairs],
            [f"{name}/{crop}" for name, _, crop in pairs],
            [name for name, _, _ in pairs],
        )

    def read(self, index: int) -> Picture:
        """A crop: 50 to 100 % of the photograph's shorter side, placed by the crop's name alone."""
        photograph = _photograph(self.paths[index])
        draw = random.Random(hashlib.sha256(self.names[index].encode()).digest())
        width, height = photograph.size
        side = round(min(width, height) * (0.5 + 0.5 * draw.random()))
        left = int(draw.random() * (width - side + 1))
        top = int(draw.random() * (height - side + 1))
        return convert(photograph.crop((left, top, left + side, top + side)), self.names[index], self.wanted)


def sample_images(crops_per_photograph: int = 8) -> Images:
    """Crops of the packaged photographs, always the same ones; groups are the photographs.

    Crop k of a photograph is the same picture however many crops are asked for. A photograph that a future version of
    its package lacks is left out.

    Raises:
        UserError: for less than one crop, or where fewer than eight photographs are installed.
    """
    if crops_per_photograph < 1:
        raise UserError(f"{crops_per_photograph} crops a photograph cannot be: give at least 1")
    found = [(photograph.name, path) for photograph in PHOTOGRAPHS if (path := photograph.path)]
    if len(found) < FEWEST:
        raise UserError(
            f"only {len(found)} of the {len(PHOTOGRAPHS)} sample photographs are installed: "
            f"reinstall scikit-image and scikit-learn, or give images of your own"
        )
    return SampleImages(found, crops_per_photograph)


@lru_cache(maxsize=1)  # crops of one photograph come one after the other
def _photograph(path: Path) -> Image.Image:
    with path.open("rb") as file:
        picture = decode(file, path.name)
    assert isinstance(picture, Image.Image)  # in RGB
    return picture
