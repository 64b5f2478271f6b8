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


class ImageSize(click.ParamType):
    """A side in pixels, or HEIGHTxWIDTH."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | tuple[int, int]:
        """The side, or (height, width)."""
        if not isinstance(value, str):
            return value
        sides = value.lower().replace("×", "x").split("x")
        if len(sides) > 2 or not all(side.strip().isdecimal() and int(side) > 0 for side in sides):
            self.fail(f"{value!r} is no size in pixels; write 224, or HEIGHTxWIDTH such as 224x448", param, ctx)
        return int(sides[0]) if len(sides) == 1 else (int(sides[0]), int(sides[1]))


class Numbers(click.ParamType):
    """Numbers with commas between them."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[float]:
        """The numbers."""
        if not isinstance(value, str):
            return value
        try:
            return [float(part) for part in value.split(",")]
        except ValueError:
            self.fail(f"{value!r} holds what is no number; write 0.5, or one for each channel: 0.4,0.5,0.6", param, ctx)


def image_options(command: Callable) -> Callable:
    """The options that say how pictures become what the model takes."""
    for option in (
        click.option(
            "--transform",
            type=click.Choice(["model", "paper"]),
            default="model",
            show_default=True,
            help="The model's own preprocessing, or the paper's.",
        ),
        click.option(
            "--std", type=Numbers(), metavar="X,…", help="What each channel is divided by, one value or one each."
        ),
        click.option(
            "--mean",
            type=Numbers(),
            metavar="X,…",
            help="Subtracted from each channel, in 0..1; above 1 in the files' own values.  [the model's own]",
        ),
        click.option(
            "--img-size",
            type=ImageSize(),
            metavar="S",
            help="Input size in pixels: a side, or HEIGHTxWIDTH.  [the model's own]",
        ),
    ):
        command = option(command)
    return command


def model_options(command: Callable) -> Callable:
    """The options that say what to load."""
    for option in (
        click.option(
            "--paradigm",
            type=SomeText(),
            metavar="P",
            help="How one --model was trained: MIM, JEA, hybrid, supervised, VLM, other, or random.  [if known, the "
            "registry's]",
        ),
        click.option(
            "--name",
            type=SomeText(),
            metavar="NAME",
            help="What tables and figures call one --model.  [its alias, or its file's name]",
        ),
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


def folder_options(command: Callable) -> Callable:
    """The options that say what becomes of a run that is there already."""
    command = click.option(
        "--resume", is_flag=True, help="Go on with the run in --out where it was broken off, or begin it."
    )(command)
    return click.option("--overwrite", is_flag=True, help="Replace a run that is in --out already.")(command)
