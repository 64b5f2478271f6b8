"""Which of several sets of weights is taken, and under which names files of ordinary trainers keep them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import timm
import torch
from click.testing import CliRunner
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from vitprobe.cli.group import main
from vitprobe.errors import UserError
from vitprobe.models.checkpoints import OTHER_ARCHITECTURE, load_into, open_checkpoint
from vitprobe.models.entries import BUNDLED_ARCHITECTURES
from vitprobe.models.identity import weights_sha256
from vitprobe.models.loaded import LoadedModel
from vitprobe.models.loading import load_model, require_loadable
from vitprobe.probing import saved

ARCH = "vit_micro"
MICRO = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
State = dict[str, Tensor]


def nano(seed: int, **options) -> VisionTransformer:
    torch.manual_seed(seed)
    return VisionTransformer(**{**MICRO, "num_classes": 0, **options})


@pytest.fixture(autouse=True)
def micro(monkeypatch):
    """A small architecture among the bundled ones: loading many files stays fast."""
    monkeypatch.setitem(BUNDLED_ARCHITECTURES, ARCH, MICRO)


GOOD, OTHER = nano(1).state_dict(), nano(2).state_dict()
HEAD = {"mlp.0.weight": torch.zeros(4, 4), "last_layer.weight": torch.zeros(9, 4)}


def under(prefix: str, state: State) -> State:
    return {f"{prefix}{name}": value for name, value in state.items()}


def within(word: str, state: State) -> State:
    return {re.sub(r"(blocks\.\d+\.)", rf"\1{word}.", name): value for name, value in state.items()}


def chunked(state: State, size: int = 2, anew: bool = False) -> State:
    """Blocks in chunks, numbered through all of them as DINOv2 does, or anew in each."""

    def place(found: re.Match[str]) -> str:
        number = int(found[1])
        return f"blocks.{number // size}.{number % size if anew else number}."

    return {re.sub(r"^blocks\.(\d+)\.", place, name): value for name, value in state.items()}


def save(content: object, path: Path) -> Path:
    torch.save(content, path)
    return path


@dataclass
class Loaded:
    module: nn.Module
    remarks: tuple[str, ...]


def load(content: object, tmp_path: Path, weights_key: str | None = None) -> Loaded:
    """As `load_model` loads a file, but fast: without an outline of the architecture."""
    path = save(content, tmp_path / "file.pth")
    found, module = open_checkpoint(path, key=weights_key).named(GOOD), nano(3)
    left = load_into(module, found.state, source=str(path), hint=OTHER_ARCHITECTURE + found.choice)
    return Loaded(module, found.remarks + left)


def refusal(content: object, tmp_path: Path, **options) -> str:
    with pytest.raises(UserError) as caught:
        load(content, tmp_path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{tmp_path / 'file.pth'} ")


def is_good(model: Loaded | LoadedModel) -> bool:
    digests = [weights_sha256(module) for module in (model.module, nano(1), nano(2))]
    assert digests[0] in digests[1:]
    return digests[0] == digests[1]


def ema_pytorch() -> State:
    """What lucidrains' EMA saves."""
    counts = {"initted": torch.tensor(True), "step": torch.tensor(7)}
    return {**under("online_model.", OTHER), **under("ema_model.", GOOD), **counts}


