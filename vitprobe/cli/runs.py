"""What `analyze` and `verify` share: which models, a folder for each, what is there already, what was left out."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

import click

from vitprobe.errors import UserError
from vitprobe.models.paradigms import find_paradigm

BUNDLED = ("mae_vit_nano", "supervised_vit_nano")  # what is taken where no model is named


def choose_runs(
    models: tuple[str, ...],
    checkpoint: Path | None,
    arch: str | None,
    weights_key: str | None,
    out: Path | None,
    resume: bool,
    prefix: str = "",
    name: str | None = None,
    paradigm: str | None = None,
) -> tuple[list[str], list[Path], dict[str, Any]]:
    """What to load, a run's folder for each (its name begins with `prefix` without `out`), and how to load it."""
    if resume and out is None:
        raise UserError("--resume goes on with a run, and that needs its folder: give --out too")
    names = _models(models, checkpoint, arch, weights_key)
    said = {} if name is None else {"name": name}
    if paradigm is not None:
        said["paradigm"] = find_paradigm(paradigm)
    if said and len(names) > 1:
        raise UserError(
            f"--{next(iter(said))} is for one model, and here are {len(names)} ({', '.join(names)}); run the command "
            f"once for each"
        )
    given = {"checkpoint": checkpoint if models else None, "arch": arch, "weights_key": weights_key} | said
    return names, _folders(names, out, prefix), given


def _models(models: tuple[str, ...], checkpoint: Path | None, arch: str | None, weights_key: str | None) -> list[str]:
    """What to load: the models, else the checkpoint, else the bundled ones."""
    if checkpoint is not None and len(models) > 1:
        raise UserError("--checkpoint fits one --model; run the command once for each checkpoint")
    if checkpoint is None and arch is not None:
        raise UserError("--arch says what a --checkpoint is; give --checkpoint FILE too, or --model NAME instead")
    if checkpoint is None and weights_key is not None:
        raise UserError("--weights-key chooses among the weights of a --checkpoint; give --checkpoint FILE too")
    if models:
        return list(models)
    return [str(checkpoint)] if checkpoint is not None else list(BUNDLED)


def _folders(names: list[str], out: Path | None, prefix: str) -> list[Path]:
    """A run's folder for each model."""
    plain = ["".join(c if c.isalnum() or c in "._-" else "_" for c in Path(name).name) for name in names]
    if len(set(plain)) < len(plain):
        raise UserError("a --model was given twice; give each once")
    time = datetime.now().strftime("%Y%m%d-%H%M%S")
    if len(names) == 1:
        return [out or Path("runs") / f"{prefix}{plain[0]}-{time}"]
    root = out or Path("runs") / f"{prefix}{len(names)}-models-{time}"
    if (root / "manifest.json").exists():
        raise UserError(f"{root} is the run of one model, and {len(names)} need a folder each; give another --out")
    return [root / name for name in plain]


def earlier_figures(folder: Path, stems: Iterable[str] | None = None) -> list[Path]:
    """The figures, without their names the paper's, that a run left in a folder."""
    from vitprobe.figures.saving import FORMATS, PAPER_FIGURES

    return [path for stem in stems or PAPER_FIGURES for kind in FORMATS if (path := folder / f"{stem}.{kind}").exists()]


def say_remarks(manifest: dict[str, Any]) -> None:
    """Print what must be known before the numbers: defaults that were assumed, which weights were taken."""
    for remark in manifest.get("remarks", []):
        click.echo(f"note: {remark}")


def say_skipped(manifest: dict[str, Any]) -> None:
    """Name the images that could not be read."""
    skipped = manifest["data"]["skipped"]
    if skipped:
        click.echo(
            f"  skipped {len(skipped)} image(s) that could not be read; the first: {skipped[0]['name']} "
            f"({skipped[0]['reason']}); all are named in manifest.json",
            err=True,
        )
