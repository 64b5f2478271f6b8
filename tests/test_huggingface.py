"""Models of Hugging Face transformers: their attention however it is computed, and loading them by name."""

from __future__ import annotations

import copy
import functools
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from helpers import SIZES, assert_all_close, captured, images, message, randomize, state_of
from reference import BlockTokens, reference_statistics
from vitprobe.errors import AttentionNotSeenError, UserError
from vitprobe.hooks import transformers_kernels
from vitprobe.hooks.capture import capture
from vitprobe.hooks.transformers_kernels import _bias
from vitprobe.models import downloads, transformers_models
from vitprobe.models.anatomy.find import find_anatomy
from vitprobe.models.identity import weights_sha256
from vitprobe.models.loading import load_model, require_loadable
from vitprobe.models.transformers_images import _share

transformers = pytest.importorskip("transformers")

# model's name: (config's name, more of the config, prefix tokens, [cls], registers)
MODELS: dict[str, tuple[str, dict[str, Any], int, bool, int]] = {
    "ViTModel": ("ViTConfig", {}, 1, True, 0),
    "ViTForImageClassification": ("ViTConfig", {"num_labels": 3}, 1, True, 0),
    "ViTMAEModel": ("ViTMAEConfig", {}, 1, True, 0),
    "ViTMAEForPreTraining": (
        "ViTMAEConfig",
        {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 3, "decoder_num_attention_heads": 2},
        1,
        True,
        0,
    ),
    "DeiTModel": ("DeiTConfig", {}, 2, True, 0),
    "BeitModel": ("BeitConfig", {"use_relative_position_bias": True}, 1, True, 0),
    "BeitForImageClassification": ("BeitConfig", {"use_shared_relative_position_bias": True}, 1, True, 0),
    "Dinov2Model": ("Dinov2Config", {}, 1, True, 0),
    "Dinov2WithRegistersModel": ("Dinov2WithRegistersConfig", {"num_register_tokens": 4}, 5, True, 4),
    "Dinov2WithRegistersForImageClassification": ("Dinov2WithRegistersConfig", {}, 5, True, 4),
    "DINOv3ViTModel": ("DINOv3ViTConfig", {"num_register_tokens": 4}, 5, True, 4),
    "CLIPVisionModel": ("CLIPVisionConfig", {}, 1, True, 0),
    "CLIPVisionModelWithProjection": ("CLIPVisionConfig", {}, 1, True, 0),
    "SiglipVisionModel": ("SiglipVisionConfig", {}, 0, False, 0),
    "IJepaModel": ("IJepaConfig", {}, 0, False, 0),
}
SECOND_NORMS = ("layernorm_after", "norm2", "layer_norm2")


def config_of(name: str, **options: Any) -> Any:
    config, more, *_ = MODELS[name]
    return getattr(transformers, config)(**(SIZES | more | options))


def tiny(name: str, **options: Any) -> Any:
    """A model of two blocks for images of 32 px with peaked attention, in eval mode."""
    return randomize(getattr(transformers, name)(config_of(name, **options))).eval()


def tiny_clip(kind: str = "CLIP", **options: Any) -> Any:
    """A model of images and texts."""
    small = {name: SIZES[name] for name in SIZES if name not in ("image_size", "patch_size")}
    config = getattr(transformers, f"{kind}Config")(
        vision_config=SIZES | options, text_config=small | {"vocab_size": 10, "eos_token_id": 2, "pad_token_id": 1}
    )
    return randomize(getattr(transformers, f"{kind}Model")(config)).eval()


# Attention -----------------------------------------------------------------------------------------------------------


