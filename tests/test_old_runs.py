"""Runs that an older vitprobe wrote (`old_runs/`, of format 1) are read, and gone on with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from vitprobe import Profile, UserError, Verification, analyze
from vitprobe.runs.manifest import FORMAT_VERSION

OLD = Path(__file__).parent / "old_runs"
STATISTICS = ["cls_self_attention", "cls_entropy", "patch_self_attention_ratio"]


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The old runs, and what the first was of, in the folder where we are."""
    shutil.copytree(OLD, tmp_path, dirs_exist_ok=True)
    np.save(tmp_path / "images.npy", np.random.default_rng(0).random((70, 3, 32, 32)).astype(np.float32))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_an_old_profile_is_read(old: Path) -> None:
    assert json.loads((old / "analyze" / "manifest.json").read_text())["format_version"] == 1
    profile = Profile.load(old / "analyze")
    assert (profile.manifest["format_version"], profile.manifest["command"]) == (FORMAT_VERSION, "analyze")
    assert (profile.name, profile.num_images, profile.statistics) == ("random_vit_nano", 70, STATISTICS)
    np.testing.assert_allclose(profile.estimate("cls_self_attention").mean, 1 / 65, rtol=0.05)  # random weights
    again = Profile.load(profile.save(old / "saved"))
    assert again.manifest == profile.manifest


def test_an_old_verification_is_read(old: Path) -> None:
    before = json.loads((old / "verify" / "manifest.json").read_text())
    found = Verification.load(old / "verify")
    assert before["kind"] == "verification" and "kind" not in found.manifest
    assert (found.manifest["command"], found.data, found.protocol) == ("verify", "squares", "logistic")
    assert found.manifest["forward_dtype"]["taken"] == "float32"
    assert list(found.table()["label"]) == ["cls@block11", "gap@block11"]
    again = Verification.load(found.save(old / "saved"))
    assert again.manifest == found.manifest and again.table().equals(found.table())


def test_each_says_whose_run_it_is(old: Path) -> None:
    with pytest.raises(UserError, match=r"is a run of vitprobe verify, .* \(vitprobe\.Verification\.load reads this"):
        Profile.load(old / "verify")
    with pytest.raises(UserError, match=r"is a run of vitprobe analyze, .* \(vitprobe\.Profile\.load reads this"):
        Verification.load(old / "analyze")


def test_an_old_run_that_was_broken_off_is_gone_on_with(old: Path) -> None:
    whole = Profile.load(old / "analyze")
    expected = {name: whole.values.read(name) for name in STATISTICS}
    manifest = json.loads((old / "analyze" / "manifest.json").read_text())
    (old / "analyze" / "manifest.json").write_text(json.dumps(manifest | {"status": "running"}))
    (old / "analyze" / "statistics" / "shard-00001.safetensors").unlink()
    with pytest.raises(UserError, match=r"was begun with seed 0, not 1, so --resume cannot go on"):
        analyze("random_vit_nano", "images.npy", statistics=STATISTICS, out="analyze", resume=True, seed=1)
    resumed = analyze("random_vit_nano", "images.npy", statistics=STATISTICS, out="analyze", resume=True)
    assert resumed.num_images == 70 and resumed.manifest["resumed"]
    for name, values in expected.items():
        np.testing.assert_allclose(resumed.values.read(name), values, rtol=1e-4, atol=1e-6)