SETS = {
    "timm": {"epoch": 3, "arch": "x", "state_dict": OTHER, "state_dict_ema": GOOD, "optimizer": {"state": {}}},
    "DeiT": {"model": OTHER, "model_ema": GOOD, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}},
    "torchvision": {"model": OTHER, "model_ema": {**under("module.", GOOD), "n_averaged": torch.tensor(3)}},
    "DINO": {"student": under("module.backbone.", OTHER), "teacher": under("backbone.", GOOD), "epoch": 2},
    "DINO, the teacher first": {"teacher": under("backbone.", GOOD), "student": under("backbone.", OTHER)},
    "I-JEPA": {"encoder": under("module.", OTHER), "predictor": {}, "target_encoder": under("module.", GOOD)},
    "BasicSR": {"params": OTHER, "params_ema": GOOD},
    "SWA": {"state_dict": OTHER, "swa_state_dict": GOOD},
    "an averaged model": {"net": OTHER, "swa_model": AveragedModel(nano(1)).state_dict()},
    "a shadow": {"model": OTHER, "ema": {"decay": 0.99, "shadow": GOOD}},
    "in a holder": {"model": {"student": OTHER, "teacher": GOOD}},
    "Lightning's averaging": {
        "state_dict": GOOD,
        "current_model_state": OTHER,
        "averaging_state": {"n_averaged": torch.tensor(3)},
    },
    "MMEngine, which exchanges the two": {"message_hub": {}, "state_dict": GOOD, "ema_state_dict": OTHER},
    "BYOL": {"online_network": GOOD, "target_network": OTHER},
    "camel case": {"model": OTHER, "modelEMA": GOOD},
    "lightly DINO": {
        **under("student_backbone.vit.", OTHER),
        **under("student_head.", HEAD),
        **under("teacher_backbone.vit.", GOOD),
        **under("teacher_head.", HEAD),
    },
    "Lightning DINO": {"state_dict": {**under("student.", OTHER), **under("teacher.", GOOD)}, "callbacks": {}},
    "MoCo v2": {"state_dict": {**under("module.encoder_q.", GOOD), **under("module.encoder_k.", OTHER)}},
    "MoCo v2, the keys first": {**under("module.encoder_k.", OTHER), **under("module.encoder_q.", GOOD)},
    "lightly MoCo": {**under("backbone_momentum.", OTHER), **under("backbone.", GOOD)},
    "ALBEF": {**under("visual_encoder_m.", OTHER), **under("visual_encoder.", GOOD)},
    "lightly MSN": {**under("anchor_backbone.", OTHER), **under("backbone.", GOOD)},
    "byol-pytorch": {**under("online_encoder.net.", GOOD), **under("target_encoder.net.", OTHER)},
    "JEPA in one dictionary": {**under("encoder.", OTHER), **under("target_encoder.", GOOD)},
    "ema_model beside model": {**under("model.", OTHER), **under("ema_model.", GOOD)},
    "model_ema beside the bare model": {**OTHER, **under("model_ema.module.", GOOD)},
    "ema-pytorch": ema_pytorch(),
}


@pytest.mark.parametrize("kind", SETS)
def test_averaged_weights_are_taken_as_the_methods_own_code_takes_them(kind, tmp_path):
    model = load(SETS[kind], tmp_path)
    assert is_good(model)
    (remark,) = model.remarks
    found = re.fullmatch(r"took the weights (.+); the file also holds (.+) \(choose with --weights-key (.+)\)", remark)
    if found is None:
        assert "also holds one without a key" in remark
        return
    assert found[3] in found[2].split(", ")
    # The advice is followed: the other set comes, and the one that was taken can be asked for by its name.
    assert not is_good(load(SETS[kind], tmp_path, weights_key=found[3]))
    again = load(SETS[kind], tmp_path, weights_key=found[1])
    assert is_good(again)
    assert not any("choose with" in line for line in again.remarks)


@pytest.mark.parametrize("kind", ["timm", "DeiT"])
def test_timm_takes_the_same(kind, tmp_path):
    save(SETS[kind], tmp_path / "file.pth")
    module = nano(3)
    timm.models.load_checkpoint(module, str(tmp_path / "file.pth"), use_ema=True, weights_only=False)
    assert weights_sha256(module) == weights_sha256(load(SETS[kind], tmp_path).module)


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ({"a": {"teacher": {**under("backbone.", GOOD), **under("head.", HEAD)}}, "b": OTHER}, "a.teacher"),
        ({"a": {"teacher": {**under("backbone.", GOOD), **under("head.", HEAD)}}, "b": OTHER}, "teacher"),
        ({"teacher": under("backbone.", GOOD), "student": OTHER}, "teacher.backbone"),
        ({"state_dict": {**under("x.vit.", GOOD), **under("y.vit.", OTHER)}}, "x"),
        ({"state_dict": {**under("x.vit.", GOOD), **under("y.vit.", OTHER)}}, "state_dict.x.vit"),
        ({**under("module.x.", GOOD), **under("module.y.", OTHER)}, "x"),
        ({"my.own": GOOD, "model": OTHER}, "my.own"),
    ],
)
def test_a_key_says_which(content, key, tmp_path):
    assert is_good(load(content, tmp_path, weights_key=key))


