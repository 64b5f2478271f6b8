"""`vitprobe verify`: what selective aggregation gives over [cls]."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vitprobe.cli.options import SomePath, SomeText, what_images, which_models, which_way
from vitprobe.cli.runs import choose_runs, earlier_figures, say_remarks, say_skipped
from vitprobe.errors import UserError

if TYPE_CHECKING:
    from vitprobe.probing.verification import Verification

SELECTIVE, BARS = ("abmilp", "ep"), "selective_aggregation"  # what the figure shows, and its name


@click.command("verify", short_help="Measure whether selective aggregation gives more than [cls].")
@which_models
@click.option(
    "--data",
    type=SomeText(),
    metavar="PATH",
    help="A folder with train/ and val/, tars so, a .csv of files and labels, hfds:…, wds:…, or TRAIN,TEST.  "
    "[scikit-learn's handwritten digits]",
)
@click.option(
    "--aggregators",
    type=SomeText(),
    metavar="A,B,…",
    help="Ways to aggregate, with options in brackets: abmilp(depth=2); docs/verification.md lists them.  "
    "[cls,gap,abmilp,ep]",
)
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
@what_images
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
    """Train light probes on frozen tokens and measure what each way of aggregating them gives, with intervals.

    The main line: vitprobe verify --model mae_vit_b --data IMAGENET
    """
    names, folders, given = choose_runs(
        models, checkpoint, arch, weights_key, out, options["resume"], "verify-", name, paradigm
    )

    from vitprobe.aggregation.registry import split_names
    from vitprobe.figures import save_figure, selective_aggregation
    from vitprobe.models.loading import require_loadable
    from vitprobe.probing.verify import verify as run
    from vitprobe.runs.folder import check_output

    aggregators = options.pop("aggregators")
    options["aggregators"] = None if aggregators is None else split_names(aggregators)
    options["blocks"] = options["blocks"] or None
    for name, folder in zip(names, folders, strict=True):  # what can be known is checked for all before any runs
        check_output(folder, options["overwrite"], options["resume"], "verify")
        require_loadable(name, **given, img_size=options["img_size"])
    root = folders[0] if len(folders) == 1 else folders[0].parent
    earlier = earlier_figures(root / "figures", [BARS])
    if earlier and not (options["overwrite"] or options["resume"]):
        raise UserError(f"{root / 'figures'} holds another run's figure; pass --overwrite to replace it")
    found: list[Verification] = []
    for name, folder in zip(names, folders, strict=True):
        try:
            found.append(run(name, **given, out=folder, **options))
        except KeyboardInterrupt:
            if any((each / "manifest.json").is_file() for each in folders):
                click.echo(f"what was saved is kept: the same command with --out {root} --resume goes on", err=True)
            raise
        verification = found[-1]
        click.echo()
        say_remarks(verification.manifest)
        click.echo(f"{verification.name} ({verification.paradigm}) on {verification.data}\n{verification}")
        _say_left_out(verification.manifest)
        say_skipped(verification.manifest)
    for path in earlier:
        path.unlink(missing_ok=True)
    try:
        axes = selective_aggregation(found, _worth_drawing(found))
    except UserError as error:  # the numbers are there all the same
        click.echo(f"\nno figure: {error}", err=True)
    else:
        click.echo(f"\nfigure: {', '.join(map(str, save_figure(axes, root / 'figures' / BARS)))}")
    click.echo(f"every number: {', '.join(str(folder / 'accuracy.csv') for folder in folders)}")


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
