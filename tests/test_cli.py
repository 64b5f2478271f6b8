"""The command line: through click's runner, and as a real process where that is the point."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from click.testing import CliRunner, Result

import vitprobe
from helpers import hear_ctrl_c, write_noise
from vitprobe.cli import main
from vitprobe.profile.profile import Profile

pytestmark = pytest.mark.usefixtures("undrawn")
VITPROBE = str(Path(sys.executable).with_name("vitprobe"))  # as pip installs it


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def process(*arguments: object, **options) -> subprocess.CompletedProcess:
    return subprocess.run([VITPROBE, *map(str, arguments)], capture_output=True, text=True, timeout=120, **options)


def assert_fails_with_one_line(result: Result, *words: str) -> None:
    """Exit status 2, one line on the error stream that has the words, nothing else said."""
    assert result.exit_code == 2, (result.output, result.exception)
    lines = result.stderr.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("Error: ")
    assert "Traceback" not in result.output
    assert result.stdout == ""
    for word in words:
        assert word in lines[0], (word, lines[0])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_noise(tmp_path / "images", 6)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch) -> None:
    """Default output folders are made under the test's own folder."""
    monkeypatch.chdir(tmp_path)


def test_the_first_command_of_the_readme(tmp_path):
    """Two models, table, verdict and three figures, in a real process, offline."""
    done = process("analyze", "--seed", 0, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    for name in ("mae_vit_nano", "supervised_vit_nano"):
        assert f"{name} (" in done.stdout
        assert f"{name}: [cls] " in done.stdout
    assert "120 images in 15 independent groups" in done.stdout
    assert "uniform attention: 1.54 %; random weights:" in " ".join(done.stdout.split())
    assert "next: " in done.stdout
    (root,) = (tmp_path / "runs").iterdir()
    assert {path.name for path in root.iterdir()} == {"mae_vit_nano", "supervised_vit_nano", "figures"}
    stems = ("figure3_cls_self_attention", "figure4_cls_entropy", "figure5_patch_self_attention")
    assert {path.name for path in (root / "figures").iterdir()} == {
        f"{s}.{e}" for s in stems for e in ("pdf", "png", "svg")
    }
    for name in ("mae_vit_nano", "supervised_vit_nano"):
        assert Profile.load(root / name).num_images == 120
        assert len(pd.read_csv(root / name / "summary.csv")) == len(pd.read_parquet(root / name / "summary.parquet"))


def test_one_model_on_a_folder_writes_the_run_into_out(folder, tmp_path, drawn):
    result = invoke("analyze", "--model", "mae_vit_nano", "--data", folder, "--num-images", 4, "--out", "run")
    assert result.exit_code == 0, result.output
    assert "mae_vit_nano (MIM), 4 images; mean over heads [95 % interval]" in result.stdout
    assert {path.name for path in Path("run").iterdir()} == {
        "manifest.json", "statistics", "summary.csv", "summary.parquet", "figures"
    }  # fmt: skip
    manifest = json.loads(Path("run/manifest.json").read_text())
    assert manifest["arguments"]["num_images"] == 4
    assert manifest["data"]["source"].endswith("images")


def test_the_table_holds_the_numbers_of_the_run(folder):
    result = invoke("analyze", "--model", "mae_vit_nano", "--data", folder, "--out", "run")
    table = Profile.load("run").table(["cls_self_attention"])
    last = table[table["head"].isna()].iloc[-1]
    row = next(line for line in result.stdout.splitlines() if line.startswith("11 "))
    assert row.startswith(f"11     {last['mean']:.4f} [{last['ci_low']:.4f}, {last['ci_high']:.4f}]")


def test_a_model_without_cls_says_what_is_undefined(folder):
    model = vitprobe.load_model("vit_wee_patch16_reg1_gap_256", pretrained=False, img_size=64)
    torch.save(model.module.state_dict(), "wee.pth")
    result = invoke("analyze", "--checkpoint", "wee.pth", "--arch", "vit_wee_patch16_reg1_gap_256",
                    "--img-size", 64, "--data", folder, "--num-images", 2, "--out", "run")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "patch self-attention" in result.stdout
    assert "[cls] self-attention" not in result.stdout
    assert "undefined here: cls_self_attention, cls_entropy_share (needs a [cls] token)" in " ".join(
        result.stdout.split()
    )
    assert not Path("run/figures/figure3_cls_self_attention.pdf").exists()
    assert Path("run/figures/figure5_patch_self_attention.pdf").exists()


def test_skipped_images_are_said(folder):
    (folder / "bad.jpg").write_bytes(b"x")
    result = invoke("analyze", "--model", "mae_vit_nano", "--data", folder, "--out", "run")
    assert result.exit_code == 0
    assert "skipped 1 image(s) that could not be read; the first: bad.jpg (" in " ".join(result.stderr.split())


def test_figures_draws_runs_together_and_any_statistic(folder, drawn):
    for name in ("mae_vit_nano", "supervised_vit_nano"):
        vitprobe.analyze(name, folder, out=name)
    result = invoke("figures", "mae_vit_nano", "supervised_vit_nano", "--out", "drawn")
    assert result.exit_code == 0, result.output
    assert len(result.stdout.splitlines()) == len(list(Path("drawn").iterdir())) == 9
    svg = Path("drawn/figure3_cls_self_attention.svg").read_text()
    assert "mae_vit_nano" in svg
    assert "supervised_vit_nano" in svg
    result = invoke("figures", "mae_vit_nano", "--statistic", "attention_distance", "--out", "drawn2")
    assert {path.name for path in Path("drawn2").iterdir()} == {
        f"attention_distance.{e}" for e in ("pdf", "png", "svg")
    }


def test_models_lists_filters_and_marks():
    everything = invoke("models").stdout.splitlines()
    assert len(everything) > 40
    assert [line for line in everything if line.startswith("mae_vit_nano") and line.rstrip().endswith("bundled")]
    dinov2 = invoke("models", "--paradigm", "hybrid", "dinov2").stdout.splitlines()
    assert 5 < len(dinov2) < len(everything)
    assert all("dinov2" in line for line in dinov2[1:])
    assert_fails_with_one_line(invoke("models", "nonsense"), "no model matches 'nonsense'")
    assert_fails_with_one_line(invoke("models", "--paradigm", "nonsense"), "MIM, JEA")


def test_help_and_version_do_not_import_torch_and_are_quick():
    code = (
        "import sys; import vitprobe.cli; print([m for m in ('torch', 'timm', 'numpy', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n"
    for arguments in (["--help"], ["analyze", "--help"], ["models", "--help"], ["figures", "--help"]):
        assert "Usage" in process(*arguments).stdout
    assert process("--version").stdout == f"vitprobe, version {vitprobe.__version__}\n"
    # The fastest of five: the machine's own noise is not ours.
    times = []
    for _ in range(5):
        began = time.perf_counter()
        process("--help")
        times.append(time.perf_counter() - began)
    assert min(times) < 0.5


# The user's mistakes --------------------------------------------------------------------------------------------------


def test_unknown_model_names_the_nearest():
    assert_fails_with_one_line(
        invoke("analyze", "--model", "mae_vit_nan"), "unknown model 'mae_vit_nan'", "mae_vit_nano"
    )
    assert not Path("runs").exists()


def test_no_network_for_weights_is_said_within_ten_seconds():
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HUB_CACHE": "empty"}
    began = time.perf_counter()
    done = process("analyze", "--model", "mae_vit_b", env=environment)
    assert time.perf_counter() - began < 10
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    for words in ("timm/vit_base_patch16_224.mae", "127.0.0.1:9", "--checkpoint FILE", "--model mae_vit_nano"):
        assert words in done.stderr
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "missing"], ["missing does not exist"]),
        (["--data", "empty"], ["empty"]),
        (["--data", "texts"], ["texts"]),
        (["--data", "texts/a.txt"], ["a.txt"]),
        (["--data", "broken.tar"], ["broken.tar"]),
        (["--data", "onlybad"], ["none of the 1 images of", "bad.png"]),
        (["--img-size", "33"], ["33", "multiples of 4"]),
        (["--num-images", "0"], ["--num-images", "0"]),
        (["--transform", "none"], ["--transform", "'model', 'paper'"]),
        (["--device", "nonsense"], ["device nonsense cannot be used", "choose cpu"]),
        (["--statistic", "entropy"], ["no statistic 'entropy'", "entropy"]),
        (["--nonsense"], ["--nonsense", "--help"]),
        (["--device", "meta"], ["device meta cannot be used"]),
        (["--seed", "-1"], ["--seed", "-1"]),
        (["--statistic", "cls_to_registers"], ["cls_to_registers", "needs register tokens"]),
        (["--data", ""], ["--data", "empty"]),
        (["--out", ""], ["--out", "empty"]),
        (["--out", "x" * 300], ["could not be written", "choose another folder (--out)"]),
        (["--model", "vit_tiny_patch16_224.nope"], ["nope"]),
        (["--model", "resnet18"], ["(ResNet) cannot be captured: it has no attention between tokens"]),
        (["--out", "texts"], ["texts is not empty and holds no run"]),
        (["--out", "texts/a.txt"], ["is a file"]),
        (["--checkpoint", "texts/a.txt"], ["a.txt is no checkpoint"]),
        (["--checkpoint", "none.pth"], ["none.pth"]),
        (["--model", "mae_vit_nano"], ["was given twice"]),
        (["--model", "supervised_vit_nano", "--checkpoint", "texts/a.txt"], ["--checkpoint fits one --model"]),
    ],
)
def test_bad_input_gets_one_line_and_leaves_nothing(arguments, words):
    Path("empty").mkdir()
    Path("texts").mkdir()
    Path("texts/a.txt").write_text("text")
    Path("onlybad").mkdir()
    Path("onlybad/bad.png").write_bytes(b"nothing")
    Path("broken.tar").write_bytes(b"nothing")
    before = sorted(Path().rglob("*"))
    assert_fails_with_one_line(invoke("analyze", "--model", "mae_vit_nano", *arguments), *words)
    assert sorted(Path().rglob("*")) == before