def opaque(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """A kernel of the user's own, in which neither a softmax nor PyTorch's attention can be seen."""
    logits = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    weights = (logits if attention_mask is None else logits + attention_mask).exp()
    return (weights / weights.sum(-1, keepdim=True) @ value).transpose(1, 2).contiguous(), None


@pytest.fixture
def register():
    """Registers an attention function by a name, for the time of a test."""
    names = []

    def add(name: str, function: Callable[..., Any]) -> str:
        transformers.AttentionInterface.register(name, function)
        names.append(name)
        return name

    yield add
    for name in names:
        del transformers.AttentionInterface._global_mapping[name]


def own_run(model: Any, x: Tensor) -> tuple[list[np.ndarray], list[BlockTokens]]:
    """The attention that a model itself gives in eager mode, and the tokens around it; no capture takes part."""
    model, x = copy.deepcopy(model).double(), x.double()
    model.set_attn_implementation("eager")
    anatomy = find_anatomy(model)
    tokens, handles, seen = [], [], {}

    def array(values: Any) -> np.ndarray:
        tensor = values if isinstance(values, Tensor) else next(iter(values))
        return tensor.detach().double().numpy().copy()

    def attended(module: nn.Module, args: Any, output: Any) -> None:
        seen["unscaled"] = array(output)

    def middle(module: nn.Module, args: Any) -> None:
        seen["middle"] = array(args)

    def ended(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        residual = array((*args, *kwargs.values()))
        tokens.append(BlockTokens(residual, array(output), seen["middle"] - residual, seen["unscaled"]))

    for block in anatomy.blocks:
        norm = next(getattr(block, name) for name in SECOND_NORMS if hasattr(block, name))
        attend = getattr(block, "self_attn", None) or block.attention
        handles += [attend.register_forward_hook(attended), norm.register_forward_pre_hook(middle)]
        handles.append(block.register_forward_hook(ended, with_kwargs=True))
    with torch.no_grad():
        if "MAE" in type(model).__name__:
            model.config.mask_ratio = 0.0
            output = model(x, noise=torch.arange(16).expand(len(x), -1), output_attentions=True)
        else:
            output = model(x, output_attentions=True)
    return [array(weights) for weights in output.attentions], tokens


@functools.cache
def expected(name: str) -> dict[str, np.ndarray]:
    """`{statistic: (B, blocks, heads)}` in float64, from a tiny model's own attention to two images."""
    _, _, prefix, has_cls, registers = MODELS[name]
    attention, tokens = own_run(tiny(name), images())
    assert max(float(A.max()) for A in attention) > 0.5, "the attention is not peaked"
    blocks = [
        reference_statistics(
            A, grid=(4, 4), prefix=prefix, has_cls=has_cls, registers=registers, patch_size=(8, 8), tokens=around
        )
        for A, around in zip(attention, tokens, strict=True)
    ]
    return {statistic: np.stack([block[statistic] for block in blocks], 1) for statistic in blocks[0]}


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "opaque"])
@pytest.mark.parametrize("name", MODELS)
def test_statistics_are_those_of_the_models_own_attention(name, implementation, register):
    register("opaque", opaque)
    model, x = tiny(name), images()
    model.set_attn_implementation(implementation)
    before = state_of(model)
    found = captured(model, x).statistics()
    assert_all_close(found, expected(name))
    assert state_of(model) == before


def test_flex_attention_is_seen(monkeypatch):
    """Uncompiled, which takes milliseconds; it is a function that nobody else watches."""
    from torch.nn.attention.flex_attention import create_block_mask

    flex = pytest.importorskip("transformers.integrations.flex_attention")
    calls = []
    monkeypatch.setattr(
        transformers.masking_utils,
        "create_block_mask",
        lambda **options: create_block_mask(**(options | {"_compile": False})),
    )

    def uncompiled(query, key, value, training=False, **kwargs):
        calls.append(kwargs["scale"])
        weights = (query @ key.transpose(-1, -2) * kwargs["scale"]).exp()
        return weights / weights.sum(-1, keepdim=True) @ value

    monkeypatch.setattr(flex, "compile_friendly_flex_attention", uncompiled)
    model, x = tiny("ViTModel"), images()
    model.set_attn_implementation("flex_attention")
    assert_all_close(captured(model, x).statistics(), expected("ViTModel"))
    assert calls == [0.25, 0.25]


def test_masks_in_each_form_that_kernels_take():
    from torch.nn.attention.flex_attention import create_block_mask

    query = torch.zeros(2, 1, 3, 4)
    there = torch.tensor([[1, 1, 0], [1, 1, 1]])
    hidden = there.bool()[:, None, None, :]
    assert torch.equal(_bias(there, query, query), hidden)
    assert torch.equal(_bias(hidden, query, query), hidden)
    assert _bias(None, query, query) is None

    def visible(batch, head, row, column):
        return there[batch, column] > 0

    block_mask = create_block_mask(visible, 2, 1, 3, 3, device="cpu")
    assert torch.equal(_bias(block_mask, query, query), hidden.expand(2, 1, 3, 3))


