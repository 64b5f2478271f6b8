"""The one door: every public name works, lazily, twice, in both import orders."""

import subprocess
import sys

import pytest

import vitprobe

CALL_EACH_TWICE = """
import sys
{first}
import vitprobe
assert {torch_before} == ("torch" in sys.modules), "importing vitprobe imports torch"
for _ in range(2):
    for name in vitprobe.__all__:
        thing = getattr(vitprobe, name)
        assert thing is getattr(vitprobe, name)
    assert callable(vitprobe.load_model) and callable(vitprobe.capture) and callable(vitprobe.analyze)
    assert callable(vitprobe.open_images) and callable(vitprobe.list_models)
    assert vitprobe.Profile.load and vitprobe.statistics.STATISTICS and vitprobe.figures.cls_entropy
    assert len(vitprobe.list_models("mae")) >= 4
    assert len(vitprobe.open_images()) > 8
    model = vitprobe.load_model("mae_vit_nano", pretrained=False)
    import torch
    with vitprobe.capture(model) as attention:
        model.module(torch.zeros(1, 3, 32, 32))
    assert len(attention) == 12
    profile = vitprobe.analyze(model, torch.randn(2, 3, 32, 32), statistics=["cls_entropy"])
    assert isinstance(profile, vitprobe.Profile)
    assert callable(vitprobe.verify) and callable(vitprobe.load_probe) and vitprobe.Verification.load
    assert "abmilp" in vitprobe.aggregation.names() and vitprobe.probing.PROTOCOLS["fast"].seeds >= 3
    assert vitprobe.aggregation.create("ep", dim=64).num_parameters == 64 * 64 + 32 * 64
print("fine")
"""

EVERY_SUBMODULE = """
import importlib, pkgutil, vitprobe
for module in pkgutil.walk_packages(vitprobe.__path__, "vitprobe."):
    importlib.import_module(module.name)
"""


@pytest.mark.parametrize(("first", "torch_before"), [("", False), (EVERY_SUBMODULE, True)], ids=["names", "modules"])
def test_each_public_name_works_twice_in_a_fresh_process(first, torch_before):
    code = CALL_EACH_TWICE.format(first=first, torch_before=torch_before)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "fine\n"


def test_dir_lists_the_public_names_and_nothing_else():
    assert dir(vitprobe) == sorted(vitprobe.__all__)
    with pytest.raises(AttributeError, match="module 'vitprobe' has no attribute 'nothing'"):
        _ = vitprobe.nothing