def test_arch_without_checkpoint_is_refused():
    assert_fails_with_one_line(invoke("analyze", "--arch", "mae_vit_b"), "--arch says what a --checkpoint is")


def test_a_checkpoint_that_does_not_fit_names_the_keys():
    model = vitprobe.load_model("mae_vit_nano", pretrained=False)
    state = model.module.state_dict()
    state.pop("blocks.3.attn.qkv.weight")
    torch.save(state, "torn.pth")
    assert_fails_with_one_line(
        invoke("analyze", "--model", "mae_vit_nano", "--checkpoint", "torn.pth"), "torn.pth", "blocks.3.attn.qkv.weight"
    )


def test_a_checkpoint_that_would_run_code_runs_none():
    class Payload:
        def __reduce__(self):
            return os.system, ("touch owned",)

    model = vitprobe.load_model("mae_vit_nano", pretrained=False)
    torch.save({"model": model.module.state_dict(), "args": Payload()}, "evil.pth")
    result = invoke(
        "analyze", "--model", "mae_vit_nano", "--checkpoint", "evil.pth", "--statistic", "cls_entropy", "--out", "r"
    )
    assert result.exit_code in (0, 2), result.output
    assert not Path("owned").exists()


def test_nan_weights_name_the_block():
    model = vitprobe.load_model("mae_vit_nano", pretrained=False)
    model.module.blocks[3].mlp.fc1.weight.data[0, 0] = float("nan")
    torch.save(model.module.state_dict(), "nan.pth")
    assert_fails_with_one_line(
        invoke("analyze", "--model", "mae_vit_nano", "--checkpoint", "nan.pth"), "NaN", "block 3"
    )


