"""Every way of naming a model, and every mistake in it as one line."""

from __future__ import annotations

import hashlib
import inspect
import json
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data import resolve_model_data_config
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vitprobe.errors import AttentionNotSeenError, UserError
from vitprobe.hooks.capture import capture
from vitprobe.layout import TokenLayout
from vitprobe.models import downloads, loading, timm_models
from vitprobe.models.building import architecture_of, build, spec_of
from vitprobe.models.identity import weights_sha256
from vitprobe.models.loaded import LoadedModel
from vitprobe.models.loading import load_model, require_loadable
from vitprobe.models.registry import find_spec

CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(downloads, "why_no_answer", lambda address: "no network in tests")


def nano(seed: int = 0, **options) -> VisionTransformer:
    torch.manual_seed(seed)
    arguments = {"img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 12, "num_heads": 4, "num_classes": 0}
    return VisionTransformer(**{**arguments, **options})


@pytest.fixture
def bundled(tmp_path, monkeypatch):
    """A folder with weights of our own in place of the shipped ones."""
    folder = tmp_path / "bundled"
    folder.mkdir()
    monkeypatch.setattr(loading, "BUNDLED_FOLDER", folder)
    for name, classes in (("mae_vit_nano", 0), ("supervised_vit_nano", 10)):
        state = nano(7, num_classes=classes).state_dict()
        save_file({key: tensor.half() for key, tensor in state.items()}, folder / f"{name}.safetensors")
    return folder


def refusal(*args, **options) -> str:
    with pytest.raises(UserError) as caught:
        load_model(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Bundled -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "classes"), [("mae_vit_nano", 0), ("supervised_vit_nano", 10)])
def test_bundled(bundled, name, classes):
    model = load_model(name)
    assert isinstance(model, LoadedModel)
    assert model.spec is find_spec(name)
    assert not any(module.training for module in model.module.modules())
    assert {tensor.dtype for tensor in model.module.state_dict().values()} == {torch.float32}
    expected = nano(7, num_classes=classes).state_dict()
    for key, tensor in model.module.state_dict().items():
        assert torch.equal(tensor, expected[key].half().float()), key
    assert (model.layout.grid, model.layout.has_cls, model.layout.patch_size) == ((8, 8), True, (4, 4))
    config = resolve_model_data_config(model.module)
    assert config["input_size"] == (3, 32, 32)
    assert (config["mean"], config["std"]) == (CIFAR10_MEAN, CIFAR10_STD)
    assert (config["interpolation"], config["crop_pct"]) == ("bicubic", 1.0)
    assert model.transform.size == (32, 32)
    assert (model.transform.mean, model.transform.std) == (CIFAR10_MEAN, CIFAR10_STD)
    assert model.module(torch.zeros(1, 3, 32, 32)).shape == (1, classes or 128)


def test_bundled_at_another_size(bundled):
    model = load_model("mae_vit_nano", img_size=(64, 48))
    assert model.layout.grid == (16, 12)
    assert model.transform.size == (64, 48)
    assert resolve_model_data_config(model.module)["input_size"] == (3, 64, 48)
    assert model.module(torch.zeros(1, 3, 64, 48)).shape == (1, 128)


@pytest.mark.parametrize("size", [None, 64])
def test_bundled_with_random_weights(size, monkeypatch, tmp_path):
    monkeypatch.setattr(loading, "BUNDLED_FOLDER", tmp_path)  # needs no file
    torch.manual_seed(5)
    first = load_model("supervised_vit_nano", pretrained=False, img_size=size)
    torch.manual_seed(5)
    second = load_model("supervised_vit_nano", pretrained=False, img_size=size)
    assert weights_sha256(first.module) == weights_sha256(second.module)
    assert weights_sha256(first.module) != weights_sha256(load_model("supervised_vit_nano", pretrained=False).module)
    assert first.spec.name == "supervised_vit_nano-random"
    assert (first.spec.paradigm, first.spec.method, first.spec.source) == ("random", "random", "random")
    assert first.spec.architecture == "vit_nano_patch4_32"
    assert first.module(torch.zeros(1, 3, size or 32, size or 32)).shape == (1, 10)
    assert not first.module.training


