"""Several processes at one run, as torchrun starts them: the same values, one voice, no hang."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from vitprobe.errors import UserError
from vitprobe.profile.analysis import analyze
from vitprobe.profile.profile import Profile
from vitprobe.profile.work import require_agreement
from vitprobe.runs import processes as distributed
from vitprobe.runs.processes import World, joined
from vitprobe.runs.torchrun import launched, local_processes, local_rank, rank

SCRIPT = """
    import sys, torch, vitprobe
    from PIL import Image
    from timm.models.vision_transformer import VisionTransformer
    torch.set_num_threads(1)
    torch.manual_seed(int(sys.argv[3]) if len(sys.argv) > 3 and vitprobe.runs.torchrun.rank() else 0)
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=0)
    torch.manual_seed(1)
    pixels = torch.randn(int(sys.argv[2]), 3, 32, 32)
    run = lambda: vitprobe.analyze(vit, pixels, batch_size=24, num_images=len(pixels) - 10, statistics=["cls_entropy"],
                                   out=sys.argv[1], distributed=True, resume=True)
"""


def torchrun(processes: int, script: Path, *arguments: object, **options) -> subprocess.Popen:
    """Start `script` as that many processes of one run."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", "0"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, str(script), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
        **options,
    )


def write(path: Path, tail: str) -> Path:
    path.write_text(textwrap.dedent(SCRIPT).replace("vitprobe\n", "vitprobe, vitprobe.runs.torchrun\n", 1) + tail)
    return path


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Profile:
    """The run of 400 images in one process."""
    folder = tmp_path_factory.mktemp("alone")
    script = write(folder / "script.py", "run()\n")
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    subprocess.run([sys.executable, str(script), str(folder / "run"), "400"], check=True, timeout=300, env=environment)
    return Profile.load(folder / "run")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_the_same_values_from_any_number_of_processes(tmp_path, alone, processes):
    running = torchrun(processes, write(tmp_path / "script.py", "run()\n"), tmp_path / "run", 400)
    _, errors = running.communicate(timeout=300)
    assert running.returncode == 0, errors
    profile = Profile.load(tmp_path / "run")
    assert profile.manifest["processes"] == processes
    assert profile.manifest["status"] == "complete"
    assert profile.values.names == alone.values.names
    assert len(set(profile.values.names)) == 390
    np.testing.assert_array_equal(profile.values.read("cls_entropy"), alone.values.read("cls_entropy"))
    columns = ["mean", "ci_low", "ci_high", "n"]
    assert (profile.table()[columns] == alone.table()[columns]).all(axis=None)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_worker_fails_the_run_with_one_line_and_resume_goes_on(tmp_path, alone, victim):
    """The victim dies once, after its second shard."""
    tail = f"""
import os, signal
from vitprobe.profile.run import Run
add = Run.add
finished = 0
def dying(self, *arguments):
    global finished
    done = add(self, *arguments)
    finished += done
    if finished == 2 and self.world.rank == {victim} and not os.path.exists("died"):
        open("died", "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return done
Run.add = dying
from vitprobe.errors import UserError
from vitprobe.runs.processes import joined
with joined(True) as world:
    try:
        run()
    except UserError as error:
        if world.may_speak():
            print("Error:", error, file=sys.stderr)
        sys.exit(2)
"""
    script = write(tmp_path / "script.py", tail)
    running = torchrun(2, script, tmp_path / "run", 400, cwd=tmp_path)
    _, errors = running.communicate(timeout=200)
    assert running.returncode != 0
    said = [line for line in errors.splitlines() if line.startswith("Error: ")]
    assert len(said) == 1, errors
    assert "another process of this run ended before its work was done" in said[0]
    assert "--resume goes on" in said[0]
    kept = Profile.load(tmp_path / "run")
    assert 128 <= kept.num_images < 390
    running = torchrun(2, script, tmp_path / "run", 400, cwd=tmp_path)
    _, errors = running.communicate(timeout=200)
    assert running.returncode == 0, errors
    profile = Profile.load(tmp_path / "run")
    assert profile.values.names == alone.values.names
    np.testing.assert_array_equal(profile.values.read("cls_entropy"), alone.values.read("cls_entropy"))
    assert len(profile.manifest["resumed"]) == 1