def test_another_run_is_refused_before_any_work(folder):
    assert invoke("analyze", "--model", "mae_vit_nano", "--data", folder, "--out", "run").exit_code == 0
    before = Path("run/manifest.json").read_bytes()
    assert_fails_with_one_line(
        invoke("analyze", "--model", "mae_vit_nano", "--data", folder, "--out", "run"), "--overwrite"
    )
    assert Path("run/manifest.json").read_bytes() == before
    again = invoke("analyze", "--model", "mae_vit_nano", "--data", folder, "--out", "run", "--overwrite")
    assert again.exit_code == 0, again.output


def test_several_models_are_not_written_into_the_run_of_one(folder):
    assert invoke("analyze", "--model", "mae_vit_nano", "--data", folder, "--out", "run").exit_code == 0
    before = sorted(Path("run").rglob("*"))
    assert_fails_with_one_line(
        invoke("analyze", "--out", "run", "--overwrite"), "run is the run of one model, and 2 need"
    )
    assert sorted(Path("run").rglob("*")) == before


def test_every_name_is_checked_before_the_first_model_runs(folder):
    result = invoke("analyze", "--model", "mae_vit_nano", "--model", "mae_vit_nan", "--data", folder, "--out", "two")
    assert_fails_with_one_line(result, "unknown model 'mae_vit_nan'")
    assert not Path("two").exists()