@pytest.mark.parametrize("way", [{"softcap": 30.0}, {"s_aux": torch.ones(2)}, {"is_causal": True}])
def test_attention_that_is_no_softmax_of_scaled_products_is_not_handed_over(way, monkeypatch):
    """Soft-capped logits, say, are another attention: better none than a wrong one."""
    seen = []
    monkeypatch.setattr(transformers_kernels, "hand_over", lambda *args, **kwargs: seen.append(kwargs))
    attend = transformers_kernels._handing_over(opaque)
    tokens = torch.zeros(1, 2, 3, 4)
    attend(nn.Identity(), tokens, tokens, tokens, None, scaling=0.5, is_causal=False, softcap=None)
    assert seen == [{"scale": 0.5, "bias": None}]
    attend(nn.Identity(), tokens, tokens, tokens, attention_mask=None, scaling=0.5, **way)
    assert len(seen) == 1


def test_captures_within_captures_and_transformers_as_it_was(register):
    register("opaque", opaque)
    functions = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
    functions["flash_attention_2"] = opaque  # an entry of this one table, beside those that all share
    try:
        before = {name: functions[name] for name in functions}
        model = tiny("ViTModel")
        model.set_attn_implementation("opaque")
        with torch.no_grad(), capture(model) as outer:
            with capture(model) as inner:
                model(images())
            assert functions["opaque"] is not opaque
        for name, values in outer.statistics().items():
            assert torch.equal(values, inner.statistics()[name])
        assert {name: functions[name] for name in functions} == before
        assert set(functions._local_mapping) == {"flash_attention_2"}
    finally:
        del functions["flash_attention_2"]


def test_other_models_leave_transformers_alone():
    functions = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
    before = functions["flex_attention"]
    from helpers import tiny_vit

    with capture(tiny_vit()):
        assert functions["flex_attention"] is before


