"""`vitprobe verify`: table, figure, folders, exit statuses; every bad input is one line and costs nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from click.testing import Result
from PIL import Image

from helpers import hear_ctrl_c
from made_squares import METHODS, fill_disk, kept, write_squares
from test_cli import assert_fails_with_one_line, invoke
from vitprobe import Verification, load_model, verify
from vitprobe.probing.bank import Bank
from vitprobe.probing.cache import TokenCache
from vitprobe.probing.protocols import PROTOCOLS

pytestmark = pytest.mark.usefixtures("undrawn")
FIGURES = {f"selective_aggregation.{kind}" for kind in ("pdf", "svg", "png")}
KNN = PROTOCOLS["knn"]
NAMES = {"fast": "bank", "cached": "cached", "knn": "knn", "logistic": "logistic"}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small protocols in the place of the real ones, and a folder of pictures."""
    for name, method in NAMES.items():
        monkeypatch.setitem(PROTOCOLS, name, METHODS[method])
    monkeypatch.chdir(tmp_path)
    return write_squares(tmp_path / "squares")


def run(*arguments: object, model: str = "random_vit_nano", out: str = "run") -> Result:
    """With the tokens of the first block, which are there soon."""
    given = ["--block", 0, "--workers", 0, "--data", "squares", "--model", model, "--out", out]
    return invoke("verify", *given, *arguments)


def succeeds(result: Result) -> str:
    assert result.exit_code == 0, (result.output, result.exception)
    return " ".join(result.stdout.split())


def files(folder: str = "run") -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()
    }


def test_the_table_the_figure_and_the_folder(drawn: None) -> None:
    result = run()
    said = succeeds(result)
    table = pd.read_csv("run/accuracy.csv")
    assert list(table["label"]) == [f"{name}@block0" for name in ("cls", "gap", "abmilp", "ep")]
    assert "random_vit_nano (random) on squares" in said
    for _, row in table.iterrows():
        words = f"{row['label']} {row['parameters']:,} {100 * row['accuracy']:.2f} [{100 * row['ci_low']:.2f}, "
        assert words in said, words
    sha = Verification.load("run").manifest["model"]["weights_sha256"]
    assert f"Conditional on these backbone weights (random_vit_nano, sha256 {sha[:12]}…)" in said
    assert "and on the protocol bank" in said and "every number: run/accuracy.csv" in said
    assert "figure: run/figures/selective_aggregation.pdf, " in said
    assert {path.name for path in Path("run/figures").iterdir()} == FIGURES
    probes = {f"{name}-seed{seed}.safetensors" for name in table["label"] for seed in (0, 1)}
    assert {path.name for path in Path("run/probes").iterdir()} == probes
    assert {path.name for path in Path("run").iterdir()} == {
        *("manifest.json", "accuracy.csv", "correctness.safetensors", "probes", "figures")
    }
    assert result.stderr == ""


@pytest.mark.parametrize("protocol", ["cached", "knn", "logistic"])
def test_the_other_protocols(protocol: str) -> None:
    said = succeeds(run("--protocol", protocol))
    table = pd.read_csv("run/accuracy.csv")
    names = ["cls", "gap", "abmilp", "ep"] if protocol == "cached" else ["cls", "gap"]
    places = ["block0", "block0+norm"] if protocol == "knn" else ["block0"]
    assert list(table["label"]) == [f"{name}@{place}" for place in places for name in names]
    assert f"on the protocol {protocol}" in said and {path.name for path in Path("run/figures").iterdir()} == FIGURES


def test_aggregators_with_options_blocks_and_norm() -> None:
    names = ["--aggregator", "cls", "--aggregator", "abmilp(depth=2,activation=tanh)"]
    write_squares(Path("few"), 8, 4)  # bfloat16 is slow on many CPUs
    options = ["--block", -1, "--norm", "--seed", 3, "--dtype", "bfloat16", "--data", "few"]
    said = succeeds(run(*names, *options))
    table = pd.read_csv("run/accuracy.csv")
    assert list(table["label"]) == [
        f"{name}@block{block}+norm" for block in (0, 11) for name in ("cls", "abmilp(depth=2,activation=tanh)")
    ]
    assert "abmilp(depth=2,activation=tanh)@block0+norm" in said
    manifest = json.loads(Path("run/manifest.json").read_text())
    assert manifest["arguments"]["aggregators"] == ["cls", "abmilp(depth=2,activation=tanh)"]
    assert manifest["arguments"]["seed"] == 3 and manifest["forward_dtype"]["taken"] == "bfloat16"
    assert {path.name for path in Path("run/figures").iterdir()} == FIGURES