def test_the_random_model_is_always_the_same(monkeypatch, tmp_path):
    monkeypatch.setattr(loading, "BUNDLED_FOLDER", tmp_path)  # needs no file
    torch.manual_seed(5)
    first = load_model("random_vit_nano")
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3)), "the global seed is the caller's"
    assert weights_sha256(first.module) == weights_sha256(load_model("random_vit_nano").module)
    assert (first.spec.name, first.spec.paradigm, first.spec.source) == ("random_vit_nano", "random", "seed:0")
    assert not first.module.training
    torch.manual_seed(0)
    unnamed = load_model("mae_vit_nano", pretrained=False)
    assert weights_sha256(first.module) == weights_sha256(unnamed.module)
    torch.manual_seed(5)
    other = load_model("random_vit_nano", pretrained=False)
    assert weights_sha256(other.module) != weights_sha256(first.module)
    assert (other.spec.name, other.spec.source) == ("random_vit_nano-random", "random")
    assert load_model("random_vit_nano", img_size=48).layout.grid == (12, 12)
    require_loadable("random_vit_nano")


def test_bundled_architecture_has_no_weights_of_its_own():
    assert refusal("vit_nano_patch4_32") == (
        "vit_nano_patch4_32 is an architecture without weights: use it as --arch for a checkpoint file"
    )


SHIPPED = Path(loading.__file__).parent / "bundled"


@pytest.mark.parametrize("name", sorted(path.stem for path in SHIPPED.glob("*.safetensors")))
def test_the_shipped_files_load(name):
    model = load_model(name)
    assert model.module(torch.zeros(1, 3, 32, 32)).isfinite().all()
    assert (SHIPPED / f"{name}.safetensors").stat().st_size < 6e6
    assert json.loads((SHIPPED / f"{name}.json").read_text())


# timm ----------------------------------------------------------------------------------------------------------------


def test_a_timm_model_with_random_weights():
    model = load_model("vit_tiny_patch16_224", pretrained=False, img_size=64)
    assert model.spec.name == "augreg_vit_t-random"
    assert model.layout.grid == (4, 4)
    assert model.transform.mean == (0.5, 0.5, 0.5)
    other = load_model("deit_tiny_distilled_patch16_224.fb_in1k", pretrained=False)
    assert other.layout.num_distillation == 1
    unlisted = load_model("vit_tiny_patch16_384", pretrained=False, img_size=32)
    assert unlisted.spec.name == "vit_tiny_patch16_384-random"
    assert unlisted.spec.normalisation == "inception"


def test_a_timm_model_that_is_not_in_the_registry(tmp_path, monkeypatch):
    state = timm.create_model("vit_tiny_patch16_384", img_size=384).state_dict()
    save_file(state, tmp_path / "model.safetensors")
    monkeypatch.setattr(timm_models, "fetch_from_hub", lambda repository, files: tmp_path / "model.safetensors")
    model = load_model("vit_tiny_patch16_384", img_size=64)
    assert model.spec.source == "timm:vit_tiny_patch16_384.augreg_in21k_ft_in1k"
    assert (model.spec.paradigm, model.spec.licence) == ("unknown", "apache-2.0")
    assert model.layout.grid == (4, 4)


def test_a_timm_model_from_a_plain_address(tmp_path, monkeypatch):
    """I-JEPA's file is a training checkpoint at an address; a small architecture stands in for its giants."""
    config = timm.get_pretrained_cfg("vit_tiny_patch16_224.augreg_in21k")
    assert config is not None
    for name, value in (("hf_hub_id", None), ("url", "https://host/weights.pth"), ("custom_load", False)):
        monkeypatch.setattr(config, name, value)
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda name: config)
    module = timm.create_model("vit_tiny_patch16_224.augreg_in21k")
    encoder = {f"module.{name}": tensor for name, tensor in module.state_dict().items()}
    target = {name: torch.zeros_like(tensor) for name, tensor in encoder.items()}
    torch.save({"target_encoder": target, "encoder": encoder, "epoch": 1}, tmp_path / "weights.pth")
    monkeypatch.setattr(timm_models, "fetch_from_address", lambda address, name: tmp_path / "weights.pth")
    model = load_model("vit_tiny_patch16_224.augreg_in21k")
    assert weights_sha256(model.module) == weights_sha256(module)


