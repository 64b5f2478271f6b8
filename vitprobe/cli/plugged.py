"""Commands of installed plugins (entry points `vitprobe.commands`): listed without their code, loaded when run."""

from __future__ import annotations

from typing import Any

import click

from vitprobe.errors import UserError
from vitprobe.plugins import COMMANDS, distribution, in_words, installed, warn


class PluginCommand(click.Command):
    """A command that an installed distribution adds; its own code is loaded when it is run, or asked for its help."""

    def __init__(self, entry: Any) -> None:
        super().__init__(entry.name, short_help=f"From {distribution(entry)}.")
        self._entry = entry

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> click.Context:
        """The context of the command itself.

        Raises:
            UserError: where it cannot be loaded or is no command, naming its distribution.
        """
        return self._load().make_context(info_name, args, parent, **extra)

    def _load(self) -> click.Command:
        entry = self._entry
        try:
            command = entry.load()
        except (Exception, SystemExit) as error:
            raise UserError(
                f"the command {entry.name} of {distribution(entry)} cannot be loaded ({in_words(error)}): update that "
                f"distribution or uninstall it"
            ) from error
        if not isinstance(command, click.Command):
            raise UserError(
                f"the command {entry.name} of {distribution(entry)} is a {type(command).__name__}, no click.Command: "
                f"update that distribution or uninstall it"
            )
        return command


def plugin_commands(taken: set[str]) -> dict[str, click.Command]:
    """The commands of plugins by name, without those whose name is taken, which a warning names."""
    found: dict[str, click.Command] = {}
    for entry in installed(COMMANDS):
        if entry.name in taken or entry.name in found:
            other = "vitprobe's own" if entry.name in taken else found[entry.name].get_short_help_str()
            warn(f"the command {entry.name} of {distribution(entry)} is left out: there is one already ({other})")
        else:
            found[entry.name] = PluginCommand(entry)
    return found