def test_the_old_spelling_of_aggregators_still_works_and_says_what_it_is_now() -> None:
    result = run("--aggregators", "gap,abmilp(depth=2,activation=tanh)", "--protocol", "fast")
    succeeds(result)
    assert result.stderr.startswith("note: --aggregators is --aggregator now, repeated")
    assert list(pd.read_csv("run/accuracy.csv")["aggregator"]) == ["gap", "abmilp(depth=2,activation=tanh)"]


def test_what_cannot_be_drawn_is_said_and_the_numbers_are_there() -> None:
    result = run("--aggregator", "abmilp")
    succeeds(result)
    assert "no figure: no model has all that is to be drawn: random_vit_nano (has neither cls nor gap)" in result.stderr
    assert not Path("run/figures").exists() and Path("run/accuracy.csv").exists()
    succeeds(run("--overwrite"))
    assert Path("run/figures").exists()
    succeeds(run("--aggregator", "abmilp", "--overwrite"))
    assert not list(Path("run/figures").iterdir())  # none of the run before stays


def test_several_models() -> None:
    arguments = ["--model", "mae_vit_nano", "--protocol", "logistic"]
    said = succeeds(run(*arguments, out="both"))
    assert "random_vit_nano (random) on squares" in said and "mae_vit_nano (MIM) on squares" in said
    assert {path.name for path in Path("both").iterdir()} == {"random_vit_nano", "mae_vit_nano", "figures"}
    assert {path.name for path in Path("both/figures").iterdir()} == FIGURES
    assert "every number: both/random_vit_nano/accuracy.csv, both/mae_vit_nano/accuracy.csv" in said
    assert_fails_with_one_line(run(*arguments, out="both"), "both/random_vit_nano holds another run; pass --overwrite")
    shutil.rmtree("both/mae_vit_nano")
    before = files("both/random_vit_nano")
    succeeds(run(*arguments, "--resume", out="both"))
    assert files("both/random_vit_nano") == before and Path("both/mae_vit_nano/accuracy.csv").exists()
    shutil.rmtree("both/mae_vit_nano")
    shutil.rmtree("both/random_vit_nano")
    assert_fails_with_one_line(run(*arguments, out="both"), "both/figures holds another run's figure")


@pytest.mark.slow
def test_default_models_folder_and_data() -> None:
    """`vitprobe verify` alone, but for the small protocol and the first block."""
    said = succeeds(invoke("verify", "--block", 0, "--protocol", "logistic"))
    (root,) = Path("runs").iterdir()
    assert root.name.startswith("verify-2-models-")
    assert {path.name for path in root.iterdir()} == {"mae_vit_nano", "supervised_vit_nano", "figures"}
    assert said.count("on scikit-learn's digits (1198 train, 599 test") == 2


def test_a_checkpoint_without_cls_says_what_is_left_out() -> None:
    module = load_model("vit_wee_patch16_reg1_gap_256", pretrained=False, img_size=32).module
    torch.save(module.state_dict(), "wee.pth")
    result = invoke(
        *("verify", "--checkpoint", "wee.pth", "--arch", "vit_wee_patch16_reg1_gap_256", "--img-size", 32),
        *("--block", 0, "--data", "squares", "--out", "run", "--protocol", "cached"),
    )
    said = succeeds(result)
    assert "gap@block0" in said and "cls@block0" not in said
    assert "left out: cls (cls reads the [cls] token, which wee does not have" in result.stderr
    assert set(pd.read_csv("run/accuracy.csv")["gain_over"]) == {"gap@block0"}
    explicit = invoke(
        *("verify", "--checkpoint", "wee.pth", "--arch", "vit_wee_patch16_reg1_gap_256", "--img-size", 32),
        *("--block", 0, "--data", "squares", "--out", "other", "--aggregator", "gap", "--aggregator", "cls"),
    )
    assert_fails_with_one_line(explicit, "cls reads the [cls] token, which wee does not have: leave it out, or use gap")


def test_probes_that_diverged_and_images_that_were_skipped_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Bank.train_step

    def step(self: Bank, batches: Any, labels: Any) -> Any:
        self.retired |= {
            spec: "made up" for spec in self.specs if spec.learning_rate == 1e-2 or spec.aggregator == "ep"
        }
        return real(self, batches, labels)

    monkeypatch.setattr(Bank, "train_step", step)
    Path("squares/val/red/002.png").write_bytes(b"")
    result = run()
    succeeds(result)
    name = json.loads(Path("run/manifest.json").read_text())["data"]["skipped"][0]["name"]
    assert result.stderr.splitlines() == [
        "  left out: ep@block0 (diverged at every learning rate)",
        "  10 probe(s) diverged and were retired; the first: cls@block0, adamw 0.01, decay 0, seed 0 (made up); all "
        "are named in manifest.json",
        f"  skipped 1 image(s) that could not be read; the first: {name} (the file is empty); all are named in "
        "manifest.json",
    ]


