"""Frozen tokens: those of the model's own forward pass, of every family, whatever state it was left in."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from helpers import captured, images, message, randomize, state_of, tiny, tiny_vit
from test_anatomy_own import Chunk, MaskedAutoencoder
from test_capture_by_hand import Attention, hand_made
from vitprobe.errors import UserError
from vitprobe.layout import TokenLayout
from vitprobe.models.loading import load_model
from vitprobe.probing.tap import Tap
from vitprobe.probing.tokens import FrozenModel

LAST, NORMED, FIRST = Tap(1), Tap(1, norm=True), Tap(0)


def read(model: Any, taps: Any = (LAST,), x: Tensor | None = None, **options: Any) -> Any:
    with FrozenModel(load_model(model), taps, device="cpu", **options) as frozen:
        return frozen(images(3) if x is None else x)


def refusal(act: Any) -> str:
    with pytest.raises(UserError) as caught:
        act()
    return message(caught)


def test_the_tokens_are_timms_own() -> None:
    model = tiny_vit(depth=3)
    given = read(model, [Tap(0), Tap(2), Tap(1, norm=True), Tap(2, norm=True), Tap(2)])
    assert set(given) == {Tap(0), Tap(2), Tap(1, norm=True), Tap(2, norm=True)}
    raw = model.forward_intermediates(images(3), return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True)
    raw = [torch.cat([prefix, patches], dim=1) for patches, prefix in raw]
    for tap, batch in given.items():
        expected = model.norm(raw[tap.block]) if tap.norm else raw[tap.block]
        torch.testing.assert_close(batch.tokens, expected)
        assert batch.tokens.dtype == torch.float32 and batch.layout == load_model(model).layout
        assert batch.attention is None and not batch.oracles
    torch.testing.assert_close(given[Tap(2, norm=True)].tokens, model.forward_features(images(3)))


def test_the_state_it_was_left_in_changes_nothing_and_comes_back() -> None:
    options = {"proj_drop_rate": 0.5, "drop_path_rate": 0.5, "attn_drop_rate": 0.5, "pos_drop_rate": 0.5}
    model = tiny_vit(**options, patch_drop_rate=0.5)
    expected = read(tiny_vit())[LAST].tokens
    model.train()
    model.blocks[1].eval()
    for block in model.blocks:
        block.attn.fused_attn = False
    before = state_of(model)
    for attention in (False, True):
        torch.testing.assert_close(read(model, attention=attention)[LAST].tokens, expected)
        assert state_of(model) == before
    with pytest.raises(ZeroDivisionError), FrozenModel(load_model(model), [LAST], device="cpu"):
        raise ZeroDivisionError
    assert state_of(model) == before


def test_a_pass_ends_after_the_last_block_that_is_read() -> None:
    model, ran = tiny_vit(depth=4), []
    for index, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda *_, index=index: ran.append(index))
    for attention in (False, True):
        ran.clear()
        batch = read(model, [Tap(2), Tap(0)], attention=attention)[Tap(2)]
        assert ran == [0, 1, 2]
        assert (batch.attention is not None) == attention


def test_probes_can_be_trained_on_the_tokens_and_the_model_gets_no_gradient() -> None:
    model = tiny_vit()
    for taps in ([LAST], [NORMED], [FIRST, LAST]):
        head = nn.Linear(32, 2)
        for batch in read(model, taps, attention=True).values():
            head(batch.tokens[:, 0]).sum().backward()
        assert head.weight.grad is not None
    assert all(parameter.grad is None for parameter in model.parameters())


def test_later_blocks_that_add_in_place_spoil_nothing() -> None:
    class InPlace(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block, self.attn = block, block.attn

        def forward(self, x: Tensor) -> Tensor:
            return x.copy_(self.block(x))

    model = tiny_vit()
    expected = {tap: batch.tokens for tap, batch in read(model, [FIRST, LAST]).items()}
    model.blocks = nn.Sequential(*map(InPlace, model.blocks))
    for tap, batch in read(model, [FIRST, LAST]).items():
        torch.testing.assert_close(batch.tokens, expected[tap])


def test_two_at_once_on_one_model_do_not_hear_each_other() -> None:
    model = load_model(tiny_vit())
    expected = read(model, [FIRST, LAST])
    with (
        FrozenModel(model, [FIRST], device="cpu") as one,
        FrozenModel(model, [LAST], attention=True, device="cpu") as two,
    ):
        for frozen, tap in ((two, LAST), (one, FIRST), (two, LAST)):
            torch.testing.assert_close(frozen(images(3))[tap].tokens, expected[tap].tokens)
        torch.testing.assert_close(model(images(3)), model(images(3)))


def test_the_attention_is_that_of_the_tapped_blocks() -> None:
    model = tiny_vit(depth=3)
    expected = captured(model, images(3))
    given = read(model, [Tap(2), Tap(1)], attention=True)
    for tap, batch in given.items():
        assert batch.attention is not None and batch.attention.block == tap.block
        torch.testing.assert_close(batch.attention.probabilities(), expected[tap.block].probabilities())


def test_the_attention_does_not_grow_from_batch_to_batch() -> None:
    with FrozenModel(load_model(tiny_vit(depth=3)), [LAST], attention=True, device="cpu") as frozen:
        for seed in range(3):
            batch = frozen(images(2, seed=seed))[LAST]
            assert batch.attention is not None and batch.attention.shape[0] == 2
            assert not frozen._capture.pooling_attention


def test_bfloat16() -> None:
    model = tiny_vit()
    plain, half = read(model, [LAST, NORMED]), read(model, [LAST, NORMED], dtype="bfloat16")
    for tap in plain:
        assert half[tap].tokens.dtype == torch.float32
        apart = (half[tap].tokens - plain[tap].tokens).abs().max() / plain[tap].tokens.abs().max()
        assert 1e-6 < apart < 0.05
    assert torch.equal(read(model, dtype="float32")[LAST].tokens, plain[LAST].tokens)


def test_weights_of_another_precision_stay_as_they_are() -> None:
    model = tiny_vit()
    expected = read(model, [LAST, NORMED])
    for tap, batch in read(copy.deepcopy(model).double(), [LAST, NORMED]).items():
        assert batch.tokens.dtype == torch.float32
        torch.testing.assert_close(batch.tokens, expected[tap].tokens, rtol=1e-4, atol=1e-4)
    assert "float32 weights" in refusal(lambda: read(copy.deepcopy(model).double(), dtype="bfloat16"))


def test_another_image_size() -> None:
    model = load_model(tiny("vit_tiny_patch16_224", img_size=32, patch_size=8, dynamic_img_size=True))
    with FrozenModel(model, [LAST], device="cpu") as frozen:
        batch = frozen(images(2, 40, 24))[LAST]
    assert batch.layout.grid == (5, 3) and batch.tokens.shape == (2, 16, 64)


def test_width() -> None:
    with FrozenModel(load_model(tiny_vit()), [LAST], device="cpu") as frozen:
        assert frozen.dim == 32


# Families -------------------------------------------------------------------------------------------------------------


def own_tokens(model: nn.Module, block: nn.Module, x: Tensor) -> Tensor:
    """What leaves a block when the whole model runs; no FrozenModel takes part."""
    seen: list[Tensor] = []
    handle = block.register_forward_hook(
        lambda m, a, output: seen.append(output if isinstance(output, Tensor) else output[0])
    )
    with torch.no_grad():
        model(x)
    handle.remove()
    return seen[0]


TIMM = [
    "vit_small_patch14_reg4_dinov2",
    "deit_tiny_distilled_patch16_224",
    "beit_base_patch16_224",
    "eva02_tiny_patch14_224",
]


@pytest.mark.parametrize("name", TIMM)
def test_families_of_timm(name: str) -> None:
    options = {"global_pool": "token"} if name.startswith(("beit", "eva")) else {}
    model = tiny(name, img_size=28 if "14" in name.split("_")[2] else 32, **options)
    size = load_model(model).transform.size
    x = images(2, *size)
    given = read(model, [LAST, NORMED], x)
    torch.testing.assert_close(given[LAST].tokens, own_tokens(model, model.blocks[1], x))
    torch.testing.assert_close(given[NORMED].tokens, model.forward_features(x))


@pytest.mark.parametrize(
    ("name", "config", "norm"),
    [
        ("ViTModel", "ViTConfig", "layernorm"),
        ("ViTForImageClassification", "ViTConfig", "layernorm"),
        ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", "layernorm"),
        ("SiglipVisionModel", "SiglipVisionConfig", "post_layernorm"),
    ],
)
def test_models_of_transformers(name: str, config: str, norm: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = randomize(getattr(transformers, name)(getattr(transformers, config)(**sizes, intermediate_size=64))).eval()
    loaded = load_model(model)
    given = read(loaded, [LAST, NORMED])
    expected = own_tokens(model, loaded.anatomy.blocks[1], images(3))
    torch.testing.assert_close(given[LAST].tokens, expected)
    (own,) = [part for path, part in model.named_modules() if path.split(".")[-1] == norm and "layer." not in path]
    torch.testing.assert_close(given[NORMED].tokens, own(expected))


def test_a_masked_autoencoder_of_transformers_sees_all_patches() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = randomize(transformers.ViTMAEModel(transformers.ViTMAEConfig(**sizes, intermediate_size=64))).eval()
    tokens = [read(model, attention=attention)[LAST].tokens for attention in (False, True)]
    assert tokens[0].shape == (3, 17, 32)
    torch.testing.assert_close(*tokens)
    torch.testing.assert_close(read(model)[LAST].tokens, tokens[0])


def test_torchvisions() -> None:
    from torchvision.models.vision_transformer import VisionTransformer as Torchvisions

    model = randomize(Torchvisions(32, 8, 2, 2, 32, 64, num_classes=5)).eval()
    given = read(model, [LAST, NORMED])
    torch.testing.assert_close(given[NORMED].tokens, model.encoder.ln(given[LAST].tokens))
    torch.testing.assert_close(model.heads(given[NORMED].cls), model(images(3)))


@pytest.mark.parametrize("batch_first", [True, False])
def test_open_clips_with_either_axis_first(batch_first: bool) -> None:
    open_clip = pytest.importorskip("open_clip")
    model = open_clip.transformer.VisionTransformer(
        image_size=32, patch_size=8, width=32, layers=2, heads=2, mlp_ratio=2.0, output_dim=8
    )
    model = randomize(model).eval()
    if not batch_first:
        model.transformer.batch_first = False
        for block in model.transformer.resblocks:
            block.attn.batch_first = False
    for count in (3, 17):  # as many images as tokens
        x = images(count)
        given = read(model, [LAST, NORMED], x)
        tokens = own_tokens(model, model.transformer.resblocks[1], x)
        torch.testing.assert_close(given[LAST].tokens, tokens if batch_first else tokens.transpose(0, 1))
        torch.testing.assert_close(given[NORMED].cls @ model.proj, model(x))


def test_modules_of_ones_own() -> None:
    model = hand_made()
    torch.testing.assert_close(read(model)[LAST].tokens, own_tokens(model, model.blocks[1], images(3)))
    masked = randomize(MaskedAutoencoder()).eval()
    plain = hand_made()
    plain.load_state_dict(masked.state_dict(), strict=False)
    for attention in (False, True):
        torch.testing.assert_close(read(masked, attention=attention)[LAST].tokens, read(plain)[LAST].tokens)
    assert "random_masking" not in vars(masked)


def test_chunks_of_blocks() -> None:
    plain = hand_made()
    expected = read(plain)[LAST].tokens
    plain.blocks = nn.Sequential(Chunk(plain.blocks))
    torch.testing.assert_close(read(plain)[LAST].tokens, expected)


# Other models' attention ----------------------------------------------------------------------------------------------


def test_an_oracle_gives_its_cls_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = load_model(tiny_vit()), load_model(tiny_vit(num_heads=4, embed_dim=16))
    monkeypatch.setattr("vitprobe.probing.tokens.load_model", lambda name, **options: {"other": other}[name])
    before = state_of(other.module)
    with FrozenModel(model, [LAST], oracles=["other"], device="cpu") as frozen:
        oracles = frozen(images(3))[LAST].oracles
    expected = captured(other.module, images(3))[1].probabilities()[:, :, 0, 1:]
    torch.testing.assert_close(oracles["other"], expected)
    assert oracles["other"].shape == (3, 4, 16) and state_of(other.module) == before


def test_an_oracle_gets_images_as_it_expects_them() -> None:
    """Of another size, mean and standard deviation; its grid is the model's."""
    model = load_model(tiny_vit(img_size=16))
    with FrozenModel(model, [LAST], oracles=["supervised_vit_nano"], device="cpu") as frozen:
        oracle = frozen._oracles["supervised_vit_nano"]
        assert oracle.model.layout.grid == (2, 2) and oracle.model.transform.size == (8, 8)
        seen: list[Tensor] = []
        handle = oracle.model.anatomy.images_enter.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        grey = torch.full((1, 3, 16, 16), 0.25)
        mean, std = (torch.tensor(part)[:, None, None] for part in (model.transform.mean, model.transform.std))
        oracles = frozen((grey - mean) / std)[LAST].oracles
        handle.remove()
        theirs = oracle.model.transform
        mean, std = (torch.tensor(part)[:, None, None] for part in (theirs.mean, theirs.std))
        torch.testing.assert_close(seen[0] * std + mean, torch.full((1, 3, 8, 8), 0.25))
    assert oracles["supervised_vit_nano"].shape == (1, 4, 4)
    assert (oracles["supervised_vit_nano"].sum(-1) < 1).all()