def test_a_key_that_is_not_there_names_those_that_are(tmp_path):
    said = "holds no weights under the key swa: "
    assert refusal(SETS["timm"], tmp_path, weights_key="swa") == f"{said}there are state_dict, state_dict_ema"
    assert refusal(SETS["lightly DINO"], tmp_path, weights_key="swa") == (
        f"{said}there are student_backbone.vit, teacher_backbone.vit"
    )
    assert refusal(GOOD, tmp_path, weights_key="swa") == f"{said}it has one set, without a key; leave --weights-key out"
    assert "optimizer" not in refusal(SETS["DeiT"], tmp_path, weights_key="swa")
    assert load(GOOD, tmp_path).remarks == ()


def test_where_no_rule_chooses_the_message_says_how(tmp_path):
    content = {"image": GOOD, "other": OTHER}
    assert (
        refusal(content, tmp_path) == "holds several sets of weights (image, other): choose one with --weights-key KEY"
    )
    assert is_good(load(content, tmp_path, weights_key="image"))


def test_a_set_that_does_not_fit_names_the_others(tmp_path):
    """A teacher that is another, larger model: distillation."""
    teacher = nano(3, depth=5).state_dict()
    text = refusal({"student": GOOD, "teacher": teacher}, tmp_path)
    assert text.endswith("; the file also holds student (--weights-key student)")
    assert is_good(load({"student": GOOD, "teacher": teacher}, tmp_path, weights_key="student"))


def test_averaged_weights_that_cannot_be_read_are_said(tmp_path):
    """torch_ema and diffusers keep them in a list, without names; others pickle the whole model."""
    content = {"model": GOOD, "ema": {"decay": 0.9, "shadow_params": list(OTHER.values())}}
    (remark,) = load(content, tmp_path).remarks
    assert "averaged ones under ema are without names" in remark
    (remark,) = load({"model": GOOD, "ema": nn.Linear(2, 2)}, tmp_path).remarks
    assert "averaged ones under ema are a pickled object" in remark


def test_what_accompanies_weights_is_no_set_of_its_own(tmp_path):
    content = {"model": GOOD, "ema": {"decay": torch.tensor(0.9)}, "optimizer": {"exp_avg": torch.zeros(3)}}
    model = load(content, tmp_path)
    assert is_good(model)
    assert model.remarks == ()


def test_keys_are_for_files(tmp_path):
    for name, text in (
        (
            "random_vit_nano",
            "weights_key is for a checkpoint file: leave it out, or give the weights of random_vit_nano with --check",
        ),
        (nano(1), "weights_key is for a checkpoint file: this model is built already"),
    ):
        with pytest.raises(UserError, match=re.escape(text)):
            load_model(name, weights_key="ema")
    path = save(SETS["timm"], tmp_path / "file.pth")
    require_loadable(ARCH, checkpoint=path, weights_key="state_dict")
    assert not is_good(load_model(ARCH, checkpoint=path, weights_key="state_dict"))