def test_architectures_without_weights():
    assert refusal("vit_base_patch16_xp_224") == (
        "timm has no weights for vit_base_patch16_xp_224: give some with --checkpoint FILE --arch "
        "vit_base_patch16_xp_224"
    )


def test_unknown_models_name_the_nearest():
    assert refusal("mae_vitb").startswith("unknown model 'mae_vitb': did you mean mae_vit_b, ")
    assert "vit_base_patch16_224" in refusal("vit_bas_patch16_224")
    assert "deit3_base_patch16_224" in refusal("deit3_bass_patch16_224.fb_in1k")
    assert refusal("qqqq") == "unknown model 'qqqq': vitprobe models lists what there is"
    assert refusal("") == "unknown model '': vitprobe models lists what there is"


def test_a_wrong_tag_names_those_that_exist():
    assert refusal("deit_tiny_patch16_224.mae") == (
        "timm's deit_tiny_patch16_224 has no weights tagged 'mae': it has fb_in1k"
    )
    assert (
        refusal("vit_base_patch16_xp_224.a") == "timm's vit_base_patch16_xp_224 has no weights tagged 'a': it has none"
    )


def test_models_without_captured_attention_are_refused_before_any_download():
    for name in ("resnet18", "hiera_tiny_224", "crossvit_tiny_240"):
        with pytest.raises(AttentionNotSeenError):
            load_model(name)


# Image sizes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (225, "225×225 pixels: it takes multiples of 16, such as 224"),
        (3, "3×3 pixels: it takes multiples of 16, such as 16"),
        (0, "0×0 pixels: it takes multiples of 16, such as 16"),
        (-16, "-16×-16 pixels: it takes multiples of 16, such as 16"),
        ((224, 230), "224×230 pixels: it takes multiples of 16, such as 224"),
    ],
)
def test_sizes_that_patches_do_not_tile(size, text):
    for pretrained in (True, False):
        assert refusal("vit_tiny_patch16_224", img_size=size, pretrained=pretrained) == (
            f"vit_tiny_patch16_224 cannot take images of {text}; its own size is 224×224"
        )


def test_sizes_of_models_whose_patches_are_not_square():
    module = nano(patch_size=(4, 8), depth=1)
    with pytest.raises(
        UserError, match=r"cannot take .* 30×32 pixels: it takes multiples of 4 \(height\), 8 \(width\)"
    ):
        load_model(module, img_size=(30, 32))


# Modules -------------------------------------------------------------------------------------------------------------


def test_a_module_is_wrapped_as_it_is():
    module = nano(depth=1).train()
    model = load_model(module)
    assert model.module is module
    assert module.training
    assert (model.spec.name, model.spec.paradigm, model.spec.source) == ("VisionTransformer", "unknown", "module")
    assert model.layout.grid == (8, 8)
    assert model.transform.size == (32, 32)
    assert load_model(model) is model
    assert load_model(model, img_size=32) is model


def test_a_module_for_another_size():
    module = nano(depth=1)
    assert load_model(module, img_size=32).layout.grid == (8, 8)
    assert refusal(module, img_size=64) == (
        "VisionTransformer is built for images of 32×32 pixels: for 64×64, load it by name with img_size, "
        "or build it so"
    )
    dynamic = load_model(nano(depth=1, dynamic_img_size=True))
    larger = load_model(dynamic, img_size=(64, 32))
    assert larger.module is dynamic.module
    assert larger.layout.grid == (16, 8)
    assert larger.transform.size == (64, 32)


def test_a_module_of_timms_brings_its_config():
    spec = load_model(timm.create_model("deit_tiny_patch16_224")).spec
    assert (spec.name, spec.architecture) == ("deit_tiny_patch16_224", "deit_tiny_patch16_224")
    assert (spec.normalisation, spec.licence) == ("imagenet", "apache-2.0")
    module = nano(depth=1)
    module.pretrained_cfg = "something of their own"  # type: ignore[assignment]
    assert spec_of(module, "", "module").architecture == "VisionTransformer"


