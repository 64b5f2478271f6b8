"""`vitprobe analyze`: table, verdict and figures of how attention flows in models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vitprobe.cli.options import SomePath, SomeText, folder_options, image_options, model_options
from vitprobe.cli.runs import Body, Loading, run_models
from vitprobe.cli.screen import profile_table, settled_lines, wrapped
from vitprobe.runs.torchrun import launched

if TYPE_CHECKING:
    from vitprobe.profile.profile import Profile


@click.command("analyze", short_help="Measure a model's attention on images: table, verdict, figures.")
@model_options
@click.option(
    "--data",
    type=SomeText(),
    metavar="PATH",
    help="A folder, a tar, one image, a .npy; wds:…, hfds:…, hfids:… for big sets (docs/scaling.md).  "
    "[packaged photographs]",
)
@click.option("--num-images", type=click.IntRange(min=1), metavar="N", help="Analyse N images, drawn at random.  [all]")
@image_options
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
@folder_options
def command(
    models: tuple[str, ...],
    checkpoint: Path | None,
    arch: str | None,
    weights_key: str | None,
    name: str | None,
    paradigm: str | None,
    out: Path | None,
    **options: Any,
) -> None:
    """Measure how attention flows in a model; print a table and a verdict, draw the paper's figures.

    The main line: vitprobe analyze --model mae_vit_b --data DIR --num-images 500

    On several GPUs or machines: torchrun --nproc-per-node 8 -m vitprobe analyze …
    """
    options |= {"statistics": options["statistics"] or None, "distributed": launched()}
    run_models(_body, Loading(models, checkpoint, arch, weights_key, name, paradigm), out, options)


def _body() -> Body:
    from vitprobe.figures.saving import PAPER_FIGURES
    from vitprobe.profile.analysis import analyze
    from vitprobe.profile.profile import KIND

    return Body(KIND, analyze, _tell, _draw, tuple(PAPER_FIGURES), ("summary.csv", "every statistic"), _kept)


def _tell(profile: Profile) -> None:
    click.echo(f"{profile_table(profile)}\n\n{wrapped([*profile.diagnosis().lines, *settled_lines(profile)])}")


def _draw(profiles: list[Profile], folder: Path) -> list[str]:
    from vitprobe.figures import save_paper_figures

    drawn = save_paper_figures(profiles, folder)
    names = ", ".join(path.name for path in drawn if path.suffix == ".pdf")
    return [f"\nfigures: {folder} ({names})"] if drawn else []


def _kept(folders: list[Path], root: Path) -> str:
    names = " ".join(map(str, folders))
    return f"finished shards are kept; vitprobe figures {names} reads them, --resume goes on"