def test_the_choice_is_printed_and_kept(tmp_path):
    path, out = save(SETS["timm"], tmp_path / "file.pth"), tmp_path / "out"
    options = [
        "analyze",
        "--checkpoint",
        str(path),
        "--arch",
        ARCH,
        "--num-images",
        "2",
        "--statistic",
        "cls_to_patches",
    ]
    told = CliRunner().invoke(main, [*options, "--out", str(out)])
    note = "took the weights state_dict_ema; the file also holds state_dict (choose with --weights-key state_dict)"
    assert told.exit_code == 0, told.output
    assert f"note: {note}" in told.output
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["remarks"], manifest["arguments"]["weights_key"]) == ([note], None)
    told = CliRunner().invoke(main, [*options, "--out", str(out), "--weights-key", "state_dict", "--overwrite"])
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["arguments"]["weights_key"] == "state_dict"
    assert manifest["model"]["weights_sha256"] == weights_sha256(nano(2))
    told = CliRunner().invoke(main, ["analyze", "--model", "random_vit_nano", "--weights-key", "ema"])
    assert (told.exit_code, told.output.count("\n")) == (2, 1)
    assert "give --checkpoint FILE too" in told.output


def test_a_saved_probe_knows_its_key(tmp_path):
    path = save(SETS["timm"], tmp_path / "file.pth")
    given = {"model": str(path), "checkpoint": None, "arch": ARCH, "img_size": None}
    assert is_good(saved._load_model(given, None, None))  # one of before there were keys
    assert not is_good(saved._load_model(given | {"weights_key": "state_dict"}, None, None))


# Prefixes and infixes ------------------------------------------------------------------------------------------------

NAMES: dict[str, State] = {
    "Lightning strategy": under("_forward_module.model.", GOOD),
    "two towers": {
        **under("image_encoder.", GOOD),
        **under("text_encoder.", {"blocks.0.norm1.weight": GOOD["norm.bias"]}),
    },
    "feature_extractor": under("feature_extractor.", GOOD),
    "any words at all": under("my_net.stage-1.the_vit.", GOOD),
    "PEFT, merged": under("base_model.model.", GOOD),
    "PEFT within": under("encoder.base_model.model.vit.", GOOD),
    "FSDP": under("_fsdp_wrapped_module.", within("_fsdp_wrapped_module", GOOD)),
    "activation checkpointing": within("_checkpoint_wrapped_module", GOOD),
    "FSDP and checkpointing": within("_fsdp_wrapped_module._checkpoint_wrapped_module", GOOD),
    "compiled blocks": within("_orig_mod", GOOD),
    "compiled in DDP": under("module._orig_mod.", GOOD),
    "DDP in compiled": under("model._orig_mod.module.", within("_orig_mod", GOOD)),
    "DINOv2's chunks": chunked(GOOD),
    "chunks numbered anew": under("backbone.", chunked(GOOD, anew=True)),
    "chunks in a teacher": under("teacher.backbone.", {**chunked(GOOD), "mask_token": torch.zeros(1, 32)}),
    "a decoder beside it": {
        **under("encoder.", GOOD),
        **under("decoder.", {n: v for n, v in OTHER.items() if "embed" not in n}),
    },
}


@pytest.mark.parametrize("kind", NAMES)
def test_names_of_ordinary_trainers(kind, tmp_path):
    model = load({"state_dict": NAMES[kind]}, tmp_path)
    assert is_good(model)
    assert model.remarks == ()


def test_wrappers_of_torch_itself(tmp_path):
    module = nano(1)
    module.blocks[0] = torch.compile(module.blocks[0])  # type: ignore[assignment]
    wrapped = nn.DataParallel(nn.Sequential(module))
    assert any("_orig_mod" in name for name in wrapped.state_dict())
    assert is_good(load(wrapped.state_dict(), tmp_path))


