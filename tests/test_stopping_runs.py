"""`analyze(tolerance=…)`: from images to the line that says why it stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from helpers import captured, message, tiny_vit
from test_distributed import torchrun
from vitprobe.cli import main
from vitprobe.data.batches import Batch
from vitprobe.errors import UserError
from vitprobe.profile.analysis import analyze
from vitprobe.profile.intervals import sequence_half_width
from vitprobe.profile.options import AnalyzeOptions
from vitprobe.profile.profile import KIND, Profile
from vitprobe.profile.run import Run
from vitprobe.profile.stopping import Stopper
from vitprobe.runs.folder import RunFolder
from vitprobe.runs.processes import World

STATISTICS = ["cls_entropy_share", "patch_self_attention_ratio"]
COUNT = 640


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return torch.randn(COUNT, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def everything(pixels) -> Profile:
    return analyze(tiny_vit(), pixels, statistics=STATISTICS, seed=3, num_images=COUNT, batch_size=64)


def run(pixels: Any, tolerance: float, **options: Any) -> Profile:
    given = {"statistics": STATISTICS, "seed": 3, "batch_size": 64, "tolerance": tolerance} | options
    return analyze(tiny_vit(), pixels, **given)


def relative_widths(profile: Profile) -> list[float]:
    """What the rule compares with T, of each mean over heads."""
    widths = []
    for name in profile.statistics:
        result = profile.estimate(name)
        half = (result.high - result.low) / 2
        widths += list(half if name == "cls_entropy_share" else half / result.mean)
    return widths


def tolerance_for(everything: Profile, images: int) -> float:
    """One at which the first `images` of the draw are the fewest that are enough."""
    values = {name: everything.values.read(name)[:images].astype(float).mean(axis=2) for name in STATISTICS}
    widest = 0.0
    for name, of_images in values.items():
        half = sequence_half_width(of_images.std(axis=0, ddof=1), images, 1.0)
        widest = max(widest, float((half / (1 if name == "cls_entropy_share" else of_images.mean(axis=0))).max()))
    return 1.0001 * widest


def test_it_stops_at_the_first_shard_that_is_enough(pixels, everything):
    tolerance = tolerance_for(everything, 256)
    profile = run(pixels, tolerance)
    assert profile.num_images == 256
    assert profile.values.names == everything.values.names[:256]  # the seeded draw's first
    for name in STATISTICS:
        np.testing.assert_array_equal(profile.values.read(name), everything.values.read(name)[:256])
    assert max(relative_widths(profile)) <= tolerance
    assert profile.manifest["stopping"] == {
        "tolerance": tolerance,
        "stopped": "known",
        "groups": 256,
        "unknown": {},
    }
    assert profile.manifest["status"] == "complete"
    assert profile.manifest["data"]["analysed"] == 256
    assert profile.manifest["arguments"]["tolerance"] == tolerance


def test_the_interval_printed_is_the_sequences(pixels, everything, tmp_path):
    profile = run(pixels, tolerance_for(everything, 128), out=tmp_path / "run")
    for table in (profile.table(), Profile.load(tmp_path / "run").table()):
        assert set(table["interval"]) == {"cs"}
        assert set(table["n"]) == {profile.num_images}
    assert set(everything.table()["interval"]) == {"skew-t"}
    ratio = run(pixels[:70], 0.5, statistics=["patch_norm_max_ratio"])
    assert set(ratio.table()["interval"]) == {"log-cs"}


def test_images_are_drawn_at_random_without_being_counted(pixels):
    names = [run(pixels, 0.5, seed=seed).values.names for seed in (0, 0, 1)]
    assert names[0] == names[1] != names[2]
    assert len(names[0]) == 64
    assert names[0] != [str(i) for i in range(64)]


def test_data_that_run_out_say_so(pixels, tmp_path):
    profile = run(pixels[:100], 1e-4, out=tmp_path / "run")
    assert profile.num_images == 100
    stopping = json.loads((tmp_path / "run" / "manifest.json").read_text())["stopping"]
    assert stopping["stopped"] == "exhausted"
    assert stopping["groups"] == 100
    assert stopping["unknown"] == {name: [0, 1] for name in STATISTICS}
    assert set(profile.table()["interval"]) == {"cs"}


def test_num_images_is_the_most_that_are_drawn(pixels):
    assert run(pixels, 1e-4, num_images=130).num_images == 130
    assert run(pixels, 0.5, num_images=130).num_images == 64


def test_groups_are_what_is_counted(pixels):
    groups = [str(i % 50) for i in range(COUNT)]
    profile = run(pixels, 0.5, groups=groups)
    assert profile.num_images == COUNT
    assert profile.manifest["stopping"]["groups"] == 50
    groups = [str(i // 2) for i in range(COUNT)]
    profile = run(pixels, 0.5, groups=groups)
    assert profile.manifest["stopping"]["groups"] == profile.num_groups >= 64
    assert profile.num_images == 128


def test_a_dataloader_is_taken_in_its_own_order(pixels):
    loader = DataLoader(TensorDataset(pixels), batch_size=50)
    profile = run(loader, 0.5)
    assert profile.values.names == [str(i) for i in range(64)]


def test_a_run_broken_off_and_resumed_stops_where_an_unbroken_one_does(pixels, everything, tmp_path, monkeypatch):
    tolerance = tolerance_for(everything, 256)
    real, taken = Stopper.add, []

    def broken_at_the_third(self, shard):
        taken.append(shard)
        if len(taken) == 3:
            raise KeyboardInterrupt
        return real(self, shard)

    monkeypatch.setattr(Stopper, "add", broken_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run(pixels, tolerance, out=tmp_path / "run")
    broken = Profile.load(tmp_path / "run")
    assert broken.num_images == 192
    assert set(broken.table()["interval"]) == {"cs"}
    assert "stopping" not in broken.manifest
    monkeypatch.setattr(Stopper, "add", real)
    with pytest.raises(UserError, match=r"was begun with tolerance .*, not 0\.2, so --resume cannot go on"):
        run(pixels, 0.2, out=tmp_path / "run", resume=True)
    profile = run(pixels, tolerance, out=tmp_path / "run", resume=True)
    assert profile.values.names == everything.values.names[:256]
    assert profile.manifest["stopping"]["groups"] == 256
    assert run(pixels, tolerance, out=tmp_path / "run", resume=True).num_images == 256


def test_shards_beyond_the_one_that_was_enough_are_dropped(pixels, everything, tmp_path):
    """As other processes may have computed them, or a sitting that was killed before it had decided."""
    folder, tolerance = tmp_path / "run", tolerance_for(everything, 192)
    run(pixels, 1e-4, out=folder, num_images=None)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["arguments"]["tolerance"], manifest["status"] = tolerance, "running"
    del manifest["stopping"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "statistics" / "shard-00009.safetensors").unlink()
    profile = run(pixels, tolerance, out=folder, resume=True)
    assert profile.num_images == 192
    assert len(list((folder / "statistics").iterdir())) == 3
    assert Profile.load(folder).values.names == everything.values.names[:192]
    assert profile.manifest["data"]["shards"] == 3


def test_a_bad_tolerance_is_refused_before_anything(tmp_path):
    with pytest.raises(UserError) as error:
        analyze("no such model", tolerance=2.0, out=tmp_path / "run")
    assert message(error).startswith("tolerance is 2.0; it must be")
    assert not (tmp_path / "run").exists()


# Several processes ----------------------------------------------------------------------------------------------------

SCRIPT = """
import sys, torch, vitprobe
sys.path.insert(0, sys.argv[1])
from helpers import tiny_vit
torch.set_num_threads(1)
pixels = torch.randn(640, 3, 32, 32, generator=torch.Generator().manual_seed(0))
vitprobe.analyze(tiny_vit(), pixels, statistics=["cls_entropy_share", "patch_self_attention_ratio"], seed=3,
                 batch_size=64, tolerance=float(sys.argv[2]), dtype=sys.argv[3], out=sys.argv[4], distributed=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "auto"])
