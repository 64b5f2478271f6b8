"""`vitprobe analyze`: table, verdict and figures of how attention flows in models."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from vitprobe.cli.options import SomePath, SomeText, what_images, which_models, which_way
from vitprobe.cli.runs import choose_runs, earlier_figures, say_remarks, say_skipped
from vitprobe.cli.screen import how, profile_table, wrapped
from vitprobe.errors import UserError
from vitprobe.runs.torchrun import launched, rank


@click.command("analyze", short_help="Measure a model's attention on images: table, verdict, figures.")
@which_models
@click.option(
    "--data",
    type=SomeText(),
    metavar="PATH",
    help="A folder, a tar, one image, a .npy; wds:…, hfds:…, hfids:… for big sets (docs/scaling.md).  "
    "[packaged photographs]",
)
@click.option("--num-images", type=click.IntRange(min=1), metavar="N", help="Analyse N images, drawn at random.  [all]")
@what_images
@click.option(
    "--transform",
    type=click.Choice(["model", "paper"]),
    default="model",
    show_default=True,
    help="The model's own preprocessing, or the paper's.",
)
@click.option("--statistic", "statistics", multiple=True, metavar="NAME", help="Only this one; repeatable.  [all]")
@click.option(
    "--tolerance",
    type=float,
    metavar="T",
    help="Draw images at random and stop when every mean is known to T, such as 0.05 (docs/stopping.md).  [all images]",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16", "auto"]),
    help="Of the forward pass; auto: bfloat16 where its measured error in block means allows.  [the weights' own]",
)
@click.option(
    "--kernel",
    type=click.Choice(["auto", "torch", "model"]),
    default="auto",
    show_default=True,
    help="What gives attention's output: the fastest, that without Triton, or the model's own with statistics beside.",
)
@click.option(
    "--dtype-bound",
    type=float,
    default=0.01,
    show_default=True,
    metavar="E",
    help="The error that --dtype auto allows in block means over heads and the first images, relative to the mean or, "
    "if larger, to the value under uniform attention (at most 0.01). Single heads and images are not bounded.",
)
@click.option("--batch-size", type=click.IntRange(min=1), metavar="B", help="Images a batch.  [sized to memory]")
@click.option("--workers", type=click.IntRange(min=0), metavar="W", help="Reading processes.  [chosen for the machine]")
@click.option("--device", metavar="NAME", help="cpu, cuda, cuda:1, …  [a GPU where there is one]")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the drawing of images.")
@click.option(
    "--out",
    type=SomePath(),
    metavar="DIR",
    help="The run's folder; for several models it holds a folder each.  [runs/<model>-<time>]",
)
@which_way
def command(
    models: tuple[str, ...],
    checkpoint: Path | None,
    arch: str | None,
    weights_key: str | None,
    out: Path | None,
    name: str | None,
    paradigm: str | None,
    **options: Any,
) -> None:
    """Measure how attention flows in a model; print a table and a verdict, draw the paper's figures.

    The main line: vitprobe analyze --model mae_vit_b --data DIR --num-images 500

    On several GPUs or machines: torchrun --nproc-per-node 8 -m vitprobe analyze …
    """
    names, folders, given = choose_runs(
        models, checkpoint, arch, weights_key, out, options["resume"], name=name, paradigm=paradigm
    )
    if not launched():
        _analyze(names, folders, given, options)
        return
    from vitprobe.runs.processes import joined

    with joined(True) as world:
        try:
            folders = world.gather(folders)[0]  # their names may hold the time
            _analyze(names, folders, given, options)
        except UserError as error:
            if world.may_speak():
                click.echo(f"Error: {error}", err=True)
            sys.exit(2)


def _analyze(names: list[str], folders: list[Path], given: dict[str, Any], options: dict[str, Any]) -> None:
    """Analyse each model into its folder."""
    from vitprobe.models.downloads import require_weights
    from vitprobe.models.registry import find_spec

    first, overwrite, resume = rank() == 0, options["overwrite"], options["resume"]
    if given["checkpoint"] is None:
        for spec in filter(None, map(find_spec, names)):
            require_weights(spec)  # before torch is imported: a missing network should cost seconds

    from vitprobe.figures import save_paper_figures
    from vitprobe.models.loading import require_loadable
    from vitprobe.profile.analysis import analyze as run
    from vitprobe.runs.folder import check_output

    for name, folder in zip(names, folders, strict=True):  # what can be known is checked for all before any runs
        check_output(folder, overwrite, resume)
        require_loadable(name, **given, img_size=options["img_size"])
    figures = (folders[0] if len(folders) == 1 else folders[0].parent) / "figures"
    if earlier_figures(figures) and not (overwrite or resume):
        raise UserError(f"{figures} holds another run's figures; pass --overwrite to replace them, or another --out")

    statistics = options.pop("statistics") or None
    profiles = []
    for name, folder in zip(names, folders, strict=True):
        try:
            profile = run(name, **given, statistics=statistics, out=folder, distributed=launched(), **options)
        except KeyboardInterrupt:
            if first:
                _say_what_is_left(folders)
            raise
        if not first:
            continue
        click.echo()
        say_remarks(profile.manifest)
        click.echo(f"{profile_table(profile)}\n\n{wrapped([*profile.diagnosis().lines, *how(profile)])}")
        say_skipped(profile.manifest)
        profiles.append(profile)
    if not first:
        return
    for path in earlier_figures(figures):
        path.unlink()
    drawn = save_paper_figures(profiles, figures)
    if drawn:
        click.echo(f"\nfigures: {figures} ({', '.join(path.name for path in drawn if path.suffix == '.pdf')})")
    click.echo(f"every statistic: {', '.join(str(folder / 'summary.csv') for folder in folders)}")


def _say_what_is_left(folders: list[Path]) -> None:
    begun = [str(folder) for folder in folders if (folder / "manifest.json").is_file()]
    if begun:
        click.echo(
            f"finished shards are kept; vitprobe figures {' '.join(begun)} reads them, --resume goes on", err=True
        )
