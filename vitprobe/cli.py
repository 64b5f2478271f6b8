"""The command line: parse, call, print. Torch and the rest are imported only by the command that needs them."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

import vitprobe
from vitprobe.errors import OUT_OF_MEMORY, UserError
from vitprobe.profile.launch import launched, rank
from vitprobe.screen import aligned, how, profile_table, wrapped

if TYPE_CHECKING:
    from vitprobe.probing.verification import Verification

BUNDLED = ("mae_vit_nano", "supervised_vit_nano")
SELECTIVE, BARS = ("abmilp", "ep"), "selective_aggregation"  # what verify's figure shows, and its name


class SomePath(click.Path):
    """A path that says something: click takes an empty one for the current folder."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path."""
        if value == "":
            self.fail("it is empty", param, ctx)
        return super().convert(value, param, ctx)


class SomeText(click.ParamType):
    """Text that says something."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The text."""
        if value == "":
            self.fail("it is empty", param, ctx)
        return value


class Commands(click.Group):
    """A group whose errors are one line each: exit status 2 for the user's mistake, 130 for Ctrl-C."""

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


def _which_models(command: Callable) -> Callable:
    """The options that say what to load."""
    for option in (
        click.option(
            "--arch", metavar="NAME", help="The architecture of --checkpoint: an alias or a timm architecture."
        ),
        click.option("--checkpoint", type=SomePath(), metavar="FILE", help="Weights for --model, or for --arch."),
        click.option(
            "--model",
            "models",
            multiple=True,
            metavar="NAME",
            help="An alias (vitprobe models), any timm name, hf-hub:… or hf:…; repeat for several.  "
            "[the bundled models]",
        ),
    ):
        command = option(command)
    return command


def _which_way(command: Callable) -> Callable:
    """The options that say what becomes of a run that is there already."""
    command = click.option(
        "--resume", is_flag=True, help="Go on with the run in --out where it was broken off, or begin it."
    )(command)
    return click.option("--overwrite", is_flag=True, help="Replace a run that is in --out already.")(command)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(vitprobe.__version__, prog_name="vitprobe")
def main() -> None:
    """Exact attention diagnostics for Vision Transformers.

    Start with `vitprobe analyze`: it diagnoses the bundled models on packaged photographs, offline.
    """


@main.command(short_help="Measure a model's attention on images: table, verdict, figures.")
@_which_models
@click.option(
    "--data",
    type=SomeText(),
    metavar="PATH",
    help="A folder, a tar, one image; wds:…, hfds:…, hfids:… for big sets (docs/scaling.md).  [packaged photographs]",
)
@click.option("--num-images", type=click.IntRange(min=1), metavar="N", help="Analyse N images, drawn at random.  [all]")
@click.option("--img-size", type=click.IntRange(min=1), metavar="S", help="Input size in pixels.  [the model's own]")
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
    help="Of the forward pass; auto: bfloat16 where its measured error allows.  [the weights' own]",
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
    help="The error of a statistic that --dtype auto allows.",
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
@_which_way
def analyze(
    models: tuple[str, ...], checkpoint: Path | None, arch: str | None, out: Path | None, **options: Any
) -> None:
    """Measure how attention flows in a model; print a table and a verdict, draw the paper's figures.

    The main line: vitprobe analyze --model mae_vit_b --data DIR --num-images 500

    On several GPUs or machines: torchrun --nproc-per-node 8 -m vitprobe analyze …
    """
    if options["resume"] and out is None:
        raise UserError("--resume goes on with a run, and that needs its folder: give --out too")
    names = _names(models, checkpoint, arch)
    folders = _folders(names, out)
    given = {"checkpoint": checkpoint if models else None, "arch": arch}
    if not launched():
        _analyze(names, folders, given, options)
        return
    from vitprobe.profile.distributed import joined

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
    from vitprobe.models.hub import require_weights
    from vitprobe.models.registry import find_spec

    first, overwrite, resume = rank() == 0, options["overwrite"], options["resume"]
    if given["checkpoint"] is None:
        for spec in filter(None, map(find_spec, names)):
            require_weights(spec)  # before torch is imported: a missing network should cost seconds

    from vitprobe.figures import save_paper_figures
    from vitprobe.models.loading import require_loadable
    from vitprobe.profile.analysis import analyze as run
    from vitprobe.profile.folder import check_output

    for name, folder in zip(names, folders, strict=True):  # what can be known is checked for all before any runs
        check_output(folder, overwrite, resume)
        require_loadable(name, **given, img_size=options["img_size"])
    figures = (folders[0] if len(folders) == 1 else folders[0].parent) / "figures"
    if _earlier_figures(figures) and not (overwrite or resume):
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
        click.echo(f"\n{profile_table(profile)}\n\n{wrapped([*profile.diagnosis().lines, *how(profile)])}")
        _say_skipped(profile.manifest)
        profiles.append(profile)
    if not first:
        return
    for path in _earlier_figures(figures):
        path.unlink()
    drawn = save_paper_figures(profiles, figures)
    if drawn:
        click.echo(f"\nfigures: {figures} ({', '.join(path.name for path in drawn if path.suffix == '.pdf')})")
    click.echo(f"every statistic: {', '.join(str(folder / 'summary.csv') for folder in folders)}")


