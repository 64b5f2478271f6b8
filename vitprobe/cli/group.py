"""The group of commands, and how errors end it."""

from __future__ import annotations

import errno
import os
import re
import sys
from functools import cached_property
from typing import Any, NoReturn

import click

import vitprobe
from vitprobe.errors import OUT_OF_MEMORY, UserError
from vitprobe.runs.torchrun import rank


class Commands(click.Group):
    """A group whose errors are one line each: exit status 2 for the user's mistake, 130 for Ctrl-C.

    Its commands are vitprobe's own and those of installed plugins.
    """

    @cached_property
    def _plugged(self) -> dict[str, click.Command]:
        from vitprobe.cli.plugged import plugin_commands

        return plugin_commands(set(self.commands))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of a name; plugins are asked only for what vitprobe does not have."""
        return super().get_command(ctx, cmd_name) or self._plugged.get(cmd_name)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, for help."""
        return [*super().list_commands(ctx), *self._plugged]

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run a command line and exit."""
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # an ASCII terminal shows ×
        try:
            super().main(*args, **{**kwargs, "standalone_mode": False})
            if sys.stdout:
                sys.stdout.flush()
        except click.exceptions.Exit as error:
            sys.exit(error.exit_code)
        except UserError as error:
            _fail(str(error))
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.ctx.get_help() if error.ctx else "")
        except click.ClickException as error:
            context = getattr(error, "ctx", None)
            _fail(error.format_message() + (f" (see {context.command_path} --help)" if context is not None else ""))
        except (KeyboardInterrupt, click.Abort):
            if rank() == 0:
                click.echo("interrupted", err=True)
            sys.exit(130)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.ENOSPC):
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would try again on leaving
            if error.errno == errno.ENOSPC:
                _fail("the output could not be written: no space left on its device")
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and not re.search(OUT_OF_MEMORY, str(error)):
                raise
            _fail("out of memory; give a smaller --batch-size or --img-size, or a smaller model")
        sys.exit(0)


def _fail(message: str) -> NoReturn:
    if rank() == 0:  # of several processes, which have the same
        click.echo(f"Error: {message}", err=True)
    sys.exit(2)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(vitprobe.__version__, prog_name="vitprobe")
def main() -> None:
    """Exact attention diagnostics for Vision Transformers.

    Start with `vitprobe analyze`: it diagnoses two bundled models on packaged photographs, offline.
    """