def test_modules_that_cannot_be_probed():
    with pytest.raises(AttentionNotSeenError, match="no list of alike transformer blocks was found in Linear"):
        load_model(nn.Linear(2, 2))


@pytest.mark.parametrize("options", [{"pretrained": False}, {"checkpoint": "a.pth"}, {"arch": "mae_vit_b"}])
def test_options_that_are_for_names_only(options):
    assert refusal(nano(depth=1), **options) == (
        "checkpoint, arch and pretrained are for models by name: this one is built already"
    )


def test_a_compiled_module_is_the_module():
    module = nano(depth=1)
    assert load_model(torch.compile(module)).module is module  # type: ignore[arg-type]


def test_a_module_that_only_wraps_a_model():
    wrapper = nn.Module()
    wrapper.module = nano(depth=1)
    for module in (nn.DataParallel(nano(depth=1)), wrapper):
        assert refusal(module) == (
            f"{type(module).__name__} wraps the model and may run copies of it, whose attention cannot be seen; pass "
            f"model.module, and call that inside the capture"
        )


def test_layout_and_blocks_are_for_modules():
    layout = TokenLayout((8, 8), has_cls=True, patch_size=(4, 4))
    assert refusal("mae_vit_nano", layout=layout) == (
        "layout and blocks are for a module of your own: of a model by name they are known"
    )
    module = nano(depth=1)
    loaded = load_model(module, layout=replace(layout, num_registers=0))
    assert loaded.layout == layout and load_model(loaded, layout=layout).layout == layout
    assert refusal(module, layout=replace(layout, num_registers=4)) == (
        "the layout given has 69 tokens (5 prefix + 8x8 patches), but VisionTransformer makes 65 of images of 32×32 "
        "pixels, 1 of them the same for every image: correct the layout, or leave it out"
    )


def test_a_word_on_which_registers_are_other_teachers_cls():
    """RADIO's prefix is the [cls] of each teacher and registers; timm calls all but the first registers."""
    module = nano(depth=1, reg_tokens=7)
    layout = TokenLayout((8, 8), True, num_distillation=2, num_registers=5, patch_size=(4, 4))
    loaded = load_model(module, layout=layout)
    with torch.no_grad(), capture(loaded) as attention:
        loaded(torch.zeros(1, 3, 32, 32))
    assert attention.layout == layout
    with pytest.raises(UserError, match="layout and blocks are for a bare module"):
        capture(loaded, layout=layout)


@pytest.mark.parametrize("name", [None, 3])
def test_what_is_no_model_at_all(name):
    with pytest.raises(UserError) as caught:
        inspect.unwrap(load_model)(name)  # without the tests' own check of types
    assert str(caught.value) == (f"a model is a name, a checkpoint file, an nn.Module or a LoadedModel, not {name}")


@pytest.mark.parametrize("size", [32.0, "32", (32,), (32, 32.0), (1, 2, 3), True, [32, 32]])
def test_image_sizes_of_another_kind(size):
    for attempt in (load_model, require_loadable):
        with pytest.raises(UserError) as caught:
            inspect.unwrap(attempt)("mae_vit_nano", img_size=size)
        assert str(caught.value) == f"img_size is one side in whole pixels (224) or (height, width), not {size!r}"


# What can be known before ---------------------------------------------------------------------------------------------