# Refusals -------------------------------------------------------------------------------------------------------------


def test_what_a_model_does_not_have() -> None:
    model = tiny_vit()
    assert "has blocks 0 to 1, not 2" in refusal(lambda: read(model, [Tap(2)]))
    assert "has blocks 0 to 1, not -1" in refusal(lambda: read(model, [Tap(-1)]))
    pooled = randomize(
        VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, global_pool="avg")
    )
    assert "has no final norm on its tokens" in refusal(lambda: read(pooled, [NORMED]))
    model.post_norm = nn.LayerNorm(32)
    assert "several (norm, post_norm) final norm" in refusal(lambda: read(model, [NORMED]))


def test_an_oracle_without_cls(monkeypatch: pytest.MonkeyPatch) -> None:
    model, without = load_model(tiny_vit()), load_model(tiny_vit(class_token=False, global_pool="avg"))
    monkeypatch.setattr("vitprobe.probing.tokens.load_model", lambda name: without)
    assert "other has no [cls] token" in refusal(lambda: FrozenModel(model, [LAST], oracles=["other"], device="cpu"))


def test_tokens_that_are_nan_name_their_images() -> None:
    model, x = tiny_vit(), images(9)
    x[[1, 4]] = torch.nan
    with FrozenModel(load_model(model), [FIRST, NORMED], device="cpu") as frozen:
        names = [f"{index}.png" for index in range(9)]
        said = refusal(lambda: frozen(x, names))
        assert "at block0 are NaN or infinite for 2 of the batch's images (1.png, 4.png)" in said
        assert "(1, 4)" in refusal(lambda: frozen(x))
        x[:] = torch.nan
        assert "9 of the batch's images (0, 1, 2, 3, 4, …)" in refusal(lambda: frozen(x))
        assert frozen(images(2))[FIRST].tokens.isfinite().all()  # and it goes on