@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_processes_stops_at_the_same_shard(pixels, everything, tmp_path, processes, dtype):
    tolerance = tolerance_for(everything, 256) * (1.0 if dtype == "float32" else 1.01)  # for its rounding
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    running = torchrun(processes, script, Path(__file__).parent, tolerance, dtype, tmp_path / "run")
    _, errors = running.communicate(timeout=300)
    assert running.returncode == 0, errors
    profile, alone = Profile.load(tmp_path / "run"), run(pixels, tolerance, dtype=dtype)
    assert profile.values.names == alone.values.names == everything.values.names[:256]
    for name in STATISTICS:
        np.testing.assert_array_equal(profile.values.read(name), alone.values.read(name))
    assert profile.manifest["stopping"] == alone.manifest["stopping"]
    assert profile.manifest["forward_dtype"] == alone.manifest["forward_dtype"]
    assert len(list((tmp_path / "run" / "statistics").iterdir())) == 4


class Pair(World):
    """One of two processes, whose other gives what it gives."""

    def __init__(self, rank: int) -> None:
        super().__init__(rank, 2)

    def gather(self, value: Any) -> list[Any]:
        return [value, value]


def test_process_0_decides_and_the_other_hears_of_it(pixels, tmp_path):
    """Shards come in any order, and count up to the first that is missing."""
    whole = run(pixels, 0.5, out=tmp_path / "whole", num_images=130)
    (shard,) = whole.values.shards()
    manifest = {**whole.manifest, "data": {"grouped": False}}
    options = AnalyzeOptions(model="tiny", tolerance=0.5)
    runs = [Run(options, dict(manifest), RunFolder(tmp_path / "run", KIND), Pair(rank), None) for rank in (0, 1)]
    attention = captured(tiny_vit(), keep="statistics", statistics=STATISTICS)
    for one in runs:
        assert not one.enough()  # nothing has come yet
        one.manifest.pop("stopping", None)
        one.world.gather = lambda value: [value]  # type: ignore[method-assign]
        one._claim(attention)
    assert [one.enough() for one in runs] == [False, False]
    runs[1].values.add(shard, (1,))
    assert [one.enough() for one in runs] == [False, False]
    runs[1].values.add(shard, (0,))
    assert not runs[1].enough()
    assert [one.enough() for one in runs] == [True, True]


