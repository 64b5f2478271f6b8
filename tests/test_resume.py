"""`--resume`: a run killed at any moment ends as an unbroken one, another is not gone on with; memory that runs out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

from vitprobe.cli import main
from vitprobe.errors import UserError
from vitprobe.profile.analysis import analyze
from vitprobe.profile.measuring import Measurement
from vitprobe.profile.profile import Profile
from vitprobe.profile.run import Run

PIXELS = torch.randn(200, 3, 32, 32, generator=torch.Generator().manual_seed(0))
OPTIONS = {"statistics": ["cls_entropy", "patch_norm_max_ratio"], "batch_size": 24, "workers": 0}


def make_vit(seed: int = 0) -> VisionTransformer:
    torch.manual_seed(seed)
    return VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=0)


@pytest.fixture
def vit() -> VisionTransformer:
    return make_vit()


def contents(folder: Path) -> dict[str, bytes]:
    """What must be the same however often a run was broken off: shards and summary."""
    files = [*(folder / "statistics").iterdir(), folder / "summary.csv"]
    return {path.name: path.read_bytes() for path in files}


def stop_after(monkeypatch, shards: int, error: BaseException) -> None:
    """Let `error` come when so many shards are finished."""
    real, finished = Run.add, []

    def add(self, *arguments):
        done = real(self, *arguments)
        finished.extend([1] * done)
        if len(finished) == shards:
            raise error
        return done

    monkeypatch.setattr(Run, "add", add)


KILLED = """
    import os, random, signal, sys, time
    from pathlib import Path
    import torch, vitprobe
    from timm.models.vision_transformer import VisionTransformer
    from vitprobe.profile.profile import Profile

    torch.set_num_threads(1)
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=0)
    pixels = torch.randn(1500, 3, 32, 32)
    here, draw = Path(sys.argv[1]), random.Random(0)

    def run(name):
        return vitprobe.analyze(vit, pixels, num_images=1400, batch_size=16, statistics=["cls_entropy"], workers=1,
                                out=here / name, resume=True, progress=False)

    run("whole")
    kills, chain = 0, 0
    while kills < 24:
        name = f"broken{chain}"
        while True:
            shards = here / name / "statistics"
            before = len(list(shards.glob("shard-*")))
            child = os.fork()
            if child == 0:
                os.setsid()  # with its reading process a group of its own
                run(name)
                os._exit(0)
            while len(list(shards.glob("shard-*"))) <= before and os.waitpid(child, os.WNOHANG) == (0, 0):
                time.sleep(0.002)
            time.sleep(draw.uniform(0, 0.15))
            try:
                os.killpg(child, signal.SIGKILL)
                kills += os.WIFSIGNALED(os.waitpid(child, 0)[1])
            except (ProcessLookupError, ChildProcessError):
                pass
            kept = Profile.load(here / name)  # whatever is there is whole
            assert kept.num_images >= min(1400, 64 * before)
            if kept.manifest["status"] == "complete":
                break
        again, whole = run(name), Profile.load(here / "whole")
        assert again.values.names == whole.values.names, name
        for path in (here / "whole" / "statistics").iterdir():
            assert (shards / path.name).read_bytes() == path.read_bytes(), path
        for file in ("summary.csv", "summary.parquet"):
            assert (here / name / file).read_bytes() == (here / "whole" / file).read_bytes()
        assert not [path for path in (here / name).rglob("*.partial")]
        chain += 1
    print(kills, "kills in", chain, "runs")
