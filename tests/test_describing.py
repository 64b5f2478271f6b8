"""`load_model(name=, paradigm=, normalization=)`: what a user says of a model, and what is refused in one line."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import images, message, stated_vit, tiny_vit
from vitprobe.cli.runs import Loading
from vitprobe.data.transforms import ImageTransform
from vitprobe.errors import UserError
from vitprobe.models.building import build
from vitprobe.models.entries import NORMALISATIONS
from vitprobe.models.loaded import with_transform
from vitprobe.models.loading import load_model, require_loadable
from vitprobe.models.registry import find_spec
from vitprobe.profile.analysis import analyze

NANO = "vit_nano_patch4_32"


def values(transform: ImageTransform) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return transform.mean, transform.std


def refusal(model: object = None, attempt: Any = load_model, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        inspect.unwrap(attempt)(tiny_vit() if model is None else model, **options)
    return message(caught)


# Name and paradigm ----------------------------------------------------------------------------------------------------


def test_a_module_gets_its_name_and_its_place() -> None:
    module = tiny_vit()
    assert load_model(module).spec.paradigm == "unknown"
    spec = load_model(module, name="ours, epoch 300", paradigm="jea").spec
    assert (spec.name, spec.paradigm, spec.source) == ("ours, epoch 300", "JEA", "module")
    profile = analyze(load_model(module, name="ours", paradigm="other"), images(2), statistics=["cls_entropy"])
    assert (profile.name, profile.paradigm) == ("ours", "other")


def test_a_file_gets_its_name_and_keeps_it_inside_another_module(tmp_path: Path) -> None:
    torch.save(build(NANO, num_classes=0).state_dict(), tmp_path / "checkpoint.pth")
    model = load_model(tmp_path / "checkpoint.pth", arch=NANO, name="ours", paradigm="MIM")
    assert (model.spec.name, model.spec.paradigm, model.spec.source) == ("ours", "MIM", "file:checkpoint.pth")
    again = load_model(torch.nn.Sequential(model.module)).spec
    assert (again.name, again.paradigm) == ("ours", "MIM")
    assert load_model(model, name="theirs").spec.name == "theirs"


def test_nothing_said_changes_nothing() -> None:
    model = load_model("mae_vit_nano", paradigm="MIM")
    assert model.spec is find_spec("mae_vit_nano")
    assert load_model(model, name="mae_vit_nano") is model


@pytest.mark.parametrize("name", ["", "  ", "two\nlines", 3])
def test_what_is_no_name(name: object) -> None:
    text = f"the name of a model is {name!r}: give a word or a few, in one line"
    assert refusal(name=name) == text
    assert refusal("mae_vit_nano", require_loadable, name=name) == text


def test_what_is_no_paradigm() -> None:
    text = "unknown paradigm 'SSL': use one of MIM, JEA, hybrid, supervised, VLM, other, random, unknown"
    assert refusal(paradigm="SSL") == text
    assert refusal("mae_vit_nano", require_loadable, paradigm="SSL") == text


# Normalization --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["imagenet", "Inception", "clip", "satellite", "cifar10"])
def test_a_normalization_by_its_name(word: str) -> None:
    model = load_model(tiny_vit(), normalization=word)
    assert values(model.transform) == NORMALISATIONS[word.casefold()]
    assert model.spec.normalisation == word.casefold()


@pytest.mark.parametrize(
    ("given", "expected", "name"),
    [
        ("none", ((0.0,) * 3, (1.0,) * 3), "none"),
        ((0.5, 0.25), ((0.5,) * 3, (0.25,) * 3), "other"),
        (((0.1, 0.2, 0.3), 1), ((0.1, 0.2, 0.3), (1.0,) * 3), "other"),
        ([(0.5, 0.5, 0.5), (0.5, 0.5, 0.5)], ((0.5,) * 3, (0.5,) * 3), "inception"),
    ],
)
def test_a_normalization_by_its_values(given: Any, expected: Any, name: str) -> None:
    model = load_model(tiny_vit(), normalization=given)
    assert values(model.transform) == expected
    assert model.spec.normalisation == name


def test_what_is_said_is_not_called_assumed() -> None:
    """And the module itself is left as it was."""
    module = tiny_vit()
    assert "does not say the mean and standard deviation" in load_model(module).remarks[0].replace(",", " and", 1)
    remark = load_model(module, normalization="clip").remarks[0]
    assert "mean" not in remark.partition("; if that is wrong")[0] and "crop" in remark
    assert values(load_model(module).transform) == NORMALISATIONS["imagenet"]
    assert not hasattr(module, "pretrained_cfg")


def test_it_stays_with_another_transform_and_size_and_gives_way_to_the_users_numbers() -> None:
    model = load_model(tiny_vit(dynamic_img_size=True), normalization="clip")
    assert values(with_transform(model, "model", 32).transform) == NORMALISATIONS["clip"]
    assert values(load_model(model, img_size=64).transform) == NORMALISATIONS["clip"]
    assert values(with_transform(model, "paper", 32).transform) == NORMALISATIONS["imagenet"]
    assert with_transform(model, "model", 32, [0.4], [0.3]).transform.mean == (0.4,) * 3
    assert with_transform(load_model("mae_vit_nano"), "model", 32).transform.mean == NORMALISATIONS["cifar10"][0]


def test_it_takes_the_place_of_what_the_model_states() -> None:
    assert values(load_model(stated_vit(), normalization="none").transform) == ((0.0,) * 3, (1.0,) * 3)


def test_a_run_is_made_with_it() -> None:
    model = load_model(tiny_vit(), normalization="inception")
    profile = analyze(model, statistics=["cls_entropy"], num_images=2, device="cpu")
    assert profile.manifest["transform"]["mean"] == [0.5] * 3


def test_images_of_another_number_of_channels() -> None:
    grey = tiny_vit(in_chans=1)
    assert values(load_model(grey, normalization=(0.5, 0.2)).transform) == ((0.5,), (0.2,))
    assert load_model(grey, normalization="none").transform.mean == (0.0,)
    assert refusal(grey, normalization=((0.1, 0.2, 0.3), 1)) == (
        "normalization has 3 values, and VisionTransformer takes 1 channel: give one value for each, or one for all"
    )


class Itself(torch.nn.Module):
    """Normalizes its images itself."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("pixel_mean", torch.full((1, 3, 1, 1), 0.5))
        self.register_buffer("pixel_std", torch.full((1, 3, 1, 1), 0.5))
        self.inner = tiny_vit()

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.inner((pixels - self.pixel_mean) / self.pixel_std)


