"""`verify(resume=True)`: killed at any moment a run ends as an unbroken one, bit for bit; another is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers import message, randomize, tiny_vit
from made_squares import BANK, CACHED, KNN, METHODS, fill_disk, kept, squares
from vitprobe import Profile, UserError, Verification, analyze, verify
from vitprobe.probing.bank import Bank
from vitprobe.probing.cache import TokenCache
from vitprobe.probing.training import Training
from vitprobe.runs.folder import RunFolder

STEPS = 6  # of BANK and CACHED on these pictures: two passes of three


@pytest.fixture(autouse=True)
def save_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitprobe.probing.training.SAVE_SECONDS", -1.0)


def run(out: Path, protocol: Any = BANK, **options: Any) -> Verification:
    given = {"model": tiny_vit(), "data": squares(), "aggregators": ["cls", "ep"], "resume": True, "workers": 0}
    return verify(protocol=protocol, out=out, **given | options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of an unbroken run of a protocol, which several tests compare theirs with."""
    made: dict[str, Path] = {}

    def folder(protocol: Any = BANK, **options: Any) -> Path:
        key = f"{protocol.name} {options}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp("whole")
            run(made[key], protocol, **options)
        return made[key]

    return folder


def refusal(out: Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        run(out, **options)
    return message(caught)


def stop_at(patched: pytest.MonkeyPatch, owner: Any, name: str, count: int, error: BaseException) -> None:
    """Let `error` come instead of the call of this number."""
    real, calls = getattr(owner, name), []

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == count:
            raise error
        return real(*arguments, **options)

    patched.setattr(owner, name, counted)


MOMENTS = {  # what is called when the error comes, and which call of it
    "the second step": (BANK, Bank, "train_step", 2),
    "another pass": (BANK, Bank, "train_step", STEPS - 1),
    "selection": (BANK, Bank, "logits", 1),
    "the test": (CACHED, "vitprobe.probing.methods", "test", 1),
    "tokens of the training images": (CACHED, TokenCache, "_store", 3),
    "tokens of the test images": (CACHED, TokenCache, "_store", 5),
    "training on tokens": (CACHED, Bank, "train_step", 4),
    "writing a probe": (BANK, "vitprobe.probing.verify", "save_probe", 3),
    "writing the numbers": (BANK, "vitprobe.probing.verification", "write_atomically", 1),
    "writing the table": (KNN, "vitprobe.probing.verification", "write_atomically", 2),
    "clearing up": (CACHED, RunFolder, "clear_unfinished", 3),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_what_was_broken_off_goes_on_and_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Callable[..., Path], moment: str
) -> None:
    protocol, owner, name, count = MOMENTS[moment]
    options: dict[str, Any] = {"aggregators": ["cls", "gap"]} if protocol is KNN else {}
    unbroken = whole(protocol, **options)
    with monkeypatch.context() as patched:
        target = sys.modules[owner] if isinstance(owner, str) else owner
        stop_at(patched, target, name, count, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run", protocol, **options)
    if moment not in ("clearing up", "writing the table"):
        with pytest.raises(UserError, match=r"is not finished \(there is no correctness.safetensors\)|holds no run"):
            Verification.load(tmp_path / "run")
    again = run(tmp_path / "run", protocol, **options)
    assert kept(tmp_path / "run") == kept(unbroken)
    theirs = json.loads((unbroken / "manifest.json").read_text())
    mine = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert mine == json.loads(json.dumps(again.manifest))
    for key in ("status", "data", "diverged", "undefined", "protocol", "model"):
        assert mine[key] == theirs[key]
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {path.name for path in unbroken.iterdir()}
    assert not names & {"training.safetensors", "tokens"} and not list((tmp_path / "run").rglob("*.partial"))


def test_what_is_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, stored = [], []
    real_step, real_store = Bank.train_step, TokenCache._store

    def store(self: TokenCache, batch: Any, content: Any) -> None:
        stored.append(1)
        real_store(self, batch, content)

    def step(self: Bank, batches: Any, labels: Any) -> Any:
        if len(steps) == 4:
            steps.append(0)
            raise KeyboardInterrupt
        steps.append(1)
        return real_step(self, batches, labels)

    monkeypatch.setattr(Bank, "train_step", step)
    monkeypatch.setattr(TokenCache, "_store", store)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, CACHED)
    assert (sum(steps), len(stored)) == (4, 6)
    run(tmp_path, CACHED)
    assert (sum(steps), len(stored)) == (STEPS, 6)


def test_the_state_is_saved_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved, clock = [], iter(range(0, 1000, 7))
    real = Training.save
    monkeypatch.setattr(Training, "save", lambda self: saved.append(self.batches) or real(self))
    monkeypatch.setattr("vitprobe.probing.training.SAVE_SECONDS", 20.0)
    monkeypatch.setattr("vitprobe.probing.training.time.monotonic", lambda: next(clock))
    run(tmp_path)
    # the clock is read once at the start, once a step, and once more after a saving
    assert saved == [3, STEPS, STEPS]


def test_a_run_is_begun_where_the_folder_is_absent_or_empty(tmp_path: Path) -> None:
    for left in ([], [".manifest.json.partial"], [".training.safetensors.partial"]):
        out = tmp_path / f"run{len(left)}{''.join(left)}"
        for name in left:
            out.mkdir(exist_ok=True)
            (out / name).write_bytes(b"{")
        assert run(out).num_images == 24
        assert not list(out.rglob("*.partial")) and (out / "manifest.json").exists()


@pytest.mark.parametrize("method", METHODS)
def test_a_complete_run_returns_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    one = run(tmp_path, METHODS[method], aggregators=["cls", "gap"])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    monkeypatch.setattr("vitprobe.probing.verify._verified", None)
    again = run(tmp_path, METHODS[method], aggregators=["cls", "gap"])
    assert again.manifest == json.loads(json.dumps(one.manifest)) and len(again.results) == len(one.results)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_kill_in_the_last_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path)
    before = kept(tmp_path)
    (tmp_path / "accuracy.csv").unlink()
    (tmp_path / "training.safetensors").write_bytes(b"")
    with monkeypatch.context() as patched:
        patched.setattr("vitprobe.probing.verify._verified", None)
        run(tmp_path)
    assert kept(tmp_path) == before and not (tmp_path / "training.safetensors").exists()
    (tmp_path / "correctness.safetensors").unlink()  # the manifest says complete already
    (tmp_path / "accuracy.csv").unlink()
    assert run(tmp_path).manifest["status"] == "complete"
    assert kept(tmp_path) == before