# Bad input ------------------------------------------------------------------------------------------------------------


def one_class(monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("train", "val"):
        shutil.rmtree(f"squares/{part}/red")
        shutil.rmtree(f"squares/{part}/blue")


def other_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("squares/val/red").rename("squares/val/pink")


def no_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (8, 8)).save("squares/train/loose.png")


def small_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))


def nan_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    from vitprobe.data.transforms import ImageTransform

    real = ImageTransform.__call__

    def spoilt(self: ImageTransform, picture: Any) -> torch.Tensor:
        pixels = real(self, picture)
        return pixels * torch.nan if picture.getpixel((0, 0)) == SPOILT else pixels

    Image.new("RGB", (8, 8), SPOILT).save("squares/train/blue/000spoilt.png")
    monkeypatch.setattr(ImageTransform, "__call__", spoilt)


def all_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PROTOCOLS, "knn", replace(KNN, grid=(("k", (100, 200)), ("temperature", (0.1,)))))


def nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pass


SPOILT = (1, 2, 3)
BAD = {
    "one class": (one_class, [], ["squares has one class only (green): a probe tells at least two apart"]),
    "other classes": (other_classes, [], ["pink of squares is only in test: a probe cannot learn"]),
    "no labels": (no_labels, [], ["loose.png of", "lies in no class folder, so it has no label"]),
    "no data": (nothing, ["--data", "nowhere"], ["nowhere does not exist: labelled data is a folder with train/"]),
    "few images": (
        all_neighbours,
        ["--protocol", "knn"],
        ["k-NN takes at least 100 training images beside the held-out ones, and there are 54"],
    ),
    "width": (nothing, ["--aggregator", "ep(queries=7)"], ["does not divide the width 128: choose one of 1, 2, 4, 8"]),
    "aggregator": (
        nothing,
        ["--aggregator", "cls", "--aggregator", "abmlip"],
        ["no aggregator is called 'abmlip'; the nearest: abmilp"],
    ),
    "option": (nothing, ["--aggregator", "cls(depth=2)"], ["cls has no option 'depth': it has none"]),
    "block": (nothing, ["--block", 12], ["random_vit_nano has blocks 0 to 11, not 12: choose one of these"]),
    "protocol": (nothing, ["--protocol", "paper"], ["--protocol", "'paper' is not one of 'fast', 'cached'"]),
    "disk": (small_disk, ["--protocol", "cached"], ["the tokens of 60 images take 998,400 bytes", "1,000 free"]),
    "nan": (nan_tokens, ["--protocol", "logistic"], ["NaN or infinite for 1 of the batch's images", "spoilt.png"]),
    "nan, cached": (nan_tokens, ["--protocol", "cached"], ["NaN or infinite for 1 of the batch's", "spoilt.png"]),
    "trained": (
        nothing,
        ["--protocol", "knn", "--aggregator", "ep"],
        ["ep is trained, and knn trains no"],
    ),
    "attention": (nothing, ["--protocol", "cached", "--aggregator", "cls_attention"], ["the cache does not hold"]),
    "model": (nothing, [], ["nosuchmodel"]),
    "device": (nothing, ["--device", "tpu7"], ["device tpu7 cannot be used"]),
    "both": (nothing, ["--resume"], ["--resume goes on with a run, and --overwrite starts anew: give one of the two"]),
    "checkpoint": (nothing, ["--checkpoint", "nowhere.pth"], ["nowhere.pth"]),
    "arch": (nothing, ["--arch", "mae_vit_nano"], ["--arch says what a --checkpoint is"]),
    "empty": (nothing, ["--aggregator", ""], ["it is empty"]),
}


