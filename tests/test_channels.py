"""Models of 1, 2, 4, 6 and 13 channels: what they are given, and that it is what the files hold."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import tifffile
import timm
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from helpers import message, tiny_vit
from made_squares import BANK
from vitprobe.cli import main
from vitprobe.data.bands import Wanted
from vitprobe.data.decoding import BadChannelsError, BadImageError, decode
from vitprobe.data.sources import open_images
from vitprobe.errors import UserError
from vitprobe.layout import TokenLayout
from vitprobe.models.anatomy.find import find_anatomy
from vitprobe.models.loading import load_model
from vitprobe.models.meta import on_meta
from vitprobe.probing.protocols import Protocol
from vitprobe.probing.saved import load_probe
from vitprobe.probing.tap import Tap
from vitprobe.probing.tokens import FrozenModel
from vitprobe.probing.verify import verify
from vitprobe.profile.analysis import analyze

pytestmark = pytest.mark.usefixtures("undrawn")
COUNTS = (1, 2, 4, 6, 13)
FEW = {"statistics": ["cls_entropy"], "device": "cpu"}


def bands(channels: int, seed: int = 0, side: int = 40, dtype: type = np.uint8) -> np.ndarray:
    """Random values `(side, side, channels)` over the whole range of their type, floats from 0 to 1."""
    rng = np.random.default_rng(seed)
    if np.issubdtype(dtype, np.floating):
        return rng.random((side, side, channels)).astype(dtype)
    return rng.integers(0, np.iinfo(dtype).max, (side, side, channels), dtype=dtype, endpoint=True)


def vit(channels: int) -> nn.Module:
    """A tiny model whose pictures are not cropped."""
    model = tiny_vit(in_chans=channels)
    model.pretrained_cfg = {"crop_pct": 1.0, "interpolation": "bicubic"}
    return model


def file_of(content: np.ndarray) -> io.BytesIO:
    stream = io.BytesIO()
    np.save(stream, content)
    stream.seek(0)
    return stream


@pytest.mark.parametrize("channels", COUNTS)
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "beit_base_patch16_224", "eva02_tiny_patch14_224",
                                  "vit_small_r26_s32_224", "naflexvit_base_patch16_gap"])  # fmt: skip
def test_channels_are_those_of_the_patch_embedding(name: str, channels: int) -> None:
    with on_meta():
        module = timm.create_model(name, in_chans=channels, depth=1)
    assert find_anatomy(module).channels == channels


def test_channels_of_patches_that_a_linear_map_embeds() -> None:
    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_patches = nn.Linear(6 * 8 * 8, 32)
            self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(32, 2, 64, batch_first=True) for _ in range(2))

    layout = TokenLayout(grid=(4, 4), has_cls=False, patch_size=(8, 8))
    module = Patches()
    assert find_anatomy(module, layout, list(module.blocks)).channels == 6


@pytest.mark.parametrize("channels", COUNTS)
def test_tensors_loaders_arrays_and_tiffs_are_analysed_alike(tmp_path: Path, channels: int) -> None:
    """The reference normalises by hand, and no picture is resized: all four ways must give the same numbers."""
    model, several = vit(channels), [bands(channels, seed, side=32) for seed in range(3)]
    mean, std = [0.1 * (k % 5) for k in range(channels)], [0.2 + 0.05 * k for k in range(channels)]
    pixels = np.stack([(x.astype(np.float64) / 255 - mean) / std for x in several]).transpose(0, 3, 1, 2)
    tensor = torch.from_numpy(pixels).float()
    expected = analyze(model, tensor, **FEW).values.read("cls_entropy")
    assert analyze(model, DataLoader(TensorDataset(tensor), batch_size=2), **FEW).values.read("cls_entropy").shape
    for kind in ("last", "first", "tiff", "pages"):
        folder = tmp_path / kind
        folder.mkdir()
        for number, x in enumerate(several):
            if kind == "tiff" and channels not in (1, 2):
                tifffile.imwrite(folder / f"{number}.tif", x, photometric="minisblack", planarconfig="contig")
            elif kind == "pages" and channels > 4:
                tifffile.imwrite(folder / f"{number}.tif", x.transpose(2, 0, 1), photometric="minisblack")
            else:
                np.save(folder / f"{number}.npy", x.transpose(2, 0, 1) if kind == "first" else x)
        profile = analyze(model, folder, mean=mean, std=std, **FEW)
        np.testing.assert_allclose(profile.values.read("cls_entropy"), expected, rtol=2e-5, atol=2e-6)
        assert profile.manifest["arguments"]["mean"] == mean
        assert profile.manifest["transform"]["std"] == std


def test_bands_are_resized_and_cropped_as_pictures_are() -> None:
    """Against torch's own antialiased bicubic, in float64, written out here."""
    x = bands(6, side=50, dtype=np.float32)
    transform = load_model(tiny_vit(in_chans=6)).transform
    resized, size = transform.resize[0], transform.size[0]
    planes = (torch.from_numpy(x).double().permute(2, 0, 1)[None] - transform.mean[0]) / transform.std[0]
    whole = F.interpolate(planes, (resized, resized), mode="bicubic", antialias=True)
    edge = (resized - size + 1) // 2
    expected = whole[0, :, edge : edge + size, edge : edge + size]
    given = transform(decode(file_of(x), "x", transform.wanted))
    assert given.shape == (6, 32, 32)
    assert (given - expected).abs().max() < 1e-4 or (
        given - whole[0, :, (resized - size) // 2 :, (resized - size) // 2 :][:, :size, :size]
    ).abs().max() < 1e-4


def test_grey_and_colour_are_made_of_each_other() -> None:
    colour, grey = bands(3), bands(1)
    to_grey = np.asarray(decode(file_of(colour), "x", Wanted(1)))
    np.testing.assert_array_equal(to_grey, np.asarray(Image.fromarray(colour).convert("L")))
    assert np.abs(to_grey - colour.astype(float) @ (0.299, 0.587, 0.114)).max() <= 0.51
    to_colour = np.asarray(decode(file_of(grey[..., 0]), "x", Wanted(3)))
    np.testing.assert_array_equal(to_colour, np.repeat(grey, 3, axis=2))
    floats = bands(3, dtype=np.float32)
    luminance = decode(file_of(floats), "x", Wanted(1))
    np.testing.assert_allclose(luminance[..., 0], floats.astype(np.float64) @ (0.299, 0.587, 0.114), atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_an_array_and_the_png_of_it_are_one_picture(tmp_path: Path, channels: int) -> None:
    for dtype in (np.uint8, np.uint16):
        if channels == 3 and dtype == np.uint16:
            continue  # of which there is no PNG that Pillow writes
        x = bands(channels, dtype=dtype)
        Image.fromarray(x if channels == 3 else x[..., 0]).save(tmp_path / "x.png")
        for wanted in (Wanted(1), Wanted(3)):
            png = decode(io.BytesIO((tmp_path / "x.png").read_bytes()), "x", wanted)
            np.testing.assert_array_equal(np.asarray(decode(file_of(x), "x", wanted)), np.asarray(png))


def test_pictures_that_have_a_models_two_or_four_channels_are_taken_as_they_are() -> None:
    for mode, channels in (("LA", 2), ("RGBA", 4), ("CMYK", 4)):
        picture = Image.fromarray(bands(channels), mode if mode == "CMYK" else None)
        stream = io.BytesIO()
        picture.save(stream, "TIFF" if mode == "CMYK" else "PNG")
        stream.seek(0)
        np.testing.assert_array_equal(decode(stream, "x", Wanted(channels)), bands(channels))


def test_what_cannot_be_made_the_models_channels(tmp_path: Path) -> None:
    with pytest.raises(BadChannelsError, match=r"has 6 channels, and the model takes 3$"):
        decode(file_of(bands(6)), "x", Wanted(3))
    with pytest.raises(BadChannelsError, match=r"it has 3 channels \(RGB\), and the model takes 6$"):
        decode(io.BytesIO(encoded(bands(3))), "x", Wanted(6))
    for photometric in ("rgb", "minisblack"):  # of which Pillow would give the first three bands without a word
        stream = io.BytesIO()
        tifffile.imwrite(stream, bands(6), photometric=photometric, planarconfig="contig")
        stream.seek(0)
        with pytest.raises(BadChannelsError, match=r"6 channels.*the model takes 3$"):
            decode(stream, "x", Wanted(3))
    Image.fromarray(bands(3)).save(tmp_path / "a.png")
    with pytest.raises(UserError) as caught:
        analyze(vit(6), tmp_path, **FEW)
    assert "takes images of 6 channels" in message(caught) and "--data of 6 channels" in message(caught)


def encoded(x: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(x).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((8, 8, 3), np.int64), "its numbers are int64, of no known range"),
        (np.full((8, 8), 3000.0), "its values reach 3000 and have no known range"),
        (np.full((8, 8), np.nan), "its values hold NaN or infinity"),
        (np.zeros((3, 8, 3)), "may be (height, width, channels) or (channels, height, width)"),
        (np.zeros((2, 8, 8, 3)), "give a file of several images as --data itself"),
        (np.zeros(8), "an array of shape (8,)"),
        (np.array([None]), "the array holds Python objects, which are not read"),
        (np.zeros((1, 200)), "over 100 times as long as wide"),
    ],
)
def test_arrays_that_are_no_picture(array: np.ndarray, reason: str) -> None:
    with pytest.raises(BadImageError) as caught:
        decode(file_of(array), "x")
    assert reason in caught.value.reason and "\n" not in caught.value.reason


