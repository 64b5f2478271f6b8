"""Which blocks of a model are taken: those that the patch embedding feeds, wherever they stand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import assert_all_close, captured, images, message, randomize, state_of, tiny_vit
from test_capture_by_hand import Attention, Block, hand_made
from vitprobe.errors import AttentionNotSeenError, UserError
from vitprobe.hooks.capture import capture
from vitprobe.layout import TokenLayout
from vitprobe.models.loading import load_model
from vitprobe.probing.tap import Tap
from vitprobe.probing.tokens import FrozenModel


def layers(count: int, width: int = 32, heads: int = 4) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(width, heads, 64, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, count, enable_nested_tensor=False)


class Segmenter(nn.Module):
    """An encoder, and a decoder of more blocks, with other heads and a strided convolution of its own."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.backbone = encoder
        self.decoder = nn.Sequential(layers(5))
        self.reduce = nn.Conv2d(32, 32, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.backbone.forward_features(x)[:, 1:]
        return self.reduce(self.decoder(tokens).transpose(1, 2).unflatten(2, (4, 4)))


class Stages(nn.Module):
    """Two lists beside one patch embedding, under names that say nothing."""

    def __init__(self, first: int = 2, second: int = 4) -> None:
        super().__init__()
        self.later, self.sooner = layers(second), layers(first)
        self.patch_embed = nn.Conv2d(3, 32, 8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.later(self.sooner(self.patch_embed(x).flatten(2).transpose(1, 2)))


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 32, 8, 8)
        self.encoder = nn.ModuleList(Block(32, 2) for _ in range(2))
        self.decoder = nn.Module()
        self.decoder.layers = nn.ModuleList(Block(32, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        for block in (*self.encoder, *self.decoder.layers):
            x = block(x)
        return x


class Adapted(nn.Module):
    """Adapters in a list of their own, as many as blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 32, 8, 8)
        self.adapters = nn.ModuleList(nn.Sequential(nn.Linear(32, 4), nn.Linear(4, 32)) for _ in range(3))
        self.trunk_of_it = nn.ModuleList(Block(32, 2) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        for block, adapter in zip(self.trunk_of_it, self.adapters, strict=False):
            x = adapter(block(x))
        return x


class InStages(nn.Module):
    """An isotropic model whose blocks stand in stages."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 32, 8, 8)
        self.layers = nn.ModuleList(Stage(count) for count in (1, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        for stage in self.layers:
            x = stage(x)
        return x


class Stage(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*[Block(32, 2) for _ in range(count)])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


ENCODERS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "timm's in a segmenter": (lambda: Segmenter(tiny_vit()), lambda m: m.backbone.blocks),
    "under names": (Named, lambda m: m.encoder),
    "found by running": (Stages, lambda m: m.sooner.layers),
    "beside adapters": (Adapted, lambda m: m.trunk_of_it),
    "in stages": (InStages, lambda m: [*m.layers[0].blocks, *m.layers[1].blocks]),
    "in a wrapper in a wrapper": (lambda: nn.Sequential(nn.Sequential(hand_made())), lambda m: m[0][0].blocks),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_the_blocks_that_the_patch_embedding_feeds(name: str) -> None:
    make, wanted = ENCODERS[name]
    model = randomize(make()).eval()
    before = state_of(model)
    loaded = load_model(model)
    assert loaded.anatomy.blocks == tuple(wanted(model))
    assert state_of(model) == before
    assert loaded.module is model
    said = [line for line in loaded.remarks if "several lists" in line]
    assert len(said) == (name == "found by running")
    given = load_model(model, blocks=list(wanted(model)))
    assert given.layout == loaded.layout
    assert_all_close(captured(given.module, blocks=list(wanted(model))).statistics(), captured(model).statistics())


def test_the_remark_of_blocks_found_by_running_can_be_followed() -> None:
    model = randomize(Stages()).eval()
    (line,) = [line for line in load_model(model).remarks if "several lists" in line]
    assert line == (
        "Stages has several lists of transformer blocks; model.sooner.layers is taken, which its forward pass feeds "
        "with the images, not model.later.layers (which load_model(model, blocks=list(model.later.layers)) takes)"
    )
    chosen = load_model(model, blocks=list(model.later.layers))
    assert chosen.anatomy.blocks == tuple(model.later.layers) and len(captured(chosen)) == 4  # type: ignore[arg-type]


class SelfDistilled(nn.Module):
    """A student, and a teacher that is its moving average."""

    def __init__(self, runs: tuple[str, ...] = ("student",), **options: Any) -> None:
        super().__init__()
        self.student = nn.Sequential(tiny_vit(**options), nn.Identity())
        self.teacher = copy.deepcopy(self.student)
        randomize(self.teacher, seed=1)
        self.runs = runs

    def forward(self, x: Tensor) -> list[Tensor]:
        return [getattr(self, name)(x) for name in self.runs]


@pytest.mark.parametrize("name", ["student", "teacher"])
def test_of_student_and_teacher_the_one_that_runs(name: str) -> None:
    model = SelfDistilled((name,)).eval()
    inner = getattr(model, name)[0]
    loaded = load_model(model)
    assert loaded.anatomy.blocks == tuple(inner.blocks)
    assert_all_close(captured(model).statistics(), captured(inner).statistics())
    assert f"model.{name}[0].blocks is taken" in loaded.remarks[0]


def ambiguity(model: nn.Module) -> str:
    with pytest.raises(UserError) as error:
        load_model(model)
    return message(error)


def test_student_and_teacher_that_both_run_are_named() -> None:
    model = SelfDistilled(("student", "teacher")).eval()
    assert ambiguity(model) == (
        "SelfDistilled has several lists of transformer blocks that may be meant (and how many): "
        "model.student[0].blocks (2), model.teacher[0].blocks (2); choose one, such as the first with "
        "load_model(model.student[0]) or load_model(model, blocks=list(model.student[0].blocks))"
    )
    for name in ("student", "teacher"):
        inner = getattr(model, name)[0]
        expected = captured(inner).statistics()
        assert_all_close(captured(load_model(inner)).statistics(), expected)  # type: ignore[arg-type]
        by_blocks = load_model(model, blocks=list(inner.blocks))
        assert by_blocks.module is model and by_blocks.layout == load_model(inner).layout
        assert_all_close(captured(by_blocks).statistics(), expected)  # type: ignore[arg-type]


def test_a_model_without_a_forward_pass_of_its_own_is_never_run() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.online, self.target = tiny_vit(), tiny_vit()

    model = Pair()
    said = ambiguity(model)
    assert "model.online.blocks (2), model.target.blocks (2)" in said
    assert "load_model(model.online) or load_model(model, blocks=list(model.online.blocks))" in said
    for loaded in (load_model(model.target), load_model(model, blocks=list(model.target.blocks))):
        assert loaded.module is model.target and len(captured(loaded)) == 2  # type: ignore[arg-type]


def test_a_forward_pass_that_fails_says_nothing() -> None:
    class Broken(SelfDistilled):
        def forward(self, x: Tensor) -> list[Tensor]:
            raise ValueError("not like this")

    said = ambiguity(Broken().eval())
    assert said.endswith("such as the first with load_model(model.student[0])")


def test_two_backbones_of_other_sizes_are_named() -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.deep = tiny_vit(), tiny_vit(depth=4)

        def forward(self, x: Tensor) -> Tensor:
            return self.wide(x) + self.deep(x)

    assert "model.wide.blocks (2), model.deep.blocks (4)" in ambiguity(Fused().eval())


def test_a_tower_of_texts_is_never_taken() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.text_encoder, self.image_encoder = layers(6, 16), hand_made()

        def forward(self, pixels: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
            return self.image_encoder(pixels), self.text_encoder(words)

    model = Pair().eval()
    loaded = load_model(model)
    # It cannot be run on images alone: the tower is.
    assert loaded.module is model.image_encoder
    with torch.no_grad(), capture(model) as attention:
        model(images(), torch.randn(2, 3, 16))
    assert_all_close(attention.statistics(), captured(model.image_encoder).statistics())


def test_a_model_that_takes_texts_first_is_run_at_its_tower() -> None:
    class Captioner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vision = hand_made()

        def forward(self, input_ids: Tensor, pixels: Tensor | None = None) -> Tensor:
            return self.vision(pixels)

    model = Captioner().eval()
    assert load_model(model).module is model.vision
    with torch.no_grad(), capture(model) as attention:
        model(torch.zeros(2, 3), images())
    assert_all_close(attention.statistics(), captured(model.vision).statistics())


def test_blocks_that_do_not_run_name_those_that_do() -> None:
    model = SelfDistilled().eval()
    advice = "other blocks ran: choose them with load_model(model, blocks=list(model.student[0].blocks))"
    with pytest.raises(AttentionNotSeenError) as error:
        captured(model, blocks=list(model.teacher[0].blocks))
    assert message(error) == f"SelfDistilled ran, but not its block 0 of those that were taken; {advice}"
    with (
        pytest.raises(UserError) as refusal,
        FrozenModel(load_model(model, blocks=list(model.teacher[0].blocks)), [Tap(0)], device="cpu") as frozen,
    ):
        frozen(images())
    assert message(refusal).endswith(advice)
    chosen = load_model(model, blocks=list(model.student[0].blocks))
    assert len(captured(chosen)) == 2  # type: ignore[arg-type]


def test_a_list_given_by_its_parts_is_opened() -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch_embed = nn.Conv2d(3, 32, 8, 8)
            self.one, self.two = (
                nn.ModuleList(nn.ModuleList([Attention(32, 2), nn.Linear(32, 32)]) for _ in range(count))
                for count in (2, 3)
            )

        def forward(self, x: Tensor) -> Tensor:
            x = self.patch_embed(x).flatten(2).transpose(1, 2)
            for attention, linear in (*self.two, *self.one):
                x = x + attention(x)
                x = x + linear(x)
            return x

    model = randomize(Parts()).eval()
    assert load_model(model).anatomy.blocks == tuple(parts[0] for parts in model.two)
    assert load_model(model, blocks=list(model.one)).anatomy.blocks == tuple(parts[0] for parts in model.one)


def test_a_layout_of_a_model_inside_another() -> None:
    model = nn.Sequential(hand_made(), nn.Identity()).eval()
    layout = TokenLayout((4, 4), has_cls=True, patch_size=(8, 8))
    loaded = load_model(model, layout=layout)
    assert loaded.layout == layout and loaded.anatomy.blocks == tuple(model[0].blocks)


def test_whatever_wraps_a_copy_of_the_model_is_refused_with_advice_that_works() -> None:
    model = tiny_vit()
    for wrapper in (nn.DataParallel(model), torch.optim.swa_utils.AveragedModel(model)):
        with pytest.raises(AttentionNotSeenError, match=r"pass model\.module, and call that inside the capture"):
            capture(wrapper)
        assert_all_close(captured(wrapper.module).statistics(), captured(model).statistics())
