"""The one body of commands that run models: for each model options → run → print, then figures of all."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vitprobe.errors import UserError
from vitprobe.models.paradigms import find_paradigm
from vitprobe.runs.torchrun import launched, rank

if TYPE_CHECKING:
    from vitprobe.runs.kind import Kind

BUNDLED = ("mae_vit_nano", "supervised_vit_nano")  # what is taken where no model is named


@dataclass(frozen=True)
class Loading:
    """What the command line says of the models, by the names of `load_model`'s arguments.

    Attributes:
        models: names.
        checkpoint: a file with weights.
        arch: what is in the file.
        weights_key: which set of weights of it.
        name: what figures call the model.
        paradigm: its place on the paper's axis.
    """

    models: tuple[str, ...]
    checkpoint: Path | None
    arch: str | None
    weights_key: str | None
    name: str | None = None
    paradigm: str | None = None

    def __post_init__(self) -> None:
        """Raises a UserError for options that contradict each other."""
        if self.checkpoint is not None and len(self.models) > 1:
            raise UserError("--checkpoint fits one --model; run the command once for each checkpoint")
        if self.checkpoint is None and self.arch is not None:
            raise UserError("--arch says what a --checkpoint is; give --checkpoint FILE too, or --model NAME instead")
        if self.checkpoint is None and self.weights_key is not None:
            raise UserError("--weights-key chooses among the weights of a --checkpoint; give --checkpoint FILE too")
        if self.paradigm is not None:
            object.__setattr__(self, "paradigm", find_paradigm(self.paradigm))
        for option in ("name", "paradigm"):
            if getattr(self, option) is not None and len(self.wanted) > 1:
                raise UserError(
                    f"--{option} is for one model, and here are {len(self.wanted)} ({', '.join(self.wanted)}); run the "
                    f"command once for each"
                )

    @property
    def wanted(self) -> list[str]:
        """What to load: the models, else the checkpoint, else the bundled ones."""
        if self.models:
            return list(self.models)
        return [str(self.checkpoint)] if self.checkpoint is not None else list(BUNDLED)

    @property
    def arguments(self) -> dict[str, Any]:
        """How to load each of them."""
        given = {
            "checkpoint": self.checkpoint if self.models else None,
            "arch": self.arch,
            "weights_key": self.weights_key,
        }
        return given | {key: word for key in ("name", "paradigm") if (word := getattr(self, key)) is not None}


@dataclass(frozen=True)
class Body:
    """What a command does with models.

    Attributes:
        kind: of its runs.
        run: (name, out=…, **options) → a result, which has a `manifest`.
        tell: prints a result.
        draw: results and the figures' folder → lines on what was drawn there.
        figures: names of these figures, without endings.
        table: the file with every number in a run's folder, and what it is called.
        kept: folders that a broken run left, and the folder given with --out → what is said of them.
    """

    kind: Kind
    run: Callable[..., Any]
    tell: Callable[[Any], None]
    draw: Callable[[list[Any], Path], list[str]]
    figures: Sequence[str]
    table: tuple[str, str]
    kept: Callable[[list[Path], Path], str]


def run_models(
    body: Callable[[], Body], loading: Loading, out: Path | None, options: dict[str, Any], prefix: str = ""
) -> None:
    """Run a command on each model, into a folder for each; under torchrun together with the other processes.

    Args:
        body: makes the body; called when the network has been asked for missing weights, as it imports torch.
        loading: which models.
        out: where to; without it a new folder in `runs`, whose name begins with `prefix`.
        options: of the run, by the names of its arguments.
        prefix: see `out`.
    """
    if options["resume"] and out is None:
        raise UserError("--resume goes on with a run, and that needs its folder: give --out too")
    folders = _folders(loading.wanted, out, prefix)
    _require_weights(loading)
    if not launched():
        _run(body(), loading, folders, options)
        return
    from vitprobe.runs.processes import joined

    with joined(True) as world:
        try:
            folders = world.gather(folders)[0]  # their names may hold the time
            _run(body(), loading, folders, options)
        except UserError as error:
            if world.may_speak():
                click.echo(f"Error: {error}", err=True)
            sys.exit(2)


def _run(body: Body, loading: Loading, folders: list[Path], options: dict[str, Any]) -> None:
    """Each model into its folder, then the figures."""
    from vitprobe.models.loading import require_loadable
    from vitprobe.runs.folder import RunFolder

    first, again = rank() == 0, options["overwrite"] or options["resume"]
    for name, folder in zip(loading.wanted, folders, strict=True):  # all that can be known, before any runs
        RunFolder(folder, body.kind).check(options["overwrite"], options["resume"])
        require_loadable(name, **loading.arguments, img_size=options["img_size"])
    root = folders[0] if len(folders) == 1 else folders[0].parent
    figures = root / "figures"
    if earlier_figures(figures, body.figures) and not again:
        raise UserError(f"{figures} holds another run's figures; pass --overwrite to replace them, or another --out")
    results = []
    for name, folder in zip(loading.wanted, folders, strict=True):
        try:
            result = body.run(name, **loading.arguments, out=folder, **options)
        except KeyboardInterrupt:
            begun = [each for each in folders if (each / "manifest.json").is_file()]
            if first and begun:
                click.echo(body.kept(begun, root), err=True)
            raise
        if first:
            click.echo()
            for remark in result.manifest.get("remarks", []):  # what must be known before the numbers
                click.echo(f"note: {remark}")
            body.tell(result)
            _say_skipped(result.manifest)
            results.append(result)
    if not first:
        return
    for path in earlier_figures(figures, body.figures):
        path.unlink(missing_ok=True)
    for line in body.draw(results, figures):
        click.echo(line)
    file, words = body.table
    click.echo(f"{words}: {', '.join(str(folder / file) for folder in folders)}")


def _require_weights(loading: Loading) -> None:
    """Asks for weights that are not here before torch is imported: a missing network should cost seconds."""
    from vitprobe.models.downloads import require_weights
    from vitprobe.models.registry import find_spec

    if loading.arguments["checkpoint"] is None:
        for spec in filter(None, map(find_spec, loading.wanted)):
            require_weights(spec)


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


def earlier_figures(folder: Path, stems: Sequence[str]) -> list[Path]:
    """The figures of these names that a run left in a folder."""
    from vitprobe.figures.saving import FORMATS

    return [path for stem in stems for kind in FORMATS if (path := folder / f"{stem}.{kind}").exists()]


def _say_skipped(manifest: dict[str, Any]) -> None:
    """Name the images that could not be read."""
    skipped = manifest["data"]["skipped"]
    if skipped:
        click.echo(
            f"  skipped {len(skipped)} image(s) that could not be read; the first: {skipped[0]['name']} "
            f"({skipped[0]['reason']}); all are named in manifest.json",
            err=True,
        )