# Token layouts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(48, 32), (64, 64), (16, 64)])
@pytest.mark.parametrize("name", [name for name in MODELS if "PreTraining" not in name])
def test_images_of_other_sizes(name, size):
    model = tiny(name)
    attention = captured(model, images(1, *size))
    prefix = MODELS[name][2]
    assert attention[0].query.shape[2] == prefix + size[0] * size[1] // 64
    assert attention[0].layout.grid == (size[0] // 8, size[1] // 8)


def test_mae_sees_all_patches_in_their_order():
    model = tiny("ViTMAEModel").double()
    x = images().double()
    plain = copy.deepcopy(model)
    plain.config.mask_ratio = 0.0
    with torch.no_grad():
        wanted = plain(x, noise=torch.arange(16.0).expand(2, -1)).last_hidden_state
        with capture(model) as attention:
            torch.testing.assert_close(model(x).last_hidden_state, wanted)
            noise = torch.rand(2, 16)
            torch.testing.assert_close(model(x, noise=noise).last_hidden_state, wanted)
            torch.testing.assert_close(model(pixel_values=x, noise=noise).last_hidden_state, wanted)
        assert attention[0].layout.num_tokens == 17
        assert model.config.mask_ratio == 0.75
        assert model(x).last_hidden_state.shape[1] == 1 + 4


def test_mae_is_masked_again_after_an_error():
    model = tiny("ViTMAEModel")
    before = state_of(model)
    with pytest.raises(RuntimeError), capture(model):
        raise RuntimeError
    assert model.config.mask_ratio == 0.75
    assert state_of(model) == before


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_the_image_tower_of_a_model_of_images_and_texts(kind):
    model = tiny_clip(kind)
    name = f"{kind}VisionModel"
    tower = model.vision_model
    x = images()
    with torch.no_grad(), capture(model) as attention:
        model(pixel_values=x, input_ids=torch.tensor([[3, 4, 2]]))
    alone = captured(tower, x)
    assert len(attention) == 2
    for statistic, values in attention.statistics().items():
        torch.testing.assert_close(values, alone.statistics()[statistic])
    assert (attention[0].layout.has_cls, len(alone.pooling_attention)) == ((True, 0) if kind == "CLIP" else (False, 1))
    loaded = load_model(model)
    assert type(loaded.module).__name__.startswith(name[:5])
    assert loaded(x).last_hidden_state.shape[1] == attention[0].layout.num_tokens


def test_patches_of_several_grids_padded_to_one_number(publish):
    """SigLIP 2's NaFlex; each image has the statistics that it has alone."""
    sizes = {name: SIZES[name] for name in SIZES if name != "image_size"}
    config = transformers.Siglip2VisionConfig(**sizes, num_patches=16)
    model = randomize(transformers.Siglip2VisionModel(config)).eval()
    shapes = torch.tensor([[2, 6], [4, 4]])
    there = torch.arange(16) < shapes.prod(-1, keepdim=True)
    patches = torch.randn(2, 16, 192)
    with torch.no_grad():
        with capture(model) as together:
            model(patches, there.long(), shapes)
        assert [layout.grid for layout in together.layouts] == [(2, 6), (4, 4)]
        for image, count in enumerate((12, 16)):
            given = patches[image : image + 1, :count], torch.ones(1, count).long(), shapes[image : image + 1]
            with capture(model) as alone:
                model(*given)
            for statistic, values in alone.statistics().items():
                torch.testing.assert_close(
                    together.statistics()[statistic][image], values[0], atol=1e-4, rtol=1e-4, msg=statistic
                )
    patches_only = "takes patches that its own processor makes, not images: run it yourself, inside capture(model)"
    publish("o/n", None, {"config.json": config.to_dict()})
    for attempt, what in ((load_model, model), (load_model, "hf:o/n"), (require_loadable, "hf:o/n")):
        assert re.match(rf"Siglip2Vision\w+ {re.escape(patches_only)}$", refusal(attempt, what))


def test_a_subclass_and_a_model_of_ones_own_around_one():
    class Mine(transformers.ViTMAEModel):
        pass

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = randomize(Mine(config_of("ViTMAEModel"))).eval()
            self.head = nn.Linear(32, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.backbone(x).last_hidden_state[:, 0])

    model = Around()
    attention = captured(model)
    assert attention[0].layout.num_tokens == 17
    torch.testing.assert_close(attention.statistics(), captured(model.backbone).statistics())


def test_what_is_no_vision_transformer():
    small = {name: SIZES[name] for name in SIZES if name not in ("image_size", "patch_size")}
    bert = transformers.BertModel(transformers.BertConfig(**small, vocab_size=10))
    with pytest.raises(AttentionNotSeenError) as caught:
        capture(bert)
    instead = "use an isotropic Vision Transformer, such as DINOv2"
    assert message(caught) == f"BertModel of transformers takes input_ids, not images; {instead}"
    config = transformers.SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2])
    with pytest.raises(AttentionNotSeenError) as caught:
        load_model(transformers.SwinModel(config))
    assert message(caught) == (
        "SwinModel of transformers works in stages, on patch grids that change from one to the next, so its blocks "
        f"have no maps of one grid; {instead}"
    )


# Loading by name -----------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    """A local hub cache without anything in it, and nobody who answers."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(downloads, "why_no_answer", lambda address: "no network in tests")


COMMIT = "0" * 40


@pytest.fixture
def publish(tmp_path):
    """Puts a repository into the local hub cache: what a model saves, and more files (None: known to be absent)."""

    def put(name: str, model: Any, files: dict[str, Any] | None = None, **saving: Any) -> Path:
        folder = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        snapshot = folder / "snapshots" / COMMIT
        shutil.rmtree(folder, ignore_errors=True)
        snapshot.mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(COMMIT)
        if model is not None:
            model.save_pretrained(snapshot, **saving)
        for file, content in (
            {"preprocessor_config.json": None, "processor_config.json": None} | (files or {})
        ).items():
            absent = folder / ".no_exist" / COMMIT / file
            if content is None:
                absent.parent.mkdir(parents=True, exist_ok=True)
                absent.touch()
            else:
                (snapshot / file).write_text(content if isinstance(content, str) else json.dumps(content))
        return snapshot

    return put


