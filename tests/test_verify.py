"""`verify`: what it writes, what it selects on, and what it refuses before it writes anything."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import vitprobe.probing.training as training
from helpers import message, state_of, tiny_vit
from made_squares import BANK, CACHED, KNN, LOGISTIC, METHODS, squares, write_squares
from vitprobe import UserError, Verification, load_model, verify
from vitprobe.data.images import ListImages
from vitprobe.data.labelled import LabelledData, LabelledSet
from vitprobe.models.identity import weights_sha256
from vitprobe.probing.bank import Bank
from vitprobe.probing.cache import TokenCache
from vitprobe.probing.heldout import held_out

FIRST = [
    *("label", "aggregator", "block", "norm", "parameters"),
    *("accuracy", "ci_low", "ci_high", "gain", "gain_ci_low", "gain_ci_high"),
]
TRAINS = ("bank", "cached")


def small(model: Any = None, data: Any = None, aggregators: Any = ("cls", "gap"), **options: Any) -> Verification:
    """A verification of a second."""
    model, data = tiny_vit() if model is None else model, squares() if data is None else data
    return verify(model, data, aggregators, **{"protocol": BANK, "workers": 0} | options)


def refusal(*arguments: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        small(*arguments, **options)
    return message(caught)


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def blind() -> nn.Module:
    """A model without [cls], as I-JEPA."""
    return tiny_vit(class_token=False, global_pool="avg")


@pytest.mark.parametrize("method", METHODS)
def test_each_method_writes_a_whole_folder(tmp_path: Path, method: str) -> None:
    model, protocol, data = tiny_vit(), METHODS[method], squares()
    model.train()
    before, out = state_of(model), tmp_path / "deep" / "run"
    found = small(model, data, None, protocol=protocol, out=out)
    assert state_of(model) == before

    trains, norms = method in TRAINS, len(protocol.norms)
    names = ["cls", "gap", "abmilp", "ep"] if trains else ["cls", "gap"]
    places = ["@block1", "@block1+norm"][:norms]
    table = pd.read_csv(out / "accuracy.csv")
    assert list(table)[: len(FIRST)] == FIRST
    assert list(table["label"]) == [name + place for place in places for name in names]
    assert dict(zip(table["label"], table["parameters"], strict=True))["cls@block1"] == 0
    assert (table["accuracy"].between(table["ci_low"], table["ci_high"])).all()
    assert (table["accuracy"] > 0.5).any(), "worse than what the colours allow"
    assert list(table["gain_over"]) == [f"cls{place}" for place in places for _ in names]
    assert (table["seeds"] == (2 if trains else 1)).all() and (table["images"] == 24).all()
    pd.testing.assert_frame_equal(table, found.table(), check_dtype=False)
    pd.testing.assert_frame_equal(Verification.load(out).table(), found.table())
    assert found.images == data.test.ids and (found.labels == data.test.labels).all()

    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["status"], manifest["command"]) == ("complete", "verify") and manifest["ended"]
    assert manifest["protocol"]["name"] == protocol.name and manifest["protocol"]["hash"] == protocol.digest
    assert manifest["model"]["weights_sha256"] == weights_sha256(model)
    assert manifest["data"] == {
        **{"source": "squares", "fingerprint": data.fingerprint, "groups_sha256": None, "skipped": []},
        **{"classes": 3, "train": 60, "test": 24, "left_out": []},
    }
    assert manifest["diverged"] == {} and manifest["undefined"] == {}
    assert manifest["arguments"]["protocol"] == f"{protocol.name} ({protocol.digest})"

    probes = [f"probes/{name}@block1-seed{seed}.safetensors" for name in names for seed in range(2)] if trains else []
    assert sorted(files(out)) == sorted([*probes, "accuracy.csv", "correctness.safetensors", "manifest.json"])
    chosen = {"bank": "learning_rate", "cached": "learning_rate", "knn": "temperature", "logistic": "c"}[method]
    grid = protocol.learning_rates if trains else dict(protocol.grid)[chosen]
    assert set(table[chosen]) <= set(grid)


def test_without_out_nothing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert len(small(protocol=CACHED).results) == 2
    assert not list(tmp_path.iterdir())


def test_several_blocks_and_a_norm_in_one_pass() -> None:
    model, passes = tiny_vit(), []
    model.blocks[0].register_forward_pre_hook(lambda *_: passes.append(1))
    alone = small(model, blocks=[0], norm=True)
    one, _ = len(passes), passes.clear()
    both = small(model, blocks=[-1, 0, 1], norm=True)
    assert len(passes) == one
    names = [f"{aggregator}@block{block}+norm" for block in (0, 1) for aggregator in ("cls", "gap")]
    assert [result.name for result in both.results] == names
    for mine, others in zip(alone.results, both.results[:2], strict=True):
        assert (mine.top1 == others.top1).all() and mine.hyperparameters == others.hyperparameters
    raw, normed = small(model, protocol=KNN, blocks=[1], norm=False), small(model, protocol=KNN, norm=True)
    assert [result.name for result in raw.results + normed.results] == [
        f"{name}@block1{norm}" for norm in ("", "+norm") for name in ("cls", "gap")
    ]


def test_a_model_without_a_final_norm() -> None:
    model = tiny_vit()
    model.norm = nn.Identity()
    found = small(model, protocol=KNN)
    assert [result.name for result in found.results] == ["cls@block1", "gap@block1"]
    assert "final norm" in found.manifest["undefined"]["+norm"]
    assert "final norm" in refusal(model, protocol=KNN, norm=True)


@pytest.mark.parametrize("protocol", [BANK, KNN], ids=lambda protocol: protocol.name)
def test_a_model_without_cls(protocol: Any) -> None:
    found = small(blind(), aggregators=None, protocol=protocol)
    assert {result.name.partition("@")[0] for result in found.results} == (
        {"gap", "abmilp", "ep"} if protocol is BANK else {"gap"}
    )
    assert set(found.table()["gain_over"].str.partition("@")[0]) == {"gap"}
    assert "reads the [cls] token" in found.manifest["undefined"]["cls"]
    assert refusal(blind(), aggregators=["gap", "cls"], protocol=protocol) == (
        "cls reads the [cls] token, which VisionTransformer does not have: leave it out, or use gap"
    )


def test_a_width_that_the_queries_do_not_divide() -> None:
    model = tiny_vit(embed_dim=36)
    assert "Q=32 does not divide the width 36" in refusal(model, aggregators="ep").replace("queries", "Q")
    found = small(model, aggregators=None)
    assert [result.name for result in found.results] == ["cls@block1", "gap@block1", "abmilp@block1"]
    assert "does not divide" in found.manifest["undefined"]["ep"]


def test_options_and_attention() -> None:
    names = ["cls_attention", "abmilp(activation=tanh,depth=2)", "cls_attention_min_entropy"]
    found = small(aggregators=names)
    assert [result.name for result in found.results] == [
        *("cls_attention@block1", "abmilp(depth=2,activation=tanh)@block1", "cls_attention_min_entropy@block1"),
    ]
    assert [result.name for result in small(aggregators="gap").results] == ["gap@block1"]


def test_an_oracle() -> None:
    found = small("random_vit_nano", aggregators=["oracle:mae_vit_nano", "gap"], protocol=LOGISTIC, blocks=[0])
    assert [result.name for result in found.results] == ["oracle:mae_vit_nano@block0", "gap@block0"]
    assert not (found.results[0].top1 == found.results[1].top1).all()


@pytest.mark.parametrize("method", METHODS)
def test_the_test_images_select_nothing(tmp_path: Path, method: str) -> None:
    data, model = squares(), tiny_vit()
    wrong = LabelledSet(data.test.images, np.roll(data.test.labels, 1))
    one = small(model, data, None, protocol=METHODS[method], out=tmp_path / "one")
    other = small(model, replace(data, test=wrong), None, protocol=METHODS[method], out=tmp_path / "other")
    assert one.table()["accuracy"].mean() > other.table()["accuracy"].mean()
    for first, second in zip(one.results, other.results, strict=True):
        assert (first.name, first.hyperparameters) == (second.name, second.hyperparameters)
    for path in (tmp_path / "one" / "probes").glob("*"):
        mine, others = load_file(path), load_file(tmp_path / "other" / "probes" / path.name)
        assert mine.keys() == others.keys() and all(torch.equal(mine[name], others[name]) for name in mine)


@pytest.mark.parametrize("method", TRAINS)
def test_the_held_out_images_train_nothing_and_alone_select(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    data, protocol = squares(), replace(METHODS[method], heldout=0.25)
    held = set(np.flatnonzero(held_out(data.train.labels, 0.25, seed=3)).tolist())
    assert len(held) == 15
    trained, selected = [], []
    real_run, real_select = training.Training.run, training.heldout_accuracy

    def run(self: Any, progress: Any) -> None:
        trained.extend(self.positions)
        real_run(self, progress)

    def select(bank: Any, feed: Any, positions: Any, progress: Any) -> Any:
        selected.extend(positions)
        return real_select(bank, feed, positions, progress)

    monkeypatch.setattr(training.Training, "run", run)
    monkeypatch.setattr("vitprobe.probing.methods.heldout_accuracy", select)
    small(data=data, protocol=protocol, seed=3)
    assert set(selected) == held and set(trained) == set(range(60)) - held and len(trained) == 45


def test_the_best_rate_is_the_one_that_held_out_images_say() -> None:
    protocol = replace(BANK, learning_rates=(1e-9, 1e-2, 1e-9 / 2))
    found = small(protocol=protocol, aggregators=["gap"])
    chosen = found.results[0].hyperparameters
    assert chosen["learning_rate"] == 1e-2 and chosen["rate_at_edge"] is False
    at_edge = small(protocol=replace(BANK, learning_rates=(1e-9, 1e-2)), aggregators=["gap"]).results[0]
    assert at_edge.hyperparameters["rate_at_edge"] is True


def test_a_probe_that_diverges_is_retired_and_named() -> None:
    protocol = replace(BANK, optimizer="sgd", learning_rates=(1e-3, 1e38))
    found = small(protocol=protocol, aggregators=["cls", "gap"])
    assert [result.hyperparameters["learning_rate"] for result in found.results] == [1e-3, 1e-3]
    assert set(found.manifest["diverged"]) == {
        f"{name}@block1, sgd 1e+38, decay 0, seed {seed}" for name in ("cls", "gap") for seed in (0, 1)
    }
    assert all("not finite" in reason for reason in found.manifest["diverged"].values())
    alone = small(protocol=replace(protocol, learning_rates=(1e-3,)), aggregators=["cls", "gap"])
    for one, other in zip(found.results, alone.results, strict=True):
        assert (one.top1 == other.top1).all()
    assert refusal(protocol=replace(protocol, learning_rates=(1e38,))) == (
        "every probe diverged by step 3: lower the learning rates"
    )


def test_an_aggregator_that_diverges_wholly_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Bank.train_step

    def step(self: Bank, batches: Any, labels: Any) -> Any:
        for spec in self.specs:
            if spec.aggregator == "gap" or (spec.aggregator == "max" and spec.seed == 1):
                self.retired[spec] = "made up"
        return real(self, batches, labels)

    monkeypatch.setattr(Bank, "train_step", step)
    found = small(aggregators=["cls", "gap", "max"])
    assert [result.name for result in found.results] == ["cls@block1"]
    words = "diverged at every learning rate"
    assert found.manifest["undefined"] == {"gap@block1": words, "max@block1": words}
    assert refusal(aggregators=["max"]) == (
        "every aggregator diverged with some seed at every learning rate: lower the rates"
    )


def test_the_same_seed_gives_the_same_and_another_does_not() -> None:
    model = tiny_vit()
    torch.manual_seed(1)
    one = small(model, seed=4)
    torch.manual_seed(2)
    again, other = small(model, seed=4), small(model, seed=5)
    for first, second, third in zip(one.results, again.results, other.results, strict=True):
        assert (first.top1 == second.top1).all()
        assert not (first.top1 == third.top1).all() or not (first.top5 == third.top5).all()


def test_mirrored_digits_are_not_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = training.Training.run

    def run(self: Any, progress: Any) -> None:
        seen.append(self.feed.augmentation.flip)
        real(self, progress)

    monkeypatch.setattr(training.Training, "run", run)
    small(aggregators=["gap"])
    small(data=squares(mirrors=False), aggregators=["gap"])
    assert seen == [True, False]


def spoil(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).write_bytes(b"")


@pytest.mark.parametrize("method", METHODS)
def test_images_that_cannot_be_read_are_named(tmp_path: Path, method: str) -> None:
    folder = write_squares(tmp_path / "squares")
    labels = np.repeat(range(3), 20)  # in the order of a folder: class after class
    held = np.flatnonzero(held_out(labels, 0.1, 0))
    names = sorted(f"{path.parent.name}/{path.name}" for path in (folder / "train").rglob("*.png"))
    free = next(number for number in range(60) if number not in held)
    bad = [f"train/{names[free]}", f"train/{names[held[0]]}", "val/red/005.png"]
    spoil(folder, *bad)
    found = small(data=folder, protocol=replace(METHODS[method], epochs=3), aggregators=["gap"])
    skipped = found.manifest["data"]["skipped"]
    assert sorted(each["name"].rpartition("/")[2] for each in skipped) == sorted(Path(name).name for name in bad)
    assert {each["reason"] for each in skipped} == {"the file is empty"}
    assert found.num_images == 23 and len(found.labels) == 23


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("part", ["train", "val"])
def test_a_part_of_which_nothing_can_be_read(tmp_path: Path, method: str, part: str) -> None:
    folder = write_squares(tmp_path / "squares", 4, 2)
    for path in (folder / part).rglob("*.png"):
        path.write_bytes(b"")
    which = "training" if part == "train" else "test"
    said = refusal(data=folder, protocol=METHODS[method], out=tmp_path / "run")
    assert said.startswith(f"too few {which} images of squares could be read, the first: ")
    assert said.endswith("(the file is empty)")


def test_no_held_out_image_can_be_read(tmp_path: Path) -> None:
    folder = write_squares(tmp_path / "squares", 6, 2)
    names = sorted(path for path in (folder / "train").rglob("*.png"))
    for number in np.flatnonzero(held_out(np.repeat(range(3), 6), 0.1, 0)):
        names[number].write_bytes(b"")
    assert refusal(data=folder).startswith("no held-out image could be read, the first: ")
    assert refusal(data=folder, protocol=LOGISTIC).startswith("too few training images of squares could be read")


# Refused before anything is written or taken away ---------------------------------------------------------------------


def nan_images(data: LabelledData, position: int) -> LabelledData:
    """One image of the test set that makes tokens NaN."""
    items: list[Any] = [torch.zeros(3, 32, 32) for _ in data.test.labels]
    items[position] = torch.full((3, 32, 32), torch.nan)
    return replace(data, test=LabelledSet(ListImages(items), data.test.labels))


BAD = {
    "protocol": ({"protocol": "quick"}, "there is no protocol 'quick'; choose from fast, cached, knn, logistic"),
    "aggregator": ({"aggregators": ["cls", "abmil"]}, "no aggregator is called 'abmil'; the nearest: abmilp"),
    "twice": ({"aggregators": ["ep", "ep(queries=32)"]}, "ep(queries=32) was asked for twice"),
    "trained": ({"aggregators": ["ep"], "protocol": KNN}, "ep is trained, and knn trains no aggregators: leave it"),
    "attention": (
        {"aggregators": ["cls", "cls_attention"], "protocol": CACHED},
        "cls_attention needs attention, which the cache does not hold: use the protocol fast, knn or logistic",
    ),
    "block": ({"blocks": [0, 2]}, "VisionTransformer has blocks 0 to 1, not 2: choose one of these"),
    "seed": ({"seed": -1}, "seed is -1; it must be a whole number of at least 0"),
    "workers": ({"workers": -1}, "workers is -1; it must be a whole number of at least 0"),
    "device": ({"device": "gpu"}, "device gpu cannot be used"),
    "both": ({"resume": True, "overwrite": True}, "--resume goes on with a run, and --overwrite starts anew"),
    "k": (
        {"protocol": replace(KNN, grid=(("k", (100, 200)), ("temperature", (0.1,))))},
        "k-NN takes at least 100 training images beside the held-out ones, and there are 54",
    ),
    "few": ({"data": squares(1, 1)}, "squares has one training image a class: nothing can be held out to select on"),
    "few_knn": ({"data": squares(1, 1), "protocol": KNN}, "squares has one training image a class: nothing can be"),
    "data": ({"data": "nowhere"}, "nowhere does not exist: labelled data is a folder with train/"),
    "nan": (
        {"data": nan_images(squares(), 5), "protocol": KNN},
        "tokens of VisionTransformer at block1 are NaN or infinite for 1 of the batch's images (5): check the weights",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_costs_nothing(tmp_path: Path, name: str) -> None:
    options, words = BAD[name]
    if name != "both":
        assert words in refusal(**{"out": tmp_path / "new", **options})
        assert not (tmp_path / "new").exists()
    small(protocol=LOGISTIC, out=tmp_path / "old")
    before = files(tmp_path / "old")
    assert words in refusal(**{"out": tmp_path / "old", "overwrite": True, **options})
    assert files(tmp_path / "old") == before


def test_a_disk_that_is_too_small_for_both_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = 17 * 32 * 2
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=84 * image - 1))
    said = refusal(protocol=CACHED, out=tmp_path / "run")
    assert f"the tokens of both parts take {84 * image:,} bytes more" in said and f"{84 * image - 1:,} free" in said
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=60 * image - 1))
    assert f"the tokens of 60 images take {60 * image:,} bytes" in refusal(protocol=CACHED, out=tmp_path / "run")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=84 * image))
    assert small(protocol=CACHED, out=tmp_path / "run").num_images == 24


def test_tokens_beyond_fp16_leave_no_run(tmp_path: Path) -> None:
    model = tiny_vit()
    with torch.no_grad():
        model.blocks[1].mlp.fc2.bias[3] = 7e4
    assert "fp16 ends at 65504" in refusal(model, protocol=CACHED, out=tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_overwrite_clears_its_own_files_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "run"
    small(out=out, aggregators=["cls", "ep"])
    mine = ["mine.txt", "probes/mine.safetensors", "figures/selective_aggregation.pdf", "tokens/mine.npy"]
    left = ["training.safetensors", "tokens/train/cache.json", "probes/.ep@block1-seed0.safetensors.partial"]
    for name in (*mine, *left, ".accuracy.csv.partial"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("mine")
    said = refusal(out=out)
    assert said == (
        f"{out} holds another run; pass --overwrite to replace it, --resume to go on with it, or give another --out"
    )
    small(out=out, aggregators=["gap"], overwrite=True)
    probes = [f"probes/gap@block1-seed{seed}.safetensors" for seed in (0, 1)]
    assert sorted(files(out)) == sorted([*mine, *probes, "accuracy.csv", "correctness.safetensors", "manifest.json"])
    small(out=out, aggregators=["gap"], overwrite=True, protocol=LOGISTIC)
    assert sorted(files(out)) == sorted([*mine, "accuracy.csv", "correctness.safetensors", "manifest.json"])


def test_a_checkpoint_and_a_pair_of_tars(tmp_path: Path) -> None:
    loaded = load_model("random_vit_nano")
    torch.save(loaded.module.state_dict(), tmp_path / "w.pth")
    folder = write_squares(tmp_path / "squares")
    for part in ("train", "val"):
        shutil.make_archive(str(tmp_path / part), "tar", folder / part)
    found = verify(
        checkpoint=tmp_path / "w.pth",
        model="mae_vit_nano",
        data=(tmp_path / "train.tar", tmp_path / "val.tar"),
        protocol=LOGISTIC,
        blocks=[0],
        img_size=(32, 32),
    )
    assert found.manifest["model"]["weights_sha256"] == weights_sha256(loaded.module)
    assert found.data == "train.tar, val.tar" and found.manifest["arguments"]["data"].endswith("val.tar")
    same = verify(loaded, folder, protocol=LOGISTIC, blocks=[0])
    assert all((result.top1 == other.top1).all() for result, other in zip(found.results, same.results, strict=True))


def test_the_cache_is_filled_in_the_same_batches_and_read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    real = TokenCache.batch

    def batch(self: TokenCache, indices: Any) -> Any:
        counts.append(len(indices))
        return real(self, indices)

    monkeypatch.setattr(TokenCache, "batch", batch)
    small(protocol=CACHED)
    # an epoch of 54 images with each of two seeds, losses on the held-out slice, another epoch; then the slice to
    # select on, the test images, the training images for the anchors, and losses again
    assert counts == [*[16] * 6, 6, *[16] * 6, 6, 16, 8, 16, 16, 16, 6, 6]


def test_progress_bars_say_what_is_done(capfd: pytest.CaptureFixture) -> None:
    small(progress=True, protocol=CACHED)
    shown = capfd.readouterr().err
    for words in ("store train", "store test", "train 8 probes", "select", "test"):
        assert f"VisionTransformer: {words}" in shown
    small(progress=False)
    assert capfd.readouterr().err == ""