"""


@pytest.mark.slow
def test_a_process_group_killed_at_random_moments_ends_as_an_unbroken_run(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(KILLED))
    command = [sys.executable, "-W", "ignore::DeprecationWarning", str(script), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) >= 20


@pytest.mark.parametrize("error", [KeyboardInterrupt(), UserError("the disk is full"), RuntimeError("a defect")])
def test_what_was_broken_off_goes_on_and_ends_the_same(vit, tmp_path, monkeypatch, error):
    whole = analyze(vit, PIXELS, num_images=190, **OPTIONS, out=tmp_path / "whole")
    with monkeypatch.context() as patched:
        stop_after(patched, 2, error)
        with pytest.raises(type(error)):
            analyze(vit, PIXELS, num_images=190, **OPTIONS, out=tmp_path / "run", resume=True)
    assert Profile.load(tmp_path / "run").num_images == 128
    measured = []
    real = Measurement.__call__
    monkeypatch.setattr(Measurement, "__call__", lambda self, batch: measured.extend(batch.names) or real(self, batch))
    again = analyze(vit, PIXELS, num_images=190, **OPTIONS, out=tmp_path / "run", resume=True)
    assert measured == whole.values.names[128:]  # what was done is not done again
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")
    assert again.manifest["status"] == "complete"
    assert len(again.manifest["resumed"]) == 1
    assert again.manifest["data"] == whole.manifest["data"]
    assert again.manifest["wall_seconds"] > 0


def test_a_shard_that_ctrl_c_cut_short_is_done_again(vit, tmp_path, monkeypatch):
    whole = analyze(vit, PIXELS, **OPTIONS, out=tmp_path / "whole")
    real, calls = Measurement.__call__, []

    def stop_at_the_fifth(self, batch):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(self, batch)

    with monkeypatch.context() as patched:
        patched.setattr(Measurement, "__call__", stop_at_the_fifth)
        with pytest.raises(KeyboardInterrupt):
            analyze(vit, PIXELS, **OPTIONS, out=tmp_path / "run")
    assert Profile.load(tmp_path / "run").num_images == 64 + 24  # kept, and readable
    again = analyze(vit, PIXELS, **OPTIONS, out=tmp_path / "run", resume=True)
    assert again.values.names == whole.values.names
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


@pytest.mark.parametrize("left", [[], [".manifest.json.partial"], [".summary.csv.partial"]])
def test_a_run_is_begun_where_the_folder_is_absent_or_empty(vit, tmp_path, left):
    for name in left:  # of a run that was killed while it wrote its first file
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / name).write_bytes(b"{")
    assert analyze(vit, PIXELS[:5], **OPTIONS, out=tmp_path / "run", resume=True).num_images == 5
    assert not list((tmp_path / "run").rglob("*.partial"))


def test_a_complete_run_returns_at_once(vit, tmp_path, monkeypatch):
    analyze(vit, PIXELS[:70], **OPTIONS, out=tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    monkeypatch.setattr(Measurement, "__call__", None)
    assert analyze(vit, PIXELS[:70], **OPTIONS, out=tmp_path / "run", resume=True).num_images == 70
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def test_all_shards_there_but_not_their_summary(vit, tmp_path):
    analyze(vit, PIXELS[:70], **OPTIONS, out=tmp_path / "whole")
    analyze(vit, PIXELS[:70], **OPTIONS, out=tmp_path / "run")
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    (tmp_path / "run" / "manifest.json").write_text(json.dumps({**manifest, "status": "running"}))
    (tmp_path / "run" / "summary.csv").unlink()
    assert analyze(vit, PIXELS[:70], **OPTIONS, out=tmp_path / "run", resume=True).num_images == 70
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def test_another_run_is_not_gone_on_with(vit, tmp_path):
    out, rest = tmp_path / "run", {key: OPTIONS[key] for key in ("workers",)}
    base = {"num_images": 70, "batch_size": 24, "statistics": ["cls_entropy"], "seed": 0, **rest}
    analyze(vit, PIXELS, **base, out=out)
    for change, was, now in [
        ({"num_images": 71}, "num_images 70", "71"),
        ({"batch_size": None}, "batch_size 24", "none"),
        ({"seed": 1}, "seed 0", "1"),
        ({"statistics": None}, r"statistics \['cls_entropy'\]", "none"),
        ({"transform": "paper"}, "transform model", "paper"),
        ({"device": "cpu"}, "device none", "cpu"),
    ]:
        with pytest.raises(
            UserError, match=rf"run was begun with {was}, not {now}, so --resume cannot go on; give the"
        ):
            analyze(vit, PIXELS, **{**base, **change}, out=out, resume=True)
    with pytest.raises(UserError, match=r"begun with weights of SHA-256 [0-9a-f]{12}…, not [0-9a-f]{12}…"):
        analyze(make_vit(1), PIXELS, **base, out=out, resume=True)
    with pytest.raises(UserError, match=r"begun with images of fingerprint [0-9a-f]{12}…, not"):
        analyze(vit, PIXELS + 1, **base, out=out, resume=True)
    with pytest.raises(UserError, match="begun with groups none, not given"):
        analyze(vit, PIXELS, **base, groups=lambda name: "one", out=out, resume=True)
    assert analyze(vit, PIXELS, **{**base, "workers": 1}, out=out, resume=True).num_images == 70  # how, not what


def test_other_groups_are_another_run(vit, tmp_path):
    analyze(vit, PIXELS[:4], **OPTIONS, groups=list("aabb"), out=tmp_path / "run")
    with pytest.raises(UserError, match="begun with groups of SHA-256"):
        analyze(vit, PIXELS[:4], **OPTIONS, groups=list("abab"), out=tmp_path / "run", resume=True)


def test_what_contradicts_resume(vit, tmp_path):
    from torch.utils.data import DataLoader

    with pytest.raises(
        UserError, match=r"^--resume goes on with a run, and --overwrite starts anew: give one of the two$"
    ):
        analyze(vit, PIXELS, out=tmp_path / "run", resume=True, overwrite=True)
    with pytest.raises(UserError, match=r"^--resume goes on with a run, and that needs its folder: give --out too$"):
        analyze(vit, PIXELS, resume=True)
    with pytest.raises(UserError, match="a DataLoader gives its images in an order that only it knows"):
        analyze(vit, DataLoader(list(PIXELS), batch_size=2), out=tmp_path / "run", resume=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and holds no run of vitprobe"):
        analyze(vit, PIXELS, out=tmp_path / "mine", resume=True)
    assert not (tmp_path / "run").exists()


def test_images_of_another_size_after_resume(vit, tmp_path, monkeypatch):
    """Of a DataLoader or a tensor nothing is known before it comes; of a failed run everything stays."""
    with monkeypatch.context() as patched:
        stop_after(patched, 1, RuntimeError("a defect"))
        with pytest.raises(RuntimeError):
            analyze(vit, PIXELS, **OPTIONS, out=tmp_path / "run")
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["status"] == "failed"
    manifest["layout"]["grid"] = [5, 5]
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="images of several sizes came"):
        analyze(vit, PIXELS, **OPTIONS, out=tmp_path / "run", resume=True)
    assert Profile.load(tmp_path / "run").num_images == 64


def test_bad_images_alone_in_the_first_shards(vit, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for i in range(70):
        (images / f"{i:03d}.png").write_bytes(b"no image")
    Image.new("RGB", (32, 32)).save(images / "100.png")
    profile = analyze(vit, images, **OPTIONS, out=tmp_path / "run")
    assert profile.values.names == ["100.png"]
    assert len(profile.manifest["data"]["skipped"]) == 70
    assert analyze(vit, images, **OPTIONS).manifest["data"]["skipped"] == profile.manifest["data"]["skipped"]
    again = Profile.load(tmp_path / "run").save(tmp_path / "copy")
    assert Profile.load(again).values.skipped == profile.values.skipped


def test_the_option(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")

    def run(*more: str):
        line = ["analyze", "--model", "mae_vit_nano", "--data", "a.png", "--statistic", "cls_entropy", *more]
        return CliRunner().invoke(main, line)

    first = run("--out", "run", "--resume")
    assert first.exit_code == 0, first.output
    second = run("--out", "run", "--resume")
    assert second.exit_code == 0, second.output
    assert second.stdout == first.stdout
    for more, words in [
        (("--resume",), "--resume goes on with a run, and that needs its folder: give --out too"),
        (("--out", "run", "--resume", "--overwrite"), "--overwrite starts anew"),
        (("--out", "run", "--resume", "--seed", "3"), "run was begun with seed 0, not 3"),
    ]:
        done = run(*more)
        assert (done.exit_code, done.stdout, len(done.stderr.splitlines())) == (2, "", 1), done.output
        assert words in done.stderr


# Memory that runs out -------------------------------------------------------------------------------------------------

OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried to"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4 bytes."),
    MemoryError(),
]


class Hungry(VisionTransformer):
    """Has memory for so many images."""

    room, error = 5, MemoryError()

    def forward(self, x):
        x = self.patch_embed(x)
        x = self._pos_embed(x)
        x = self.blocks[0](x)
        if len(x) > self.room:
            raise self.error
        return self.blocks[2](self.blocks[1](x))


def make_hungry() -> Hungry:
    torch.manual_seed(0)
    return Hungry(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=0)


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: str(error)[:20])
def test_the_batch_is_halved_and_the_shard_goes_on(tmp_path, error):
    hungry = make_hungry()
    hungry.error = error
    pixels = PIXELS[:72]  # a shard and the beginning of another
    options = {"statistics": ["cls_entropy"], "workers": 0}
    profile = analyze(hungry, pixels, batch_size=24, **options, out=tmp_path / "run")
    hungry.room = 64
    whole = analyze(hungry, pixels, batch_size=24, **options)
    assert profile.values.names == whole.values.names
    np.testing.assert_allclose(profile.values.read("cls_entropy"), whole.values.read("cls_entropy"), rtol=1e-5)
    notes = [
        {"shard": [0], "from": 24, "to": 12},
        {"shard": [0], "from": 12, "to": 6},
        {"shard": [0], "from": 6, "to": 3},
    ]
    assert Profile.load(tmp_path / "run").manifest["out_of_memory"] == notes
    assert whole.manifest["out_of_memory"] == []


def test_one_image_too_many_is_one_line(tmp_path):
    hungry = make_hungry()
    hungry.room = 0
    with pytest.raises(
        UserError, match=r"^out of memory on cpu with one image a batch; give a smaller --img-size, a sm"
    ):
        analyze(hungry, PIXELS, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_error_is_not_taken_for_memory():
    hungry = make_hungry()
    hungry.error = RuntimeError("a defect")
    with pytest.raises(RuntimeError, match="a defect"):
        analyze(hungry, PIXELS, batch_size=24)
