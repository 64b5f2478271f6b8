"""Folders that save_pretrained and timm write, weights in several files; each piece of advice is followed."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from timm.models import save_for_hf

from helpers import SIZES
from vitprobe.cli.group import main
from vitprobe.errors import UserError
from vitprobe.models import downloads
from vitprobe.models.identity import weights_sha256
from vitprobe.models.loading import load_model, require_loadable

transformers = pytest.importorskip("transformers")

ARCH = "test_vit"  # of timm, for its own tests: 0.4 million weights, images of 160 px
SETTINGS = {
    "image_processor_type": "ViTImageProcessor",
    "size": {"height": 32, "width": 32},
    "resample": 2,
    "image_mean": [0.1, 0.2, 0.3],
    "image_std": [0.4, 0.5, 0.6],
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(downloads, "why_no_answer", lambda address: "no network in tests")
    monkeypatch.chdir(tmp_path)


def vit(**options: Any) -> Any:
    torch.manual_seed(0)
    return transformers.ViTModel(transformers.ViTConfig(**SIZES, **options)).eval()


def refusal(name: Any, **options: Any) -> str:
    """What loading says, which checking before says too where it can know it."""
    with pytest.raises(UserError) as caught:
        load_model(name, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def ways(folder: str) -> list[Any]:
    """All ways to name a folder."""
    absolute = str(Path(folder).resolve())
    return [
        folder,
        f"./{folder}",
        f"{folder}/",
        Path(folder),
        absolute,
        f"hf:{folder}",
        f"hf:./{folder}",
        f"hf:{absolute}",
    ]


@pytest.mark.parametrize("sharded", [False, True])
def test_a_folder_by_every_name_that_it_has(sharded):
    module = vit()
    module.save_pretrained("w/hf", **({"max_shard_size": "20KB"} if sharded else {}))
    assert len(list(Path("w/hf").glob("*.safetensors"))) > sharded
    Path("w/hf/preprocessor_config.json").write_text(json.dumps(SETTINGS))
    for name in ways("w/hf"):
        model = load_model(name)
        require_loadable(name)
        assert weights_sha256(model.module) == weights_sha256(module)
        assert model.transform.mean == (0.1, 0.2, 0.3)
        assert (model.spec.name, model.spec.source) == ("hf", "folder:hf")
        assert model.layout.grid == (4, 4)
    assert load_model("hf:./w/hf", img_size=(48, 64)).layout.grid == (6, 8)
    assert weights_sha256(load_model("w/hf", pretrained=False).module) != weights_sha256(module)


def test_without_settings_and_with_old_kinds_of_files():
    module = vit()
    module.save_pretrained("w/hf")
    Path("w/hf/model.safetensors").unlink()
    torch.save(module.state_dict(), "w/hf/pytorch_model.bin")
    model = load_model("w/hf")
    assert weights_sha256(model.module) == weights_sha256(module)
    assert model.transform.mean == (0.5, 0.5, 0.5)


def test_which_of_a_folder_and_the_hub(tmp_path):
    """An existing folder wins, and says so where the name might be one of the hub; the remark's advice reaches that."""
    vit().save_pretrained("owner/name")
    (remark,) = load_model("hf:owner/name").remarks
    assert remark == "read the folder owner/name that is here; for that of the hub write hf:owner/name@main"
    assert "no network in tests" in refusal("hf:owner/name@main")
    snapshot = tmp_path / "hub/models--owner--name/snapshots" / ("0" * 40)
    other = vit(hidden_act="relu")
    other.save_pretrained(snapshot)
    Path(tmp_path / "hub/models--owner--name/refs").mkdir()
    Path(tmp_path / "hub/models--owner--name/refs/main").write_text("0" * 40)
    (snapshot / "preprocessor_config.json").write_text(json.dumps(SETTINGS))
    model = load_model("hf:owner/name@main")
    assert (model.module.config.hidden_act, model.remarks) == ("relu", ())
    assert load_model("hf:./owner/name").remarks == ()
    # A folder without a model in it is not meant.
    Path("owner/other").mkdir()
    assert "no network in tests" in refusal("hf:owner/other")


