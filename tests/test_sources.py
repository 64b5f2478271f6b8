"""Opening images: what is read, what it is called, and what a bad one says."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from timm.data.readers.img_extensions import get_img_extensions
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from vitprobe.data.decoding import to_rgb
from vitprobe.data.sources import BadImageError, LoaderImages, open_images
from vitprobe.errors import UserError


def picture(color=(200, 30, 40), size=(12, 10), mode="RGB") -> Image.Image:
    return Image.new("RGB", size, color).convert(mode)


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def noise(seed: int = 0, side: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def refusal(data, **options) -> str:
    """The one line with which `data` is refused."""
    with pytest.raises(UserError) as caught:
        open_images(data, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def reason(path: Path) -> str:
    """Why an image in a folder of its own cannot be read."""
    images = open_images(path.parent)
    with pytest.raises(BadImageError) as caught:
        images.read(images.names.index(path.name))
    assert caught.value.name == path.name
    assert str(caught.value) == f"{path.name}: {caught.value.reason}"
    assert "\n" not in caught.value.reason and "0x" not in caught.value.reason
    return caught.value.reason


# ------------------------------------------------------------------------------------------------------- folders


def test_a_folder_is_read_with_its_subfolders_in_natural_order(tmp_path):
    for name in ("b/10.png", "b/9.png", "a/ü–図.png", "c/deep/er/x.JPG"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        picture().save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    images = open_images(tmp_path)
    assert images.names == ["a/ü–図.png", "b/9.png", "b/10.png", "c/deep/er/x.JPG"]
    assert images.groups == images.names
    assert len(images) == 4
    assert images.source == str(tmp_path)
    for i in range(4):
        read = images.read(i)
        assert isinstance(read, Image.Image) and read.mode == "RGB" and read.size == (12, 10)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".PNG", ".Tiff"])
def test_every_usual_file_type_is_read(tmp_path, suffix):
    picture((10, 200, 30)).save(tmp_path / f"x{suffix}")
    pixels = np.asarray(open_images(tmp_path).read(0)).astype(int)
    assert np.abs(pixels - (10, 200, 30)).max() < 12  # lossy formats


def test_the_order_does_not_hang_on_upper_and_lower_case(tmp_path):
    for name in ("B.png", "a.png", "A.png", "b.png"):
        picture().save(tmp_path / name)
    assert open_images(tmp_path).names == ["A.png", "a.png", "B.png", "b.png"]


def test_a_relative_and_an_absolute_folder_give_the_same_names(tmp_path, monkeypatch):
    (tmp_path / "set" / "sub").mkdir(parents=True)
    picture().save(tmp_path / "set" / "sub" / "x.png")
    absolute = open_images(tmp_path / "set")
    monkeypatch.chdir(tmp_path)
    relative = open_images("set")
    assert relative.names == absolute.names == ["sub/x.png"]
    assert relative.fingerprint() == absolute.fingerprint()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_images("~/set").names == ["sub/x.png"]


def test_a_name_with_a_line_break_or_undecodable_bytes_stays_one_printable_line(tmp_path):
    content = encoded(picture())
    for name in (b"a\nb.png", b"\xff.png"):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(content)
    images = open_images(tmp_path)
    assert images.names == ["a\\nb.png", "\\udcff.png"]
    assert [images.read(i).size for i in range(2)] == [(12, 10)] * 2
    images.fingerprint()


def linked_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "set"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    for name in ("set/1.png", "set/2.png", "set/sub/3.png", "elsewhere/deep/4.png", "above.png"):
        picture().save(tmp_path / name)
    return folder


def test_links_to_images_and_to_other_folders_are_followed(tmp_path):
    folder = linked_folder(tmp_path)
    (folder / "link.png").symlink_to(tmp_path / "above.png")
    (folder / "z").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "also").symlink_to(folder)
    images = open_images(folder)
    assert images.names == ["1.png", "2.png", "link.png", "sub/3.png", "z/deep/4.png"]
    assert all(images.read(i).size == (12, 10) for i in range(5))
    assert open_images(tmp_path / "also").names == images.names


@pytest.mark.parametrize("target", [".", "..", "../..", "sub", "../set", "/"])
def test_a_link_back_or_to_a_folder_of_the_same_tree_adds_no_image(tmp_path, monkeypatch, target):
    folder = linked_folder(tmp_path)
    for name in ("a", "b"):  # "a" comes before "sub", but real folders give the names
        (folder / name).symlink_to(target)
    (folder / "z").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(folder / "sub")
    images = open_images(folder)
    assert images.names == ["1.png", "2.png", "sub/3.png", "z/deep/4.png"]
    assert all(images.read(i).size == (12, 10) for i in range(4))
    monkeypatch.chdir(folder)
    assert open_images(".").names == images.names


def test_a_folder_with_links_that_lead_back_alone(tmp_path):
    (tmp_path / "self").symlink_to(".")
    assert refusal(tmp_path).startswith(f"{tmp_path} holds no images, nor do its subfolders")
    picture().save(tmp_path / "1²2.png")
    assert refusal(tmp_path).startswith(f"{tmp_path} cannot be listed: invalid literal for int()")


def test_an_empty_path_is_not_the_current_folder():
    for data in ("", [""]):
        assert refusal(data) == "the path of the images is empty: give a folder, a .tar or an image file"


def test_a_home_that_nobody_has():
    assert refusal("~nobody_of_this_name/x").startswith("~nobody_of_this_name/x does not exist: ")


def test_a_missing_folder(tmp_path):
    assert refusal(tmp_path / "none") == (
        f"{tmp_path / 'none'} does not exist: give a folder of images, a .tar or an image file"
    )


def test_a_folder_without_images(tmp_path):
    expected = f"{tmp_path} holds no images, nor do its subfolders"
    assert refusal(tmp_path) == expected
    (tmp_path / "notes.txt").write_text("no image")
    assert refusal(str(tmp_path)) == f"{expected} (it holds 1 file that is no picture: notes.txt)"


def test_a_name_that_timm_cannot_sort(tmp_path):
    picture().save(tmp_path / "1²2.png")
    assert refusal(tmp_path).startswith(f"{tmp_path} cannot be listed: invalid literal for int()")


# ------------------------------------------------------------------------------------------------------ bad images


def test_a_truncated_jpeg(tmp_path):
    content = encoded(noise(), "JPEG")
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) // 2])
    assert "truncated" in reason(tmp_path / "cut.jpg")


def test_a_truncated_png(tmp_path):
    content = encoded(noise())
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    assert "truncated" in reason(tmp_path / "cut.png")


def test_a_text_called_jpg(tmp_path):
    (tmp_path / "text.jpg").write_text("not an image at all")
    assert reason(tmp_path / "text.jpg") == "not an image that Pillow reads here"


def test_a_postscript_called_jpg_never_reaches_its_interpreter(tmp_path):
    (tmp_path / "eps.jpg").write_bytes(encoded(picture(), "EPS"))
    assert reason(tmp_path / "eps.jpg") == "not an image that Pillow reads here"


def test_an_empty_file(tmp_path):
    (tmp_path / "empty.png").touch()
    assert reason(tmp_path / "empty.png") == "the file is empty"


def test_a_decompression_bomb(tmp_path, monkeypatch):
    picture(size=(30, 30)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 449)
    assert reason(tmp_path / "bomb.png") == "more than the 898 pixels that Pillow allows (a decompression bomb?)"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 450)  # where Pillow only warns, the image is read
    assert open_images(tmp_path).read(0).size == (30, 30)


def test_a_strip_that_would_fill_the_memory_once_resized(tmp_path):
    picture(size=(1, 101)).save(tmp_path / "strip.png")
    assert reason(tmp_path / "strip.png") == "1×101 pixels: over 100 times as long as wide"
    assert to_rgb(picture(size=(100, 1))).size == (100, 1)


def test_pixels_of_unknown_range(tmp_path):
    Image.fromarray(np.full((4, 4), 1e6, dtype=np.float32)).save(tmp_path / "height.tif")
    assert reason(tmp_path / "height.tif") == (
        "its pixels have 32 bits (mode F) and no known range; save it with 8 or 16 bits, or give --mean and "
        "--std of its values"
    )


def test_a_file_that_vanished_a_pipe_and_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    for name in ("a.png", "b.png", "c.png"):
        picture().save(tmp_path / name)
    images = open_images(tmp_path)
    before = images.fingerprint()
    (tmp_path / "a.png").unlink()
    (tmp_path / "b.png").unlink()
    os.mkfifo(tmp_path / "b.png")
    with pytest.raises(BadImageError, match=r"^a\.png: no such file$"):
        images.read(0)
    with pytest.raises(BadImageError, match=r"^b\.png: not a regular file$"):
        images.read(1)
    assert images.fingerprint() != before

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(BadImageError, match=r"^c\.png: cannot be opened: Permission denied$"):
        images.read(2)


def test_a_bad_image_error_survives_pickling():
    error = pickle.loads(pickle.dumps(BadImageError("x.png", "why")))
    assert (error.name, error.reason, str(error)) == ("x.png", "why", "x.png: why")


# ------------------------------------------------------------------------------------------------------- pixel modes


def test_cmyk_becomes_rgb(tmp_path):
    picture((255, 0, 0), mode="CMYK").save(tmp_path / "x.jpg")
    assert np.abs(np.asarray(open_images(tmp_path).read(0)).astype(int) - (255, 0, 0)).max() < 12


def test_grey_becomes_three_equal_channels(tmp_path):
    Image.new("L", (5, 5), 77).save(tmp_path / "x.png")
    assert (np.asarray(open_images(tmp_path).read(0)) == 77).all()


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, suffix):
    wide = np.array([[0, 256, 257], [32768, 65278, 65535]], dtype=np.uint16)
    Image.fromarray(wide).save(tmp_path / f"x.{suffix}")
    pixels = np.asarray(open_images(tmp_path).read(0))
    assert pixels[..., 0].tolist() == np.round(wide / 257).astype(int).tolist() == [[0, 1, 1], [128, 254, 255]]
    assert (pixels == pixels[..., :1]).all()


def test_a_palette_with_transparency(tmp_path):
    image = picture((10, 20, 30)).quantize(4)
    image.save(tmp_path / "x.png", transparency=bytes([100, 128, 255, 255]))
    with Image.open(tmp_path / "x.png") as opened:
        assert opened.mode == "P" and isinstance(opened.info["transparency"], bytes)
    assert (np.asarray(open_images(tmp_path).read(0)) == (10, 20, 30)).all()


def test_an_alpha_channel_is_dropped(tmp_path):
    Image.new("RGBA", (4, 4), (1, 2, 3, 0)).save(tmp_path / "x.png")
    assert (np.asarray(open_images(tmp_path).read(0)) == (1, 2, 3)).all()


# -------------------------------------------------------------------------------------------------------------- tars


def test_a_tar_is_read_in_place(tmp_path):
    members = {"b/10.png": noise(1), "b/9.webp": noise(2), "a/ü.JPG": noise(3)}
    formats = {"png": "PNG", "webp": "WEBP", "JPG": "JPEG"}
    contents = {name: encoded(image, formats[name.rsplit(".")[-1]]) for name, image in members.items()}
    images = open_images(write_tar(tmp_path / "set.tar", {**contents, "README.txt": b"text"}))
    assert images.names == ["a/ü.JPG", "b/9.webp", "b/10.png"]
    assert images.source == str(tmp_path / "set.tar")
    for name, read in zip(images.names, map(images.read, range(3)), strict=True):
        with Image.open(io.BytesIO(contents[name])) as expected:
            assert np.array_equal(np.asarray(read), np.asarray(expected.convert("RGB")))
    assert get_img_extensions() == (".png", ".jpg", ".jpeg")  # timm's global list is as it was


def test_a_tar_and_the_same_files_in_a_folder_have_one_fingerprint(tmp_path):
    contents = {"a.png": encoded(noise(1)), "b.png": encoded(noise(2))}
    write_tar(tmp_path / "set.tar", contents)
    (tmp_path / "set").mkdir()
    for name, content in contents.items():
        (tmp_path / "set" / name).write_bytes(content)
    fingerprint = open_images(tmp_path / "set.tar").fingerprint()
    assert len(fingerprint) == 64
    assert open_images(tmp_path / "set").fingerprint() == fingerprint
    (tmp_path / "set" / "a.png").write_bytes(contents["a.png"] + b"\0")
    assert open_images(tmp_path / "set").fingerprint() != fingerprint
    (tmp_path / "set" / "a.png").write_bytes(contents["a.png"])
    (tmp_path / "set" / "b.png").rename(tmp_path / "set" / "c.png")
    assert open_images(tmp_path / "set").fingerprint() != fingerprint


def test_tars_within_a_tar(tmp_path):
    inner = [
        write_tar(tmp_path / f"{i}.tar", {"note.txt": b"x" * 700, "x.png": encoded(noise(i))}).read_bytes()
        for i in range(2)
    ]
    images = open_images(write_tar(tmp_path / "outer.tar", {"cat.tar": inner[0], "dog.tar": inner[1]}))
    assert images.names == ["cat.tar/x.png", "dog.tar/x.png"]
    for i in range(2):
        assert np.array_equal(np.asarray(images.read(i)), np.asarray(noise(i)))


def test_bad_members_of_a_tar(tmp_path):
    content = encoded(noise(), "JPEG")
    images = open_images(write_tar(tmp_path / "x.tar", {"a.jpg": content[:900], "b.jpg": b"", "c.jpg": content}))
    with pytest.raises(BadImageError, match=r"^a\.jpg: .*truncated"):
        images.read(0)
    with pytest.raises(BadImageError, match=r"^b\.jpg: the file is empty$"):
        images.read(1)
    assert images.read(2).size == (64, 64)
    (tmp_path / "x.tar").unlink()
    with pytest.raises(BadImageError, match=r"^c\.jpg: its tar cannot be read: No such file or directory$"):
        images.read(2)


def test_one_name_twice_in_a_tar_gives_two_names(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for seed in range(3):
            content = encoded(noise(seed))
            info = tarfile.TarInfo("x.png")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    assert open_images(tmp_path / "x.tar").names == ["x.png", "x.png#2", "x.png#3"]


@pytest.mark.parametrize("members", [{}, {"notes.txt": b"text"}])
def test_a_tar_without_images(tmp_path, members):
    path = write_tar(tmp_path / "x.tar", members)
    assert refusal(path) == f"{path} holds no images" + (
        " (it holds 1 file that is no picture: notes.txt)" if members else ""
    )


def test_a_tar_with_a_name_that_timm_cannot_sort(tmp_path):
    path = write_tar(tmp_path / "x.tar", {"1²2.png": b""})
    assert refusal(path).startswith(f"{path} cannot be listed: invalid literal for int()")


def test_a_broken_tar(tmp_path):
    path = write_tar(tmp_path / "x.tar", {f"{i}.png": encoded(noise(i)) for i in range(3)})
    content = path.read_bytes()
    for broken in (content[: len(content) // 2], b"text", b""):
        path.write_bytes(broken)
        assert refusal(path).startswith(f"{path} cannot be read as a plain tar: ")
    assert get_img_extensions() == (".png", ".jpg", ".jpeg")


def test_an_archive_that_is_no_plain_tar(tmp_path):
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as tar:
        tar.add(__file__, "x.png")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("x.png", b"")
    for name in ("x.tar.gz", "x.zip"):
        assert refusal(tmp_path / name) == (
            f"{tmp_path / name} is an archive, but no plain .tar: unpack it, or repack it uncompressed as .tar"
        )


def test_a_tar_read_in_two_processes_after_a_read_in_this_one(tmp_path):
    """A handle shared with a forked child would share its position; this also pickles the source."""
    members = {f"{i}.png": encoded(noise(i)) for i in range(4)}
    images = open_images(write_tar(tmp_path / "x.tar", members))
    images.read(0)
    again = pickle.loads(pickle.dumps(images))
    for i in (3, 0, 2):
        assert np.array_equal(np.asarray(again.read(i)), np.asarray(noise(i)))


# ----------------------------------------------------------------------------------------------- one file and lists


def test_one_image_file(tmp_path):
    picture().save(tmp_path / "x.png")
    images = open_images(str(tmp_path / "x.png"))
    assert (images.names, images.source, images.read(0).size) == (["x.png"], str(tmp_path / "x.png"), (12, 10))


def test_one_file_that_is_no_image(tmp_path):
    (tmp_path / "x.txt").write_text("text")
    assert refusal(tmp_path / "x.txt") == (
        f"{tmp_path / 'x.txt'} cannot be read as an image: not an image that Pillow reads here"
    )


def test_a_list_of_everything(tmp_path):
    picture().save(tmp_path / "x.png")
    path = str(tmp_path / "x.png")
    tensor = torch.rand(3, 4, 5, requires_grad=True)
    images = open_images([path, Image.new("L", (3, 3), 9), tensor, Path(path)])
    assert images.names == [Path(path).as_posix(), "1", "2", f"{Path(path).as_posix()}#2"]
    assert images.source == "a list of 4 images"
    assert images.read(0).size == images.read(3).size == (12, 10)
    assert (np.asarray(images.read(1)) == 9).all() and images.read(1).mode == "RGB"
    before = images.fingerprint()
    picture(size=(99, 99)).save(path)
    assert images.fingerprint() != before
    assert torch.equal(images.read(2), tensor.detach()) and not images.read(2).requires_grad


def test_a_picture_alone_and_one_whose_file_is_damaged(tmp_path):
    assert open_images(picture()).names == ["0"]
    content = encoded(noise(), "JPEG")
    lazy = Image.open(io.BytesIO(content[: len(content) // 2]))  # Pillow decodes on first use
    images = open_images((lazy, picture()))
    with pytest.raises(BadImageError, match=r"^0: .*truncated"):
        images.read(0)
    assert len(images.fingerprint()) == 64


def test_lists_that_cannot_be(tmp_path):
    for empty in ([], ()):
        assert refusal(empty) == "the list of images is empty: give at least one path, PIL image or tensor"
    assert refusal(["none.png"]) == "none.png (entry 0 of the list) does not exist"
    assert refusal([tmp_path]) == f"{tmp_path} is a folder: a list takes image files; give the folder alone"
    assert refusal([picture(), 5]) == "entry 1 of the list is a int: give paths, PIL images or float tensors (C, H, W)"
    assert refusal([torch.zeros(4, 4, 3)]) == (
        "tensor 0 of the list has the shape (4, 4, 3): images are (channels, height, width), none of them 0"
    )


# -------------------------------------------------------------------------------------------------------- tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_tensor_is_used_as_it_is(dtype):
    pixels = torch.randn(5, 3, 6, 4).to(dtype)
    images = open_images(pixels)
    assert images.names == ["0", "1", "2", "3", "4"]
    assert images.source == "a tensor of shape (5, 3, 6, 4)"
    assert torch.equal(images.read(3), pixels[3])
    assert images.fingerprint() == open_images(pixels.clone()).fingerprint()
    assert images.fingerprint() != open_images(-pixels).fingerprint()
    assert torch.equal(open_images(pixels[0]).read(0), pixels[0])


def test_contents_decide_the_fingerprint_of_lists():
    a, b = noise(1), noise(2)
    assert open_images([a, b]).fingerprint() == open_images([a.copy(), b.copy()]).fingerprint()
    assert open_images([a, b]).fingerprint() != open_images([b, a]).fingerprint()
    x = torch.rand(3, 4, 4)
    assert open_images([x]).fingerprint() != open_images([x.flip(2)]).fingerprint()
    assert open_images([x]).fingerprint() == open_images([x.clone()]).fingerprint()


def test_tensors_that_cannot_be():
    assert refusal(torch.zeros(2, 3, 4, 4, dtype=torch.uint8)) == (
        "the tensor holds uint8: normalise it as the model expects (float, minus mean, over std), or give PIL images"
    )
    shape = "the tensor has the shape {}: images are (n, channels, height, width), none of them 0"
    assert refusal(torch.zeros(2, 4, 4, 3)) == shape.format((2, 4, 4, 3))
    assert refusal(torch.zeros(4, 4)) == shape.format((4, 4))
    assert refusal(torch.zeros(0, 3, 4, 4)) == shape.format((0, 3, 4, 4))


@pytest.mark.parametrize(
    ("data", "kind"),
    [(5, "int"), (np.zeros((3, 4, 4)), "ndarray"), ({"a": 1}, "dict"), ((picture() for _ in range(2)), "generator")],
)
def test_what_is_no_source_of_images(data, kind):
    assert refusal(data) == (
        f"cannot read images from a {kind}: give a folder, a .tar, an image file, a list of paths, "
        f"PIL images or tensors, a float tensor (n, channels, height, width), or a DataLoader"
    )


# ------------------------------------------------------------------------------------------------------ DataLoaders


class Stream(IterableDataset):
    def __iter__(self):
        yield from torch.zeros(4, 3, 2, 2)


def test_a_loader_announces_its_images():
    data = TensorDataset(torch.zeros(7, 3, 2, 2))
    images = open_images(DataLoader(data, batch_size=3))
    assert isinstance(images, LoaderImages)
    assert (len(images), images.names, images.source) == (7, list("0123456"), "a DataLoader")
    assert len(open_images(DataLoader(data, batch_size=3, drop_last=True))) == 6
    assert images.fingerprint() == ""
    with pytest.raises(UserError, match=r"^a DataLoader gives its images in its own order, so image 2 cannot be read"):
        images.read(2)


def test_a_loader_of_unknown_length():
    images = open_images(DataLoader(Stream(), batch_size=2), groups=lambda name: f"film {int(name) // 2}")
    assert isinstance(images, LoaderImages) and images.announced is None and images.names == []
    with pytest.raises(TypeError, match="does not tell how many"):
        len(images)
    assert [images.group(i) for i in range(4)] == ["film 0", "film 0", "film 1", "film 1"]
    assert refusal(DataLoader(Stream(), batch_size=2), groups=["a"] * 4) == (
        "the DataLoader does not tell how many images it gives, so groups cannot be a list: "
        "give a function from the running number (a string) to the group"
    )


def test_a_loader_over_a_sampler_without_length():
    class Endless:
        def __iter__(self):
            yield from range(7)

    loader = DataLoader(TensorDataset(torch.zeros(7, 3, 2, 2)), batch_size=3, sampler=Endless())  # type: ignore[arg-type]
    assert open_images(loader).announced is None


# ----------------------------------------------------------------------------------------------------------- groups


def test_groups_as_a_list_and_as_a_function(tmp_path):
    for name in ("cat/1.png", "cat/2.png", "dog/1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture().save(tmp_path / name)
    assert open_images(tmp_path, groups=lambda name: name.split("/")[0]).groups == ["cat", "cat", "dog"]
    for groups in ([1, 1, 2], (1, 1, 2), np.array([1, 1, 2]), pd.Series([1, 1, 2], index=[7, 8, 9])):
        assert open_images(tmp_path, groups=groups).groups == ["1", "1", "2"]


def test_images_pass_through_and_can_be_grouped_anew():
    images = open_images(torch.zeros(2, 3, 4, 4))
    assert open_images(images) is images
    regrouped = open_images(images, groups=["a", "a"])
    assert regrouped.groups == ["a", "a"] and images.groups == ["0", "1"]
    loader = open_images(DataLoader(TensorDataset(torch.zeros(2, 3, 2, 2))))
    assert open_images(loader, groups=["x", "y"]).groups == ["x", "y"]


def test_groups_that_cannot_be():
    pixels = torch.zeros(2, 3, 4, 4)
    assert refusal(pixels, groups=["a"]) == "groups has 1 entries for 2 images: give one an image"
    assert refusal(pixels, groups="ab") == (
        "groups is one string, 'ab': give a list, one group an image, or a function of its name"
    )
    for groups, kind in (
        (3, "int"),
        (iter([1, 2]), "list_iterator"),
        ((name for name in "ab"), "generator"),
        ({"0": "a", "1": "b"}, "dict"),
        ({"a", "b"}, "set"),
        (np.array(3), "ndarray"),
        (np.zeros((2, 2)), "ndarray"),
    ):
        for data in (pixels, open_images(pixels), DataLoader(TensorDataset(pixels))):
            assert refusal(data, groups=groups) == (
                f"groups is a {kind}: give a list, one group an image, or a function of its name"
            )


def test_the_shared_photographs():
    shared = os.environ.get("VITPROBE_SHARED")
    path = Path(shared or "") / "data" / "imagenet_sample.tar"
    if not shared or not path.is_file():
        pytest.skip("VITPROBE_SHARED names no folder with data/imagenet_sample.tar")
    images = open_images(path)
    assert len(images) == 800 == len(set(images.names))
    for i in (0, 399, 799):
        read = images.read(i)
        assert isinstance(read, Image.Image) and min(read.size) <= 288
