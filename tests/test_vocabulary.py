"""One word for one thing: what Python calls an argument, the command line calls an option."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import get_args

import click
import pytest

import vitprobe as vp
from vitprobe.cli import main
from vitprobe.frozen.dtype import CHOICES, DTYPES
from vitprobe.hooks.capture import Kernel
from vitprobe.probing.protocols import PROTOCOLS
from vitprobe.runs.options import TRANSFORMS

COMMANDS = {"analyze": vp.analyze, "verify": vp.verify}
# What only one of the two can say: images' groups and a progress bar in Python; several processes are torchrun's word.
ONLY_PYTHON = {"groups", "progress", "distributed"}
SEVERAL = {"models": "model"}  # the command line takes several, one after the other
TABLE = Path(__file__).parent.parent / "docs" / "vocabulary.md"


def options_of(command: str) -> dict[str, click.Option]:
    found = main.commands[command].params
    return {SEVERAL.get(str(each.name), str(each.name)): each for each in found if isinstance(each, click.Option)}


def shown(command: str) -> dict[str, click.Option]:
    return {name: option for name, option in options_of(command).items() if not option.hidden}


@pytest.mark.parametrize("command", COMMANDS)
def test_arguments_and_options_have_the_same_names(command: str) -> None:
    arguments = set(inspect.signature(COMMANDS[command]).parameters)
    assert set(shown(command)) == arguments - ONLY_PYTHON


@pytest.mark.parametrize("command", COMMANDS)
def test_arguments_and_options_have_the_same_defaults(command: str) -> None:
    arguments = inspect.signature(COMMANDS[command]).parameters
    said = main.commands[command].make_context(command, []).params
    for name, option in shown(command).items():
        if name == "model":  # the command line takes the bundled ones, Python none
            assert arguments[name].default is inspect.Parameter.empty and not option.required
            continue
        default = said[str(option.name)]
        assert arguments[name].default == (None if default == () else default), name


@pytest.mark.parametrize("command", COMMANDS)
def test_choices_are_those_of_the_package(command: str) -> None:
    wanted = {
        "dtype": CHOICES if command == "analyze" else tuple(DTYPES),
        "transform": TRANSFORMS,
        "kernel": get_args(Kernel),
        "protocol": tuple(PROTOCOLS),
    }
    for name, option in shown(command).items():
        assert isinstance(option.type, click.Choice) == (name in wanted), name
        if isinstance(option.type, click.Choice):
            assert tuple(option.type.choices) == tuple(wanted[name]), name


def test_what_can_be_said_several_times_is_said_in_the_singular() -> None:
    for command in COMMANDS:
        for name, option in shown(command).items():
            spelled = option.opts[0].removeprefix("--").replace("-", "_")
            assert spelled == (name.removesuffix("s") if option.multiple else name), (command, name)


def test_the_table_in_the_docs_has_every_argument_and_no_other() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(--[\w-]+)", TABLE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    known = {(name, option.opts[0]) for command in COMMANDS for name, option in shown(command).items()}
    assert set(rows) == known
