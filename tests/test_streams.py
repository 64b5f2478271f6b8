"""Sets that are streamed: every sample once, in one order, whoever reads it; and data sets of Hugging Face on disk."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

from vitprobe.data import streams
from vitprobe.data.shards import Share
from vitprobe.data.sources import open_images
from vitprobe.data.streams import StreamImages, iterate_stream
from vitprobe.data.transforms import ImageTransform
from vitprobe.errors import UserError
from vitprobe.profile.analysis import analyze
from vitprobe.profile.profile import Profile

pytest.importorskip("webdataset")
TRANSFORM = ImageTransform("model", (8, 8), 1.0, "center", "bicubic", (0.0,) * 3, (1.0,) * 3)
COUNTS, ALL = (130, 64, 7), Share()
# from Python 3.12 on, forking warns where torch runs threads; the readers do not use what those hold
FORK = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
# what `datasets` and its own needs say of themselves is none of ours
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def picture(number: int, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (12, 9), (number % 256, number // 256, 50)).save(stream, kind)
    return stream.getvalue()


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


@pytest.fixture(scope="module")
def tars(tmp_path_factory) -> Path:
    """Tars of 130, 64 and 7 samples, each with a text beside its image; in the first two bad ones and one without."""
    folder = tmp_path_factory.mktemp("tars")
    number = 0
    for part, count in enumerate(COUNTS):
        with tarfile.open(folder / f"set-{part:03d}.tar", "w") as tar:
            for i in range(count):
                add(tar, f"{i:05d}.txt", b"a caption")
                if (part, i) == (0, 3):
                    add(tar, f"{i:05d}.jpg", b"no image")
                elif (part, i) != (0, 70):
                    add(tar, f"{i:05d}.png", picture(number))
                number += 1
    return folder


BAD = [
    ("set-000.tar/00003", "not an image that Pillow reads here"),
    ("set-000.tar/00070", "its sample holds no image"),
]
NAMES = [f"set-{part:03d}.tar/{i:05d}" for part, count in enumerate(COUNTS) for i in range(count)]
GOOD = [name for name in NAMES if name not in dict(BAD)]


def spec(tars: Path) -> str:
    return f"wds:{tars}/set-{{000..002}}.tar"


def read(images, share: Share = ALL, **options):
    assert isinstance(images, StreamImages)
    return list(iterate_stream(images, TRANSFORM, 24, share, **options))


@FORK
@pytest.mark.filterwarnings("ignore:This DataLoader will create 3")  # on a machine of two cores
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_every_sample_once_in_order_whoever_decodes(tars, workers):
    batches = read(open_images(spec(tars)), workers=workers)
    assert [name for batch in batches for name in batch.names] == GOOD
    assert [bad for batch in batches for bad in batch.skipped] == BAD
    assert sorted({batch.shard for batch in batches}) == [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0)]
    ends = [batch.shard for batch in batches if batch.ends]
    assert ends == [(0, 2), (1, 0), (2, 0)]  # also where a part is just one shard
    assert [batch.shard for batch in batches if batch.last] == [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0)]
    assert [len(b.names) + len(b.skipped) for b in batches] == [24, 24, 16, 24, 24, 16, 2, 24, 24, 16, 7]
    for batch in batches:
        for name, pixels in zip(batch.names, batch.pixels, strict=True):
            number = NAMES.index(name)
            assert torch.allclose(pixels[0], torch.tensor((number % 256) / 255))


@pytest.mark.parametrize("size", [2, 3, 4])  # with 4 there are fewer parts than processes
@pytest.mark.parametrize("num_images", [None, 100, 150])
def test_shares_are_the_whole_and_batches_the_same(tars, size, num_images):
    images = open_images(spec(tars))
    whole = {(b.shard, tuple(b.names)) for b in read(images, num_images=num_images)}
    shares = [read(images, Share(rank, size), num_images=num_images) for rank in range(size)]
    dealt = [(b.shard, tuple(b.names)) for share in shares for b in share]
    if num_images is not None:  # each reads from the beginning, so shards are dealt, not parts
        assert sum(len(b.names) + len(b.skipped) for share in shares for b in share) == num_images
    assert len(dealt) == len(set(dealt))
    assert set(dealt) == whole


def test_what_is_done_is_not_done_again(tars):
    images = open_images(spec(tars))
    share = Share(done=frozenset({(0, 0), (0, 2), (1, 0)}), ended=frozenset({1}))
    assert {batch.shard for batch in read(images, share)} == {(0, 1), (2, 0)}


def test_ways_to_name_tars(tars, tmp_path):
    fingerprint = open_images(spec(tars)).fingerprint()
    assert open_images(f"wds:{tars}").fingerprint() == fingerprint
    info = {"splits": {"val": {"name": "val", "num_samples": 71, "filenames": ["set-001.tar", "set-002.tar"],
                               "shard_lengths": [64, 7]}}}  # fmt: skip
    for path in tars.glob("*.tar"):
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "_info.json").write_text(json.dumps(info))
    assert len(read(open_images(f"wds:{tmp_path}#val"))) == 4
    for wrong, words in [
        (f"wds:{tmp_path}#none", "split none not found"),
        (f"wds:{tars}/set-{{000..003}}.tar", r"set-003.tar does not exist; give DIR/\{0000..0063\}.tar, or a folder"),
        (f"wds:{tmp_path / 'nowhere'}", "cannot be opened|does not exist"),
    ]:
        with pytest.raises(UserError, match=words):
            open_images(wrong)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty holds no \.tar"):
        open_images(f"wds:{tmp_path / 'empty'}")


def test_a_tar_cut_off_is_an_error_that_names_it(tars, tmp_path):
    whole = (tars / "set-001.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2 + 100])
    with pytest.raises(UserError, match=r"cut\.tar cannot be read to its end \(.*\); mend it, and --resume goes on"):
        read(open_images(f"wds:{tmp_path}"))


def test_a_stream_is_not_listed(tars):
    images = open_images(spec(tars), groups=lambda name: name.split("/")[0])
    assert {group for batch in read(images) for group in batch.groups} == {f"set-{part:03d}.tar" for part in range(3)}
    assert read(open_images(images, groups=lambda name: "one"))[0].groups == ["one"] * 23
    with pytest.raises(TypeError):
        len(images)
    with pytest.raises(UserError, match="read from its beginning"):
        images.read(0)
    with pytest.raises(UserError, match="groups cannot be a list"):
        open_images(spec(tars), groups=["a"])


def test_without_the_package_the_extra_is_named(tars, monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(streams.importlib, "import_module", missing)
    with pytest.raises(UserError, match=r"wds:… needs the package webdataset: pip install 'vitprobe\[data\]'"):
        open_images(spec(tars))
    with pytest.raises(UserError, match=r"hfds:… needs the package datasets"):
        open_images("hfds:x")


# Through analyze ------------------------------------------------------------------------------------------------------


@pytest.fixture
def vit() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=0)


def test_a_stream_is_analysed_and_resumed(vit, tars, tmp_path):
    whole = analyze(vit, spec(tars), statistics=["cls_entropy"], batch_size=24, workers=0, out=tmp_path / "whole")
    assert whole.values.names == GOOD
    assert [tuple(bad.values()) for bad in whole.manifest["data"]["skipped"]] == BAD
    options = {"statistics": ["cls_entropy"], "batch_size": 24, "workers": 0, "resume": True}
    again = analyze(vit, spec(tars), out=tmp_path / "again", **options)
    manifest = json.loads((tmp_path / "again" / "manifest.json").read_text())
    (tmp_path / "again" / "manifest.json").write_text(json.dumps({**manifest, "status": "running"}))
    for name in ("shard-00000-00001", "shard-00002-00000"):
        (tmp_path / "again" / "statistics" / f"{name}.safetensors").unlink()
    again = analyze(vit, spec(tars), out=tmp_path / "again", **options)
    assert again.values.names == GOOD
    np.testing.assert_array_equal(again.values.read("cls_entropy"), whole.values.read("cls_entropy"))
    assert Profile.load(tmp_path / "again").manifest["data"]["skipped"] == whole.manifest["data"]["skipped"]
    first = analyze(vit, spec(tars), statistics=["cls_entropy"], num_images=100, workers=0)
    assert first.values.names == [name for name in NAMES[:100] if name in GOOD]  # the first ones


# Hugging Face data sets -----------------------------------------------------------------------------------------------


@pytest.fixture
def table(tmp_path, monkeypatch) -> Path:
    """A folder with two parquet files of 70 and 5 rows, as `datasets` writes them, and a cache of its own."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    features = datasets.Features({"text": datasets.Value("string"), "picture": datasets.Image()})
    start = 0
    for part, count in enumerate((70, 5)):
        numbers = range(start, start + count)
        rows = {
            "text": [str(i) for i in numbers],
            "picture": [{"bytes": b"bad" if i == 2 else picture(i), "path": f"{i}.png"} for i in numbers],
        }
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"train-{part:05d}-of-00002.parquet")
        start += count
    return folder