def refusal(attempt: Callable[..., Any], *args: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        attempt(*args, **options)
    return message(caught)


TOWERS = [name for name in MODELS if name.endswith("Model")]


@pytest.mark.parametrize("name", TOWERS)
def test_a_repository_of_each_kind(name, publish):
    module = tiny(name)
    publish("someone/small", module)
    torch.manual_seed(1)  # nothing is left to chance
    loaded = load_model("hf:someone/small")
    assert not loaded.module.training
    assert (loaded.spec.name, loaded.spec.source, loaded.spec.paradigm) == ("small", "hf:someone/small", "unknown")
    assert loaded.layout == find_anatomy(module).layout((32, 32))
    found, wanted = captured(loaded).statistics(), captured(module).statistics()
    for statistic in wanted:
        torch.testing.assert_close(found[statistic], wanted[statistic])
    require_loadable("hf:someone/small")
    larger = load_model("hf:someone/small", img_size=(48, 64))
    assert larger.layout.grid == (6, 8)
    with torch.no_grad():  # without a capture too
        assert larger(images(1, 48, 64)).last_hidden_state.shape[1] == larger.layout.num_tokens


@pytest.mark.parametrize("name", [name for name in MODELS if not name.endswith("Model")])
def test_what_is_around_the_tower_is_left_out(name, publish):
    module = tiny(name)
    publish("someone/small", module)
    found, wanted = captured(load_model("hf:someone/small")).statistics(), captured(module).statistics()
    for statistic in wanted:
        torch.testing.assert_close(found[statistic], wanted[statistic])


def test_names_of_older_versions():
    """What the hub's oldest checkpoints are called, and how transformers 5 calls the same."""
    module = tiny("ViTModel")
    old = {
        name.replace("layers.", "encoder.layer.")
        .replace("attention.q_proj", "attention.attention.query")
        .replace("attention.k_proj", "attention.attention.key")
        .replace("attention.v_proj", "attention.attention.value")
        .replace("attention.o_proj", "attention.output.dense")
        .replace("mlp.fc1", "intermediate.dense")
        .replace("mlp.fc2", "output.dense"): value
        for name, value in module.state_dict().items()
    }
    with torch.device("meta"):
        outline = transformers.ViTModel(module.config)
    state = {f"vit.{name}": value for name, value in old.items()} | {"classifier.weight": torch.zeros(2, 2)}
    filled = transformers_models._filled(outline, state, "it")
    assert weights_sha256(filled) == weights_sha256(module)


def test_mae_by_name_is_not_masked(publish):
    module = tiny("ViTMAEForPreTraining")
    publish("someone/mae", module)
    loaded = load_model("hf:someone/mae")
    with torch.no_grad():
        once, again = (loaded(images()).last_hidden_state for _ in range(2))
    assert once.shape == (2, 17, 32)
    assert torch.equal(once, again)


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_a_model_of_images_and_texts_gives_its_image_tower(kind, publish):
    module = tiny_clip(kind)
    publish("someone/clip", module)
    loaded = load_model("hf:someone/clip")
    assert type(loaded.module).__name__ == f"{kind}VisionModel"
    assert not any("text" in name for name in loaded.module.state_dict())
    found, wanted = captured(loaded).statistics(), captured(module.vision_model).statistics()
    for statistic in wanted:
        torch.testing.assert_close(found[statistic], wanted[statistic])


def test_weights_in_several_files_and_in_half_precision(publish):
    module = tiny("Dinov2Model").half()
    snapshot = publish("someone/small", module, max_shard_size="20KB")
    assert len(list(snapshot.glob("*.safetensors"))) > 1
    loaded = load_model("hf:someone/small").module
    assert weights_sha256(loaded) == weights_sha256(module.float())
    (snapshot / "model.safetensors.index.json").write_text("{}")
    assert refusal(load_model, "hf:someone/small") == (
        f"{snapshot}/model.safetensors.index.json is damaged: it lists no weights; delete it to download it again"
    )


class Payload:
    ran = False

    def __reduce__(self):
        return setattr, (Payload, "ran", True)


def test_code_in_weights_is_not_run(publish):
    module = tiny("ViTModel")
    snapshot = publish("someone/small", module)
    (snapshot / "model.safetensors").unlink()
    torch.save(module.state_dict() | {"more": Payload()}, snapshot / "pytorch_model.bin")
    assert weights_sha256(load_model("hf:someone/small").module) == weights_sha256(module)
    assert not Payload.ran


def test_random_weights_and_weights_from_a_file(publish, tmp_path):
    module = tiny("ViTModel")
    snapshot = publish("someone/small", module)
    (snapshot / "model.safetensors").rename(tmp_path / "mine.safetensors")
    spec = load_model("hf:someone/small", pretrained=False).spec
    assert (spec.name, spec.paradigm, spec.source) == ("small-random", "random", "random")
    file = tmp_path / "mine.safetensors"
    for options in ({"model": "hf:someone/small", "checkpoint": file}, {"model": file, "arch": "hf:someone/small"}):
        loaded = load_model(**options)
        assert weights_sha256(loaded.module) == weights_sha256(module)
        assert (loaded.spec.name, loaded.spec.source) == ("mine", "file:mine.safetensors")
        require_loadable(**options)
    assert "no network in tests" in refusal(load_model, "hf:someone/small")
    assert "no network in tests" in refusal(require_loadable, "hf:someone/small")


def test_weights_that_do_not_fit(publish):
    module = tiny("ViTModel")
    snapshot = publish("someone/small", module)
    file = snapshot / "model.safetensors"
    (snapshot / "config.json").write_text(
        json.dumps(json.loads((snapshot / "config.json").read_text()) | {"num_hidden_layers": 3})
    )
    text = refusal(load_model, "hf:someone/small")
    assert re.match(rf"{re.escape(str(file))} does not fit ViTModel: 16 missing: \S+\.2\.\S+, .*, …$", text)
    publish(
        "someone/small",
        tiny("ViTModel", num_hidden_layers=2),
        {"config.json": module.config.to_dict() | {"num_hidden_layers": 1, "image_size": 64}},
    )
    text = refusal(load_model, "hf:someone/small")
    assert re.match(
        rf"{re.escape(str(file))} does not fit ViTModel: 16 unexpected: \S+\.1\.\S+, .*, …; "
        "1 of another shape: embeddings.position_embeddings$",
        text,
    )


def test_weights_that_transformers_stumbles_over(publish, monkeypatch):
    def stumble(*args: Any, **kwargs: Any) -> None:
        raise ValueError("no\nway")

    snapshot = publish("someone/small", tiny("ViTModel"))
    monkeypatch.setattr(transformers.ViTModel, "from_pretrained", stumble)
    assert refusal(load_model, "hf:someone/small") == f"{snapshot}/model.safetensors does not fit ViTModel: no way"


def test_repositories_that_hold_no_vision_transformer(publish):
    small = {name: SIZES[name] for name in SIZES if name not in ("image_size", "patch_size")}
    bert = transformers.BertConfig(**small, vocab_size=10, architectures=["BertModel"])
    swin = transformers.SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2])
    dinov2 = "use a Vision Transformer, such as hf:facebook/dinov2-base"
    version = transformers.__version__
    for config, text in (
        (bert.to_dict(), f"hf:o/n holds no vision model: its config.json is of a BertModel; {dinov2}"),
        (
            {"model_type": "no_such", "architectures": ["NoSuchModel"]},
            f"hf:o/n holds no vision model that transformers {version} knows: its config.json is of a NoSuchModel; "
            f"{dinov2}",
        ),
        ({}, f"hf:o/n holds no vision model that transformers {version} knows: its config.json is of a None; {dinov2}"),
        ({"architecture": "vit_tiny_patch16_224"}, "hf:o/n holds a model of timm's: write hf-hub:o/n"),
        ("[1]", "config.json is damaged: it is no JSON of a model; delete it to download it again"),
        ("{", "config.json is damaged: it is no JSON of a model; delete it to download it again"),
        (
            {"model_type": "vit", "hidden_size": "wide"},
            "transformers cannot build what the config.json of hf:o/n describes: ",
        ),
        (swin.to_dict(), "SwinModel of transformers works in stages"),
    ):
        publish("o/n", None, {"config.json": config})
        for attempt in (load_model, require_loadable):
            assert text in refusal(attempt, "hf:o/n")


