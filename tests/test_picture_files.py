"""Folders of pictures as people have them: every format, hidden files, other files, several frames, unused bits."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest
import tifffile
from click.testing import CliRunner
from PIL import Image, features

from helpers import stated_vit
from vitprobe.cli import main
from vitprobe.data.bands import Wanted
from vitprobe.data.decoding import EXTENSIONS, FORMATS, BadImageError
from vitprobe.data.labelled import open_labelled
from vitprobe.data.looking import look_at
from vitprobe.data.sources import open_images
from vitprobe.profile.analysis import analyze

FEW = {"statistics": ["cls_entropy"], "device": "cpu"}
LOSSLESS = ("apng", "bmp", "dib", "gif", "j2k", "jp2", "pcx", "png", "pnm", "ppm", "sgi", "tga", "tif", "tiff")
LOSSY = ("avif", "jfif", "jpe", "jpeg", "jpg", "webp")


def grey(seed: int = 0, side: int = 40) -> Image.Image:
    """A picture of few shades, which a GIF's palette holds too."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 200, (side, side), np.uint8)).convert("RGB")


def test_every_format_that_pillow_writes_here_is_read(tmp_path: Path) -> None:
    for number, suffix in enumerate((*LOSSLESS, *LOSSY)):
        if suffix == "avif" and not features.check("avif"):
            continue
        kind = {"apng": "PNG", "jfif": "JPEG", "jpe": "JPEG", "pnm": "PPM"}.get(suffix)
        picture = grey(number).resize((40, 40)) if suffix in LOSSLESS else Image.new("RGB", (40, 40), (90, 60, 30))
        picture.save(tmp_path / f"x.{suffix}", kind)
    images = open_images(tmp_path)
    assert len(images) == len(list(tmp_path.iterdir())) >= len(LOSSLESS) + len(LOSSY) - 1
    for name, picture in zip(images.names, map(images.read, range(len(images))), strict=True):
        suffix = name.partition(".")[2]
        if suffix in LOSSLESS:
            expected = np.asarray(grey((*LOSSLESS, *LOSSY).index(suffix)))
            np.testing.assert_array_equal(np.asarray(picture), expected, err_msg=name)
        else:
            assert np.abs(np.asarray(picture).astype(int) - (90, 60, 30)).max() < 20, name
    assert images.left_out.describe() == []