@pytest.mark.slow
def test_processes_that_differ_are_told_so_in_one_line(tmp_path):
    script = write(tmp_path / "script.py", "run()\n")
    running = torchrun(2, script, tmp_path / "run", 100, 5)  # process 1 has other weights
    _, errors = running.communicate(timeout=200)
    assert running.returncode != 0
    assert "process 1 loaded other weights than process 0; each needs the same model, data and options" in errors
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_command_line_under_torchrun(tmp_path):
    from PIL import Image

    images = tmp_path / "images"
    images.mkdir()
    for i in range(130):
        Image.new("RGB", (32, 32), (i, 2 * i % 255, 0)).save(images / f"{i}.png")
    (images / "bad.png").write_bytes(b"nothing")
    command = ["-m", "vitprobe", "analyze", "--model", "mae_vit_nano", "--data", images, "--statistic", "cls_entropy"]
    running = torchrun(2, *command[:1], *command[1:], cwd=tmp_path)  # type: ignore[arg-type]
    output, errors = running.communicate(timeout=300)
    assert running.returncode == 0, errors
    assert output.count("mae_vit_nano (MIM), 130 images") == 1
    assert errors.count("skipped 1 image(s)") == 1
    (run,) = (tmp_path / "runs").iterdir()
    assert json.loads((run / "manifest.json").read_text())["processes"] == 2
    running = torchrun(2, *command[:1], *command[1:], "--out", run, cwd=tmp_path)  # type: ignore[arg-type]
    output, errors = running.communicate(timeout=300)
    assert running.returncode != 0
    assert len([line for line in errors.splitlines() if line.startswith("Error: ")]) == 1
    assert "holds another run; pass --overwrite to replace it, --resume to go on with it" in errors


# In one process -------------------------------------------------------------------------------------------------------


def test_alone_everything_is_of_oneself(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with joined(True) as world:
        assert (world.rank, world.size, world.first, world.may_speak()) == (0, 1, True, True)
        assert world.gather("x") == ["x"]
        assert world.on_first(lambda: 5) == world.together(lambda: 5) == 5
        with pytest.raises(UserError, match="mine"):
            world.together(lambda: (_ for _ in ()).throw(UserError("mine")))


def test_what_torchrun_says(monkeypatch):
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(key, raising=False)
    assert (launched(), rank(), local_rank(), local_processes()) == (False, 0, 0, 1)
    for key, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(key, value)
    assert (launched(), rank(), local_rank(), local_processes()) == (True, 5, 1, 4)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert (launched(), rank(), local_rank(), local_processes()) == (False, 0, 0, 1)


class Pretended(World):
    """Two processes, of which the other says what it is told to."""

    def __init__(self, other: object, rank: int = 0) -> None:
        super().__init__(rank, 2)
        self.other = other

    def gather(self, value):
        return [value, self.other] if self.rank == 0 else [self.other, value]


def test_an_error_of_one_is_raised_in_all():
    with pytest.raises(UserError, match=r"^process 1 of 2: no such folder$"):
        Pretended(UserError("no such folder")).together(lambda: 1)
    with pytest.raises(UserError, match=r"^first$"):
        Pretended(UserError("second")).together(lambda: (_ for _ in ()).throw(UserError("first")))
    assert Pretended(None).together(lambda: 1) == 1


def test_one_process_joined_as_one_of_two_hears_when_the_other_goes(monkeypatch):
    monkeypatch.setattr(distributed.dist, "all_reduce", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("closed")))
    with pytest.raises(UserError, match="another process of this run ended before its work was done; the same command"):
        World(0, 2).gather(1)


def test_a_group_of_ones_own_is_used_and_left(monkeypatch, tmp_path):
    """A group of one process stands in for a bigger one: the words go through gloo all the same."""
    import torch.distributed as dist

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        with joined(True) as world, joined(True) as again:
            assert again is world
            world.size = 2  # so that it asks
            assert world.gather("mine") == ["mine", None]
            assert world.may_speak()
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


def test_sigterm_is_an_error_in_one_line_while_joined(monkeypatch, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(UserError, match="another process"), distributed._terminated_as_error(True):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    assert signal.getsignal(signal.SIGTERM) == before
    with distributed._terminated_as_error(False):
        assert signal.getsignal(signal.SIGTERM) == before


def test_disagreement_names_the_process_and_what():
    one = {"arguments": {"seed": 0}, "model": {"weights_sha256": "a"}, "data": {"fingerprint": "b"}}
    require_agreement([one, one])
    for key, what in [("arguments", "was given other arguments"), ("model", "loaded other weights"),
                      ("data", "sees other images")]:  # fmt: skip
        with pytest.raises(UserError, match=f"^process 2 {what} than process 0; each needs the same"):
            require_agreement([one, one, {**one, key: {}}])


def test_what_several_processes_cannot_share(monkeypatch):
    from torch.utils.data import DataLoader

    from vitprobe.profile import analysis

    class Two:
        def __enter__(self):
            return Pretended(None)

        def __exit__(self, *error):
            return None

    monkeypatch.setattr(analysis, "joined", lambda wanted: Two())
    pixels = torch.zeros(2, 3, 32, 32)
    with pytest.raises(UserError, match="several processes put their values into one folder: give --out DIR"):
        analyze("mae_vit_nano", pixels)
    with pytest.raises(UserError, match="a DataLoader gives its images in an order that only it knows"):
        analyze("mae_vit_nano", DataLoader(list(pixels), batch_size=1), out="never", distributed=True)