@pytest.fixture(scope="module")
def old_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that must outlive what is tried on it."""
    folder = tmp_path_factory.mktemp("old")
    data = write_squares(folder / "squares")
    verify("random_vit_nano", data, protocol=METHODS["logistic"], blocks=[0], out=folder / "run", workers=0)
    return folder / "run"


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_costs_nothing(monkeypatch: pytest.MonkeyPatch, old_run: Path, name: str) -> None:
    spoil, arguments, words = BAD[name]
    shutil.copytree(old_run, "old")
    before = files("old")
    spoil(monkeypatch)
    model = {"model": "nosuchmodel"} if name == "model" else {}
    assert_fails_with_one_line(run(*arguments, "--overwrite", out="old", **model), *words)
    assert files("old") == before
    if name != "both":
        assert_fails_with_one_line(run(*arguments, out="new", **model), *words)
        assert not Path("new").exists()


def test_resumed_with_other_settings_or_weights() -> None:
    succeeds(run("--protocol", "logistic"))
    before = files()
    said = "so --resume cannot go on; give the same again, --overwrite to start anew, or another --out"
    for arguments, was in (
        (["--seed", 1], "run was begun with seed 0, not 1"),
        (["--protocol", "cached"], "run was begun with protocol logistic"),
        (["--aggregator", "gap"], "run was begun with aggregators none, not ['gap']"),
        (["--block", 1], "run was begun with blocks [0], not [0, 1]"),
    ):
        given = arguments if "--protocol" in arguments else [*arguments, "--protocol", "logistic"]
        assert_fails_with_one_line(run(*given, "--resume"), was, said)
    other = run("--protocol", "logistic", "--resume", model="mae_vit_nano")
    assert_fails_with_one_line(other, "run was begun with model random_vit_nano, not mae_vit_nano", said)
    assert files() == before
    assert "every number" in succeeds(run("--protocol", "logistic", "--resume"))
    assert_fails_with_one_line(invoke("verify", "--resume"), "--resume goes on with a run, and that needs its folder")


@pytest.mark.parametrize("moment", ["cache.json", "selective_aggregation.svg"])
def test_a_full_disk_is_one_line_and_nothing_is_lost(monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    with monkeypatch.context() as patched:
        fill_disk(patched, moment)
        result = run("--protocol", "cached")
        assert result.exit_code == 2
        (line,) = result.stderr.splitlines()
        assert line.startswith("Error: the disk is full, so ") and f"{moment} could not be written" in line
    assert not list(Path("run").rglob("*.partial"))
    succeeds(run("--protocol", "cached", "--resume"))
    succeeds(run("--protocol", "cached", out="whole"))
    assert kept(Path("run")) == kept(Path("whole"))
    assert {path.name for path in Path("run/figures").iterdir()} == FIGURES


def test_runs_of_the_other_command() -> None:
    analyzed = ["analyze", "--model", "random_vit_nano", "--data", "squares/val", "--statistic", "cls_entropy"]
    succeeds(run("--protocol", "logistic", out="verified"))
    succeeds(invoke(*analyzed, "--out", "analyzed"))
    before = files("verified") | files("analyzed")
    wants_analyze = "verified is a run of vitprobe verify, not of analyze: give another folder (vitprobe.Verification"
    wants_verify = "analyzed is a run of vitprobe analyze, not of verify: give another folder (vitprobe.Profile.load"
    assert_fails_with_one_line(invoke("figures", "verified"), wants_analyze)
    for option in ([], ["--resume"], ["--overwrite"]):
        assert_fails_with_one_line(invoke(*analyzed, "--out", "verified", *option), wants_analyze)
        assert_fails_with_one_line(run(*option, out="analyzed"), wants_verify)
    assert files("verified") | files("analyzed") == before


# Ctrl-C, in a real process --------------------------------------------------------------------------------------------

SLOWLY = """
import sys, time
sys.path.insert(0, {tests!r})
import vitprobe.probing.training as training
from made_squares import BANK
from vitprobe.cli import main
from vitprobe.probing.bank import Bank
from vitprobe.probing.protocols import PROTOCOLS
PROTOCOLS["fast"], training.SAVE_SECONDS, real = BANK, -1.0, Bank.train_step
Bank.train_step = lambda *given: (time.sleep({pause}), real(*given))[1]
main()
"""


def slowly(pause: float, *arguments: str) -> subprocess.Popen:
    code = SLOWLY.format(tests=str(Path(__file__).parent), pause=pause)
    command = [sys.executable, "-c", code, "verify", "--model", "random_vit_nano", "--block", "0", "--data", "squares"]
    return subprocess.Popen(
        [*command, "--out", "run", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hear_ctrl_c,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_ctrl_c_exits_with_130_and_says_how_to_go_on() -> None:
    running = slowly(0.2)
    deadline = time.monotonic() + 60
    while not Path("run/training.safetensors").exists() and time.monotonic() < deadline and running.poll() is None:
        time.sleep(0.01)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 130, errors
    assert [line for line in errors.splitlines() if line] == [
        "what was saved is kept: the same command with --out run --resume goes on",
        "interrupted",
    ]
    assert "Traceback" not in errors and not Path("run/accuracy.csv").exists()
    succeeds(run("--resume"))
    succeeds(run(out="whole"))
    assert kept(Path("run")) == kept(Path("whole"))


def test_ctrl_c_before_anything_was_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*given: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Bank, "train_step", interrupted)
    result = run()
    assert result.exit_code == 130 and result.stderr.strip() == "interrupted"
    assert not Path("run").exists()


def test_a_defect_is_not_dressed_up_as_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: Any, **options: Any) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(TokenCache, "fill", broken)
    result = run("--protocol", "cached")
    assert result.exit_code == 1 and isinstance(result.exception, RuntimeError)
