"""No option is overruled without a word: images that are not there, unfinished runs, sizes, names, precisions."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from helpers import images, message, stated_vit, tiny_vit
from made_squares import write_squares
from vitprobe.bench import benchmark
from vitprobe.cli import main
from vitprobe.errors import UserError
from vitprobe.figures import heads, statistic
from vitprobe.models.building import architecture_of, outline
from vitprobe.probing.verify import verify
from vitprobe.profile.analysis import analyze
from vitprobe.profile.profile import Profile
from vitprobe.profile.values import SHARD_FOLDER, SHARDS

FEW = {"statistics": ["cls_entropy"], "device": "cpu"}


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "pictures"
    place.mkdir()
    for number in range(3):
        Image.new("RGB", (50, 40), (80 * number, 20, 30)).save(place / f"{number}.png")
    return place


@pytest.mark.parametrize("kind", ["folder", "tensor", "loader"])
def test_more_images_than_there_are(folder: Path, kind: str) -> None:
    pixels = images(3)
    data = {"folder": folder, "tensor": pixels, "loader": DataLoader(TensorDataset(pixels))}[kind]
    assert analyze(stated_vit(), data, num_images=500, **FEW).remarks == ["asked for 500 images; there are 3"]
    assert analyze(stated_vit(), data, num_images=3, **FEW).remarks == []


def test_a_verification_of_a_baseline_alone_says_why_it_draws_nothing(tmp_path: Path) -> None:
    data = str(write_squares(tmp_path / "squares"))
    code, output = run("verify", "--model", "mae_vit_nano", "--aggregator", "cls", "--protocol", "knn", "--out",
                       str(tmp_path / "run"), "--data", data)  # fmt: skip
    assert code == 0 and "no figure: no model has all that is to be drawn" in output
    assert "has nothing beside its baseline" in output and (tmp_path / "run" / "accuracy.csv").is_file()


def test_more_images_than_there_are_on_the_screen(folder: Path, tmp_path: Path) -> None:
    code, output = run("analyze", "--model", "mae_vit_nano", "--data", str(folder), "--num-images", "500",
                       "--statistic", "cls_entropy", "--out", str(tmp_path / "run"))  # fmt: skip
    assert code == 0 and "note: asked for 500 images; there are 3" in output


def test_batches_and_workers_that_cannot_be_as_asked() -> None:
    (said,) = analyze(tiny_vit(), images(3), batch_size=100, **FEW).remarks
    assert said == "batch_size 100: a batch is cut at the 64 images of a shard"
    loader = DataLoader(TensorDataset(images(3)))
    assert analyze(tiny_vit(), loader, workers=2, **FEW).remarks == [
        "workers are those of the DataLoader (num_workers)"
    ]


def unfinished(tmp_path: Path) -> Path:
    """A run of 70 of 100 images, the way that an interruption leaves one."""
    analyze(tiny_vit(), images(100), out=tmp_path / "run", **FEW)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["data"]["images"] == 100
    manifest["status"] = "interrupted"
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(manifest))
    last = sorted((tmp_path / "run" / SHARD_FOLDER).glob(SHARDS))[-1]
    last.unlink()
    return tmp_path / "run"


def test_an_unfinished_run_is_drawn_as_such(tmp_path: Path) -> None:
    profile = Profile.load(unfinished(tmp_path))
    assert profile.unfinished == "64 of 100 images" and "64 of 100 images" in repr(profile)
    assert "64 of 100 images" in profile._repr_html_()
    axes = statistic([profile], "cls_entropy")
    (note,) = [text.get_text() for text in axes.texts if text.get_gid() == "note"]
    assert "(64 of 100 images)" in " ".join(note.split())
    assert "(64 of 100 images)" in heads(profile, "cls_entropy").get_title()
    code, output = run("figures", str(tmp_path / "run"), "--statistic", "cls_entropy", "--out", str(tmp_path / "drawn"))
    assert code == 0 and f"note: {tmp_path / 'run'} is not complete: 64 of 100 images" in output
    done = analyze(tiny_vit(), images(100), out=tmp_path / "run", resume=True, **FEW)
    assert done.unfinished is None and done.num_images == 100


def test_the_title_of_an_unfinished_table(tmp_path: Path) -> None:
    from vitprobe.cli.screen import profile_table

    assert ", 64 of 100 images; mean over heads" in profile_table(Profile.load(unfinished(tmp_path)))


@pytest.mark.parametrize("name", ["vit_base", "vit_larg", "vit_base_patch16", "beit_base", "vit_base16", "dinov3"])
def test_suggested_models_can_be_analysed(name: str) -> None:
    with pytest.raises(UserError) as caught:
        architecture_of(name)
    said = re.search(r"did you mean (.*)\?", message(caught))
    assert said is not None
    for suggestion in said[1].split(", ")[:3]:
        outline(architecture_of(suggestion))


def test_auto_is_for_analyze(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        verify("mae_vit_nano", None, ["cls"], dtype="auto", out=tmp_path / "run")
    assert "dtype='auto' is for analyze" in message(caught) and not (tmp_path / "run").exists()


def test_a_bound_without_auto(folder: Path) -> None:
    with pytest.raises(UserError) as caught:
        analyze(tiny_vit(), folder, dtype_bound=0.001, **FEW)
    assert "dtype_bound=0.001 is for dtype='auto'" in message(caught)


# Sizes that are not square ------------------------------------------------------------


def test_a_size_that_is_not_square_on_the_command_line(folder: Path, tmp_path: Path) -> None:
    arguments = ["analyze", "--model", "mae_vit_nano", "--data", str(folder), "--statistic", "cls_entropy"]
    code, output = run(*arguments, "--img-size", "32x64", "--out", str(tmp_path / "run"))
    assert code == 0, output
    profile = Profile.load(tmp_path / "run")
    assert profile.layout.grid == (32 // profile.layout.patch_size[0], 64 // profile.layout.patch_size[1])
    assert profile.manifest["arguments"]["img_size"] == [32, 64]
    code, output = run(*arguments, "--img-size", "32×64", "--resume", "--out", str(tmp_path / "run"))
    assert code == 0, output
    code, output = run(*arguments, "--img-size", "64x32", "--resume", "--out", str(tmp_path / "run"))
    assert code == 2 and "begun with img_size [32, 64], not [64, 32]" in output


def test_a_size_that_is_not_square_in_python(folder: Path, tmp_path: Path) -> None:
    model = tiny_vit(dynamic_img_size=True)
    wide = analyze(model, folder, img_size=(32, 64), out=tmp_path / "run", **FEW)
    assert wide.layout.grid == (4, 8) and wide.manifest["transform"]["size"] == [32, 64]
    again = analyze(model, folder, img_size=(32, 64), out=tmp_path / "run", resume=True, **FEW)
    assert again.layout.grid == (4, 8)
    assert analyze(model, torch.randn(2, 3, 32, 64), img_size=(32, 64), **FEW).layout.grid == (4, 8)


@pytest.mark.parametrize("size", ["0", "x", "32x", "32x32x3", "-3", "32.5", "a"])
@pytest.mark.parametrize("command", ["analyze", "verify", "bench"])
def test_what_is_no_size(size: str, command: str) -> None:
    code, output = run(command, "--img-size", size)
    assert code == 2 and "is no size in pixels; write 224, or HEIGHTxWIDTH such as 224x448" in output


def test_a_size_that_is_not_square_in_verify_and_bench(tmp_path: Path) -> None:
    data = str(write_squares(tmp_path / "squares"))
    code, output = run("verify", "--model", "mae_vit_nano", "--aggregator", "cls", "--protocol", "knn", "--img-size",
                       "32x64", "--out", str(tmp_path / "run"), "--data", data)  # fmt: skip
    assert code == 0, output
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["layout"]["grid"][1] == 2 * manifest["layout"]["grid"][0]
    (cost,) = benchmark("mae_vit_nano", img_size=(32, 64), batch_size=1, rounds=1, ways=["papers"], memory=False)
    assert cost.ratio > 0