def test_a_model_that_normalizes_its_images_itself() -> None:
    model = load_model(Itself().eval(), normalization="none")
    assert values(model.transform) == ((0.0,) * 3, (1.0,) * 3)
    assert refusal(Itself().eval(), normalization="imagenet").endswith(
        "normalizes its images itself (Itself): leave normalization out"
    )


KNOWN = "imagenet, inception, clip, satellite, cifar10, none"


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("imgnet", f"unknown normalization 'imgnet': use one of {KNOWN}, or a pair (mean, std)"),
        (0.5, f"normalization is 0.5: give one of {KNOWN}, or a pair (mean, std)"),
        ((1, 2, 3), f"normalization is (1, 2, 3): give one of {KNOWN}, or a pair (mean, std)"),
        ((0.5, 0), "std is 0: give a number above 0, or one for each channel"),
        (("a", 1), "mean is 'a': give a number, or one for each channel"),
        (((0.1, 0.2), (0.3, 0.3, 0.3)), "give as many values for the mean as for the std"),
        ((123.7, 58.4), "and it is of pixels from 0 to 1: divide it by 255, or give mean and std of the values in"),
    ],
)
def test_what_is_no_normalization(given: Any, text: str) -> None:
    assert text in refusal(normalization=given)
    assert text in refusal("mae_vit_nano", require_loadable, normalization=given)


# On the command line --------------------------------------------------------------------------------------------------


def test_the_options_reach_load_model() -> None:
    loading = Loading(("mae_vit_nano",), None, None, None, name="ours", paradigm="mim")
    names, given = loading.wanted, loading.arguments
    assert given == {"checkpoint": None, "arch": None, "weights_key": None, "name": "ours", "paradigm": "MIM"}
    require_loadable(names[0], **given)
    assert load_model(names[0], **given).spec.name == "ours"
    assert set(Loading(("mae_vit_nano",), None, None, None).arguments) == {"checkpoint", "arch", "weights_key"}


def test_the_options_are_for_one_model() -> None:
    for models, said in ((("a", "b"), {"name": "ours"}), ((), {"paradigm": "MIM"})):
        with pytest.raises(UserError) as caught:
            Loading(models, None, None, None, **said)
        shown = "a, b" if models else "mae_vit_nano, supervised_vit_nano"
        assert message(caught) == (
            f"--{next(iter(said))} is for one model, and here are 2 ({shown}); run the command once for each"
        )


@pytest.mark.parametrize("command", ["analyze", "verify"])
def test_the_commands_know_the_options(command: str) -> None:
    from click.testing import CliRunner

    from vitprobe.cli import main

    output = CliRunner().invoke(main, [command, "--help"]).output
    assert "--name NAME " in output and "--paradigm P " in output
    result = CliRunner().invoke(main, [command, "--paradigm", "SSL"])
    assert result.exit_code == 2 and "unknown paradigm 'SSL': use one of MIM, JEA" in result.output
    result = CliRunner().invoke(main, [command, "--name", "ours"])
    assert result.exit_code == 2 and "--name is for one model, and here are 2" in result.output