def test_float16_that_overflows_names_bfloat16() -> None:
    model = tiny_vit()
    with torch.no_grad():
        model.blocks[1].mlp.fc2.bias.fill_(7e4)
    assert "or take bfloat16" in refusal(lambda: read(model, dtype="float16"))


def test_images_of_a_size_that_a_model_cannot_take() -> None:
    assert "cannot take images of 40x40 pixels" in refusal(lambda: read(tiny_vit(), x=images(2, 40)))


def test_outside_its_context_it_gives_nothing() -> None:
    frozen = FrozenModel(load_model(tiny_vit()), [LAST], device="cpu")
    assert "inside its context" in refusal(lambda: frozen(images()))
    with frozen:
        frozen(images())
    assert "inside its context" in refusal(lambda: frozen(images()))
    frozen.__exit__(None, None, None)  # once more does no harm


def test_blocks_that_give_no_sequence_of_tokens() -> None:
    class Odd(nn.Module):
        def __init__(self, give: Any) -> None:
            super().__init__()
            self.give, self.attn, self.linear = give, Attention(32, 2), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Any:
            return self.give(self.attn(x))

    for give, came in ((lambda x: x[:, :5], "(3, 5, 32)"), (lambda x: {"x": x}, "a dict")):
        model = hand_made()
        model.blocks = nn.Sequential(Odd(give))
        assert f"block 0 of HandMadeViT gave {came} where" in refusal(lambda: read(model, [Tap(0)]))  # noqa: B023