@main.command(short_help="Measure whether selective aggregation gives more than [cls].")
@_which_models
@click.option(
    "--data",
    type=SomeText(),
    metavar="PATH",
    help="A folder with train/ and val/, tars of that shape, or TRAIN,TEST.  [scikit-learn's handwritten digits]",
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
@click.option("--img-size", type=click.IntRange(min=1), metavar="S", help="Input size in pixels.  [the model's own]")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Of the forward pass.  [the weights' own]",
)
@click.option("--workers", type=click.IntRange(min=0), metavar="W", help="Reading processes.  [chosen for the machine]")
@click.option("--device", metavar="NAME", help="cpu, cuda, cuda:1, …  [a GPU where there is one]")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of all that is drawn.")
@click.option(
    "--out",
    type=SomePath(),
    metavar="DIR",
    help="The run's folder; for several models it holds a folder each.  [runs/verify-<model>-<time>]",
)
@_which_way
def verify(
    models: tuple[str, ...], checkpoint: Path | None, arch: str | None, out: Path | None, **options: Any
) -> None:
    """Train light probes on frozen tokens and measure what each way of aggregating them gives, with intervals.

    The main line: vitprobe verify --model mae_vit_b --data IMAGENET
    """
    if options["resume"] and out is None:
        raise UserError("--resume goes on with a run, and that needs its folder: give --out too")
    names = _names(models, checkpoint, arch)
    folders = _folders(names, out, "verify-")
    given = {"checkpoint": checkpoint if models else None, "arch": arch}

    from vitprobe.aggregation.registry import split_names
    from vitprobe.figures import save_figure, selective_aggregation
    from vitprobe.models.loading import require_loadable
    from vitprobe.probing.verify import verify as run
    from vitprobe.profile.folder import check_output

    aggregators = options.pop("aggregators")
    options["aggregators"] = None if aggregators is None else split_names(aggregators)
    options["blocks"] = options["blocks"] or None
    for name, folder in zip(names, folders, strict=True):  # what can be known is checked for all before any runs
        check_output(folder, options["overwrite"], options["resume"], "verify")
        require_loadable(name, **given, img_size=options["img_size"])
    root = folders[0] if len(folders) == 1 else folders[0].parent
    earlier = _earlier_figures(root / "figures", [BARS])
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
        click.echo(f"\n{verification.name} ({verification.paradigm}) on {verification.data}\n{verification}")
        _say_left_out(verification.manifest)
        _say_skipped(verification.manifest)
    for path in earlier:
        path.unlink(missing_ok=True)
    try:
        axes = selective_aggregation(found, _worth_drawing(found))
    except UserError as error:  # the numbers are there all the same
        click.echo(f"\nno figure: {error}", err=True)
    else:
        click.echo(f"\nfigure: {', '.join(map(str, save_figure(axes, root / 'figures' / BARS)))}")
    click.echo(f"every number: {', '.join(str(folder / 'accuracy.csv') for folder in folders)}")


@main.command("models", short_help="List the models that have an alias.")
@click.argument("words", nargs=-1)
@click.option("--paradigm", metavar="NAME", help="Only MIM, JEA, hybrid, supervised or VLM.")
def list_models(words: tuple[str, ...], paradigm: str | None) -> None:
    """List the models that have an alias (any timm name works too); WORDS filter them."""
    from vitprobe.models.registry import list_models as listed

    table = listed(" ".join(words) or None, paradigm=paradigm)
    if table.empty:
        raise UserError(f"no model matches {' '.join(words)!r}; vitprobe models lists them all")
    columns = ("name", "method", "paradigm", "architecture", "licence", "status")
    click.echo(aligned({column: table[column].astype(str).tolist() for column in columns}))


@main.command(short_help="Draw several runs together.")
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
def figures(runs: tuple[Path, ...], out: Path, statistics: tuple[str, ...]) -> None:
    """Draw RUNS (folders that analyze wrote) together, as PDF, SVG and PNG."""
    from vitprobe.figures import save_figure, save_paper_figures, statistic
    from vitprobe.profile.profile import Profile

    profiles = [Profile.load(run) for run in runs]
    if statistics:
        drawn = [path for name in statistics for path in save_figure(statistic(profiles, name), out / name)]
    else:
        drawn = save_paper_figures(profiles, out)
    for path in drawn:
        click.echo(path)


@main.command(short_help="Measure what seeing attention costs on this machine.")
@click.option("--model", type=SomeText(), default="vit_base_patch16_224", show_default=True, help="Any model by name.")
@click.option("--img-size", type=click.IntRange(min=1), help="Pixels a side; the model's own by default.")
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="Images in a batch.")
@click.option("--rounds", type=click.IntRange(min=1), default=7, show_default=True, help="Pairs of timings.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="A CUDA GPU where there is one by default.")
@click.option(
    "--autocast",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="What the forward pass runs in; bfloat16 on a GPU by default, else float32.",
)
@click.option("--out", type=SomePath(), help="Write the numbers to this JSON file too.")
def bench(out: Path | None, device: str | None, **options: Any) -> None:
    """Time captures against the plain forward pass and the usual ways, paired, with random weights."""
    import torch

    from vitprobe.bench import benchmark, report

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no CUDA GPU here: leave --device out, or choose cpu")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and options["autocast"] is None:
        options["autocast"] = "bfloat16"
    if options["autocast"] == "float32":
        options["autocast"] = None
    costs = benchmark(device=device, progress=click.echo, **options)
    if out is not None:
        report(out, costs, {"device": device, **options})


def _names(models: tuple[str, ...], checkpoint: Path | None, arch: str | None) -> list[str]:
    """What to load: the models, else the checkpoint, else the bundled ones."""
    if checkpoint is not None and len(models) > 1:
        raise UserError("--checkpoint fits one --model; run the command once for each checkpoint")
    if checkpoint is None and arch is not None:
        raise UserError("--arch says what a --checkpoint is; give --checkpoint FILE too, or --model NAME instead")
    if models:
        return list(models)
    return [str(checkpoint)] if checkpoint is not None else list(BUNDLED)


def _folders(names: list[str], out: Path | None, prefix: str = "") -> list[Path]:
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


def _worth_drawing(found: list[Verification]) -> list[str]:
    """The aggregators of a figure: the paper's and EP where every model has one of them, else what all models have."""
    of_each = [[result.name.partition("@")[0] for result in verification.results] for verification in found]
    baselines = {str(over).partition("@")[0] for verification in found for over in verification.table()["gain_over"]}
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


def _say_skipped(manifest: dict[str, Any]) -> None:
    skipped = manifest["data"]["skipped"]
    if skipped:
        click.echo(
            f"  skipped {len(skipped)} image(s) that could not be read; the first: {skipped[0]['name']} "
            f"({skipped[0]['reason']}); all are named in manifest.json",
            err=True,
        )


def _say_what_is_left(folders: list[Path]) -> None:
    begun = [str(folder) for folder in folders if (folder / "manifest.json").is_file()]
    if begun:
        click.echo(
            f"finished shards are kept; vitprobe figures {' '.join(begun)} reads them, --resume goes on", err=True
        )


def _earlier_figures(folder: Path, stems: Iterable[str] | None = None) -> list[Path]:
    """The figures, without their names the paper's, that a run left in a folder."""
    from vitprobe.figures.saving import FORMATS, PAPER_FIGURES

    return [path for stem in stems or PAPER_FIGURES for kind in FORMATS if (path := folder / f"{stem}.{kind}").exists()]


if __name__ == "__main__":
    main()
