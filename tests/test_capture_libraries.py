"""`nn.MultiheadAttention`, alone and in the Vision Transformers of torchvision and open_clip."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import assert_all_close, assert_close, captured, images, message, randomize
from reference import BlockTokens, reference_statistics
from vitprobe.errors import AttentionNotSeenError
from vitprobe.hooks.calls import AttentionCall
from vitprobe.hooks.capture import capture
from vitprobe.hooks.interception import AttentionWatcher
from vitprobe.layout import TokenLayout
from vitprobe.models.loading import load_model


@pytest.fixture(autouse=True)
def no_shortcut() -> Iterator[None]:
    """Without torch's shortcut for eval mode, which rounds otherwise: then a capture changes no bit of an output."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


class Multihead(nn.Module):
    """Two blocks around `nn.MultiheadAttention`; keeps the weights that torch itself gives."""

    def __init__(self, how: dict[str, Any] | None = None, **options: Any) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, 8)
        self.blocks = nn.ModuleList([nn.MultiheadAttention(16, 2, **options) for _ in range(2)])
        self.first = not options.get("batch_first", False)
        self.how = how or {}
        self.weights: list[Tensor] = []

    def forward(self, x: Tensor, keep_weights: bool = False) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x.transpose(0, 1) if self.first else x
        for block in self.blocks:
            if keep_weights:
                weights = block(x, x, x, need_weights=True, average_attn_weights=False, **self.how)[1]
                self.weights.append(weights)
            x = x + block(x, x, x, need_weights=False, **self.how)[0]
        return x


CAUSAL = torch.ones(16, 16).triu(1).bool()
PADDING = torch.arange(16)[None] >= torch.tensor([[12], [16]])


@pytest.mark.parametrize(
    ("how", "options"),
    [
        ({}, {"batch_first": True}),
        ({}, {}),
        ({}, {"bias": False}),
        ({"attn_mask": CAUSAL}, {"batch_first": True}),
        ({"attn_mask": CAUSAL, "is_causal": True}, {"batch_first": True}),
        ({"attn_mask": torch.linspace(0, 1, 16).repeat(4, 16, 1)}, {"batch_first": True}),
        ({"key_padding_mask": PADDING}, {"batch_first": True}),
        ({"attn_mask": CAUSAL, "key_padding_mask": PADDING}, {}),
    ],
)
@pytest.mark.parametrize("train", [False, True])
def test_heads_of_multihead_attention_are_torchs_own(how: dict, options: dict, train: bool) -> None:
    model = randomize(Multihead(how, **options)).train(train)
    with torch.no_grad():
        expected = model(images(), keep_weights=True)
        with capture(model) as attention:
            output = model(images())
    assert torch.equal(output, expected)
    for view, weights in zip(attention, model.weights, strict=True):
        assert_close(view.probabilities(), weights, tolerance=1e-5)


def test_weights_of_their_own_for_queries_and_keys() -> None:
    """What `nn.MultiheadAttention` has where keys are of another width."""
    torch.manual_seed(0)
    joint, apart = nn.MultiheadAttention(16, 2), nn.MultiheadAttention(16, 2, kdim=12, vdim=12)
    x, y = torch.randn(9, 3, 16), torch.randn(7, 3, 12)
    with torch.no_grad():
        for module, key in ((joint, x), (apart, y)):
            calls: list[AttentionCall] = []
            with AttentionWatcher(lambda call, calls=calls: not calls.append(call)):
                module(x, key, key, need_weights=False)
            weights = module(x, key, key, average_attn_weights=False)[1]
            (call,) = calls
            found = (call.scale * call.query @ call.key.mT).softmax(-1)
            assert_close(found, weights, tolerance=1e-5)


def test_a_key_that_is_no_token_is_named() -> None:
    with pytest.raises(AttentionNotSeenError, match="attends from 16 queries to 17 keys"):
        captured(randomize(Multihead(add_zero_attn=True)))
    with pytest.raises(AttentionNotSeenError, match="attends from 16 queries to 17 keys"):
        captured(randomize(Multihead(add_bias_kv=True)))


def test_torchs_own_encoder_layer_takes_no_shortcut_that_hides_its_attention() -> None:
    torch.backends.mha.set_fastpath_enabled(True)

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, 16, 8, 8)
            layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.encoder(self.patches(x).flatten(2).transpose(1, 2))

    model = randomize(Encoder()).eval()
    with torch.no_grad():
        plain = model(images())
        attention = captured(model)
        layer = model.encoder.layers[0]
        x = layer.norm1(model.patches(images()).flatten(2).transpose(1, 2))
        weights = layer.self_attn(x, x, x, average_attn_weights=False)[1]
    assert_close(attention[0].probabilities(), weights, tolerance=1e-5)
    assert torch.isfinite(plain).all() and "patch_update_ratio" in attention.statistics()


