"""Which token is what is measured: every order of [cls], registers and patches, found, given, or refused."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

import vitprobe as vp
from helpers import assert_all_close, captured, images, randomize, state_of
from reference import BlockTokens, reference_statistics, unfused_run
from vitprobe.errors import AttentionNotSeenError, UserError
from vitprobe.layout import TokenLayout, layout_from, reordered, restored
from vitprobe.models.loading import load_model
from vitprobe.probing.tap import Tap
from vitprobe.probing.tokens import FrozenModel

WIDTH, GRID, PATCHES, REGISTERS = 32, (3, 4), 12, 3
SIZE = (24, 32)
# What follows what: c [cls], d distillation, r all registers, R one of them, p all patches, h half of the patches.
ORDERS = (
    "cp",
    "pc",
    "crp",
    "rcp",
    "cpr",
    "prc",
    "pcr",
    "rpc",
    "cdp",
    "dcp",
    "cdrp",
    "rdpc",
    "rp",
    "pr",
    "hch",
    "RcpRR",
)


class AnyOrder(nn.Module):
    """A Vision Transformer whose tokens come in the order that a word of ORDERS says."""

    def __init__(self, order: str, *, bias: bool = False) -> None:
        super().__init__()
        self.order = order
        self.patch_embed = nn.Conv2d(3, WIDTH, 8, 8)
        self.img_size = SIZE
        registers = REGISTERS if "r" in order.lower() else 0
        for kind, name, count in (("c", "cls_token", 1), ("d", "dist_token", 1), ("r", "register_tokens", registers)):
            if kind in order.lower():
                self.register_parameter(name, nn.Parameter(torch.zeros(1, count, WIDTH)))
        self.blocks = nn.ModuleList(Block(WIDTH, 2) for _ in range(2))
        self.pos_embed = nn.Parameter(torch.zeros(1, len(self.kinds), WIDTH))

    @property
    def kinds(self) -> str:
        """One letter a token, in the order in which they stand."""
        counts = {"c": 1, "d": 1, "r": REGISTERS, "R": 1, "p": PATCHES, "h": PATCHES // 2}
        return "".join(letter * counts[letter] for letter in self.order).lower().replace("h", "p")

    @property
    def canonical(self) -> list[int]:
        """Positions of [cls], distillation, registers and patches, in this order."""
        return [place for kind in "cdrp" for place, letter in enumerate(self.kinds) if letter == kind]

    def layout(self, **changes: Any) -> TokenLayout:
        special = [place for place in self.canonical if self.kinds[place] != "p"]
        count = self.kinds.count
        facts = {"grid": GRID, "has_cls": "c" in self.kinds, "num_distillation": count("d"), "patch_size": (8, 8)}
        return TokenLayout(**(facts | {"num_registers": count("r"), "positions": tuple(special)} | changes))

    def embed(self, x: Tensor) -> Tensor:
        patches = self.patch_embed(x).flatten(2).transpose(1, 2)
        of_kind = {"p": patches} | {
            kind: getattr(self, name).expand(len(x), -1, -1)
            for kind, name in (("c", "cls_token"), ("d", "dist_token"), ("r", "register_tokens"))
            if hasattr(self, name)
        }
        taken = dict.fromkeys(of_kind, 0)
        sequence = []
        for letter in self.kinds:
            sequence.append(of_kind[letter][:, taken[letter]])
            taken[letter] += 1
        return torch.stack(sequence, dim=1) + self.pos_embed

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return x.mean(dim=1)


def any_order(order: str, **options: Any) -> AnyOrder:
    model = randomize(AnyOrder(order, **options)).eval()
    assert isinstance(model, AnyOrder)
    return model


def reference(model: AnyOrder, x: Tensor, block: int) -> dict[str, np.ndarray]:
    """The textbook statistics of the plain attention matrix, its rows and columns put into the usual order."""
    trace, order = unfused_run(model, x)[block], model.canonical
    assert trace.tokens is not None
    tokens = BlockTokens(*(None if part is None else part[:, order] for part in vars(trace.tokens).values()))
    return reference_statistics(
        trace.A[:, :, order][..., order],
        grid=GRID,
        prefix=len(model.kinds) - PATCHES,
        has_cls="c" in model.kinds,
        registers=model.kinds.count("r"),
        patch_size=(8, 8),
        tokens=tokens,
    )


@pytest.mark.parametrize("keep", ["qk", "statistics"])
@pytest.mark.parametrize("order", ORDERS)
def test_every_order_has_the_references_statistics(order: str, keep: str) -> None:
    model, x = any_order(order), images(3, *SIZE)
    before, random = state_of(model), torch.get_rng_state()
    attention = captured(model, x, keep=keep)
    assert attention.layout == model.layout()
    found = attention.statistics()
    for block in range(2):
        assert_all_close({name: value[:, block] for name, value in found.items()}, reference(model, x, block))
    assert state_of(model) == before and torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("order", ["pc", "rcp", "hch"])
def test_maps_stay_in_the_models_own_order(order: str) -> None:
    model, x = any_order(order), images(2, *SIZE)
    plain = unfused_run(model, x)[1].A
    view = captured(model, x)[1]
    np.testing.assert_allclose(view.probabilities().numpy(), plain, atol=1e-6)
    np.testing.assert_allclose(view.probabilities(head=1).numpy(), plain[:, 1], atol=1e-6)


@pytest.mark.parametrize("kernel", ["auto", "model"])
@pytest.mark.parametrize("order", ["pc", "cpr", "rdpc"])
def test_analyze_one_image_is_enough(order: str, kernel: str) -> None:
    model, x = any_order(order), images(1, *SIZE)
    profile = vp.analyze(model, x, kernel=kernel)
    expected = reference(model, x, 0)
    table = profile.table()
    rows = table[(table["block"] == 0) & table["head"].isna()].set_index("statistic")["mean"]
    for name in ("patch_entropy", "attention_distance", "patch_self_attention"):
        assert rows[name] == pytest.approx(expected[name].mean(), rel=1e-4)
    assert profile.layout == model.layout()


@pytest.mark.parametrize("order", ORDERS)
def test_tokens_of_a_frozen_model_come_in_the_usual_order(order: str) -> None:
    model, x = any_order(order), images(2, *SIZE)
    with torch.no_grad():
        plain = model.blocks[0](model.embed(x))
    for attention in (False, True):
        with FrozenModel(load_model(model), [Tap(0)], attention=attention, device="cpu") as frozen:
            (batch,) = frozen(x).values()
        torch.testing.assert_close(batch.tokens, plain[:, model.canonical], atol=1e-5, rtol=1e-5)
        assert batch.layout == model.layout().canonical
        if "c" in order:
            torch.testing.assert_close(batch.cls, plain[:, model.kinds.index("c")], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("order", ["pc", "rcp", "cpr", "hch"])
def test_a_right_layout_is_believed_and_a_wrong_one_refused_with_the_right_one(order: str) -> None:
    model, x = any_order(order), images(2, *SIZE)
    assert load_model(model, layout=model.layout()).layout == model.layout()
    wrong = model.layout(positions=None)
    with pytest.raises(UserError, match=r"is not that of AnyOrder: of the 1[36] tokens") as caught:
        load_model(model, layout=wrong)
    with pytest.raises(UserError, match="is not that of AnyOrder"), vp.capture(model, layout=wrong), torch.no_grad():
        model(x)
    advice = re.search(r"positions=\(([-\d, ]+)\)", str(caught.value))
    assert advice is not None
    positions = tuple(int(word) for word in advice.group(1).split(",") if word.strip())
    assert load_model(model, layout=model.layout(positions=positions)).layout == model.layout()


def test_a_token_that_nothing_explains_is_asked_for() -> None:
    """Two of them, of which no parameter's name says which is [cls]."""
    model = any_order("cp")
    del model.cls_token
    model.first, model.second = (nn.Parameter(torch.randn(1, 1, WIDTH)) for _ in range(2))

    def forward(x: Tensor) -> Tensor:
        x = model.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([x, model.first.expand(len(x), -1, -1), model.second.expand(len(x), -1, -1)], dim=1)
        for block in model.blocks:
            x = block(x)
        return x

    model.forward = forward
    with pytest.raises(AttentionNotSeenError, match="12, 13 are the same for every image") as caught:
        load_model(model)
    said = re.search(r"vitprobe\.(TokenLayout\(.*\))\), with", str(caught.value))
    assert said is not None
    layout = eval(said.group(1), {"TokenLayout": TokenLayout})
    assert load_model(model, layout=layout).layout.positions == (-2, -1)