def test_sizes_that_patches_do_not_tile_are_refused_before_the_download(publish):
    publish("o/n", None, {"config.json": tiny("ViTModel").config.to_dict()})
    for attempt in (load_model, require_loadable):
        assert refusal(attempt, "hf:o/n", img_size=33) == (
            "hf:o/n cannot take images of 33×33 pixels: it takes multiples of 8, such as 32; its own size is 32×32"
        )


def test_a_repository_that_cannot_be_asked_for():
    assert "no network in tests" in refusal(load_model, "hf:someone/absent")
    assert refusal(load_model, "hf:") == "'' is no repository of the Hugging Face hub: write owner/name"


def test_without_transformers_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    assert refusal(load_model, "hf:facebook/vit-mae-base") == (
        "hf:facebook/vit-mae-base needs the library transformers: pip install 'vitprobe[hf]'"
    )


# How images are prepared ---------------------------------------------------------------------------------------------

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
PROCESSORS = {
    "squashed": {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}, "resample": 2},
    "old": {"feature_extractor_type": "ViTFeatureExtractor", "size": 32, "resample": 3, "do_resize": True},
    "cropped": {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": 36},
        "crop_size": {"height": 32, "width": 32},
        "do_center_crop": True,
        "resample": 3,
    },
    "squashed and cropped": {
        "image_processor_type": "DeiTImageProcessor",
        "size": {"height": 37, "width": 37},
        "crop_size": {"height": 24, "width": 24},
        "do_center_crop": True,
        "resample": 3,
    },
    "not normalised": {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 32, "width": 32},
        "resample": 2,
        "do_normalize": False,
    },
}


