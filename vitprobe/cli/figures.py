"""`vitprobe figures`: several runs in one picture."""

from __future__ import annotations

from pathlib import Path

import click

from vitprobe.cli.options import SomePath


@click.command("figures", short_help="Draw several runs together.")
@click.argument("runs", nargs=-1, required=True, type=SomePath())
@click.option(
    "--out",
    type=SomePath(),
    default=Path("figures"),
    show_default=True,
    metavar="DIR",
    help="The folder to write to.",
)
@click.option(
    "--statistic",
    "statistics",
    multiple=True,
    metavar="NAME",
    help="Draw this statistic; repeatable.  [the paper's figures 3, 4 and 5]",
)
def command(runs: tuple[Path, ...], out: Path, statistics: tuple[str, ...]) -> None:
    """Draw RUNS (folders that analyze wrote) together, as PDF, SVG and PNG."""
    from vitprobe.figures import save_figure, save_paper_figures, statistic
    from vitprobe.profile.profile import Profile

    profiles = [Profile.load(run) for run in runs]
    if statistics:
        drawn = [path for name in statistics for path in save_figure(statistic(profiles, name), out / name)]
    else:
        drawn = save_paper_figures(profiles, out)
    for run, profile in zip(runs, profiles, strict=True):
        if profile.unfinished is not None:
            click.echo(f"note: {run} is not complete: {profile.unfinished}")
    for path in drawn:
        click.echo(path)