def test_a_few_weights_that_are_no_encoders_are_left_out_and_said(tmp_path):
    projector = under(
        "projector.", {"0.weight": torch.zeros(4, 4), "0.bias": torch.zeros(4), "2.weight": torch.ones(4, 4)}
    )
    model = load({**GOOD, **projector}, tmp_path)
    assert is_good(model)
    assert model.remarks == (
        "3 weights in the file are no part of the encoder and were left out: projector.0.weight, projector.0.bias, "
        "projector.2.weight",
    )
    assert load({**GOOD, "logit_scale": torch.ones(1)}, tmp_path).remarks == (
        "logit_scale in the file is no part of the encoder and was left out",
    )
    many = under("extra.", {f"{number}.weight": torch.zeros(2) for number in range(60)})
    assert "60 unexpected: extra.0.weight, " in refusal({**GOOD, **many}, tmp_path)


@pytest.mark.parametrize(
    "more",
    [
        {"blocks.0.attn.q_norm.weight": torch.ones(16)},
        {"reg_token": torch.zeros(1, 4, 32)},
        {"norm_pre.weight": torch.ones(32)},
        {"rope.freqs": torch.ones(3)},
        {"blocks.4.norm1.weight": torch.ones(32)},
    ],
)
def test_what_belongs_to_an_encoder_is_never_left_out(more, tmp_path):
    assert f"1 unexpected: {next(iter(more))}" in refusal({**GOOD, **more}, tmp_path)


def test_a_missing_weight_of_the_encoder_stays_an_error(tmp_path):
    state = {name: value for name, value in GOOD.items() if name != "blocks.3.norm2.bias"}
    assert "1 missing: blocks.3.norm2.bias" in refusal(under("backbone.", state), tmp_path)


def test_adapters_are_merged_first(tmp_path):
    """The advice of the message is followed."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    adapted = peft.get_peft_model(nano(1), peft.LoraConfig(target_modules=["qkv"], r=2, init_lora_weights=False))
    text = refusal(adapted.state_dict(), tmp_path)
    assert text.startswith("holds an adapter that is not merged into the weights (base_model.model.blocks.0.attn.qkv.")
    assert "call merge_and_unload() on the PEFT model" in text
    alone = {name: value for name, value in adapted.state_dict().items() if "lora_" in name}
    assert "holds an adapter that is not merged" in refusal(alone, tmp_path)
    merged = adapted.merge_and_unload()
    model = load(merged.state_dict(), tmp_path)
    assert weights_sha256(model.module) == weights_sha256(merged)
    assert not torch.equal(model.module.blocks[0].attn.qkv.weight, GOOD["blocks.0.attn.qkv.weight"])


def test_safetensors_have_sets_by_prefix_too(tmp_path):
    from safetensors.torch import save_file

    save_file(
        {**under("student_backbone.vit.", OTHER), **under("teacher_backbone.vit.", GOOD)},
        path := tmp_path / "file.safetensors",
    )
    assert is_good(load_model(path, arch=ARCH))
    assert not is_good(load_model(path, arch=ARCH, weights_key="student_backbone"))
    with pytest.raises(UserError, match=r"there are student_backbone\.vit, teacher_backbone\.vit"):
        open_checkpoint(path, key="ema")


# One file, one architecture ------------------------------------------------------------------------------------------


def test_a_name_and_an_architecture_that_contradict_each_other(tmp_path):
    path = save(GOOD, tmp_path / "file.pth")
    attempts: list[Callable] = [load_model, require_loadable]
    for name, arch in (("mae_vit_b", ARCH), ("vit_tiny_patch16_224", "vit_small_patch16_224"), (ARCH, "mocov3_vit_s")):
        for attempt in attempts:
            with pytest.raises(UserError) as caught:
                attempt(name, checkpoint=path, arch=arch)
            assert str(caught.value) == (
                f"--model {name} and --arch {arch} are two architectures for one file: leave one of the two out"
            )
    # Both ways out.
    assert is_good(load_model(path, arch=ARCH))
    assert is_good(load_model(ARCH, checkpoint=path))
    assert is_good(load_model(ARCH, checkpoint=path, arch=ARCH))
    with pytest.raises(UserError, match="unknown model 'mae_vit_q'"):
        load_model("mae_vit_q", checkpoint=path, arch=ARCH)
