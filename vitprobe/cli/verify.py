"""`vitprobe verify`: what selective aggregation gives over [cls]."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vitprobe.cli.options import SomePath, SomeText, folder_options, image_options, model_options
from vitprobe.cli.runs import Body, Loading, run_models
from vitprobe.errors import UserError

if TYPE_CHECKING:
    from vitprobe.probing.verification import Verification

SELECTIVE, BARS = ("abmilp", "ep"), "selective_aggregation"  # what the figure shows, and its name


@click.command("verify", short_help="Measure whether selective aggregation gives more than [cls].")
@model_options
@click.option(
    "--data",
    type=SomeText(),
    metavar="PATH",
    help="A folder with train/ and val/, tars so, a .csv of files and labels, hfds:…, wds:…, or TRAIN,TEST.  "
    "[scikit-learn's handwritten digits]",
)
@click.option(
    "--aggregator",
    "aggregators",
    type=SomeText(),
    multiple=True,
    metavar="NAME",
    help="A way to aggregate, with options in brackets: abmilp(depth=2), or your own as module:Name or file.py:Name; "
    "repeatable; docs/verification.md lists them.  [cls, gap, abmilp, ep]",
)
@click.option("--aggregators", "with_commas", type=SomeText(), hidden=True)  # the old spelling
@click.option(
    "--protocol",
    type=click.Choice(["fast", "cached", "knn", "logistic"]),
    default="fast",
    show_default=True,
    help="How probes are trained and selected (docs/verification.md).",
)
@click.option(
    "--block", "blocks", type=int, multiple=True, metavar="N", help="Read this block's tokens; repeatable.  [the last]"
)
@click.option("--norm/--no-norm", default=None, help="With the model's final norm on the tokens.  [the protocol's]")
@image_options
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Of the forward pass.  [the weights' own]",
)
@click.option("--workers", type=click.IntRange(min=0), metavar="W", help="Reading processes.  [chosen for the machine]")
@click.option("--device", metavar="NAME", help="cpu, cuda, cuda:1, …  [a GPU where there is one]")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of all that is drawn.")
@click.option(
    "--independent-seeds",
    is_flag=True,
    help="Let each seed make all passes over the images by itself; as many times the passes as there are seeds.",
)
@click.option(
    "--out",
    type=SomePath(),
    metavar="DIR",
    help="The run's folder; for several models it holds a folder each.  [runs/verify-<model>-<time>]",
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
    """Train light probes on frozen tokens and measure what each way of aggregating them gives, with intervals.

    The main line: vitprobe verify --model mae_vit_b --data IMAGENET
    """
    asked, several = list(options.pop("aggregators")), options.pop("with_commas")
    if several is not None:
        from vitprobe.aggregation.registry import split_names

        click.echo("note: --aggregators is --aggregator now, repeated; the old spelling goes in a release", err=True)
        asked += split_names(several)
    options |= {"aggregators": asked or None, "blocks": options["blocks"] or None}
    run_models(_body, Loading(models, checkpoint, arch, weights_key, name, paradigm), out, options, "verify-")


def _body() -> Body:
    from vitprobe.probing.verification import ACCURACY, KIND
    from vitprobe.probing.verify import verify

    return Body(KIND, verify, _tell, _draw, (BARS,), (ACCURACY, "every number"), _kept)


def _tell(verification: Verification) -> None:
    click.echo(f"{verification.name} ({verification.paradigm}) on {verification.data}\n{verification}")
    _say_left_out(verification.manifest)


def _draw(found: list[Verification], folder: Path) -> list[str]:
    from vitprobe.figures import save_figure, selective_aggregation

    try:
        axes = selective_aggregation(found, _worth_drawing(found))
    except UserError as error:  # the numbers are there all the same
        click.echo(f"\nno figure: {error}", err=True)
        return []
    return [f"\nfigure: {', '.join(map(str, save_figure(axes, folder / BARS)))}"]


def _kept(folders: list[Path], root: Path) -> str:
    return f"what was saved is kept: the same command with --out {root} --resume goes on"


def _worth_drawing(found: list[Verification]) -> list[str]:
    """The aggregators of a figure: the paper's and EP where every model has one of them, else what all models have."""
    of_each = [[result.aggregator for result in verification.results] for verification in found]
    tables = [verification.table() for verification in found]
    baselines = {name for table in tables for name in table["aggregator"][table["label"].isin(table["gain_over"])]}
    common = [name for name in dict.fromkeys(of_each[0]) if all(name in names for names in of_each)]
    return [name for name in SELECTIVE if name in common] or [name for name in common if name not in baselines]


def _say_left_out(manifest: dict[str, Any]) -> None:
    for name, reason in manifest["undefined"].items():
        click.echo(f"  left out: {name} ({reason})", err=True)
    diverged = manifest["diverged"]
    if diverged:
        name, reason = next(iter(diverged.items()))
        click.echo(
            f"  {len(diverged)} probe(s) diverged and were retired; the first: {name} ({reason}); all are named in "
            f"manifest.json",
            err=True,
        )