def test_blocks_that_are_lists_of_parts() -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Conv2d(3, 32, 8, 8)
            self.layers = nn.ModuleList(
                [nn.ModuleList([Attention(32, 2), nn.Sequential(nn.Linear(32, 32))]) for _ in range(2)]
            )

        def forward(self, x: Tensor) -> Tensor:
            x = self.proj(x).flatten(2).transpose(1, 2)
            for attention, mlp in self.layers:
                x = x + attention(x)
                x = x + mlp(x)
            return x

    model = randomize(Parts()).eval()
    with torch.no_grad():
        torch.testing.assert_close(read(model)[LAST].tokens, model(images(3)))


def test_a_block_that_never_runs() -> None:
    model = hand_made()
    idle = copy.deepcopy(model.blocks[1])
    loaded = load_model(
        model, blocks=[model.blocks[0], idle], layout=TokenLayout((4, 4), has_cls=True, patch_size=(8, 8))
    )
    assert "its block 1 did not" in refusal(lambda: read(loaded))


def test_dtypes_and_devices_that_cannot_be_had() -> None:
    model = load_model(tiny_vit())
    assert "device nowhere cannot be used" in refusal(lambda: FrozenModel(model, [LAST], device="nowhere"))


def test_where_memory_runs_out_the_batch_is_halved_and_the_tokens_are_the_same() -> None:
    model, taps, sizes = tiny_vit(), [FIRST, NORMED], []
    expected = read(model, taps, images(7))

    def short_of_memory(module: nn.Module, args: tuple[Any, ...]) -> None:
        sizes.append(len(args[0]))
        if len(args[0]) > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    handle = model.blocks[0].register_forward_pre_hook(short_of_memory)
    with FrozenModel(load_model(model), taps, device="cpu") as frozen:
        for x in (images(7), images(3)):
            given = frozen(x)
            for tap in taps:
                torch.testing.assert_close(given[tap].tokens, expected[tap].tokens[: len(x)])
    assert sizes[:2] == [7, 3] and set(sizes[2:]) == {1}  # halved for good: 7, then 3, then 1
    handle.remove()
    model.blocks[0].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(MemoryError()))
    assert refusal(lambda: read(model)).startswith("out of memory on cpu with one image a batch; give a smaller --img-")