def test_another_run_is_not_gone_on_with(tmp_path: Path) -> None:
    base: dict[str, Any] = {"aggregators": ["cls", "gap"], "seed": 0}
    run(tmp_path, **base)
    before = kept(tmp_path)
    for change, was, now in [
        ({"aggregators": ["cls"]}, "aggregators ['cls', 'gap']", "['cls']"),
        ({"seed": 1}, "seed 0", "1"),
        ({"blocks": [0]}, "blocks none", "[0]"),
        ({"norm": True}, "norm none", "True"),
        ({"dtype": "bfloat16"}, "dtype none", "bfloat16"),
        ({"protocol": CACHED}, f"protocol bank ({BANK.digest})", f"cached ({CACHED.digest})"),
        ({"protocol": (other := replace(BANK, epochs=3))}, f"protocol bank ({BANK.digest})", f"bank ({other.digest})"),
    ]:
        assert refusal(tmp_path, **{**base, **change}) == (
            f"{tmp_path} was begun with {was}, not {now}, so --resume cannot go on; give the same again, --overwrite "
            f"to start anew, or another --out"
        )
    assert "begun with weights of SHA-256" in refusal(tmp_path, **base, model=randomize(tiny_vit(), 1))
    assert "begun with images of fingerprint" in refusal(tmp_path, **base, data=squares(21))
    assert kept(tmp_path) == before
    assert len(run(tmp_path, **base, workers=1).results) == 2  # how, not what
    with pytest.raises(UserError, match="that needs its folder: give --out too"):
        verify(tiny_vit(), squares(), protocol=BANK, resume=True)