def test_a_manifest_of_somebody_elses_makes_no_run(folder):
    app = Path("app")
    (app / "figures").mkdir(parents=True)
    (app / "statistics").mkdir()
    (app / "manifest.json").write_text('{"name": "my web app"}')
    (app / "figures" / "paper.pdf").write_text("mine")
    (app / "statistics" / "data.csv").write_text("mine")
    for options in ([], ["--overwrite"]):
        result = invoke("analyze", "--model", "mae_vit_nano", "--data", folder, "--out", "app", *options)
        assert_fails_with_one_line(result, "app is not empty and holds no run of vitprobe")
    assert sorted(path.name for path in app.rglob("*") if path.is_file()) == ["data.csv", "manifest.json", "paper.pdf"]


def test_overwrite_takes_a_runs_own_files_alone(folder):
    arguments = ("analyze", "--model", "mae_vit_nano", "--data", folder, "--out", "run")
    assert invoke(*arguments).exit_code == 0
    (Path("run") / "figures" / "mine.pdf").write_text("mine")
    (Path("run") / "statistics" / "mine.csv").write_text("mine")
    result = invoke(*arguments, "--statistic", "cls_self_attention", "--overwrite")
    assert result.exit_code == 0, result.output
    assert (Path("run") / "figures" / "mine.pdf").read_text() == "mine"
    assert (Path("run") / "statistics" / "mine.csv").read_text() == "mine"
    drawn = {path.stem for path in (Path("run") / "figures").iterdir()}
    assert drawn == {"mine", "figure3_cls_self_attention"}  # no figure of the run before stays


def test_figures_of_another_run_are_not_replaced_unasked(folder):
    figure = Path("out/figures/figure3_cls_self_attention.pdf")
    figure.parent.mkdir(parents=True)
    figure.write_text("mine")
    result = invoke("analyze", "--data", folder, "--out", "out")
    assert_fails_with_one_line(result, "holds another run's figures; pass --overwrite")
    assert figure.read_text() == "mine"


def test_the_manifest_says_model_checkpoint_and_arch(folder):
    model = vitprobe.load_model("mae_vit_nano", pretrained=False)
    torch.save(model.module.state_dict(), "w.pth")
    invoke("analyze", "--model", "mae_vit_nano", "--checkpoint", "w.pth", "--data", folder, "--out", "run")
    arguments = json.loads(Path("run/manifest.json").read_text())["arguments"]
    assert (arguments["model"], arguments["checkpoint"], arguments["arch"]) == ("mae_vit_nano", "w.pth", None)
    assert arguments["data"] == str(folder)
    invoke("analyze", "--checkpoint", "w.pth", "--arch", "mae_vit_nano", "--data", folder, "--out", "run2")
    arguments = json.loads(Path("run2/manifest.json").read_text())["arguments"]
    assert (arguments["model"], arguments["arch"]) == ("w.pth", "mae_vit_nano")


