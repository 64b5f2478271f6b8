"""Plugins: what an installed distribution adds to vitprobe by entry points.

Two groups. `vitprobe.plugins` names modules or functions that declare statistics, register aggregators or models: they
are loaded when a registry is first asked for a name that it does not know, or for all its names. `vitprobe.commands`
names click commands: each is loaded when it is run.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

PLUGINS, COMMANDS = "vitprobe.plugins", "vitprobe.commands"

_loaded = False


class PluginWarning(UserWarning):
    """A plugin that could not be loaded; everything else works."""


def load_plugins() -> bool:
    """Load the plugins of all installed distributions, once a process; a broken one is named in a warning.

    Returns:
        Whether this call loaded them. False where an earlier one did, also from inside a plugin.
    """
    global _loaded
    if _loaded:
        return False
    _loaded = True
    for entry in installed(PLUGINS):
        try:
            plugin = entry.load()
            if callable(plugin):
                plugin()
        except (Exception, SystemExit) as error:
            warn(f"the plugin {entry.name} of {distribution(entry)} cannot be loaded ({in_words(error)}): update it or "
                 f"uninstall it")  # fmt: skip
    return True


def installed(group: str) -> Iterator[EntryPoint]:
    """The entry points of a group, distribution by distribution."""
    from importlib.metadata import entry_points  # takes a while, and most runs need none

    yield from sorted(entry_points(group=group), key=lambda entry: (distribution(entry), entry.name))


def distribution(entry: EntryPoint) -> str:
    """The name of the distribution that an entry point comes from."""
    return entry.dist.name if entry.dist is not None else entry.value


def in_words(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")


def warn(message: str) -> None:
    """Give a warning of one line: it belongs to no line of code that could be shown under it."""
    warnings.warn_explicit(message, PluginWarning, "vitprobe", 1)