def test_timms_folders():
    torch.manual_seed(0)
    module = timm.create_model(ARCH, num_classes=3)
    save_for_hf(module, "w/timm", model_config={"num_classes": 3})
    for name in ("w/timm", "./w/timm", "hf-hub:./w/timm", "local-dir:w/timm"):
        model = load_model(name)
        require_loadable(name)
        assert weights_sha256(model.module) == weights_sha256(module), name
        assert (model.spec.name, model.spec.source) == ("timm", "folder:timm")
    # What the message says is what works.
    assert refusal("hf:./w/timm") == "hf:./w/timm holds a model of timm's: write hf-hub:./w/timm"
    Path("w/timm/model.safetensors").write_bytes(b"broken")
    assert "download" not in refusal("w/timm")


def test_timm_saved_by_transformers():
    given = {"architecture": "vit_tiny_patch16_224", "num_classes": 0, "pretrained_cfg": {"input_size": [3, 224, 224]}}
    torch.manual_seed(0)
    module = transformers.TimmWrapperModel(transformers.TimmWrapperConfig.from_dict(given))
    module.save_pretrained("w")
    model = load_model("./w")
    assert weights_sha256(model.module) == weights_sha256(module.timm_model)
    assert refusal("hf:./w") == "hf:./w holds a model of timm's: write hf-hub:./w"
    assert weights_sha256(load_model("hf-hub:./w").module) == weights_sha256(module.timm_model)


def test_folders_that_are_none():
    Path("w/empty").mkdir(parents=True)
    assert refusal("w/empty") == (
        "the folder w/empty holds no config.json: give a folder that save_pretrained wrote, or a checkpoint file"
    )
    assert refusal("hf:./w/empty").startswith("the folder ./w/empty holds no config.json: give a folder that ")
    assert refusal("hf:./w/none") == "there is no folder ./w/none"
    for name in ("./w/none", "w/none/none", "../none", "/none/none"):
        assert refusal(name) == f"there is no file or folder {name}"
    assert refusal("local-dir:w/none") == "there is no folder w/none"
    Path("w/empty/config.json").write_text(json.dumps(vit().config.to_dict()))
    assert refusal("w/empty").startswith("the folder ./w/empty has no model.safetensors or ")
    Path("w/empty/config.json").write_text("{")
    assert refusal("w/empty") == "w/empty/config.json is damaged: it is no JSON of a model"


def test_advice_on_folders_and_files_leads_out():
    state = timm.create_model(ARCH, num_classes=0).state_dict()
    Path("w/files").mkdir(parents=True)
    save_file(state, "w/files/model.safetensors")
    said = refusal("w/files")
    advice = re.search(r"give the file (\S+) with its architecture \(--arch NAME\)$", said)
    assert advice is not None
    assert load_model(advice[1], arch=ARCH).layout.grid == (10, 10)
    vit().save_pretrained("w/hf")
    said = refusal(ARCH, checkpoint="w/hf")
    advice = re.search(r"give it as --model (\S+)$", said)
    assert advice is not None
    assert load_model(advice[1]).layout.grid == (4, 4)


