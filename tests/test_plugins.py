"""Plugins: loaded when an unknown name or all names are asked for; a broken one harms nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

STATISTIC = """
import vitprobe as vp

@vp.statistics.declare("patch_mass", label="mass", unit="share", bounds=(0, 1), asks="sums")
def patch_mass(view):
    return (view.patch_sums.log_z_patches - view.patch_sums.log_z).exp().mean(dim=-1)

def declare_more():
    @vp.aggregation.register("median")
    class Median(vp.aggregation.Aggregator):
        def forward(self, batch):
            return batch.patches.median(dim=1).values

    assert "median" in vp.aggregation.names()  # asking inside a plugin does not load it again
"""
COMMAND = """
import click

@click.command()
@click.option("--times", type=int, default=1)
def command(times):
    "Greet."
    click.echo("hello " * times)

no_command = 7
"""
PLUGINS = """[vitprobe.plugins]
statistics = ours.attention
more = ours.attention:declare_more
broken = ours.broken
gone = ours.nowhere:plugin

[vitprobe.commands]
hello = ours.greeting:command
broken = ours.broken:command
wrong = ours.greeting:no_command
analyze = ours.greeting:command
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a distribution `our-plugin`, as pip would install it."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "ours").mkdir()
    for name, text in (
        ("__init__", ""),
        ("attention", STATISTIC),
        ("greeting", COMMAND),
        ("broken", "raise ValueError('on\\npurpose')"),
    ):
        (folder / "ours" / f"{name}.py").write_text(text)
    info = folder / "our_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: our-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(PLUGINS)
    return folder


def run(folder: Path, *arguments: str, fail: bool = False) -> tuple[str, str]:
    """stdout and stderr of Python with the plugin installed."""
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == (2 if fail else 0), done.stderr
    return done.stdout, done.stderr


def test_what_plugins_add_is_there_and_broken_ones_are_named_in_a_line_each(installed: Path) -> None:
    code = """
import sys
import vitprobe as vp
assert "cls_entropy" in [s.name for s in vp.statistics.select(["cls_entropy"])] and "ours.attention" not in sys.modules
assert vp.statistics.select("patch_mass")[0].unit == "share"
assert "patch_mass" in [s.name for s in vp.statistics.select(None)]
assert vp.aggregation.create("median", dim=8).name == "median" and "median" in vp.aggregation.names()
"""
    _, said = run(installed, "-c", code)
    start, end = "vitprobe:1: PluginWarning: the plugin", "update it or uninstall it"
    assert said.splitlines() == [
        f"{start} broken of our-plugin cannot be loaded (ValueError: on purpose): {end}",
        f"{start} gone of our-plugin cannot be loaded (ModuleNotFoundError: No module named 'ours.nowhere'): {end}",
    ]


def test_help_lists_commands_without_their_code(installed: Path) -> None:
    shown, said = run(installed, "-X", "importtime", "-m", "vitprobe", "--help")
    lines = {line.split()[0]: line for line in shown.partition("Commands:")[2].splitlines() if line.strip()}
    assert list(lines) == ["analyze", "bench", "figures", "models", "verify", "broken", "hello", "wrong"]
    assert lines["hello"].endswith("From our-plugin.")
    imported = {line.rpartition("|")[2].strip() for line in said.splitlines() if line.startswith("import time:")}
    assert not {"torch", "ours", "pandas", "matplotlib"} & imported and "importlib.metadata" in imported
    (warning,) = [line for line in said.splitlines() if "PluginWarning" in line]
    assert warning == (
        "vitprobe:1: PluginWarning: the command analyze of our-plugin is left out: there is one already "
        "(vitprobe's own)"
    )


def test_a_commands_own_help_and_options(installed: Path) -> None:
    assert run(installed, "-W", "ignore", "-m", "vitprobe", "hello", "--times", "2") == ("hello hello \n", "")
    assert "Greet." in run(installed, "-W", "ignore", "-m", "vitprobe", "hello", "--help")[0]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "broken",
            "Error: the command broken of our-plugin cannot be loaded (ValueError: on purpose): update that "
            "distribution or uninstall it\n",
        ),
        (
            "wrong",
            "Error: the command wrong of our-plugin is a int, no click.Command: update that distribution or uninstall "
            "it\n",
        ),
    ],
)
def test_a_broken_command_is_one_line(installed: Path, name: str, expected: str) -> None:
    assert run(installed, "-W", "ignore", "-m", "vitprobe", name, fail=True) == ("", expected)


def test_our_own_commands_ask_no_plugin(installed: Path) -> None:
    _, said = run(installed, "-X", "importtime", "-m", "vitprobe", "models", "--help")
    assert "importlib.metadata" not in said and "PluginWarning" not in said