def test_a_cls_that_is_not_used_is_no_token() -> None:
    model = any_order("rp")
    model.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
    assert load_model(model).layout == model.layout()


def test_a_cls_that_is_made_of_the_image_is_the_users_word() -> None:
    model = any_order("cp")
    del model.cls_token
    embed = lambda x: model.patch_embed(x).flatten(2).transpose(1, 2)  # noqa: E731
    model.embed = lambda x: torch.cat([embed(x).mean(dim=1, keepdim=True), embed(x)], dim=1) + model.pos_embed
    layout = TokenLayout(GRID, has_cls=True, patch_size=(8, 8))
    assert load_model(model, layout=layout).layout == layout


def test_patches_that_run_column_by_column_are_refused() -> None:
    model = any_order("cp")
    columns = torch.arange(PATCHES).view(GRID).T.flatten()
    embed = AnyOrder.embed.__get__(model)
    model.embed = lambda x: embed(x)[:, [0, *(1 + columns)]]
    with pytest.raises(UserError, match="do not run row by row on a grid of 3x4"):
        load_model(model)
    with pytest.raises(UserError, match="do not run row by row"), vp.capture(model), torch.no_grad():
        model(images(1, *SIZE))


@pytest.mark.parametrize("grid", [(4, 3), (2, 6)])
def test_a_grid_that_the_patches_do_not_lie_on_is_refused(grid: tuple[int, int]) -> None:
    """Of as many tokens as there are."""
    model, x = any_order("pc"), images(2, *SIZE)
    said = f"has a grid of {grid[0]}x{grid[1]} patches, but images of 24×32 pixels make 3x4: give the layout with grid"
    with pytest.raises(UserError, match=said), vp.capture(model, layout=model.layout(grid=grid)), torch.no_grad():
        model(x)
    with pytest.raises(UserError, match=said):
        vp.analyze(load_model(model, layout=model.layout(grid=grid)), x)
    assert captured(model, x, layout=model.layout(grid=(3, 4))).layout == model.layout()
    # Where no convolution says which grid an image makes, what a half of the image changes does.
    model.patch_embed = nn.Sequential(nn.Conv2d(3, WIDTH, 1, 1), nn.MaxPool2d(8))  # type: ignore[assignment]
    tall = model.layout(grid=grid, patch_size=(24 // grid[0], 32 // grid[1]))
    with pytest.raises(UserError, match=f"do not run row by row on a grid of {grid[0]}x{grid[1]}"):
        captured(model, x, layout=tall)


def test_a_grid_that_timms_model_does_not_make_is_refused() -> None:
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2).eval()
    layout = TokenLayout((2, 8), has_cls=True, patch_size=(8, 8))
    for act in (lambda: captured(model, layout=layout), lambda: load_model(model, layout=layout)):
        with pytest.raises(UserError, match="has a grid of 2x8 patches, but images of 32×32 pixels make 4x4"):
            act()


def test_timms_class_with_another_order_is_measured_too() -> None:
    class ClsLast(VisionTransformer):
        def _pos_embed(self, x: Tensor) -> Tensor:
            return super()._pos_embed(x).roll(-1, dims=1)

    model = randomize(ClsLast(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)).eval()
    attention = captured(model)
    A = unfused_run(model, images())[0].A
    assert attention.layout == TokenLayout((4, 4), has_cls=True, patch_size=(8, 8), positions=(-1,))
    np.testing.assert_allclose(attention.statistics()["cls_self_attention"][:, 0], A[:, :, 16, 16], rtol=1e-4)


def test_the_model_is_left_in_its_mode_with_its_random_numbers_and_gradients() -> None:
    model = any_order("rcp").train()
    model.blocks[1].eval()
    modes, random = [part.training for part in model.modules()], torch.get_rng_state()
    load_model(model)
    with vp.capture(model):
        model(images(2, *SIZE)).sum().backward()
    assert [part.training for part in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert model.cls_token.grad is not None


def test_a_model_without_values_keeps_the_order_that_its_names_say() -> None:
    model = any_order("crp").to("meta")
    assert captured(model, images(2, *SIZE).to("meta")).layout == model.layout()


def test_detection_tokens_of_transformers_yolos_come_last() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"image_size": [32, 32], "patch_size": 8, "num_detection_tokens": 5, "hidden_size": 32}
    config = transformers.YolosConfig(**sizes, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    model = randomize(transformers.YolosModel(config)).eval()
    right = TokenLayout((4, 4), has_cls=True, num_registers=5, patch_size=(8, 8), positions=(0, 17, 18, 19, 20, 21))
    model.set_attn_implementation("eager")
    A = model(images(), output_attentions=True).attentions[0].detach().double().numpy()
    model.set_attn_implementation("sdpa")
    for given in ({}, {"layout": right}, {"layout": right, "blocks": list(model.encoder.layer)}):
        found = captured(model, **given).statistics()
        np.testing.assert_allclose(found["cls_to_registers"][:, 0], A[:, :, 0, 17:].sum(-1), rtol=1e-4)
        np.testing.assert_allclose(
            found["patch_self_attention"][:, 0], A.diagonal(0, 2, 3)[..., 1:17].mean(-1), rtol=1e-4
        )
    with pytest.raises(UserError, match=r"give positions=\(0, 17, 18, 19, 20, 21\) \(1 \[cls\], 5 registers\)"):
        captured(model, layout=TokenLayout((4, 4), has_cls=True, num_registers=5, patch_size=(8, 8)))


# Patches that overlap -------------------------------------------------------------------------------------------------


class Overlapping(AnyOrder):
    """As models for re-identification cut them: patches of 16 pixels, 12 apart."""

    def __init__(self) -> None:
        super().__init__("cp")
        self.patch_embed, self.img_size = nn.Conv2d(3, WIDTH, 16, 12), (64, 32)
        self.pos_embed = nn.Parameter(torch.zeros(1, 11, WIDTH))

    def embed(self, x: Tensor) -> Tensor:
        patches = self.patch_embed(x).flatten(2).transpose(1, 2)
        return torch.cat([self.cls_token.expand(len(x), -1, -1), patches], dim=1) + self.pos_embed


@pytest.mark.parametrize("said", [{}, {"layout": None}, {"layout": None, "blocks": None}])
def test_overlapping_patches_found_or_given(said: dict[str, Any]) -> None:
    model = randomize(Overlapping()).eval()
    layout = TokenLayout((5, 2), has_cls=True, patch_size=(12, 12))
    given: dict[str, Any] = {"layout": layout, "blocks": list(model.blocks)}
    loaded = load_model(model, **{name: given[name] for name in said})
    assert loaded.layout == layout
    assert loaded.transform.size == (64, 32)  # what the patch embedding takes, not 60 by 24
    pictures = [Image.fromarray(np.random.default_rng(n).integers(0, 255, (70, 40, 3), np.uint8)) for n in range(3)]
    profile = vp.analyze(loaded, pictures)
    assert profile.layout == layout and profile.num_images == 3
    A = unfused_run(model, images(2, 64, 32))[0].A
    found = captured(model, images(2, 64, 32)).statistics()["cls_self_attention"]
    np.testing.assert_allclose(found[:, 0], A[:, :, 0, 0], rtol=1e-4)
    with torch.no_grad(), vp.capture(loaded) as attention:
        model.pos_embed.data = torch.zeros(1, 1 + 5 * 3, WIDTH)
        model(images(1, 64, 40))
    assert attention.layout is not None and attention.layout.grid == (5, 3)


# The layout itself ----------------------------------------------------------------------------------------------------


def test_positions_have_one_form_for_every_grid() -> None:
    assert TokenLayout((2, 2), True, positions=(0,)) == TokenLayout((2, 2), True)
    last = TokenLayout((2, 2), True, positions=(4,))
    assert last == TokenLayout((2, 2), True, positions=(-1,)) and last.cls == 4
    assert last.of_grid((3, 3)).cls == 9 and last.canonical == TokenLayout((2, 2), True)
    assert (last.patches, last.registers) == (slice(0, 4), slice(0, 0))
    between = TokenLayout((2, 2), True, positions=(2,))
    assert between.patches == [0, 1, 3, 4] and between.of_grid((2, 2)) == between
    with pytest.raises(UserError, match="among its 2x2 patches"):
        between.of_grid((3, 3))
    assert str(TokenLayout((2, 2), True, num_registers=2, positions=(2, 0, 1))) == (
        "[cls] at 2, registers at 0 to 1 + 2x2 patches"
    )
    for wrong in ((0, 0), (5,), (), (-6,)):
        with pytest.raises(UserError, match="names each of its 1 "):
            TokenLayout((2, 2), True, positions=wrong)


def test_a_layout_from_json_and_an_order_there_and_back() -> None:
    import dataclasses
    import json

    layout = AnyOrder("rdpc").layout()
    assert layout_from(json.loads(json.dumps(dataclasses.asdict(layout)))) == layout
    tokens = torch.randn(2, layout.num_tokens, 3)
    usual = reordered(tokens, layout, 1)
    assert torch.equal(usual, tokens[:, AnyOrder("rdpc").canonical]) and torch.equal(restored(usual, layout, 1), tokens)
