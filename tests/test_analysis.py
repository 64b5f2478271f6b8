"""`analyze`: the loop, its promises about weights, batches, order, files, errors and the model it is given."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch.utils.data import DataLoader, TensorDataset

from helpers import hear_ctrl_c, write_noise
from vitprobe.errors import UserError
from vitprobe.frozen.device import choose_batch_size, choose_device, free_memory
from vitprobe.profile.analysis import analyze
from vitprobe.profile.measuring import Measurement
from vitprobe.profile.profile import Profile
from vitprobe.statistics import STATISTICS


@pytest.fixture
def vit() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_noise(tmp_path / "images", 10, 40, 50)


def values(profile: Profile) -> dict[str, np.ndarray]:
    """Values by statistic, in the order of the images' names."""
    order = np.argsort(profile.values.names)
    return {name: profile.values.read(name)[order] for name in profile.statistics}


def test_one_value_an_image_block_and_head_of_every_defined_statistic(vit, folder):
    profile = analyze(vit, folder)
    assert profile.num_images == 10
    assert set(profile.statistics) | set(profile.undefined) == set(STATISTICS)
    assert set(profile.undefined) == {"cls_to_registers", "patches_to_registers"}
    for name, array in values(profile).items():
        assert array.shape == (10, 3, 2 if STATISTICS[name].per_head else 1)
        assert array.dtype == np.float32
        assert np.isfinite(array).all()


@pytest.mark.parametrize("batch_size", [1, 3, 10])
def test_the_same_values_whatever_the_batch_size(vit, folder, batch_size):
    whole, split = values(analyze(vit, folder, batch_size=7)), values(analyze(vit, folder, batch_size=batch_size))
    for name, expected in whole.items():
        np.testing.assert_allclose(split[name], expected, rtol=2e-5, atol=1e-6, err_msg=name)


def test_images_weigh_alike_whatever_the_batches(vit, folder):
    profile = analyze(vit, folder, batch_size=4)  # 4 + 4 + 2: a mean of batch means would differ
    expected = profile.values.read("cls_entropy").astype(float).mean(axis=(0, 2))
    table = profile.table(["cls_entropy"])
    np.testing.assert_allclose(table[table["head"].isna()]["mean"], expected)


def test_the_draw_is_random_seeded_and_without_replacement(vit, folder):
    drawn = [analyze(vit, folder, num_images=6, seed=seed, statistics=["cls_entropy"]) for seed in (0, 0, 1)]
    names = [profile.values.names for profile in drawn]
    assert names[0] == names[1] != names[2]
    assert len(set(names[0])) == 6
    assert sorted(names[0]) != [f"{i:02d}.png" for i in range(6)]


def test_more_images_asked_for_than_there_are_gives_all(vit, folder):
    profile = analyze(vit, folder, num_images=50, statistics=["cls_entropy"])
    assert profile.num_images == 10
    assert profile.manifest["data"]["analysed"] == 10


def test_every_kind_of_source(vit, folder):
    pixels = torch.randn(5, 3, 32, 32)
    labelled = DataLoader(TensorDataset(pixels, torch.zeros(5)), batch_size=2)
    one = analyze(vit, pixels, statistics=["cls_entropy"])
    two = analyze(vit, labelled, statistics=["cls_entropy"])
    np.testing.assert_allclose(one.values.read("cls_entropy"), two.values.read("cls_entropy"), rtol=1e-5)
    assert analyze(vit, labelled, num_images=3, statistics=["cls_entropy"]).num_images == 3
    assert analyze(vit, folder / "00.png", statistics=["cls_entropy"]).num_images == 1
    assert analyze(vit, sorted(folder.iterdir())[:2], statistics=["cls_entropy"]).num_images == 2


def test_groups_make_n(vit, folder):
    profile = analyze(vit, folder, groups=lambda name: str(int(Path(name).stem) % 2), statistics=["cls_entropy"])
    assert set(profile.table()["n"]) == {2}
    assert profile.manifest["data"]["groups"] == 2


def test_the_model_comes_back_as_it_was(vit, folder):
    vit.train()
    vit.blocks[1].eval()
    modes = [part.training for part in vit.modules()]
    before = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    analyze(vit, folder, statistics=["cls_entropy"])
    assert [part.training for part in vit.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in vit.state_dict().items())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in vit.modules())


def test_the_module_is_in_eval_mode_meanwhile(folder):
    torch.manual_seed(0)
    vit = VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=32,
        depth=2,
        num_heads=2,
        num_classes=0,
        drop_path_rate=0.5,
        proj_drop_rate=0.5,
    ).train()
    first, second = (values(analyze(vit, folder)) for _ in range(2))
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])