def test_an_image_size_is_the_same_after_json(tmp_path: Path) -> None:
    run(tmp_path, img_size=(32, 32))
    assert len(run(tmp_path, img_size=(32, 32)).results) == 2
    assert "img_size [32, 32], not none" in refusal(tmp_path)


def test_broken_state_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Callable[..., Path]) -> None:
    with monkeypatch.context() as patched:
        stop_at(patched, Bank, "train_step", 3, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    state = tmp_path / "training.safetensors"
    content = state.read_bytes()
    for broken in (b"", content[:200], content[:-1]):
        state.write_bytes(broken)
        said = refusal(tmp_path)
        assert said.startswith(f"{state} cannot be read (") and said.endswith("; start anew with --overwrite")
    state.write_bytes(content.replace(b'\\"steps\\": 6', b'\\"steps\\": 7'))
    assert refusal(tmp_path) == (
        "the saved training is one of other probes or another schedule: resume with its settings"
    )
    state.unlink()
    run(tmp_path)
    assert kept(tmp_path) == kept(whole())


def test_overwrite_does_not_go_on_with_what_was_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        stop_at(patched, Bank, "train_step", 3, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run", CACHED)
    assert (tmp_path / "run" / "training.safetensors").exists() and (tmp_path / "run" / "tokens").exists()
    steps: list[int] = []
    real: Callable[..., Any] = Bank.train_step
    monkeypatch.setattr(Bank, "train_step", lambda *given: steps.append(1) or real(*given))
    run(tmp_path / "run", CACHED, resume=False, overwrite=True, data=squares(21))
    assert len(steps) == STEPS
    run(tmp_path / "whole", CACHED, data=squares(21))
    assert kept(tmp_path / "run") == kept(tmp_path / "whole")


@pytest.mark.parametrize("moment", ["training.safetensors", "cache.json", "correctness.safetensors", "accuracy.csv"])
def test_a_full_disk_is_one_line_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Callable[..., Path], moment: str
) -> None:
    with monkeypatch.context() as patched:
        fill_disk(patched, moment)
        said = refusal(tmp_path / "run", protocol=CACHED)
    assert said.startswith("the disk is full, so ") and f"{moment} could not be written" in said
    assert not list((tmp_path / "run").rglob("*.partial"))
    run(tmp_path / "run", CACHED)
    assert kept(tmp_path / "run") == kept(whole(CACHED))


# The other kind of run ------------------------------------------------------------------------------------------------


def test_a_run_of_the_other_command_is_one_line(tmp_path: Path) -> None:
    verified, analyzed = tmp_path / "verified", tmp_path / "analyzed"
    run(verified)
    analyze(tiny_vit(), squares().test.images, statistics=["cls_entropy"], out=analyzed, workers=0)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    wants_analyze = (
        f"{verified} is a run of vitprobe verify, not of analyze: give another folder (vitprobe.Verification.load "
        f"reads this one)"
    )
    wants_verify = (
        f"{analyzed} is a run of vitprobe analyze, not of verify: give another folder (vitprobe.Profile.load reads "
        f"this one)"
    )
    for options in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(UserError) as caught:
            analyze(tiny_vit(), squares().test.images, out=verified, workers=0, **options)
        assert message(caught) == wants_analyze
        assert refusal(analyzed, **{"resume": False} | options) == wants_verify
    with pytest.raises(UserError) as caught:
        Profile.load(verified)
    assert message(caught) == wants_analyze
    with pytest.raises(UserError) as caught:
        Verification.load(analyzed)
    assert message(caught) == wants_verify
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


# Real processes, really killed ----------------------------------------------------------------------------------------

HEAD = """
    import os, random, signal, sys, time
    from pathlib import Path
    sys.path.insert(0, sys.argv[2])
    import torch, vitprobe
    from helpers import tiny_vit
    from made_squares import BANK, CACHED, kept, squares
    import vitprobe.files, vitprobe.probing.training
    from vitprobe.probing.bank import Bank
    from vitprobe.probing.cache import TokenCache

    torch.set_num_threads(1)
    here, model = Path(sys.argv[1]), tiny_vit()

    def run(name, protocol, data):
        return vitprobe.verify(model, data, ["cls", "ep"], protocol=protocol, out=here / name, resume=True, workers=0,
                               progress=False)

    def child(act):
        number = os.fork()
        if number == 0:
            act()
            os._exit(0)
        return number
"""

AT_MOMENTS = """
    vitprobe.probing.training.SAVE_SECONDS = -1
    data = squares()

    def killed(owner, name, count, after):
        real, calls = getattr(owner, name), []
        def counted(*given, **options):
            calls.append(1)
            if len(calls) == count and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            done = real(*given, **options)
            if len(calls) == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return done
        setattr(owner, name, counted)

    for protocol in (BANK, CACHED):
        run(f"whole-{protocol.name}", protocol, data)
    number = 0
    for protocol, owner, name, count, after in (
        (BANK, Bank, "train_step", 4, True),
        (BANK, os, "fsync", 3, False),       # the partial file of a saving is there
        (CACHED, TokenCache, "_write", 2, True),  # tokens are there, and nobody has said so
        (CACHED, os, "fsync", 16, False),
    ):
        number += 1
        def act():
            killed(owner, name, count, after)
            run(f"broken{number}", protocol, data)
        assert os.WTERMSIG(os.waitpid(child(act), 0)[1]) == signal.SIGKILL
        run(f"broken{number}", protocol, data)
        assert kept(here / f"broken{number}") == kept(here / f"whole-{protocol.name}"), number
        left = [path for path in (here / f"broken{number}").rglob("*") if path.name.endswith(".partial")]
        assert not left and not (here / f"broken{number}" / "training.safetensors").exists()
    print(number, "kills")
"""

AT_RANDOM = """
    from dataclasses import replace
    vitprobe.probing.training.SAVE_SECONDS = 0.05
    data, draw = squares(300, 60), random.Random(0)
    kills = 0
    for protocol in (replace(BANK, epochs=8), replace(CACHED, epochs=12)):
        run(f"whole-{protocol.name}", protocol, data)
        for chain in range(3):
            name, tries = f"broken-{protocol.name}{chain}", 0
            while True:
                number = child(lambda: run(name, protocol, data))
                tries += 1
                # most in the midst; ever later, so that it comes to an end
                time.sleep(draw.uniform(0.2, 1.0) + 0.05 * tries)
                os.kill(number, signal.SIGKILL)
                if not os.WIFSIGNALED(os.waitpid(number, 0)[1]):
                    break
                kills += 1
            run(name, protocol, data)
            assert kept(here / name) == kept(here / f"whole-{protocol.name}"), name
            assert not list((here / name).rglob("*.partial"))
            assert not {"training.safetensors", "tokens"} & {path.name for path in (here / name).iterdir()}
    print(kills, "kills")
"""


def carry_out(folder: Path, code: str, timeout: float) -> int:
    script = folder / "script.py"
    script.write_text(textwrap.dedent(HEAD) + textwrap.dedent(code))
    command = [sys.executable, "-W", "ignore::DeprecationWarning", str(script), str(folder), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=os.environ)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[0])


def test_a_process_killed_in_training_and_in_the_cache_ends_as_an_unbroken_run(tmp_path: Path) -> None:
    assert carry_out(tmp_path, AT_MOMENTS, 120) == 4


@pytest.mark.slow
def test_a_process_killed_at_random_moments_ends_as_an_unbroken_run(tmp_path: Path) -> None:
    assert carry_out(tmp_path, AT_RANDOM, 500) >= 12
