"""`vitprobe models`: the models that have an alias."""

from __future__ import annotations

import click

from vitprobe.cli.screen import aligned
from vitprobe.errors import UserError


@click.command("models", short_help="List the models that have an alias.")
@click.argument("words", nargs=-1)
@click.option("--paradigm", metavar="NAME", help="Only MIM, JEA, hybrid, supervised, VLM, or other.")
def command(words: tuple[str, ...], paradigm: str | None) -> None:
    """List the models that have an alias (any timm name works too); WORDS filter them."""
    from vitprobe.models.registry import list_models

    table = list_models(" ".join(words) or None, paradigm=paradigm)
    if table.empty:
        raise UserError(f"no model matches {' '.join(words)!r}; vitprobe models lists them all")
    columns = ("name", "method", "paradigm", "architecture", "licence", "status")
    click.echo(aligned({column: table[column].astype(str).tolist() for column in columns}))
