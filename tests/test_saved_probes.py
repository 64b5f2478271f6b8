"""Saved probes: what `load_probe` gives is what `verify` trained, on the weights it was trained on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from helpers import message, randomize, state_of, tiny_vit
from made_squares import BANK, squares, write_squares
from vitprobe import UserError, Verification, load_model, load_probe, verify
from vitprobe.data.sources import open_images
from vitprobe.probing import Protocol
from vitprobe.probing.saved import LoadedProbe

ONE = Protocol(name="one", words="of a test", method="bank", batch_size=16, learning_rates=(1e-2,))
FEW = squares(8, 4)
NAMES = ("cls", "ep", "cls_attention", "abmilp_all(depth=2,activation=tanh)")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_squares(tmp_path_factory.mktemp("pictures") / "squares")


@pytest.fixture(scope="module")
def verified(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> tuple[Any, Path, Verification]:
    out, model = tmp_path_factory.mktemp("probes") / "run", tiny_vit()
    found = verify(model, pictures, NAMES, protocol=BANK, blocks=[0, 1], norm=True, out=out, workers=0)
    return model, out / "probes", found


def refusal(*arguments: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        load_probe(*arguments, **options)
    return message(caught)


def test_a_probe_is_as_right_as_it_was_in_verify(verified: Any, pictures: Path) -> None:
    model, folder, found = verified
    test = open_images(pictures / "val")
    assert [Path(name).name for name in test.names] == [Path(name).name for name in found.images]
    before = state_of(model)
    for result in found.results:
        for seed in (0, 1):
            probe = load_probe(folder / f"{result.name}-seed{seed}.safetensors", model)
            assert probe.spec.name == result.name and probe.spec.seed == seed and probe.classes[2] == "red"
            scores = probe.classify(test, batch_size=16)
            assert scores.shape == (24, 3) and not scores.requires_grad
            right = scores.argmax(dim=1).numpy() == found.labels
            np.testing.assert_array_equal(right, result.top1[seed])
            vectors = probe.embed(pictures / "val", batch_size=7)
            assert vectors.shape == (24, probe.probe.aggregator.out_dim)
            torch.testing.assert_close(probe.probe.head(vectors), scores, rtol=1e-4, atol=1e-4)
    assert state_of(model) == before


def test_everything_that_holds_images(verified: Any, pictures: Path) -> None:
    model, folder, _ = verified
    probe = load_probe(str(folder / "ep@block1+norm-seed1.safetensors"), load_model(model))
    assert repr(probe) == "LoadedProbe('ep@block1+norm' of 'VisionTransformer', 3 classes)"
    assert probe.about["protocol"]["hash"] == BANK.digest and probe.about["data"]["source"] == "squares"
    files = sorted((pictures / "val").rglob("*.png"))[:5]
    expected = probe.embed(files)
    read = [open_images(files).read(number) for number in range(5)]
    stack = torch.stack([probe.model.transform(picture) for picture in read])
    for same in (read, stack, list(stack), DataLoader(stack, batch_size=2)):
        torch.testing.assert_close(probe.embed(same, batch_size=2), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(probe.embed(files[0]), expected[:1], rtol=1e-4, atol=1e-5)


def test_images_that_cannot_be_embedded(verified: Any, pictures: Path, tmp_path: Path) -> None:
    model, folder, _ = verified
    probe = load_probe(folder / "cls@block0+norm-seed0.safetensors", model)
    (tmp_path / "bad.png").write_bytes(b"")
    shutil.copy(next((pictures / "val").rglob("*.png")), tmp_path / "good.png")
    stream = tmp_path / "shards"
    stream.mkdir()
    shutil.make_archive(str(stream / "000"), "tar", pictures / "val")
    for images, words in (
        (tmp_path, "bad.png cannot be read (the file is empty): leave it out"),
        (tmp_path / "nowhere", "does not exist"),
        ([], "the list of images is empty"),
        (torch.zeros(1, 3, 40, 40), "cannot take images of 40x40 pixels"),
        (f"wds:{stream}/000.tar", "is a stream: give a folder, a tar, a list, a tensor or a DataLoader"),
    ):
        with pytest.raises(UserError) as caught:
            probe.embed(images)
        assert words in message(caught)


def test_a_model_given_in_python_has_to_be_given_again(verified: Any, tmp_path: Path) -> None:
    model, folder, _ = verified
    path = folder / "cls@block1+norm-seed0.safetensors"
    assert refusal(path) == (
        f"{path} was trained on a model given in Python: give the same with load_probe(path, model)"
    )
    named = verify(load_model("random_vit_nano"), FEW, ["cls"], protocol=ONE, blocks=[0], out=tmp_path / "run")
    assert len(named.results) == 1
    path = tmp_path / "run" / "probes" / "cls@block0-seed0.safetensors"
    assert "given in Python" in refusal(path)
    assert load_probe(path, "random_vit_nano").embed(torch.zeros(1, 3, 32, 32)).shape == (1, 128)
    assert load_probe(path, load_model("random_vit_nano")).spec.name == "cls@block0"
    assert "this one is built already" in refusal(
        folder / "cls@block1+norm-seed0.safetensors", model, checkpoint="w.pth"
    )


def test_other_weights_are_refused(verified: Any) -> None:
    _, folder, found = verified
    sha = found.manifest["model"]["weights_sha256"]
    path = folder / "ep@block1+norm-seed0.safetensors"
    assert refusal(path, randomize(tiny_vit(), 1)) == (
        f"{path} was trained on other weights of VisionTransformer than those of VisionTransformer: give the ones of "
        f"SHA-256 {sha[:12]}… with load_probe(path, model)"
    )
    assert "than those of random_vit_nano" in refusal(path, "random_vit_nano")
    with torch.no_grad():
        changed = tiny_vit()
        changed.head.bias[0] += 1e-6
    assert "other weights" in refusal(path, changed)
    assert load_probe(path, tiny_vit()).spec.seed == 0


def embedded(probe: LoadedProbe) -> torch.Tensor:
    return probe.embed(squares(1, 2).test.images)


def test_a_model_by_name_or_from_a_checkpoint_that_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(load_model("random_vit_nano").module.state_dict(), "w.pth")
    options: Any = {"protocol": ONE, "blocks": [0], "data": FEW, "aggregators": ["cls"]}
    verify("random_vit_nano", out="named", **options)
    verify("random_vit_nano", checkpoint="w.pth", out="both", **options)
    verify("w.pth", arch="mae_vit_nano", out="file", **options)
    named, both, file = (Path(name) / "probes" / "cls@block0-seed0.safetensors" for name in ("named", "both", "file"))
    expected = embedded(load_probe(named))
    for path in (both, file):
        torch.testing.assert_close(embedded(load_probe(path)), expected)
    (tmp_path / "elsewhere").mkdir()
    Path("w.pth").rename("elsewhere/w.pth")
    for path in (both, file):
        assert "w.pth" in refusal(path)
        torch.testing.assert_close(embedded(load_probe(path, checkpoint="elsewhere/w.pth")), expected)
        torch.testing.assert_close(embedded(load_probe(path, load_model("random_vit_nano"))), expected)
    torch.testing.assert_close(embedded(load_probe(file, "elsewhere/w.pth")), expected)
    torch.save(load_model("mae_vit_nano").module.state_dict(), "w.pth")
    assert "was trained on other weights" in refusal(both)


def test_another_image_size_is_kept(tmp_path: Path) -> None:
    for size in (16, (16, 24)):
        out = tmp_path / str(size)
        verify("random_vit_nano", FEW, ["cls"], protocol=ONE, blocks=[0], img_size=size, out=out)
        probe = load_probe(out / "probes" / "cls@block0-seed0.safetensors")
        assert probe.model.transform.size == ((16, 16) if size == 16 else (16, 24))
        assert embedded(probe).shape == (6, 128)


def test_an_oracle_comes_with_its_probe(tmp_path: Path) -> None:
    found = verify(
        "random_vit_nano", FEW, ["oracle:mae_vit_nano"], protocol=ONE, blocks=[0], out=tmp_path, dtype="bfloat16"
    )
    (path,) = (tmp_path / "probes").iterdir()
    assert path.name == "oracle_mae_vit_nano@block0-seed0.safetensors"
    probe = load_probe(path)
    assert probe.dtype == "bfloat16"
    right = probe.classify(FEW.test.images).argmax(dim=1).numpy() == found.labels
    np.testing.assert_array_equal(right, found.results[0].top1[0])


def test_files_that_are_no_probe(verified: Any, tmp_path: Path) -> None:
    model, folder, _ = verified
    whole, path = folder / "ep@block1+norm-seed0.safetensors", tmp_path / "probe.safetensors"
    hint = "give a file from the folder probes/ of a run of verify"
    assert refusal(path) == f"{path} is no probe of vitprobe (there is no such file): {hint}"
    for content in (b"", b"text", whole.read_bytes()[:-1], whole.read_bytes()[:100]):
        path.write_bytes(content)
        assert refusal(path, model).startswith(f"{path} is no probe of vitprobe (") and hint in refusal(path, model)
    save_file({"a": torch.zeros(1)}, path)
    assert refusal(path, model) == f"{path} is no probe of vitprobe (KeyError): {hint}"
    assert "is no probe of vitprobe" in refusal(tmp_path, model)
    with safe_open(whole, framework="pt") as file:
        metadata = dict(file.metadata())
    tensors = load_file(whole)
    words = json.loads(metadata["vitprobe_probe"])
    save_file(tensors, path, metadata={"vitprobe_probe": json.dumps({**words, "version": 2})})
    assert refusal(path, model) == f"{path} is a probe of format 2, this vitprobe reads 1: upgrade"
    save_file({name: tensor for name, tensor in tensors.items() if name != "head.bias"}, path, metadata=metadata)
    assert refusal(path, model) == f"{path} lacks weights of its own probe, or has others (RuntimeError)"
    save_file(tensors, path, metadata=metadata)
    assert load_probe(path, model).spec.aggregator == "ep"


def test_a_probe_of_an_older_vitprobe_is_read_or_said_to_be_older(tmp_path: Path) -> None:
    """Older files do not say which vitprobe wrote them, and hold poolings of other shapes, as AIM's query of `(D,)`."""
    model = tiny_vit()
    verify(model, squares(), ["gap", "aim(heads=4)", "capi(heads=4)"], protocol=ONE, out=tmp_path)
    capi = load_probe(next((tmp_path / "probes").glob("capi*")), model)
    assert not capi.probe.norm.state_dict() and embedded(capi).isfinite().all()
    gap, aim = (next((tmp_path / "probes").glob(f"{name}*")) for name in ("gap", "aim"))
    for path in (gap, aim):
        with safe_open(path, framework="pt") as file:
            words = json.loads(file.metadata()["vitprobe_probe"])
        tensors = load_file(path)
        if path == aim:
            tensors["aggregator.query"] = tensors["aggregator.query"].flatten()
        del words["vitprobe"]
        save_file(tensors, path, metadata={"vitprobe_probe": json.dumps(words)})
    assert embedded(load_probe(gap, model)).shape[0] == 6
    said = refusal(aim, model)
    assert said.startswith(f"{aim} lacks weights of its own probe, or has others (")
    assert said.endswith("an older vitprobe wrote it: train it again with vitprobe verify")
    verify(model, squares(), ["gap", "aim(heads=4)"], protocol=ONE, out=tmp_path, overwrite=True)
    assert embedded(load_probe(aim, model)).shape[0] == 6


def test_nothing_of_a_probe_says_where_or_how_it_was_made(verified: Any) -> None:
    _, folder, _ = verified
    for path in folder.iterdir():
        with safe_open(path, framework="pt") as file:
            words = json.loads(file.metadata()["vitprobe_probe"])
        assert set(words["arguments"]) == {"model", "checkpoint", "arch", "weights_key", "img_size", "mean", "std"}