@pytest.mark.parametrize("kind", PROCESSORS)
def test_images_are_prepared_as_the_repository_does(kind, publish):
    snapshot = publish("someone/small", tiny("ViTModel"), {"preprocessor_config.json": PROCESSORS[kind] | IMAGENET})
    processor = transformers.AutoImageProcessor.from_pretrained(snapshot, backend="pil")
    loaded = load_model("hf:someone/small")
    pixels = np.random.default_rng(0).integers(0, 255, (50, 61, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels).resize((75, 58), Image.Resampling.BICUBIC)
    wanted = processor(picture, return_tensors="pt")["pixel_values"][0]
    found = loaded.transform(picture)
    assert loaded.transform.size == tuple(wanted.shape[-2:])
    assert loaded.layout.grid == (wanted.shape[-2] // 8, wanted.shape[-1] // 8)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_without_settings_the_class_has_its_own_or_timms(publish):
    publish("someone/small", tiny("ViTModel"))
    assert load_model("hf:someone/small").transform.mean == (0.5, 0.5, 0.5)
    clip = load_model(tiny_clip()).transform
    assert clip.mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))
    assert (clip.size, clip.resize) == ((32, 32), (32, 32))

    class OwnConfig(transformers.CLIPVisionConfig):
        pass

    module = transformers.CLIPVisionModel(OwnConfig(**SIZES))
    assert load_model(module).transform.mean == pytest.approx((0.485, 0.456, 0.406))
    # transformers lends ViTMAE the processor of ViT, with another mean than MAE was trained with.
    mae = load_model(tiny("ViTMAEModel")).transform
    assert mae.mean == pytest.approx((0.485, 0.456, 0.406))
    assert mae.size == (32, 32)


def test_a_module_finds_the_settings_of_where_it_came_from(publish, tmp_path):
    settings = PROCESSORS["cropped"] | IMAGENET
    snapshot = publish("someone/small", tiny("Dinov2Model", image_size=64), {"preprocessor_config.json": settings})
    for place in (str(snapshot), "someone/small"):
        module = transformers.Dinov2Model.from_pretrained(snapshot)
        module.config._name_or_path = place
        loaded = load_model(module)
        assert loaded.module is module
        assert (loaded.transform.size, loaded.transform.resize) == ((32, 32), (36, 36))
        assert load_model(module).transform == loaded.transform
        assert load_model(module, img_size=64).transform.size == (64, 64)


def test_settings_that_cannot_be_had_or_read(publish, tmp_path):
    snapshot = publish("someone/small", tiny("ViTModel"), {"preprocessor_config.json": "{"})
    text = refusal(load_model, "hf:someone/small")
    assert text.startswith(f"{snapshot} says how to prepare images, but not so that it can be: ")
    (snapshot / "preprocessor_config.json").unlink()
    # Not known to be absent: other images than the model's own would be another measurement.
    assert "no network in tests" in refusal(load_model, "hf:someone/small")


def test_a_share_gives_the_size_back():
    sides = [(side, resized) for side in range(1, 700, 7) for resized in range(side, 900, 11)]
    assert all(math.floor(side / _share(side, resized)) == resized for side, resized in sides)
    assert _share(224, 256) == 0.875
