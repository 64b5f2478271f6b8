"""`vitprobe.models.register`: an alias of one's own loads, lists, and is refused in one line where it cannot be."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import vitprobe as vp
from helpers import images, message, tiny_vit
from vitprobe.cli import main
from vitprobe.errors import UserError
from vitprobe.models import registered
from vitprobe.models.building import build
from vitprobe.models.downloads import require_weights
from vitprobe.models.loading import load_model, require_loadable
from vitprobe.models.registry import all_specs, find_spec, list_models, status

NANO = "vit_nano_patch4_32"


@pytest.fixture(autouse=True)
def only_here(monkeypatch, tmp_path):
    monkeypatch.setattr(registered, "_REGISTERED", {})
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def file(tmp_path) -> Path:
    torch.manual_seed(1)
    path = tmp_path / "ours.pth"
    torch.save({"model": build(NANO, num_classes=0).state_dict()}, path)
    return path


def refusal(*arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        inspect.unwrap(vp.models.register)(*arguments, **options)
    return message(caught)


def test_a_checkpoint_under_an_alias(file, monkeypatch, tmp_path):
    vp.models.register("ours", "ours.pth", arch=NANO, paradigm="mim", method="OurMIM", licence="mit")
    monkeypatch.chdir(tmp_path.parent)  # the path was made absolute
    require_loadable("ours")
    model = load_model("ours")
    spec = model.spec
    assert (spec.name, spec.paradigm, spec.method, spec.licence) == ("ours", "MIM", "OurMIM", "mit")
    assert (spec.source, spec.architecture) == ("file:ours.pth", NANO)
    expected = torch.load(file, weights_only=True)["model"]
    assert all(torch.equal(value, expected[name]) for name, value in model.module.state_dict().items())


def test_analyze_takes_it(file):
    vp.models.register("ours", file, arch=NANO, paradigm="JEA")
    profile = vp.analyze("ours", images(2), statistics=["cls_entropy"], device="cpu")
    assert (profile.name, profile.paradigm) == ("ours", "JEA")


def test_the_table_and_the_command_list_it(file):
    before = len(list_models())
    vp.models.register("ours", file, arch=NANO, paradigm="VLM")
    vp.models.register("theirs", "vit_tiny_patch16_224")
    table = list_models()
    assert list(table["name"])[before:] == ["ours", "theirs"]
    assert [status(spec) for spec in all_specs()[before:]] == ["local", ""]
    assert list(list_models(paradigm="other")["name"]) == ["theirs"]
    file.unlink()
    assert list(list_models("ours")["status"]) == ["missing"]
    result = CliRunner().invoke(main, ["models", "--paradigm", "VLM", "ours"])
    assert result.exit_code == 0 and "ours" in result.output and NANO in result.output


def test_a_shipped_model_under_another_name():
    vp.models.register("again", "mae_vit_nano")
    spec = find_spec("again")
    assert spec is not None
    assert (spec.paradigm, spec.method, spec.licence) == ("MIM", "MAE", "apache-2.0")
    require_weights(spec)
    loaded = load_model("again").spec
    assert (loaded.name, loaded.paradigm, loaded.source) == ("again", "MIM", "bundled:mae_vit_nano")
    assert load_model("again", pretrained=False).spec.name == "again-random"
    vp.models.register("third", "again", paradigm="supervised")
    assert load_model("third").spec.paradigm == "supervised"


def test_an_alias_says_the_architecture_of_other_weights(file):
    vp.models.register("ours", "elsewhere.pth", arch=NANO, paradigm="MIM")
    for model in (load_model("ours", checkpoint=file), load_model(file, arch="ours", name="ours", paradigm="MIM")):
        assert (model.spec.name, model.spec.paradigm, model.spec.source) == ("ours", "MIM", "file:ours.pth")
    with pytest.raises(UserError) as caught:
        load_model("ours")
    assert "elsewhere.pth" in message(caught) and "there is no checkpoint file" in message(caught)
    with pytest.raises(UserError) as caught:
        load_model("ours", arch=NANO)
    assert message(caught) == (
        "arch is for a checkpoint file: leave it out, or give the weights of ours with --checkpoint FILE"
    )


def test_a_layout_is_kept(file):
    layout = vp.TokenLayout((8, 8), has_cls=True, patch_size=(4, 4))
    vp.models.register("ours", file, arch=NANO, layout=layout)
    model = load_model("ours")
    assert model.layout == layout
    assert model.anatomy.given
    assert model.spec.source == "file:ours.pth"
    assert load_model("ours", img_size=(32, 48)).layout.grid == (8, 12)
    vp.models.register("wrong", file, arch=NANO, layout=vp.TokenLayout((8, 8), has_cls=False, patch_size=(4, 4)))
    with pytest.raises(UserError):
        load_model("wrong")


def test_a_folder_under_an_alias(tmp_path, monkeypatch):
    folder = tmp_path / "saved"
    folder.mkdir()
    module = build("vit_tiny_patch16_224", img_size=32, num_classes=0)
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 0, "model_args": {"img_size": 32}}
    config["pretrained_cfg"] = {"input_size": [3, 32, 32]}
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(module.state_dict(), folder / "pytorch_model.bin")
    for number, source in enumerate((folder, "saved", "./saved", "hf-hub:./saved", "hf_hub:saved")):
        vp.models.register(f"ours{number}", source, paradigm="hybrid")
    monkeypatch.chdir(tmp_path.parent)
    for number in range(5):
        require_loadable(f"ours{number}")
        assert list(list_models(f"ours{number}")["status"]) == ["local"]
    spec = load_model("ours3").spec
    assert (spec.name, spec.paradigm, spec.source) == ("ours3", "hybrid", "folder:saved")


def test_what_cannot_be_registered(file):
    assert refusal("mae_vit_b", file, arch=NANO) == (
        "mae_vit_b is the name of a model that vitprobe ships: choose another alias"
    )
    assert "ships" in refusal("vit_base_patch16_224.mae", file, arch=NANO)
    assert "ships" in refusal(NANO, file, arch=NANO)
    assert refusal("ours", file, arch=NANO, paradigm="SSL") == (
        "unknown paradigm 'SSL': use one of MIM, JEA, hybrid, supervised, VLM, other, random, unknown"
    )
    assert refusal("a/b", file, arch=NANO) == "'a/b' cannot be an alias: use letters, digits, and _ . + -"
    assert "cannot be an alias" in refusal("", file) and "cannot be an alias" in refusal(3, file)
    assert refusal("ours", file) == (
        f"{file} needs the name of its architecture: arch= with an alias (mae_vit_b) or a timm name "
        f"(vit_base_patch16_224)"
    )
    assert "needs the name of its architecture" in refusal("ours", "not_here.safetensors")
    assert refusal("ours", "hf:owner/name", arch=NANO) == (
        "arch is for a checkpoint file, and hf:owner/name says its own: leave it out"
    )
    assert refusal("ours", file.parent, arch=NANO) == (
        f"arch is for a checkpoint file, and {file.parent} is a folder: leave it out"
    )
    assert refusal("ours", "hf:!!") == "hf:!! names no repository: write hf:owner/name, or hf:./DIR for a folder"
    assert refusal("ours", "owner/name") == (
        "there is no file or folder owner/name; for a repository of the Hugging Face hub write hf:owner/name or "
        "hf-hub:owner/name"
    )
    assert refusal("ours", "") == "the source of ours is '': give a model's name, a folder, or a checkpoint file"
    assert refusal("ours", file, arch=NANO, layout=3) == "the layout of ours is 3: give a vitprobe.TokenLayout"
    assert registered._REGISTERED == {}


def test_registering_twice(file):
    for _ in range(2):  # the same again changes nothing
        vp.models.register("ours", file, arch=NANO)
    assert refusal("ours", "mae_vit_nano") == (
        f"the alias ours is registered already, for {file}: choose another, or pass replace_earlier=True"
    )
    vp.models.register("ours", "mae_vit_nano", replace_earlier=True)
    assert load_model("ours").spec.source == "bundled:mae_vit_nano"


def test_an_alias_does_not_hide_a_model_of_timm(file):
    vp.models.register("vit_tiny_patch16_224", file, arch=NANO)
    for attempt in (load_model, require_loadable):
        with pytest.raises(UserError) as caught:
            attempt("vit_tiny_patch16_224")
        assert message(caught) == (
            "the alias vit_tiny_patch16_224 was registered, and timm has a model of this name: choose another alias"
        )


def test_registering_needs_neither_torch_nor_timm():
    code = (
        "import sys, vitprobe as vp\n"
        "vp.models.register('ours', 'ours.pth', arch='vit_base_patch16_224', paradigm='MIM')\n"
        "assert list(vp.list_models('ours')['status']) == ['missing']\n"
        "print({'torch', 'timm'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_page_on_models_runs(file, monkeypatch, capsys):
    page = (Path(__file__).parents[1] / "docs" / "models.md").read_text()
    blocks = [block.partition("```")[0] for block in page.split("```python\n")[1:]]
    assert len(blocks) == 3
    (file.parent / "runs").mkdir()
    file.rename(file.parent / "runs" / "ours.pth")
    names = {"module": tiny_vit()}
    for block in blocks:
        # A model of the size of the tests instead, and two images.
        small = block.replace("vit_base_patch16_224", NANO).replace("(model)", "(model, num_images=2)")
        exec(small, names)
    printed = capsys.readouterr().out
    assert "ours, 300 epochs MIM 1 prefix + 8x8 patches" in printed
    assert "ours_vit_b" in printed
    assert (names["profile"].name, names["profile"].paradigm) == ("ours", "JEA")