def test_the_advice_for_values_of_unknown_range_works(tmp_path: Path) -> None:
    """mean and std above 1 are of the values in the files, which are not scaled first."""
    model = vit(2)
    wide = [(3000 * bands(2, seed, 32, np.float64)).astype(kind) for seed, kind in enumerate((np.int32, np.float32))]
    for number, x in enumerate(wide):
        np.save(tmp_path / f"{number}.npy", x)
    with pytest.raises(UserError, match="give --mean and --std of its values"):
        analyze(model, tmp_path, **FEW)
    profile = analyze(model, tmp_path, mean=1500, std=[800, 900], **FEW)
    pixels = np.stack([(x.astype(np.float64) - 1500) / [800, 900] for x in wide]).transpose(0, 3, 1, 2)
    expected = analyze(model, torch.from_numpy(pixels).float(), **FEW)
    np.testing.assert_allclose(
        profile.values.read("cls_entropy"), expected.values.read("cls_entropy"), rtol=2e-5, atol=2e-6
    )
    assert any("not scaled to 0..1" in remark for remark in profile.remarks)


def test_mean_and_std_above_one_of_ordinary_pictures_are_of_0_to_255(tmp_path: Path) -> None:
    Image.fromarray(bands(3)).save(tmp_path / "a.png")
    shades, unit = ([127.5, 63.75, 25.5], [0.5, 0.25, 0.1])
    given = [
        analyze(vit(3), tmp_path, mean=mean, std=mean, **FEW).values.read("cls_entropy") for mean in (shades, unit)
    ]
    np.testing.assert_allclose(given[0], given[1], rtol=1e-5)


