"""Labelled data from everywhere: Hugging Face sets, WebDatasets, tables, torch's own; and sets that are small."""

from __future__ import annotations

import csv
import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch.utils.data import DataLoader, Subset, TensorDataset
from torchvision.datasets import ImageFolder

from helpers import message, tiny_vit
from made_squares import BANK
from vitprobe.cli import main
from vitprobe.data.labelled import LabelledData, open_labelled
from vitprobe.errors import UserError
from vitprobe.probing.knn import fitting
from vitprobe.probing.verify import verify

pytestmark = pytest.mark.usefixtures("undrawn")
CLASSES = ("cat", "dog", "owl")


def picture(number: int) -> Image.Image:
    return Image.new("RGB", (12, 10), (number, 10, 20))


def png(number: int) -> bytes:
    stream = io.BytesIO()
    picture(number).save(stream, "PNG")
    return stream.getvalue()


def folder_of(root: Path, **counts: int) -> Path:
    """A folder a part; picture k of a part, over all classes, is of the shade 100·part + k."""
    for part, (name, count) in enumerate(counts.items()):
        for number in range(count):
            place = root / name / CLASSES[number % 3]
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{number}.png").write_bytes(png(100 * part + number))
    return root


def refusal(data: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        open_labelled(data, **options)
    return message(caught)


def assert_right(data: LabelledData, train: int, test: int) -> None:
    """Every picture is there with the label that its shade says."""
    assert (len(data.train), len(data.test)) == (train, test)
    for part, (split, count) in enumerate(((data.train, train), (data.test, test))):
        shades = [int(np.asarray(split.images.read(index))[0, 0, 0]) - 100 * part for index in range(count)]
        assert sorted(shades) == list(range(count))
        assert [data.classes[label] for label in split.labels] == [CLASSES[shade % 3] for shade in shades]
    assert open_labelled(data) is data


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same data set as `datasets` writes it to a disk, as an imagefolder, and as parquet files."""
    datasets = pytest.importorskip("datasets")
    root = tmp_path_factory.mktemp("hub")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    parts = {
        name: datasets.Dataset.from_dict(
            {
                "image": [{"bytes": png(100 * part + k), "path": None} for k in range(count)],
                "label": [k % 3 for k in range(count)],
            },
            features=features,
        )
        for part, (name, count) in enumerate((("train", 9), ("validation", 6)))
    }
    (root / "parquet").mkdir()
    for name, dataset in parts.items():
        dataset.to_parquet(root / "parquet" / f"{name}-00000.parquet")
    datasets.DatasetDict(parts).save_to_disk(root / "disk")
    parts["train"].save_to_disk(root / "one")
    folder_of(root / "folder", train=9, validation=6)
    return {kind: str(root / kind) for kind in ("parquet", "disk", "one", "folder")}


@pytest.mark.filterwarnings("ignore")  # of datasets' own
@pytest.mark.parametrize(("prefix", "kind"), [("hfds", "disk"), ("hfds", "parquet"), ("hfds", "folder"),
                                              ("hfids", "disk"), ("hfids", "folder")])  # fmt: skip
def test_a_hugging_face_data_set(saved: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, prefix: str,
                                 kind: str) -> None:  # fmt: skip
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    spec = f"{prefix}:{saved[kind]}"
    assert_right(open_labelled(spec), 9, 6)
    assert_right(open_labelled(f"{spec}#train,{spec}#validation"), 9, 6)
    assert open_labelled(spec).fingerprint == open_labelled(spec).fingerprint != ""
    alone = open_labelled(f"{spec}#train", seed=3)
    assert (len(alone.train), len(alone.test)) == (6, 3) and "drawn with seed 3" in alone.remarks[0]


@pytest.mark.filterwarnings("ignore")
def test_a_data_set_saved_without_splits_is_drawn(saved: dict[str, str]) -> None:
    data = open_labelled(f"hfds:{saved['one']}")
    assert (len(data.train), len(data.test)) == (6, 3)
    assert refusal(f"hfds:{saved['one']}x").startswith(f"hfds:{saved['one']}x cannot be loaded (")
    with pytest.raises(UserError, match=r"has no column of labels .*it has image"):
        import datasets

        bare = datasets.load_from_disk(saved["one"]).remove_columns("label")
        bare.save_to_disk(saved["one"] + "-bare")
        open_labelled(f"hfds:{saved['one']}-bare")


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def samples(part: int, numbers: range, kind: str = "cls") -> dict[str, bytes]:
    found = {}
    for k in numbers:
        found[f"{k:04d}.png"] = png(100 * part + k)
        label = CLASSES[k % 3]
        found[f"{k:04d}.{kind}"] = label.encode() if kind == "cls" else f'{{"label": "{label}"}}'.encode()
    return found


@pytest.mark.parametrize("kind", ["cls", "json"])
@pytest.mark.parametrize("way", ["folders", "names", "pair", "info"])
def test_a_webdataset(tmp_path: Path, way: str, kind: str) -> None:
    pytest.importorskip("webdataset")
    between = "/" if way == "folders" else "-"
    for part, name, ranges in ((0, "train", (range(5), range(5, 9))), (1, "val", (range(6),))):
        for number, numbers in enumerate(ranges):
            write_tar(tmp_path / f"{name}{between}{number}.tar", samples(part, numbers, kind))
    spec = f"wds:{tmp_path}"
    if way == "pair":
        spec = f"wds:{tmp_path}/train-{{0..1}}.tar,wds:{tmp_path}/val-0.tar"
    if way == "info":
        lengths = {"train": ["train-{0..1}.tar", [5, 4]], "validation": ["val-{0..0}.tar", [6]]}
        splits = {name: {"name": name, "filenames": [f"{'train' if name == 'train' else 'val'}-{i}.tar" for i in
                         range(len(counts))], "shard_lengths": counts, "num_samples": sum(counts)}
                  for name, (_, counts) in lengths.items()}  # fmt: skip
        import json

        (tmp_path / "_info.json").write_text(json.dumps({"splits": splits}))
    assert_right(open_labelled(spec), 9, 6)


def test_a_webdataset_in_one_part_and_one_without_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("webdataset")
    write_tar(tmp_path / "a" / "0.tar", samples(0, range(15)))
    data = open_labelled(f"wds:{tmp_path / 'a'}")
    assert (len(data.train), len(data.test)) == (12, 3) and "one part" in data.remarks[0]
    write_tar(tmp_path / "b" / "0.tar", {"x.png": png(0)})
    assert "0.tar/x of" in refusal(f"wds:{tmp_path / 'b'}") and "has no label" in refusal(f"wds:{tmp_path / 'b'}")
    monkeypatch.setattr("vitprobe.data.labelled_hub.available_memory", lambda: 300)
    assert "does not fit into memory" in refusal(f"wds:{tmp_path / 'a'}")


def table(path: Path, rows: list[list[str]], delimiter: str = ",") -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return path


def rows_of(root: Path, part: str) -> list[tuple[str, str]]:
    return [(path.relative_to(root).as_posix(), path.parent.name) for path in sorted((root / part).rglob("*.png"))]


@pytest.mark.parametrize(("delimiter", "suffix"), [(",", "csv"), (";", "csv"), ("\t", "tsv")])
@pytest.mark.parametrize("heading", [("file", "label", "split"), ("Image_Path", "Class", "Set"), None])
def test_a_table_with_splits(tmp_path: Path, delimiter: str, suffix: str, heading: tuple[str, ...] | None) -> None:
    folder_of(tmp_path, train=9, test=6)
    rows = [[file, label, part] for part in ("train", "test") for file, label in rows_of(tmp_path, part)]
    path = table(tmp_path / f"x.{suffix}", ([list(heading)] if heading else []) + rows, delimiter)
    assert_right(open_labelled(str(path)), 9, 6)


def test_a_table_without_splits_is_drawn_by_class_and_seed(tmp_path: Path) -> None:
    folder_of(tmp_path, all=30)
    path = table(tmp_path / "x.csv", [["label", "file"], *([label, file] for file, label in rows_of(tmp_path, "all"))])
    data, other = open_labelled(path, seed=1), open_labelled(path, seed=2)
    assert np.bincount(data.test.labels).tolist() == [2, 2, 2] and len(data.train) == 24
    assert not set(data.train.ids) & set(data.test.ids)
    assert data.test.ids == open_labelled(path, seed=1).test.ids != other.test.ids
    assert data.remarks == ("x.csv comes in one part, so a test of 20% of each class was drawn with seed 1",)
    assert "24 train, 6 test, drawn by class with seed 1" in data.name


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([["file", "label"]], "names no image"),
        ([["width", "height", "file"], ["1", "2", "a.png"]], "has the columns width, height, file: a table has"),
        ([["file", "label"], ["none.png", "cat"]], "none of the 1 files that x.csv names is there, the first: "),
        ([["file", "label"], ["train/cat/0.png", ""]], "row 1 of x.csv (train/cat/0.png) has no label"),
        ([["file", "label"], ["train/cat/0.png"]], "row 1 of x.csv has 1 of 2 columns"),
        ([["file", "label", "split"], ["train/cat/0.png", "cat", "train"]], "one must be train, and one val"),
        ([["file", "label"], ["train/cat/0.png", "cat"]], "one image a class"),
        ([], "is empty"),
    ],
)
def test_tables_that_cannot_be(tmp_path: Path, rows: list[list[str]], words: str) -> None:
    folder_of(tmp_path, train=3)
    assert words in refusal(table(tmp_path / "x.csv", rows))


def test_torchvisions_image_folder(tmp_path: Path) -> None:
    folder_of(tmp_path, train=9, test=6)
    train, test = (ImageFolder(str(tmp_path / part)) for part in ("train", "test"))
    assert_right(open_labelled((train, test)), 9, 6)
    assert_right(open_labelled((train, tmp_path / "test")), 9, 6)
    alone = open_labelled(train)
    assert (len(alone.train), len(alone.test)) == (6, 3) and "one part" in alone.remarks[0]
    half = open_labelled((Subset(train, range(0, 9, 2)), test))
    assert len(half.train) == 5 and [half.classes[label] for label in half.train.labels[:2]] == ["cat", "cat"]
    assert "cannot read labelled images from a TensorDataset" in refusal(TensorDataset(torch.zeros(2)))


def loader(count: int, seed: int = 0, **options: Any) -> DataLoader:
    labels = torch.arange(count) % 2
    pixels = (
        torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) + 3 * labels[:, None, None, None]
    )
    return DataLoader(TensorDataset(pixels, labels), batch_size=7, **options)


def test_a_pair_of_dataloaders(tmp_path: Path) -> None:
    data = open_labelled((loader(20), loader(10, seed=1)))
    assert data.classes == ("0", "1") and (len(data.train), len(data.test)) == (20, 10)
    assert torch.equal(data.test.images.read(3), loader(10, seed=1).dataset[3][0])
    for protocol in ("logistic", "knn", BANK):
        assert verify(tiny_vit(), (loader(20), loader(10, seed=1)), ["cls"], protocol=protocol, device="cpu").num_images
    as_dict = DataLoader([{"pixel_values": x, "labels": y} for x, y in loader(6).dataset], batch_size=3)  # type: ignore[arg-type]
    assert open_labelled((as_dict, loader(4, seed=1))).train.labels.tolist() == [0, 1] * 3


def test_what_a_dataloader_cannot_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = (loader(20), loader(10, seed=1))
    run = {"protocol": "knn", "device": "cpu", "out": tmp_path / "run"}
    with pytest.raises(UserError, match="so a run on it cannot be resumed"):
        verify(tiny_vit(), pair, ["cls"], resume=True, **run)
    with pytest.raises(UserError, match="leave mean and std out"):
        verify(tiny_vit(), pair, ["cls"], mean=0.5, std=0.5, **run)
    assert not (tmp_path / "run").exists()
    model = tiny_vit(img_size=64, dynamic_img_size=True)
    with pytest.raises(UserError, match="have 32×32 pixels, and VisionTransformer takes 64×64: give tensors of that"):
        verify(model, pair, ["cls"], protocol="logistic", device="cpu")
    assert verify(model, pair, ["cls"], protocol="logistic", img_size=32, device="cpu").num_images == 10
    bare = DataLoader(TensorDataset(torch.randn(4, 3, 32, 32)), batch_size=2)
    assert "gave no labels with its images" in refusal((bare, bare))
    same = open_labelled((loader(8), loader(8)))  # a try-out
    assert "are the same images" in same.remarks[0]
    monkeypatch.setattr("vitprobe.data.labelled_torch.available_memory", lambda: 2**16)
    assert "do not fit into memory" in refusal(pair)


def test_validation_comes_before_test_and_the_other_is_said(tmp_path: Path) -> None:
    data = open_labelled(folder_of(tmp_path / "x", train=9, validation=6, test=3))
    assert_right(data, 9, 6)
    assert data.remarks == ("x has test/ too, which is not used: validation is tested on",)


# Small sets -----------------------------------------------------------------------------------------------------------


def test_the_numbers_of_neighbours_that_fit() -> None:
    assert fitting((10, 20, 100, 200), 189) == (10, 20, 100)
    assert fitting((10, 20), 10) == (10,)
    with pytest.raises(UserError, match="at least 10 training images beside the held-out ones, and there are 9"):
        fitting((10, 20), 9)


def test_knn_takes_the_numbers_that_fit_and_says_so(tmp_path: Path) -> None:
    folder_of(tmp_path / "x", train=30, val=6)
    arguments = ["verify", "--model", "mae_vit_nano", "--data", str(tmp_path / "x"), "--aggregator", "cls",
                 "--protocol", "knn"]  # fmt: skip
    result = CliRunner().invoke(main, [*arguments, "--out", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    assert (
        "note: k is chosen from 5, 10, 15, 20 of 5, 10, 15, 20, 50, 100, 200: k-NN searches among 27" in result.output
    )
    found = verify("mae_vit_nano", tmp_path / "x", ["cls"], protocol="knn", device="cpu")
    assert dict(found.manifest["protocol"]["grid"])["k"] == [5, 10, 15, 20]
    assert all(result.hyperparameters["k"] <= 20 for result in found.results)


def test_too_few_images_for_any_number_and_the_advice(tmp_path: Path) -> None:
    folder_of(tmp_path / "x", train=6, val=3)
    arguments = ["verify", "--model", "mae_vit_nano", "--data", str(tmp_path / "x"), "--aggregator", "cls"]
    result = CliRunner().invoke(main, [*arguments, "--protocol", "knn", "--out", str(tmp_path / "run")])
    assert result.exit_code == 2 and "there are 3: give more, or take --protocol logistic" in result.output
    result = CliRunner().invoke(main, [*arguments, "--protocol", "logistic", "--out", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output


def test_a_class_without_test_images_is_said_on_the_screen(tmp_path: Path) -> None:
    folder_of(tmp_path / "x", train=12, val=2)
    arguments = ["verify", "--model", "mae_vit_nano", "--data", str(tmp_path / "x"), "--aggregator", "cls"]
    result = CliRunner().invoke(main, [*arguments, "--protocol", "logistic", "--out", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    assert "note: the test images of x lack 1 of its 3 classes: owl" in result.output