def test_half_precision_weights_are_run_in_their_own_type(vit, folder):
    profile = analyze(vit.to(torch.bfloat16), folder, statistics=["cls_entropy"])
    assert profile.manifest["dtype"] == "bfloat16"
    assert profile.values.read("cls_entropy").dtype == np.float32


def test_the_transform_is_chosen_and_recorded(vit, folder):
    vit.pretrained_cfg = {"input_size": (3, 32, 32), "crop_pct": 1.0, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    own, paper = (analyze(vit, folder, transform=mode, statistics=["cls_entropy"]) for mode in ("model", "paper"))
    assert own.manifest["transform"]["mode"] == "model"
    assert paper.manifest["transform"]["mode"] == "paper"
    assert not np.array_equal(own.values.read("cls_entropy"), paper.values.read("cls_entropy"))
    with pytest.raises(UserError, match=r"model.*paper"):
        analyze(vit, folder, transform="other")


def test_the_manifest_says_what_the_run_was_made_of(vit, folder, tmp_path):
    analyze(vit, folder, num_images=4, seed=3, out=tmp_path / "run")
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["status"] == "complete"
    assert (manifest["format_version"], manifest["command"]) == (2, "analyze")
    assert manifest["arguments"] | {"num_images": 4, "seed": 3, "transform": "model"} == manifest["arguments"]
    assert re.fullmatch(r"[0-9a-f]{64}", manifest["model"]["weights_sha256"])
    assert re.fullmatch(r"[0-9a-f]{64}", manifest["data"]["fingerprint"])
    assert manifest["packages"]["torch"] == torch.__version__.split("+")[0] or manifest["packages"]["torch"]
    assert manifest["layout"]["grid"] == [4, 4]
    assert manifest["model"]["num_blocks"] == 3
    assert manifest["device"] == "cpu"
    assert manifest["wall_seconds"] > 0


def test_bad_images_are_skipped_counted_and_named_and_no_neighbour_takes_their_place(vit, folder, tmp_path):
    clean = analyze(vit, folder, statistics=["cls_entropy"])
    whole = (folder / "03.png").read_bytes()
    (folder / "03.png").write_bytes(whole[: len(whole) // 2])
    (folder / "note.jpg").write_text("not an image")
    profile = analyze(vit, folder, statistics=["cls_entropy"], out=tmp_path / "run", batch_size=2)
    skipped = json.loads((tmp_path / "run" / "manifest.json").read_text())["data"]["skipped"]
    assert sorted(entry["name"] for entry in skipped) == ["03.png", "note.jpg"]
    assert all(entry["reason"] for entry in skipped)
    assert sorted(profile.values.names) == [f"{i:02d}.png" for i in range(10) if i != 3]
    np.testing.assert_allclose(
        values(profile)["cls_entropy"], np.delete(values(clean)["cls_entropy"], 3, axis=0), rtol=1e-5
    )


def test_all_bad_is_an_error_and_leaves_nothing(vit, tmp_path):
    bad = tmp_path / "bad"
    bad.mkdir()
    for name in ("a.png", "b.jpg"):
        (bad / name).write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"none of the 2 images of .*bad could be read; the first: a\.png \("):
        analyze(vit, bad, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_nan_weights_and_nan_activations_name_the_block(vit, folder, tmp_path):
    vit.blocks[1].mlp.fc2.bias.data[0] = float("inf")  # finite weights are checked when loading; here the block counts
    with pytest.raises(UserError, match=r"block|blocks\.1"):
        analyze(vit, folder, out=tmp_path / "run")
    vit.blocks[1].mlp.fc2.bias.data[0] = 0
    pixels = torch.randn(3, 3, 32, 32)
    pixels[1, 0, 0, 0] = float("nan")
    with pytest.raises(UserError, match=r"activations of .* are NaN or infinite from block 0 on \(image .*1.*\)"):
        analyze(vit, pixels, out=tmp_path / "run")
    vit.blocks[2].norm1.weight.data *= 1e38  # finite, but what comes of it is not
    with pytest.raises(UserError, match="from block 2 on"):
        analyze(vit, folder, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_images_of_a_size_that_the_model_cannot_take(vit):
    with pytest.raises(UserError, match="cannot take images of 40x40 pixels"):
        analyze(vit, torch.randn(2, 3, 40, 40))


@pytest.mark.parametrize(
    ("name", "number", "least"), [("num_images", 0, 1), ("batch_size", 0, 1), ("seed", -1, 0), ("workers", -1, 0)]
)
def test_counts_below_the_least_are_refused(vit, folder, name, number, least):
    with pytest.raises(UserError, match=f"{name} is {number}; it must be a whole number of at least {least}"):
        analyze(vit, folder, **{name: number})


def test_infinity_leaving_the_last_block_is_no_result(vit, folder):
    def overflow(module, args, output):
        output = output.clone()
        output[:, 3] = float("inf")
        return output

    vit.blocks[2].mlp.register_forward_hook(overflow)
    with pytest.raises(UserError, match="NaN or infinite from block 2 on"):
        analyze(vit, folder)


def test_the_first_bad_block_is_named_with_its_own_image(vit):
    def poison(block, image):
        def hook(module, args, output):
            output = output.clone()
            output[image] = float("nan")
            return output

        vit.blocks[block].mlp.register_forward_hook(hook)

    poison(2, 0)
    poison(1, 3)
    with pytest.raises(UserError, match=r"from block 1 on \(image 3\)"):
        analyze(vit, torch.randn(5, 3, 32, 32))


def test_only_the_odds_of_cls_may_be_infinite(vit, folder):
    """[cls] gives the patches less than float32 can hold: that is a result, not a defect."""
    vit.cls_token.data[0, 0, 0] = 1000
    vit.blocks[0].attn.qkv.weight.data = torch.cat([10 * torch.eye(32), 10 * torch.eye(32), torch.zeros(32, 32)])
    profile = analyze(vit, folder, statistics=["cls_self_attention_ratio", "cls_self_attention"])
    assert np.isinf(profile.values.read("cls_self_attention_ratio")[:, 0, 0]).all()
    np.testing.assert_array_equal(profile.values.read("cls_self_attention")[:, 0, 0], 1)
    table = profile.table(["cls_self_attention_ratio"])
    assert (table[(table["block"] == 0) & (table["head"] == 0)]["interval"] == "none").all()


def test_device_meta_is_refused_and_the_module_untouched(vit, folder):
    before = vit.pos_embed.clone()
    with pytest.raises(UserError, match="device meta cannot be used"):
        analyze(vit, folder, device="meta")
    assert torch.equal(vit.pos_embed, before)


def test_nothing_defined_of_what_was_asked_for_is_an_error(vit, folder, tmp_path):
    with pytest.raises(UserError, match="cls_to_registers"):
        analyze(vit, folder, statistics=["cls_to_registers"], out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_unknown_statistic_and_device(vit, folder):
    with pytest.raises(UserError, match="no statistic 'cls_entropi'; the nearest are cls_entropy"):
        analyze(vit, folder, statistics=["cls_entropi"])
    with pytest.raises(UserError, match=r"device nonsense cannot be used \(.*\); choose cpu"):
        analyze(vit, folder, device="nonsense")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"device cuda cannot be used \(.*\); choose cpu"):
            analyze(vit, folder, device="cuda")


def test_batches_are_sized_to_memory(monkeypatch):
    from vitprobe.frozen import device as state
    from vitprobe.layout import TokenLayout

    large, small = TokenLayout((64, 64), True), TokenLayout((8, 8), True)
    monkeypatch.setattr(state, "free_memory", lambda device: 4 * 2**30)
    cpu = choose_device("cpu")
    assert choose_batch_size(small, 128, cpu) == 64
    assert 1 <= choose_batch_size(large, 1024, cpu) < 64
    monkeypatch.setattr(state, "free_memory", lambda device: 0)
    assert choose_batch_size(large, 1024, cpu) == 1


def test_free_memory_is_what_is_available_within_a_jobs_limits(monkeypatch, tmp_path):
    from vitprobe import memory

    available = SimpleNamespace(available=5000, free=10)  # most of what is not free is cache, and can be had
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: available)
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "OWN_CGROUP", tmp_path / "own")
    assert free_memory(torch.device("cpu")) == 5000  # no control groups at all
    (tmp_path / "own").write_text("1:cpu:/old\n0::/job/step\n")
    assert free_memory(torch.device("cpu")) == 5000  # none with a limit
    job, step = tmp_path / "job", tmp_path / "job" / "step"
    step.mkdir(parents=True)
    for folder, limit, used in ((step, "max", 100), (job, "1000", 300)):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
    assert free_memory(torch.device("cpu")) == 700
    (job / "memory.stat").write_text("anon 50\ninactive_file 200\n")
    assert free_memory(torch.device("cpu")) == 900
    (tmp_path / "memory.max").write_text("40")
    (tmp_path / "memory.current").write_text("60")
    assert free_memory(torch.device("cpu")) == 0


# The run's folder -----------------------------------------------------------------------------------------------------


def test_a_run_of_another_is_refused_without_overwrite_and_kept(vit, folder, tmp_path):
    analyze(vit, folder, out=tmp_path / "run", statistics=["cls_entropy"])
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="holds another run; pass --overwrite"):
        analyze(vit, folder, out=tmp_path / "run")
    # With overwrite, what fails before its first batch takes nothing away either.
    with pytest.raises(UserError, match="cannot take images"):
        analyze(vit, torch.randn(1, 3, 40, 40), out=tmp_path / "run", overwrite=True)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    (tmp_path / "run" / "mine.txt").write_text("a note of the user's")
    analyze(vit, folder, num_images=2, out=tmp_path / "run", overwrite=True)
    assert Profile.load(tmp_path / "run").num_images == 2
    assert (tmp_path / "run" / "mine.txt").read_text() == "a note of the user's"


def test_a_folder_of_something_else_is_never_touched(vit, folder, tmp_path):
    for overwrite in (False, True):
        with pytest.raises(UserError, match="is not empty and holds no run of vitprobe"):
            analyze(vit, folder, out=folder, overwrite=overwrite)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file is a file"):
        analyze(vit, folder, out=tmp_path / "file")
    with pytest.raises(UserError, match=r"file is a file, so .*run cannot be made"):
        analyze(vit, folder, out=tmp_path / "file" / "run")
    assert len(list(folder.iterdir())) == 10


def test_a_place_that_is_not_writable(vit, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("vitprobe.runs.folder.os.access", lambda *args: False)  # root may write anywhere
    with pytest.raises(UserError, match="is not writable; give another --out"):
        analyze(vit, folder, out=tmp_path / "run")


def test_a_disk_that_fills_up_midway_keeps_the_finished_shards(vit, tmp_path, monkeypatch):
    real, written = os.fsync, []

    def full_from_the_third_file_on(descriptor: int) -> None:
        written.append(1)
        if len(written) > 2:  # the manifest and one shard
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr("vitprobe.files.os.fsync", full_from_the_third_file_on)
    with pytest.raises(UserError, match=r"the disk is full.*; the 64 images finished before are kept in .*run$"):
        analyze(vit, torch.randn(150, 3, 32, 32), statistics=["cls_entropy"], out=tmp_path / "run")
    assert Profile.load(tmp_path / "run").num_images == 64


def test_interrupted_by_an_exception_of_ctrl_c_keeps_what_is_done(vit, folder, tmp_path, monkeypatch):
    real, calls = Measurement.__call__, []

    def stop_at_the_third(self, *args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(Measurement, "__call__", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        analyze(vit, folder, batch_size=2, out=tmp_path / "run")
    profile = Profile.load(tmp_path / "run")
    assert profile.num_images == 4
    assert profile.manifest["status"] == "interrupted"
    assert vit.blocks[0]._forward_hooks == {}


SLOW_RUN = """
    import sys, torch, vitprobe
    from timm.models.vision_transformer import VisionTransformer
    torch.manual_seed(0)
    torch.set_num_threads(1)
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=0)
    vitprobe.analyze(vit, torch.randn(20000, 3, 32, 32), batch_size=16, statistics=["cls_entropy"], out=sys.argv[1])
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill"])
def test_a_real_process_stopped_midway_leaves_readable_shards(tmp_path, sent):
    run = tmp_path / "run"
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SLOW_RUN))
    command = [sys.executable, str(script), str(run)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env=os.environ, preexec_fn=hear_ctrl_c)
    deadline = time.monotonic() + 100
    while len(list(run.glob("statistics/shard-*"))) < 2 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(sent)
    process.communicate(timeout=60)
    assert process.returncode != 0
    profile = Profile.load(run)
    assert 128 <= profile.num_images < 20000
    assert profile.manifest["status"] == ("interrupted" if sent == signal.SIGINT else "running")
    assert len(profile.table()) == 3 * (1 + 2)
    assert not list(run.rglob("*.partial")) or sent == signal.SIGKILL


def test_progress_shows_images_a_second_and_the_time_left(vit, folder, capsys):
    analyze(vit, folder, statistics=["cls_entropy"], progress=True, batch_size=5)
    shown = capsys.readouterr().err
    assert "10/10" in shown
    assert "img/s" in shown
    analyze(vit, folder, statistics=["cls_entropy"])
    assert capsys.readouterr().err == ""  # no terminal, no notebook
    analyze(vit, folder, statistics=["cls_entropy"], progress=False)
    assert capsys.readouterr().err == ""