def test_readers_that_start_programs_or_read_nothing_are_left_out() -> None:
    assert not {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"} & set(FORMATS)
    assert not {".eps", ".ps", ".wmf", ".emf", ".h5", ".mpg"} & set(EXTENSIONS)
    assert {".gif", ".jfif", ".ppm", ".jp2", ".webp", ".tif", ".bmp", ".npy"} <= set(EXTENSIONS)


def clutter(folder: Path) -> None:
    """Two pictures, three files that are none, and what other programs hide beside them."""
    for place in (folder, folder / ".ipynb_checkpoints", folder / "__MACOSX", folder / "more"):
        place.mkdir(parents=True, exist_ok=True)
    for name in ("a.png", "more/b.png", ".ipynb_checkpoints/a-checkpoint.png", "__MACOSX/a.png"):
        grey().save(folder / name)
    for name in ("._a.png", "more/._b.png", "Thumbs.db", ".DS_Store", "more/desktop.ini", "notes.txt", "labels.csv",
                 "more/clip.mp4"):  # fmt: skip
        (folder / name).write_bytes(b"\0\5\x16\7")


OTHERS = ("labels.csv", "more/clip.mp4", "notes.txt")


def test_hidden_files_are_left_out_and_the_rest_is_counted_and_named(tmp_path: Path) -> None:
    clutter(tmp_path / "x")
    images = open_images(tmp_path / "x")
    assert images.names == ["a.png", "more/b.png"]
    assert images.left_out.others == OTHERS
    assert len(images.left_out.hidden) == 7 and ".ipynb_checkpoints/" in images.left_out.hidden
    profile = analyze(stated_vit(), tmp_path / "x", **FEW)
    (said,) = profile.remarks
    assert "left out: 3 files that are no pictures: labels.csv, more/clip.mp4, notes.txt; 7 hidden ones: " in said
    assert profile.manifest["data"]["left_out"] == [*OTHERS, *images.left_out.hidden]


def test_a_hidden_folder_can_be_given_itself(tmp_path: Path) -> None:
    (tmp_path / ".cache").mkdir()
    grey().save(tmp_path / ".cache" / "a.png")
    assert open_images(tmp_path / ".cache").names == ["a.png"]


def test_the_same_in_a_tar(tmp_path: Path) -> None:
    clutter(tmp_path / "x")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(tmp_path / "x", ".")
    images = open_images(tmp_path / "x.tar")
    assert [name.removeprefix("./") for name in images.names] == ["a.png", "more/b.png"]
    assert sorted(name.removeprefix("./") for name in images.left_out.others) == list(OTHERS)
    assert len(images.left_out.hidden) == 7  # files: of a hidden folder each


def test_the_same_in_labelled_folders_and_one_tar_of_both_parts_is_said_once(tmp_path: Path) -> None:
    for part, seed in (("train", 0), ("val", 5)):
        for label in ("cat", "dog"):
            (tmp_path / "pets" / part / label).mkdir(parents=True)
            for number in range(2):
                grey(seed + number).save(tmp_path / "pets" / part / label / f"{number}.png")
        (tmp_path / "pets" / part / ".hidden").mkdir()
        grey().save(tmp_path / "pets" / part / ".hidden" / "x.png")
        (tmp_path / "pets" / part / "readme.txt").write_text("text")
    data = open_labelled(tmp_path / "pets")
    assert data.classes == ("cat", "dog")
    assert [line.partition(" left out: ")[2] for line in data.look_at("x")] == [
        "1 file that is no picture: readme.txt; 1 hidden one: .hidden/"
    ] * 2
    with tarfile.open(tmp_path / "pets.tar", "w") as tar:
        tar.add(tmp_path / "pets", ".")
    (said,) = open_labelled(tmp_path / "pets.tar").look_at("x")
    assert "2 files that are no pictures" in said and "2 hidden ones" in said


def test_of_several_frames_the_first_is_taken_and_that_is_said(tmp_path: Path) -> None:
    frames = [grey(seed) for seed in range(3)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    frames[1].save(tmp_path / "pages.tif", save_all=True, append_images=frames[2:])
    frames[2].save(tmp_path / "still.gif")
    images = open_images(tmp_path)
    for index in range(3):
        np.testing.assert_array_equal(np.asarray(images.read(index)), np.asarray(frames[index]))
    (said,) = look_at(images, "x")
    assert said.startswith("2 files of ") and "the first is taken: moving.gif has 3" in said


@pytest.mark.parametrize("kind", ["grey.png", "grey.tif", "colour.tif", "array.npy"])
def test_16_bits_of_which_12_are_used_are_said(tmp_path: Path, kind: str) -> None:
    shape = (40, 40, 3) if kind.startswith("colour") else (40, 40)
    wide = np.random.default_rng(0).integers(0, 4096, shape, np.uint16)
    wide.flat[0] = 4095

    def write(values: np.ndarray) -> None:
        path = tmp_path / f"{kind}"
        if kind.endswith("npy"):
            np.save(path, values)
        elif kind.startswith("colour"):
            tifffile.imwrite(path, values, photometric="rgb")
        else:
            Image.fromarray(values).save(path)

    write(wide)
    images = open_images(tmp_path)
    (said,) = look_at(images, "x")
    assert "16-bit pictures" in said and "reach 4095 of 65535" in said and "--mean and --std" in said
    assert look_at(images.for_model(Wanted(3, given=True, stored=True)), "x") == []  # the advice, followed
    write(wide * np.uint16(16))
    assert look_at(open_images(tmp_path), "x") == []


def test_the_advice_for_unused_bits_works_on_the_command_line(tmp_path: Path) -> None:
    wide = np.random.default_rng(0).integers(0, 4096, (40, 40), np.uint16)
    Image.fromarray(wide).save(tmp_path / "x.png")
    arguments = ["analyze", "--model", "mae_vit_nano", "--data", str(tmp_path), "--statistic", "cls_entropy"]
    result = CliRunner().invoke(main, [*arguments, "--out", str(tmp_path / "dark")])
    assert result.exit_code == 0 and "note: the 16-bit pictures" in result.output
    result = CliRunner().invoke(main, [*arguments, "--mean", "2048", "--std", "1182", "--out", str(tmp_path / "b")])
    assert result.exit_code == 0 and "16-bit" not in result.output


def test_colours_of_16_bits_that_pillow_would_cut_to_8_are_refused_where_their_values_count(tmp_path: Path) -> None:
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return len(content).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")

    rows = b"".join(b"\0" + bytes(8 * 6) for _ in range(8))
    head = (8).to_bytes(4, "big") * 2 + bytes([16, 2, 0, 0, 0])
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (tmp_path / "x.png").write_bytes(png)
    images = open_images(tmp_path)
    assert np.asarray(images.read(0)).shape == (8, 8, 3)
    with pytest.raises(BadImageError, match=r"save it as \.npy or TIFF"):
        images.for_model(Wanted(3, given=True, stored=True)).read(0)
