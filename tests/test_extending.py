"""docs/extending.md: each block runs as it stands, from outside the package, in a folder of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parent.parent / "docs" / "extending.md"
OUTSIDE = {"vitprobe", "torch", "math", "click"}  # what a block imports


def blocks() -> dict[str, str]:
    """Heading → its Python."""
    found = {}
    for part in PAGE.read_text(encoding="utf-8").split("\n## ")[1:]:
        heading, _, text = part.partition("\n")
        if code := re.findall(r"```python\n(.*?)```", text, re.DOTALL):
            (found[heading],) = code
    return found


def run(folder: Path, *arguments: str, fail: bool = False) -> str:
    environment = {**os.environ, "MPLBACKEND": "Agg"}
    path = [str(folder / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(path)
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == (2 if fail else 0), done.stderr
    return done.stderr if fail else done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the statistic's block has run, and what it declares is an installed plugin."""
    folder = tmp_path_factory.mktemp("outside")
    run(folder, "-c", blocks()["A statistic"])
    package = folder / "site" / "our_package"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "rank.py").write_text(blocks()["A command"])
    (package / "attention.py").write_text(blocks()["A statistic"].partition("\nprofile =")[0])
    info = folder / "site" / "our_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: our-package\nVersion: 1.0\n")
    groups = re.findall(r"```toml\n\[project.entry-points.\"(.*?)\"\]\n(\w+) = \"(.*?)\"\n```", PAGE.read_text())
    assert [group for group, _, _ in groups] == ["vitprobe.commands", "vitprobe.plugins"]
    entries = "".join(f"[{group}]\n{name} = {value}\n" for group, name, value in groups)
    (info / "entry_points.txt").write_text(entries)
    return folder


def test_every_extension_has_one_block_that_imports_nothing_inner() -> None:
    assert list(blocks()) == ["A statistic", "An aggregator", "A figure", "A checkpoint", "A command", "A data source"]
    for code in blocks().values():
        assert set(re.findall(r"^(?:import|from) (\S+)", code, re.MULTILINE)) <= OUTSIDE


def test_a_statistic(folder: Path) -> None:
    assert (folder / "run" / "summary.csv").is_file()
    assert {path.suffix for path in folder.glob("patches_to_patches.*")} == {".pdf", ".svg", ".png"}


def test_an_aggregator(folder: Path) -> None:
    assert run(folder, "-c", blocks()["An aggregator"]) == "193\n"


def test_an_aggregator_by_its_place_on_the_command_line(folder: Path) -> None:
    unregistered = blocks()["An aggregator"].replace('@vp.aggregation.register("top")\n', "").partition("\nprint")[0]
    (folder / "top.py").write_text(unregistered)
    said = run(folder, "-m", "vitprobe", "verify", "--model", "mae_vit_nano", "--protocol", "knn", "--aggregator",
               "cls", "--aggregator", "top.py:Top(count=4)", "--device", "cpu", fail=True)  # fmt: skip
    assert said.splitlines()[-1].startswith("Error: top.py:Top(count=4) is trained, and knn trains no aggregators")


def test_a_figure(folder: Path) -> None:
    run(folder, "-c", blocks()["A figure"])
    assert {path.suffix for path in folder.glob("times_uniform.*")} == {".pdf", ".svg", ".png"}


def test_a_checkpoint(folder: Path) -> None:
    code = blocks()["A checkpoint"]
    names = re.search(r"register\(\s*\"(\w+)\", \"(\S+)\", arch=", code)
    assert names is not None and names.groups() == ("our_mae", "weights/our_mae.pth")
    import vitprobe.models

    if not hasattr(vitprobe.models, "register"):
        pytest.skip("vitprobe.models.register is not there yet")
    (folder / "weights").mkdir()
    (folder / "weights" / "our_mae.pth").touch()
    assert "our_mae" in run(folder, "-c", code)


def test_a_command_and_a_plugin(folder: Path) -> None:
    assert "rank     From our-package." in run(folder, "-m", "vitprobe", "--help")
    shown = run(folder, "-m", "vitprobe", "rank", "run", "--statistic", "patches_to_patches")
    assert re.fullmatch(r"mae_vit_nano +0\.\d{4} \[0\.\d{4}, 0\.\d{4}\]\n", shown)
    said = run(folder, "-m", "vitprobe", "rank", "run", "--statistic", "cls_entropy", fail=True)
    assert said == "Error: mae_vit_nano has no cls_entropy: was not asked for in this run\n"
    run(folder, "-m", "vitprobe", "figures", "run", "--statistic", "patches_to_patches", "--out", "drawn")
    assert (folder / "drawn" / "patches_to_patches.pdf").is_file()


def test_a_data_source(folder: Path) -> None:
    shown = run(folder, "-c", blocks()["A data source"])
    assert shown.startswith("8 ") and "attention_distance" in shown
