"""Copies of a model that hold no blocks, and models compiled in whole or in part."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from helpers import assert_all_close, captured, images, message, randomize, state_of, tiny_vit
from test_capture_by_hand import hand_made
from vitprobe.errors import UserError
from vitprobe.hooks.capture import capture
from vitprobe.models.loading import load_model
from vitprobe.probing.tap import Tap
from vitprobe.probing.tokens import FrozenModel


class Classifier(nn.Module):
    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.backbone(x)


def traced(model: nn.Module) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(model, images())


def scripted(model: nn.Module) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(nn.Sequential(nn.Linear(2, 2)))


def exported(model: nn.Module) -> Any:
    return torch.export.export(model, (images(),))


def features(model: nn.Module) -> Any:
    from torchvision.models.feature_extraction import create_feature_extractor

    return create_feature_extractor(model, ["norm"])


def symbolic(model: nn.Module) -> Any:
    return torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2)))


COPIES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "traced": (traced, "torch.jit (trace or script)"),
    "scripted": (scripted, "torch.jit (trace or script)"),
    "exported program": (exported, "torch.export"),
    "exported module": (lambda model: exported(model).module(), "torch.export"),
    "unflattened": (lambda model: torch.export.unflatten(exported(model)), "torch.export"),
    "torchvision's feature extractor": (features, "torch.fx or torch.export"),
    "symbolic trace": (symbolic, "torch.fx or torch.export"),
    "traced in a model of one's own": (lambda model: Classifier(traced(model)), "torch.jit (trace or script)"),
}


@pytest.mark.slow  # torch.export and torch.fx take half a minute to import
@pytest.mark.parametrize("name", COPIES)
def test_a_copy_says_what_it_is_and_what_to_give_instead(name: str) -> None:
    make, maker = COPIES[name]
    model = tiny_vit()
    copy = make(model)
    kind = type(copy.backbone if isinstance(copy, Classifier) else copy).__name__
    # An exported program is no module: tests check the types that load_model takes.
    for act in (capture, load_model) if isinstance(copy, nn.Module) else (capture,):
        with pytest.raises(UserError) as error:
            act(copy)
        assert message(error) == (
            f"{kind} is a copy of a model made by {maker}: it runs recorded operations, not the model's blocks, so "
            f"their attention cannot be seen; give the nn.Module that the copy was made from"
        )
    assert len(captured(load_model(model))) == 2  # type: ignore[arg-type]


def by_list(model: Any, **how: Any) -> None:
    for index, block in enumerate(model.blocks):
        model.blocks[index] = torch.compile(block, **how)


def in_place(model: Any, **how: Any) -> None:
    for block in model.blocks:
        block.compile(**how)


def one_of_two(model: Any, **how: Any) -> None:
    model.blocks[0] = torch.compile(model.blocks[0], **how)


def attention_alone(model: Any, **how: Any) -> None:
    for block in model.blocks:
        block.attn = torch.compile(block.attn, **how)


def whole(model: Any, **how: Any) -> None:
    model.compile(**how)


@pytest.mark.slow  # the compiler alone takes half a minute to import
@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("how", [by_list, in_place, one_of_two, attention_alone, whole])
@pytest.mark.parametrize("make", [lambda: tiny_vit(init_values=0.3), hand_made])
def test_compiled_blocks_have_the_statistics_of_plain_ones(make: Any, how: Any, ran: bool) -> None:
    model = make()
    expected, tokens = captured(model).statistics(), read(model)
    how(model, backend="eager")
    if ran:  # code compiled before the capture knows nothing of its hooks
        with torch.no_grad():
            model(images())
    before = state_of(model)
    assert_all_close(captured(model).statistics(), expected, tolerance=1e-6)
    numbers = captured(model, keep="statistics").statistics()
    assert_all_close(numbers, expected, tolerance=1e-5)
    torch.testing.assert_close(read(model), tokens)
    assert state_of(model) == before
    if ran:
        with torch.no_grad():  # it runs compiled again
            torch.testing.assert_close(model(images()), make()(images()))


def read(model: nn.Module) -> torch.Tensor:
    with FrozenModel(load_model(model), [Tap(1)], device="cpu") as frozen:
        return frozen(images())[Tap(1)].tokens


@pytest.mark.slow
def test_wrappers_compiled_and_wrappers_of_compiled_models() -> None:
    plain = tiny_vit()
    expected = captured(plain).statistics()
    inner = Classifier(torch.compile(tiny_vit(), backend="eager"))
    outer = torch.compile(Classifier(tiny_vit()), backend="eager")
    for model in (inner, outer, torch.compile(inner, backend="eager")):
        with torch.no_grad():
            model(images())
            with capture(model) as attention:
                model(images())
        assert_all_close(attention.statistics(), expected, tolerance=1e-6)
        assert load_model(model).spec.name == "VisionTransformer"


@pytest.mark.slow
def test_inductor() -> None:
    """The compiler that makes machine code, where there is one for it."""
    plain = tiny_vit()
    expected = captured(plain).statistics()
    model = torch.compile(tiny_vit(), backend="inductor")
    try:
        with torch.no_grad():
            output = model(images())
    except Exception as error:
        pytest.skip(f"no compiler here: {type(error).__name__}")
    with torch.no_grad(), capture(model) as attention:
        model(images())
    assert_all_close(attention.statistics(), expected, tolerance=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model(images()), output)


def test_checkpointed_blocks_have_the_statistics_of_plain_ones() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = tiny_vit()
    expected = captured(model).statistics()
    for index, block in enumerate(model.blocks):
        model.blocks[index] = checkpoint_wrapper(block)
    assert_all_close(captured(model).statistics(), expected, tolerance=1e-6)
    assert_all_close(captured(nn.Sequential(randomize(model))).statistics(), captured(model).statistics())
