"""The command line: parse, call, print. Torch and the rest are imported only by the command that needs them."""

from vitprobe.cli import analyze, bench, figures, models, verify
from vitprobe.cli.group import main

for module in (analyze, verify, models, figures, bench):
    main.add_command(module.command)

__all__ = ["main"]