def test_the_default_for_unknown_channels_is_said_and_the_users_word_is_taken(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", bands(6))
    (said,) = analyze(vit(6), tmp_path, **FEW).remarks
    assert "mean and std for 6 channels are not known" in said and "0.449 and 0.226" in said
    assert analyze(vit(6), tmp_path, mean=0.3, std=0.2, **FEW).remarks == []
    assert analyze(vit(6), torch.randn(2, 6, 32, 32), **FEW).remarks == []  # which are normalised already


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mean": 0.5}, "mean and std belong together: give std too (--std)"),
        ({"mean": [0.1, 0.2], "std": 1}, "mean has 2 values, and the model takes 6 channels"),
        ({"mean": float("nan"), "std": 1}, "mean is nan: give a number"),
        ({"mean": 0, "std": 0}, "std is 0: give a number above 0"),
    ],
)
def test_impossible_normalisations(tmp_path: Path, options: dict, words: str) -> None:
    np.save(tmp_path / "a.npy", bands(6))
    with pytest.raises(UserError) as caught:
        analyze(vit(6), tmp_path, out=tmp_path / "run", **options, **FEW)
    assert words in message(caught) and not (tmp_path / "run").exists()


def test_what_is_normalised_already_takes_no_preparation() -> None:
    pixels = torch.randn(2, 6, 32, 32)
    for data in (pixels, list(pixels), DataLoader(TensorDataset(pixels))):
        for options, words in (
            ({"mean": 0.5, "std": 0.5}, "leave mean and std out"),
            ({"img_size": 64}, "img_size is 64×64 and the tensors have 32×32 pixels"),
        ):
            model = tiny_vit(in_chans=6, dynamic_img_size=True)
            with pytest.raises(UserError) as caught:
                analyze(model, data, **options, **FEW)
            assert words in message(caught)
        (said,) = analyze(vit(6), data, transform="paper", **FEW).remarks
        assert said.startswith("transform='paper' is for pictures: ")
    with pytest.raises(UserError, match=r"has the shape \(2, 3, 32, 32\), and the model takes \(n, 6, height, width\)"):
        analyze(vit(6), torch.randn(2, 3, 32, 32), **FEW)
    with pytest.raises(UserError, match=r"a batch is a float tensor \(n, 6, height, width\)"):
        analyze(vit(6), DataLoader(TensorDataset(torch.randn(2, 3, 32, 32))), **FEW)


