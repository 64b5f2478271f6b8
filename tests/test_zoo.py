"""The recipes: resumable, seeded, honest about what they saw; and what they shipped."""

import dataclasses
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tiny_recipes import tiny
from vitprobe.frozen.device import choose_device
from vitprobe.models import loading
from vitprobe.runs.manifest import device_name
from zoo import train as training
from zoo.augment import random_resized_crop_flip
from zoo.cifar import load_tar
from zoo.evaluate import evaluate
from zoo.objectives import OBJECTIVES, build_objective
from zoo.objectives.mae import MaskedAutoencoder
from zoo.recipe import Recipe, load_recipe
from zoo.ship import ship

# lightly's head of DINO and iBOT.
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def tar(tmp_path_factory) -> Path:
    """12 pictures of 3 classes, unsorted."""
    path, rng = tmp_path_factory.mktemp("zoo") / "images.tar", np.random.default_rng(0)
    with tarfile.open(path, "w") as archive:
        for i in range(12):
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file, "png")
            info = tarfile.TarInfo(f"{['dog', 'cat', 'ant'][i % 3]}/{i:02d}.png")
            info.size = file.tell()
            archive.addfile(info, io.BytesIO(file.getvalue()))
    return path


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return torch.load(checkpoint, weights_only=True)["objective"]


def test_classes_are_in_alphabetical_order(tar):
    images, labels, classes = load_tar(tar)
    assert images.shape == (12, 3, 32, 32)
    assert images.dtype == torch.uint8
    assert classes == ["ant", "cat", "dog"]
    assert labels.bincount().tolist() == [4, 4, 4]


