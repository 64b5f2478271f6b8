"""The packaged photographs and their crops."""

from __future__ import annotations

import hashlib
import importlib.util
import pickle
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from vitprobe.data import samples
from vitprobe.data.samples import PHOTOGRAPHS, Photograph, sample_images
from vitprobe.data.sources import open_images
from vitprobe.errors import UserError


def test_every_photograph_of_the_table_is_installed_and_credited():
    assert len(PHOTOGRAPHS) == 15 == len({photograph.name for photograph in PHOTOGRAPHS})
    for photograph in PHOTOGRAPHS:
        assert photograph.path is not None and photograph.path.is_file(), photograph
        assert photograph.credit and photograph.licence


def test_crops_are_grouped_by_photograph():
    images = sample_images(3)
    assert len(images) == 45
    assert images.names[:4] == ["astronaut/0", "astronaut/1", "astronaut/2", "camera/0"]
    assert set(Counter(images.groups).values()) == {3}
    assert images.source == "45 crops of 15 photographs packaged with scikit-image and scikit-learn"
    assert all(name.split("/")[0] == group for name, group in zip(images.names, images.groups, strict=True))


def test_no_data_means_the_samples():
    images = open_images()
    assert images.names == sample_images().names and len(images) == 120
    assert images.fingerprint() == sample_images().fingerprint() != sample_images(7).fingerprint()
    assert open_images(groups=images.names).groups == images.names


def test_crops_are_square_inside_the_photograph_and_half_of_it_at_least():
    images = sample_images(1)
    for i, photograph in enumerate(PHOTOGRAPHS):
        crop = images.read(i)
        assert isinstance(crop, Image.Image) and crop.mode == "RGB"
        assert photograph.path is not None
        with Image.open(photograph.path) as whole:
            shorter = min(whole.size)
        assert crop.width == crop.height
        assert shorter // 2 <= crop.width <= shorter
        assert np.asarray(crop).std() > 3, f"{photograph.name} is blank"


def test_crops_do_not_change():
    few, many = sample_images(2), sample_images(4)
    position = many.names.index("coffee/1")
    crop = few.read(few.names.index("coffee/1"))
    assert np.array_equal(np.asarray(crop), np.asarray(many.read(position)))
    assert np.array_equal(np.asarray(crop), np.asarray(pickle.loads(pickle.dumps(many)).read(position)))
    other = many.read(position + 1)
    assert crop.size != other.size or not np.array_equal(np.asarray(crop), np.asarray(other))
    # pinned: a crop's name must mean the same picture in every version
    assert hashlib.sha256(crop.tobytes()).hexdigest().startswith("486254a66b333b67") and crop.size == (387, 387)


def test_a_missing_photograph_is_left_out(monkeypatch):
    gone = (
        Photograph("gone", "skimage", "data/no_such_file.png", "nobody", "none"),
        Photograph("nowhere", "no_such_package_at_all", "x.png", "nobody", "none"),
    )
    monkeypatch.setattr(samples, "PHOTOGRAPHS", PHOTOGRAPHS + gone)
    assert importlib.util.find_spec("no_such_package_at_all") is None
    assert len(sample_images(1)) == 15


def test_too_few_photographs(monkeypatch):
    gone = tuple(Photograph(f"{i}", "skimage", f"data/none{i}.png", "nobody", "none") for i in range(3))
    monkeypatch.setattr(samples, "PHOTOGRAPHS", PHOTOGRAPHS[:7] + gone)
    with pytest.raises(UserError) as caught:
        sample_images()
    assert str(caught.value) == (
        "only 7 of the 10 sample photographs are installed: "
        "reinstall scikit-image and scikit-learn, or give images of your own"
    )


def test_no_crops():
    with pytest.raises(UserError, match=r"^0 crops a photograph cannot be: give at least 1$"):
        sample_images(0)