def test_a_stream_has_no_random_order(pixels):
    work = Run(AnalyzeOptions(model="tiny", tolerance=0.1), {}, RunFolder.of(None, KIND), World(), None)
    batch = Batch(pixels[:2], [0, 1], ["0", "1"], ["0", "1"], shard=(0, 0))
    with pytest.raises(UserError) as error:
        work.add(batch, None, captured(tiny_vit()))
    assert message(error) == (
        "a stream comes in its own order, and --tolerance draws images at random: give a folder, tar or list"
    )


# The command line -----------------------------------------------------------------------------------------------------


def test_the_command_line_says_n_and_why(tmp_path):
    arguments = ["analyze", "--model", "mae_vit_nano", "--statistic", "cls_entropy_share", "--out", str(tmp_path / "a")]
    result = CliRunner().invoke(main, [*arguments, "--tolerance", "0.5"])
    assert result.exit_code == 0, result.output
    assert "120 images in 15 independent groups" in result.output
    assert "the images ran out at n = 15, below the 64 that --tolerance needs" in " ".join(result.output.split())


@pytest.mark.parametrize("given", ["0", "1.5", "nan", "much"])
def test_a_bad_tolerance_on_the_command_line_is_one_line(tmp_path: Path, given: str):
    result = CliRunner().invoke(main, ["analyze", "--tolerance", given, "--out", str(tmp_path / "a")])
    assert result.exit_code == 2
    assert "tolerance" in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert not (tmp_path / "a").exists()