def test_crops_stay_inside_the_picture_and_are_seeded():
    images = torch.full((8, 3, 32, 32), 0.7)
    crops = random_resized_crop_flip(images, (0.4, 1.0), torch.Generator().manual_seed(0))
    torch.testing.assert_close(crops, images)  # nothing from outside
    noise = torch.randn(8, 3, 32, 32)
    again = [random_resized_crop_flip(noise, (0.4, 1.0), torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(again[0], again[1])
    assert not torch.equal(again[0], again[2])
    flips = random_resized_crop_flip(noise, (1.0, 1.0), torch.Generator().manual_seed(0))
    assert flips.shape == noise.shape


@pytest.mark.parametrize("method", OBJECTIVES)
def test_a_run_that_was_stopped_ends_as_an_unbroken_one(tar, tmp_path, monkeypatch, method):
    recipe = tiny(method, num_classes=3)
    whole = weights(training.train(recipe, tar, tmp_path / "whole"))
    real, saved = torch.save, []

    def stop_after_two(state, path):
        real(state, path)
        saved.append(state["epoch"])

    class Stop(Exception):
        pass

    def stopping_print(*args, **kwargs):
        if len(saved) == 2:
            raise Stop

    monkeypatch.setattr(training.torch, "save", stop_after_two)
    monkeypatch.setattr("builtins.print", stopping_print)
    with pytest.raises(Stop):
        training.train(recipe, tar, tmp_path / "broken")
    saved.clear()
    resumed = weights(training.train(recipe, tar, tmp_path / "broken"))
    assert saved == [3]
    assert whole.keys() == resumed.keys()
    for name in whole:
        assert torch.equal(whole[name], resumed[name]), name
    rows = (tmp_path / "broken" / recipe.name / "log.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["1", "2", "3"]


def test_another_seed_gives_other_weights(tar, tmp_path):
    one, two = (weights(training.train(tiny("mae", seed=s), tar, tmp_path / str(s))) for s in (0, 1))
    assert not torch.equal(one["vit.cls_token"], two["vit.cls_token"])


def test_the_masked_autoencoder_sees_a_quarter_and_is_judged_on_the_rest():
    torch.manual_seed(0)
    objective = MaskedAutoencoder(tiny("mae"))
    seen = []
    objective.vit.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    images = torch.randn(2, 3, 32, 32)
    loss = objective(images, torch.zeros(2), torch.Generator().manual_seed(0))
    assert seen == [1 + 4]  # [cls] and 4 of 16 patches
    order = torch.rand(2, 16, generator=torch.Generator().manual_seed(0)).argsort(1)
    changed = images.clone()
    visible = order[:, :4]
    for image in range(2):
        for patch in visible[image].tolist():
            row, column = divmod(patch, 4)
            changed[image, :, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] = 0

    def from_targets_of(pixels: torch.Tensor) -> torch.Tensor:
        """The loss of predictions that do not depend on the pixels: only the targets' part."""
        frozen = MaskedAutoencoder(tiny("mae"))
        frozen.load_state_dict(objective.state_dict())
        frozen.decoder_head.weight.data.zero_()
        return frozen(pixels, torch.zeros(2), torch.Generator().manual_seed(0))

    assert loss.item() > 0
    torch.testing.assert_close(from_targets_of(images), from_targets_of(changed))  # visible patches are no targets
    masked = images.clone()
    row, column = divmod(order[0, 10].item(), 4)
    masked[0, :, row * 8 : row * 8 + 8, column * 8 : column * 8 + 4] += 9
    assert not torch.isclose(from_targets_of(images), from_targets_of(masked))


def test_learning_rate_warms_up_and_falls_to_zero():
    recipe = dataclasses.replace(tiny("mae"), epochs=10, warmup_epochs=2.0, learning_rate=1.0)
    rates = [training.learning_rate(recipe, epoch) for epoch in (0, 1, 2, 6, 10)]
    assert rates == pytest.approx([0, 0.5, 1, 0.5, 0])


def test_shipping_an_unfinished_run_is_refused_and_a_finished_one_has_a_full_card(tar, tmp_path, monkeypatch):
    recipe = tiny("supervised", num_classes=3)
    checkpoint = training.train(dataclasses.replace(recipe, epochs=2), tar, tmp_path)
    with pytest.raises(SystemExit, match="has run 2 of 3 epochs"):
        ship(recipe, tmp_path, tmp_path / "bundled")
    training.train(recipe, tar, tmp_path)
    objective = build_objective(recipe)
    objective.load_state_dict(weights(checkpoint))
    monkeypatch.setattr("zoo.evaluate.KNN", 3)
    accuracy = evaluate(objective.vit, tar, tar)
    assert set(accuracy) == {"knn20_cls", "linear_cls", "knn20_average", "linear_average", "own_head"}
    assert all(0 <= value <= 1 for value in accuracy.values())
    (tmp_path / recipe.name / "accuracy.json").write_text(json.dumps(accuracy))
    ship(recipe, tmp_path, tmp_path / "bundled")
    card = json.loads((tmp_path / "bundled" / f"{recipe.name}.json").read_text())
    assert card["recipe"]["epochs"] == 3
    assert len(card["training"]["loss_by_epoch"]) == 3
    assert card["training"]["device"] == f"{device_name(choose_device(None))}, bfloat16 autocast"
    shipped = load_file(tmp_path / "bundled" / f"{recipe.name}.safetensors")
    assert {tensor.dtype for tensor in shipped.values()} == {torch.float16}
    torch.testing.assert_close(shipped["cls_token"], objective.vit.cls_token.data.half())


def test_a_vit_without_cls_is_judged_by_its_average(tar, monkeypatch):
    monkeypatch.setattr("zoo.evaluate.KNN", 3)
    assert set(evaluate(build_objective(tiny("ijepa")).vit, tar, tar)) == {"knn20_average", "linear_average"}


SHIPPED = sorted(path.stem for path in loading.BUNDLED_FOLDER.glob("*.safetensors"))


def test_the_issued_models_are_shipped_and_small_together():
    assert [
        *("mae_ft_vit_nano", "mae_vit_nano", "mae_xavier_vit_nano"),
        *("mocov3_vit_nano", "supervised_vit_nano"),
    ] == SHIPPED
    assert sum(path.stat().st_size for path in loading.BUNDLED_FOLDER.iterdir()) < 40e6


@pytest.mark.parametrize("name", SHIPPED)
def test_what_is_shipped_is_small_whole_and_of_its_recipe(name):
    path = loading.BUNDLED_FOLDER / f"{name}.safetensors"
    assert path.stat().st_size < 6e6
    state = load_file(path)
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}
    assert all(torch.isfinite(tensor).all() for tensor in state.values())
    card = json.loads(path.with_suffix(".json").read_text())
    recipe = load_recipe(name)
    made_by = Recipe(**card["recipe"])  # what a recipe has learnt to say since then is at its default
    assert json.dumps(dataclasses.asdict(made_by)) == json.dumps(dataclasses.asdict(recipe))
    losses = card["training"]["loss_by_epoch"]
    assert len(losses) == recipe.epochs
    assert losses[-1] < losses[0]
    assert card["training"]["images_seen"] == recipe.epochs * 49_920  # whole batches of 50,000 images
    assert card["licence"] == "Apache-2.0"
    assert card["tuning"].startswith("None")
    assert ("head.weight" in state) == (recipe.method == "supervised")
    if recipe.method == "supervised":
        assert card["test_accuracy"]["own_head"] > 0.6
        assert card["classes"] == sorted(card["classes"])
    if name == "mae_vit_nano":
        assert recipe.epochs >= 40
    if recipe.method == "mae":
        assert losses[-1] < 0.536  # of the 10-epoch trial
    for pooled in ("cls", "average"):
        assert card["test_accuracy"][f"knn20_{pooled}"] > 0.28  # of random weights