def test_an_adapters_folder_says_to_merge():
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the two libraries about each other
        adapted = peft.get_peft_model(vit(), peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    adapted.save_pretrained("w/adapter")
    said = refusal("w/adapter")
    assert "call merge_and_unload(), and save what that gives" in said
    merged = adapted.merge_and_unload()
    merged.save_pretrained("w/merged")
    assert weights_sha256(load_model("w/merged").module) == weights_sha256(merged)


def test_sets_of_weights_under_the_names_of_transformers():
    good, other = vit().state_dict(), {name: value * 0 for name, value in vit().state_dict().items()}
    vit().save_pretrained("w/hf")
    content = {f"student.{name}": value for name, value in other.items()}
    content |= {f"teacher._orig_mod.{name}": value for name, value in good.items()}
    torch.save(content, "w/file.pth")
    model = load_model("hf:./w/hf", checkpoint="w/file.pth")
    assert weights_sha256(model.module) == weights_sha256(vit())
    assert model.remarks == (
        "took the weights teacher; the file also holds student (choose with --weights-key student)",
    )
    model = load_model("w/file.pth", arch="w/hf", weights_key="student")
    assert not any(value.any() for value in model.module.parameters())


# No code is run -------------------------------------------------------------------------------------------------------

EVIL = "open('ran', 'w').close()\nclass Evil: pass\n"


@pytest.mark.parametrize("where", ["config.json", "preprocessor_config.json"])
def test_no_code_in_a_folder_is_run(where):
    vit().save_pretrained("w/hf")
    Path("w/hf/preprocessor_config.json").write_text(json.dumps(SETTINGS))
    for name in ("modeling", "configuration", "image_processing", "__init__", "processing"):
        Path(f"w/hf/{name}_evil.py").write_text(EVIL)
    classes = {
        "AutoConfig": "configuration_evil.Evil",
        "AutoModel": "modeling_evil.Evil",
        "AutoImageProcessor": "image_processing_evil.Evil",
    }
    file = Path("w/hf") / where
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": classes}))
    assert load_model("w/hf").layout.grid == (4, 4)
    # Where the folder's code alone would know it, it is refused.
    config = Path("w/hf/config.json")
    config.write_text(json.dumps({"model_type": "evil", "architectures": ["Evil"], "auto_map": classes}))
    assert "holds no vision model that transformers" in refusal("w/hf")
    assert not Path("ran").exists()


# Several files --------------------------------------------------------------------------------------------------------


def shards(folder: str = "w/shards", kind: str = "model", ending: str = "safetensors") -> tuple[Any, list[Path]]:
    torch.manual_seed(0)
    module = timm.create_model(ARCH, num_classes=0)
    state, place = module.state_dict(), Path(folder)
    place.mkdir(parents=True)
    names = [f"{kind}-0000{number}-of-00002.{ending}" for number in (1, 2)]
    parts = [dict(list(state.items())[:40]), dict(list(state.items())[40:])]
    for name, part in zip(names, parts, strict=True):
        (save_file if ending == "safetensors" else torch.save)(part, place / name)
    places = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    (place / f"{kind}.{ending}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return module, [place / name for name in names]


@pytest.mark.parametrize(("kind", "ending"), [("model", "safetensors"), ("pytorch_model", "bin")])
def test_an_index_is_a_checkpoint_file(kind, ending):
    module, files = shards(kind=kind, ending=ending)
    for file in files:
        said = refusal(file, arch=ARCH)
        assert said.startswith(f"{file} is one of 2 files that hold the weights together: give their index, ")
        index = said.rpartition(" ")[2]
        model = load_model(index, arch=ARCH)
        assert weights_sha256(model.module) == weights_sha256(module)
        assert (model.spec.name, model.spec.source) == (kind, f"file:{Path(index).name}")
    said = refusal("w/shards")
    assert re.search(r"give the file (\S+) with", said)[1] == index  # type: ignore[index]
    files[1].unlink()
    assert refusal(index, arch=ARCH) == (f"{index} lists 2 files, and 1 of them are not beside it: {files[1].name}")
    Path(index).unlink()
    assert refusal(files[0], arch=ARCH).endswith(
        f"give their index, {index} (it is not here, but beside them where they are from)"
    )
    only = files[0].with_name(files[0].name.replace("-of-00002", "-of-00001"))
    files[0].rename(only)
    assert "38 missing" in refusal(only, arch=ARCH)


@pytest.mark.parametrize("content", ["{", "{}", '{"weight_map": {}}', '{"weight_map": 3}', "[]"])
def test_an_index_that_lists_nothing(content):
    Path("a.safetensors.index.json").write_text(content)
    assert refusal("a.safetensors.index.json", arch="mae_vit_nano") == (
        "a.safetensors.index.json is damaged: it lists no weights"
    )


@pytest.mark.parametrize("name", ["../a.safetensors", "/etc/passwd", "b/a.safetensors", 3])
def test_an_index_lists_files_beside_it_alone(name):
    Path("a.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    assert "is no file beside it" in refusal("a.safetensors.index.json", arch="mae_vit_nano")


def test_on_the_command_line():
    vit().save_pretrained("w/hf")
    command = ["analyze", "--num-images", "2", "--statistic", "cls_to_patches", "--model"]
    told = CliRunner().invoke(main, [*command, "w/hf", "--out", "out"])
    assert told.exit_code == 0, told.output
    manifest = json.loads(Path("out/manifest.json").read_text())
    assert (manifest["model"]["source"], manifest["arguments"]["model"]) == ("folder:hf", "w/hf")
    told = CliRunner().invoke(main, [*command, "w/none"])
    assert (told.exit_code, told.output.count("\n")) == (2, 1)