def test_what_can_be_known_without_the_weights(file, tmp_path):
    """Each refusal is that of `load_model`, word for word."""
    for options in (
        {"model": "mae_vitb"},
        {"model": "mae_vit_b"},
        {"model": "ijepa_vit_h"},
        {"model": "vit_tiny_patch16_384"},
        {"model": "vit_base_patch16_xp_224"},
        {"model": "vit_nano_patch4_32"},
        {"model": "hf-hub:owner/absent"},
        {"model": "resnet50"},
        {"model": "none.pth", "arch": "mae_vit_b"},
        {"model": "mae_vit_nano", "checkpoint": tmp_path / "none.pth"},
        {"model": "mae_vit_nano", "checkpoint": tmp_path},
        {"model": file},
        {"model": file, "arch": "mae_vit_q"},
        {"model": "mae_vit_nano", "img_size": 33},
        {"model": "mae_vit_b", "img_size": 225},
        {"model": "mae_vit_b", "img_size": 0},
        {"model": "mae_vit_nano", "checkpoint": file, "img_size": -4},
    ):
        with pytest.raises(UserError) as caught:
            require_loadable(**options)
        name = options.pop("model")
        assert str(caught.value) == refusal(name, **options)


def test_what_can_be_loaded_as_far_as_one_can_know(file, monkeypatch):
    require_loadable("mae_vit_nano", img_size=64)
    require_loadable(file, arch="mae_vit_nano")
    require_loadable("mae_vit_nano", checkpoint=file)
    monkeypatch.setattr(downloads, "why_no_answer", lambda address: "")
    for name in ("mae_vit_b", "ijepa_vit_h", "vit_tiny_patch16_384"):
        require_loadable(name)


# Weights that mean nothing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("inf"), "infinity")])
def test_weights_that_are_not_finite(bundled, value, word):
    state = {key: tensor.half() for key, tensor in nano().state_dict().items()}
    state["blocks.7.attn.qkv.weight"][5, 3] = value
    state["norm.bias"][0] = value
    save_file(state, bundled / "mae_vit_nano.safetensors")
    assert refusal("mae_vit_nano") == (
        f"the weights of mae_vit_nano hold {word}, first in blocks.7.attn.qkv.weight (block 7): its attention means "
        "nothing"
    )
    module = nano(depth=1)
    with torch.no_grad():
        module.norm.bias[1] = value
    assert refusal(module) == (
        f"the weights of VisionTransformer hold {word}, first in norm.bias: its attention means nothing"
    )


def test_modules_without_memory():
    with torch.device("meta"):
        module = nano(depth=1)
    assert refusal(module) == "VisionTransformer has no weights: cls_token is on the meta device"


# Checkpoint files ----------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.v2.pth"
    torch.save({"model": nano(3).state_dict()}, path)
    return path


def test_a_file_with_its_architecture(file):
    for name in (file, str(file)):
        model = load_model(name, arch="mae_vit_nano")
        assert weights_sha256(model.module) == weights_sha256(nano(3))
        assert not model.module.training
        assert (model.spec.name, model.spec.source) == ("mine", "file:mine.v2.pth")
        assert (model.spec.paradigm, model.spec.licence) == ("unknown", "")
        assert (model.spec.architecture, model.spec.normalisation) == ("vit_nano_patch4_32", "cifar10")
    assert load_model(file, arch="vit_nano_patch4_32", img_size=64).layout.grid == (16, 16)


def test_a_named_model_from_a_file(file):
    model = load_model("mae_vit_nano", checkpoint=file)
    assert weights_sha256(model.module) == weights_sha256(nano(3))
    assert (model.spec.name, model.spec.paradigm, model.spec.source) == ("mae_vit_nano", "MIM", "file:mine.v2.pth")
    other = load_model("supervised_vit_nano", checkpoint=file, arch="mae_vit_nano")
    assert other.spec.paradigm == "unknown", "with arch, the name says nothing of the weights"


def test_a_file_with_a_head_keeps_it(tmp_path):
    torch.save(nano(3, num_classes=6).state_dict(), tmp_path / "file.pth")
    model = load_model(tmp_path / "file.pth", arch="mae_vit_nano")
    assert model.module(torch.zeros(1, 3, 32, 32)).shape == (1, 6)


def test_a_file_in_timms_layout(tmp_path):
    module = timm.create_model("deit_tiny_patch16_224", num_classes=5)
    torch.save({"model": module.state_dict()}, tmp_path / "file.pth")
    model = load_model(tmp_path / "file.pth", arch="deit_vit_t", img_size=64)
    assert model.layout.grid == (4, 4)
    assert model.transform.mean == pytest.approx((0.485, 0.456, 0.406))
    state = model.module.state_dict()
    assert torch.equal(state["head.weight"], module.state_dict()["head.weight"])