def traced(block: nn.Module, norm: str, attention: str, x: Tensor, sequence_first: bool) -> tuple[Tensor, BlockTokens]:
    """A pre-norm block's attention weights and tokens, computed by its parts."""
    normed = getattr(block, norm)(x)
    part = getattr(block, attention)
    update, weights = part(normed, normed, normed, need_weights=True, average_attn_weights=False)
    arrays = [t.transpose(0, 1) if sequence_first else t for t in (x, block(x), update)]
    residual, output, update = (t.detach().double().numpy() for t in arrays)
    return weights, BlockTokens(residual, output, update, update)


def check(model: nn.Module, blocks: Any, norm: str, attention: str, patch: int = 8, first: bool = False) -> None:
    """Every statistic of every block against the reference, from the input that the block had."""
    entering: list[Tensor] = []
    handles = [block.register_forward_pre_hook(lambda _, args: entering.append(args[0])) for block in blocks]
    with torch.no_grad():
        plain = model(images())
        for handle in handles:
            handle.remove()
        with capture(model) as captured_attention:
            assert torch.equal(model(images()), plain)
        values = captured_attention.statistics()
        for index, (block, x) in enumerate(zip(blocks, entering, strict=True)):
            weights, tokens = traced(block, norm, attention, x, first)
            expected = reference_statistics(
                weights.double().numpy(),
                grid=(4, 4),
                prefix=1,
                has_cls=True,
                registers=0,
                patch_size=(patch, patch),
                tokens=tokens,
            )
            assert_all_close({name: value[:, index] for name, value in values.items()}, expected)


def test_torchvisions_vision_transformer() -> None:
    vision_transformer = pytest.importorskip("torchvision.models.vision_transformer")
    model = vision_transformer.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=5)
    randomize(model).eval()
    check(model, model.encoder.layers, "ln_1", "self_attention")
    loaded = load_model(model)
    assert loaded.layout == TokenLayout((4, 4), True, patch_size=(8, 8)) and loaded.transform.size == (32, 32)
    assert (loaded.anatomy.width, loaded.anatomy.num_heads) == (32, 2)


def open_clips(**options: Any) -> nn.Module:
    transformer = pytest.importorskip("open_clip.transformer")
    sizes = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "heads": 2, "mlp_ratio": 2, "output_dim": 8}
    return randomize(transformer.VisionTransformer(**sizes | options)).eval()


def test_open_clips_vision_transformer() -> None:
    model = open_clips()
    check(model, model.transformer.resblocks, "ln_1", "attn")
    assert load_model(model).layout == TokenLayout((4, 4), True, patch_size=(8, 8))


def test_blocks_that_take_the_sequence_first() -> None:
    """As older open_clip and OpenAI's own code have them."""
    model, model_of_today = open_clips(), open_clips()
    model.transformer.batch_first = False
    for block in model.transformer.resblocks:
        block.attn.batch_first = False
    check(model, model.transformer.resblocks, "ln_1", "attn", first=True)
    assert_all_close(captured(model, images(17)).statistics(), captured(model_of_today, images(17)).statistics())


def test_a_model_of_images_and_texts_is_its_image_tower() -> None:
    class Clip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.visual = open_clips()
            self.transformer = nn.ModuleList([nn.TransformerEncoderLayer(8, 2) for _ in range(3)])  # of the text

        def encode_image(self, x: Tensor) -> Tensor:
            return self.visual(x)

    model = Clip()
    with torch.no_grad(), capture(model) as attention:
        model.encode_image(images())
    assert attention.module is model.visual and len(attention) == 2
    loaded = load_model(model)
    assert_all_close(captured(loaded).statistics(), attention.statistics())  # type: ignore[arg-type]


def test_open_clips_own_word_on_preprocessing() -> None:
    model = open_clips()
    model.preprocess_cfg = {
        "size": (32, 32),
        "mode": "RGB",
        "mean": (0.1, 0.2, 0.3),
        "std": (0.4, 0.5, 0.6),
        "interpolation": "bicubic",
        "resize_mode": "squash",
    }
    transform = load_model(model).transform
    assert (transform.mean, transform.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (transform.crop_mode, transform.crop_pct, transform.size) == ("squash", 1.0, (32, 32))


def test_a_wrapper_is_named() -> None:
    with pytest.raises(AttentionNotSeenError) as error:
        load_model(nn.DataParallel(open_clips()))
    assert message(error).startswith("DataParallel wraps the model and may run copies of it")