def test_several_images_in_one_array(tmp_path: Path) -> None:
    stacks = {
        "last": (np.stack([bands(6, seed) for seed in range(3)]), 6),
        "first": (np.stack([bands(6, seed) for seed in range(3)]).transpose(0, 3, 1, 2), 6),
        "grey": (np.stack([bands(1, seed)[..., 0] for seed in range(20)]), 1),
    }
    for name, (stack, channels) in stacks.items():
        np.save(tmp_path / f"{name}.npy", stack)
        images = open_images(tmp_path / f"{name}.npy").for_model(Wanted(channels))
        assert len(images) == len(stack)
        expected = bands(channels, seed=2)
        np.testing.assert_array_equal(np.asarray(images.read(2)).reshape(expected.shape), expected)
        assert analyze(vit(channels), tmp_path / f"{name}.npy", **FEW).num_images == len(stack)
    np.save(tmp_path / "one.npy", bands(6))
    assert len(open_images(tmp_path / "one.npy").for_model(Wanted(6))) == 1
    with pytest.raises(UserError, match=r"save grey images as \(40, 40, 6, 1\)"):
        open_images(tmp_path / "one.npy").for_model(Wanted(1))
    np.save(tmp_path / "eight.npy", np.stack([bands(1, seed)[..., 0] for seed in range(8)])[..., None])
    assert len(open_images(tmp_path / "eight.npy").for_model(Wanted(1))) == 8


def test_the_packaged_photographs() -> None:
    assert analyze(vit(1), None, num_images=2, **FEW).num_images == 2
    with pytest.raises(UserError) as caught:
        analyze(vit(6), None, **FEW)
    assert "--data of 6 channels" in message(caught)
    with pytest.raises(UserError) as caught:
        verify(vit(6), None, protocol="knn", device="cpu")
    assert "--data of 6 channels" in message(caught)


@pytest.mark.parametrize(("channels", "protocol"), [(1, "knn"), (6, "logistic"), (6, BANK)])
def test_verify_takes_the_models_channels(tmp_path: Path, channels: int, protocol: str | Protocol) -> None:
    for part, count in (("train", 12), ("val", 4)):
        for label in range(2):
            folder = tmp_path / part / f"c{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                x = bands(channels, 100 * label + number + 50 * (part == "val"), side=32) // 2 + 120 * label
                np.save(folder / f"{number}.npy", x.astype(np.uint8))
    found = verify(vit(channels), tmp_path, ["cls"], protocol=protocol, mean=0.5, std=0.25, device="cpu", workers=0)
    assert found.num_images == 8
    assert found.manifest["transform"]["mean"] == [0.5] * channels


def test_a_saved_probe_prepares_pictures_as_its_run_did(tmp_path: Path) -> None:
    for part, count in (("train", 12), ("val", 4)):
        for label in range(2):
            (tmp_path / "data" / part / f"c{label}").mkdir(parents=True)
            for number in range(count):
                x = bands(6, 100 * label + number + 50 * (part == "val"), side=32) // 2 + 120 * label
                np.save(tmp_path / "data" / part / f"c{label}" / f"{number}.npy", x.astype(np.uint8))
    model, mean, std = vit(6), [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0.2]
    given = {"protocol": BANK, "mean": mean, "std": std, "device": "cpu", "workers": 0}
    verify(model, tmp_path / "data", ["cls"], out=tmp_path / "run", **given)
    probe = load_probe(next((tmp_path / "run" / "probes").iterdir()), model)
    np.save(tmp_path / "x.npy", bands(6, side=32))
    pixels = (bands(6, side=32).astype(np.float64) / 255 - mean) / 0.2
    tensor = torch.from_numpy(pixels.transpose(2, 0, 1)).float()
    torch.testing.assert_close(probe.embed(tmp_path / "x.npy"), probe.embed(tensor), rtol=1e-4, atol=1e-5)


def test_frozen_tokens_are_measured_with_the_models_channels() -> None:
    with FrozenModel(load_model(vit(13)), [Tap(1)], device="cpu") as frozen:
        assert frozen.dim == 32


def test_mean_and_std_on_the_command_line(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", bands(3, dtype=np.float32))
    arguments = ["analyze", "--model", "mae_vit_nano", "--data", str(tmp_path), "--statistic", "cls_entropy"]
    given = ["--mean", "0.4,0.5,0.6", "--std", "0.2"]
    result = CliRunner().invoke(main, [*arguments, *given, "--out", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(main, [*arguments, "--mean", "0.4;0.5", "--out", str(tmp_path / "other")])
    assert result.exit_code == 2 and "is no number" in result.output
    result = CliRunner().invoke(main, [*arguments, "--resume", "--out", str(tmp_path / "run")])
    assert result.exit_code == 2 and "begun with mean [0.4, 0.5, 0.6], not none" in result.output