def test_a_fine_tuned_mae_has_its_norm_after_the_pooling(tmp_path):
    source = nano(3, global_pool="avg", num_classes=4)
    assert "fc_norm.weight" in source.state_dict()
    torch.save({"model": source.state_dict()}, tmp_path / "file.pth")
    model = load_model(tmp_path / "file.pth", arch="mae_vit_nano")
    assert weights_sha256(model.module) == weights_sha256(source)
    image = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(model.module(image), source.eval()(image))


def test_files_and_names_that_contradict_each_other(file, tmp_path):
    assert refusal(file) == (
        f"{file} needs the name of its architecture: --arch with an alias (mae_vit_b) or a timm name "
        "(vit_base_patch16_224)"
    )
    assert refusal(file, checkpoint=file, arch="mae_vit_b") == (
        f"{file} and {file} are both files: give one, and its architecture (--arch NAME)"
    )
    assert refusal(file, arch="mae_vit_nano", pretrained=False) == (
        f"random weights (pretrained=False) and those of {file} exclude each other"
    )
    assert refusal("mae_vit_nano", arch="mae_vit_b") == (
        "arch is for a checkpoint file: leave it out, or give the weights of mae_vit_nano with --checkpoint FILE"
    )
    assert refusal("none.pth") == "there is no checkpoint file none.pth"
    assert refusal("mae_vit_nano", checkpoint=tmp_path / "none.pth").startswith("there is no checkpoint file ")
    assert refusal("owner/name") == (
        "there is no file owner/name; for a repository of the Hugging Face hub write hf:owner/name (a model of "
        "transformers) or hf-hub:owner/name (of timm)"
    )
    assert refusal(file, arch="mae_vit_q").startswith("unknown model 'mae_vit_q': did you mean ")
    assert refusal(file, arch="deit_vit_t").startswith(
        f"{file} does not fit deit_tiny_patch16_224: its patches are 4×4 "
    )


def test_a_folder_called_like_a_model_does_not_hide_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("mae_vit_b", "vit_tiny_patch16_224"):
        (tmp_path / name).mkdir()
        assert "no network in tests" in refusal(name)
    (tmp_path / "mine").write_bytes(b"")
    assert refusal("mine").startswith("mine needs the name of its architecture")


def test_architecture_of():
    assert architecture_of("mae_vit_b") == "vit_base_patch16_224.mae"
    assert architecture_of("mae_vit_nano") == architecture_of("vit_nano_patch4_32") == "vit_nano_patch4_32"
    assert architecture_of("vit_base_patch16_224") == "vit_base_patch16_224"
    assert build("vit_nano_patch4_32").num_classes == 0


# The digest ----------------------------------------------------------------------------------------------------------


def test_weights_sha256_is_the_weights_and_nothing_else():
    module = nano(depth=1)
    digest = weights_sha256(module)
    assert digest == weights_sha256(nano(depth=1)) == weights_sha256(module.train())
    assert digest != weights_sha256(module.half())
    assert digest != weights_sha256(nano(1, depth=1))
    linear = nn.Linear(2, 3, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.arange(6.0).view(3, 2))
    header = b'["weight", "torch.float32", [3, 2]]'
    expected = hashlib.sha256(b"%d:" % len(header) + header + linear.weight.detach().numpy().tobytes()).hexdigest()
    assert weights_sha256(linear) == expected
    linear.weight = nn.Parameter(linear.weight.detach().t().contiguous().t())  # the same numbers, laid out otherwise
    assert weights_sha256(linear) == expected
    linear.register_buffer("a", torch.tensor(True))
    assert weights_sha256(linear) != expected


def test_state_that_is_no_tensor_is_passed_over():
    class WithExtra(VisionTransformer):
        def get_extra_state(self):
            return {"step": 3}

    torch.manual_seed(0)
    module = WithExtra(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2)
    assert weights_sha256(load_model(module).module)
