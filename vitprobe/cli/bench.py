"""`vitprobe bench`: what seeing attention costs on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from vitprobe.cli.options import ImageSize, SomePath, SomeText
from vitprobe.cli.runs import BUNDLED
from vitprobe.errors import UserError


@click.command("bench", short_help="Measure what seeing attention costs on this machine.")
@click.option(
    "--model",
    "models",
    type=SomeText(),
    multiple=True,
    metavar="NAME",
    help="Any model by name; repeat for several.  [mae_vit_nano and supervised_vit_nano]",
)
@click.option("--img-size", type=ImageSize(), metavar="S", help="A side, or HEIGHTxWIDTH; the model's own by default.")
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="Images in a batch.")
@click.option("--rounds", type=click.IntRange(min=1), default=7, show_default=True, help="Pairs of timings.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="A CUDA GPU where there is one by default.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="What the forward pass runs in; default: bfloat16 on a GPU, else float32.",
)
@click.option("--autocast", type=click.Choice(["float32", "bfloat16", "float16"]), hidden=True, help="Old: --dtype.")
@click.option("--out", type=SomePath(), help="Write the numbers to this JSON file too.")
def command(
    models: tuple[str, ...],
    out: Path | None,
    device: str | None,
    dtype: str | None,
    autocast: str | None,
    **options: Any,
) -> None:
    """Time captures against the plain forward pass and the usual ways, paired, with random weights.

    The main line: vitprobe bench --model vit_base_patch16_224
    """
    names = models or BUNDLED
    if out is not None and len(names) > 1:
        raise UserError(f"--out is for one model, and here are {len(names)} ({', '.join(names)}); give one --model")
    import torch

    from vitprobe.bench import benchmark, report

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no CUDA GPU here: leave --device out, or choose cpu")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if autocast is not None:
        click.echo("Note: --autocast is --dtype now; the next release takes --dtype alone", err=True)
    dtype = dtype or autocast or ("bfloat16" if device == "cuda" else "float32")
    for name in names:
        if len(names) > 1:
            click.echo(f"{name}:")
        costs = benchmark(name, device=device, dtype=dtype, progress=click.echo, **options)
        if out is not None:
            report(out, costs, {"model": name, "device": device, "dtype": dtype, **options})
