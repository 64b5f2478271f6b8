"""What options take, and those that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click


class SomePath(click.Path):
    """A path that says something: click takes an empty one for the current folder."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path."""
        if value == "":
            self.fail("it is empty", param, ctx)
        return super().convert(value, param, ctx)


class SomeText(click.ParamType):
    """Text that says something."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The text."""
        if value == "":
            self.fail("it is empty", param, ctx)
        return value


def which_models(command: Callable) -> Callable:
    """The options that say what to load."""
    for option in (
        click.option(
            "--weights-key",
            metavar="KEY",
            help="Of a --checkpoint with several sets of weights this one.  [averaged ones, else the usual]",
        ),
        click.option(
            "--arch", metavar="NAME", help="The architecture of --checkpoint: an alias or a timm architecture."
        ),
        click.option("--checkpoint", type=SomePath(), metavar="FILE", help="Weights for --model, or for --arch."),
        click.option(
            "--model",
            "models",
            multiple=True,
            metavar="NAME",
            help="An alias (vitprobe models), any timm name, hf-hub:…, hf:…, or a folder; repeat for several.  "
            "[mae_vit_nano and supervised_vit_nano]",
        ),
    ):
        command = option(command)
    return command


def which_way(command: Callable) -> Callable:
    """The options that say what becomes of a run that is there already."""
    command = click.option(
        "--resume", is_flag=True, help="Go on with the run in --out where it was broken off, or begin it."
    )(command)
    return click.option("--overwrite", is_flag=True, help="Replace a run that is in --out already.")(command)