def test_a_data_set_on_disk_is_read_in_any_order(vit, table):
    images = open_images(f"hfds:{table}")
    assert len(images) == 75
    assert images.names[:2] == ["0.png", "1.png"]
    assert images.read(74).getpixel((0, 0)) == (74, 0, 50)
    assert len(images.fingerprint()) == 64
    profile = analyze(vit, f"hfds:{table}#train", statistics=["cls_entropy"], num_images=75)
    assert sorted(profile.values.names) == sorted(f"{i}.png" for i in range(75) if i != 2)
    assert [bad["name"] for bad in profile.manifest["data"]["skipped"]] == ["2.png"]


def test_a_data_set_is_streamed_file_by_file(vit, table):
    images = open_images(f"hfids:{table}")
    assert isinstance(images, StreamImages) and images.parts == 2
    batches = read(images)
    assert [name for batch in batches for name in batch.names] == (
        [f"0/{i}" for i in range(70) if i != 2] + [f"1/{i}" for i in range(5)]
    )
    assert [name for batch in batches for name, _ in batch.skipped] == ["0/2"]
    assert images.fingerprint() == open_images(f"hfids:{table}").fingerprint()
    assert analyze(vit, f"hfids:{table}", statistics=["cls_entropy"], num_images=10).num_images == 9


@pytest.mark.parametrize("kind", ["hfds", "hfids"])
def test_what_is_no_data_set(table, tmp_path, kind):
    with pytest.raises(UserError, match=f"{kind}:.*nothing cannot be loaded"):
        open_images(f"{kind}:{tmp_path / 'nothing'}")
    with pytest.raises(UserError, match=f"{kind}:.*#test cannot be loaded"):
        open_images(f"{kind}:{table}#test")


def test_a_data_set_without_images(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict({"text": ["a"], "label": [1]}).to_parquet(tmp_path / "set" / "train.parquet")
    with pytest.raises(UserError, match="has no column of images; it has text, label"):
        open_images(f"hfids:{tmp_path / 'set'}")