def test_an_ascii_terminal_and_names_that_are_no_text(folder):
    folder.rename(os.fsdecode(os.fsencode(folder) + b"\xff"))
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [os.fsencode(VITPROBE), b"analyze", b"--model", b"mae_vit_nano", b"--img-size", b"33"]
    done = subprocess.run(command, capture_output=True, timeout=60, env=environment)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    command = [*command[:4], b"--data", os.fsencode(folder) + b"\xff", b"--out", b"r\xff"]
    done = subprocess.run(command, capture_output=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr


def test_output_that_cannot_be_written(folder):
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    done = subprocess.run(f"{VITPROBE} models > /dev/full", shell=True, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "Error: the output could not be written: no space left on its device\n"
    quiet = f"{VITPROBE} analyze --model mae_vit_nano --data {folder} --out quiet 2>&-"
    done = subprocess.run(quiet, shell=True, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "mae_vit_nano: [cls]" in done.stdout


def test_vitprobe_alone_gives_its_help():
    done = process()
    assert done.returncode == 0
    assert done.stdout.startswith("Usage: vitprobe")
    assert done.stderr == ""


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_out_of_memory_is_one_line(monkeypatch, error):
    def hungry(*args, **kwargs):
        raise error

    monkeypatch.setattr("vitprobe.profile.analysis.analyze", hungry)
    assert_fails_with_one_line(
        invoke("analyze", "--model", "mae_vit_nano"), "out of memory; give a smaller --batch-size"
    )


def test_a_ratio_is_printed_as_what_its_interval_is_about(folder):
    result = invoke(
        "analyze", "--model", "mae_vit_nano", "--data", folder, "--statistic", "cls_update_ratio", "--out", "r"
    )
    assert result.exit_code == 0, result.output
    assert "cls_update_ratio (geometric mean)" in result.stdout
    assert "none of the paper's three statistics was measured" in " ".join(result.stdout.split())
    assert "next: measure the paper's three statistics too" in " ".join(result.stdout.split())


def test_figures_of_no_run(folder):
    assert_fails_with_one_line(invoke("figures", "images"), "images holds no run")
    assert_fails_with_one_line(invoke("figures"), "RUNS")


def test_a_full_disk_is_one_line(folder, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vitprobe.files.os.fsync", full)
    result = invoke("analyze", "--model", "mae_vit_nano", "--data", folder, "--out", "run")
    assert_fails_with_one_line(result, "the disk is full")
    assert not Path("run").exists()


def test_an_error_of_ours_is_not_dressed_up_as_the_users(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("a defect")

    monkeypatch.setattr("vitprobe.profile.analysis.analyze", broken)
    result = invoke("analyze", "--model", "mae_vit_nano")
    assert result.exit_code == 1
    assert isinstance(result.exception, RuntimeError)


def test_ctrl_c_exits_with_130_and_finished_shards_stay(tmp_path):
    images = write_noise(tmp_path / "many", 300, 64, 64)
    command = [VITPROBE, "analyze", "--model", "mae_vit_nano", "--data", str(images), "--out", "run",
               "--batch-size", "1", "--workers", "0"]  # fmt: skip
    running = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=hear_ctrl_c
    )
    deadline = time.monotonic() + 100
    while not list(Path("run").glob("statistics/shard-*")) and time.monotonic() < deadline and running.poll() is None:
        time.sleep(0.01)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 130, errors
    assert "Traceback" not in errors
    assert "finished shards are kept; vitprobe figures run reads them" in errors
    assert 64 <= Profile.load("run").num_images < 300


def test_a_reader_that_goes_away_is_no_error():
    done = subprocess.run(f"{VITPROBE} models | head -1", shell=True, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert done.stderr == ""
