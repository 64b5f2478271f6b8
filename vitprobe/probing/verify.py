"""`verify`: does aggregating the patch tokens selectively give more than [cls]? Measured, with intervals."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from vitprobe.aggregation import Aggregator
from vitprobe.aggregation.registering import as_name
from vitprobe.data.labelled import has_loader
from vitprobe.data.transforms import check_normalisation
from vitprobe.errors import UserError
from vitprobe.files import disk_errors, partial_of
from vitprobe.probing.methods import TOKENS, TRAINING, classify_vectors, train_probes
from vitprobe.probing.plan import Plan, make_plan
from vitprobe.probing.protocols import Protocol, find_protocol
from vitprobe.probing.saved import FILES as PROBE_FILES
from vitprobe.probing.saved import FOLDER as PROBES
from vitprobe.probing.saved import save_probe
from vitprobe.probing.verification import ACCURACY, CORRECTNESS, Verification
from vitprobe.runs.folder import MANIFEST, check_output, is_run, read_manifest, write_manifest
from vitprobe.runs.options import check_resume, check_whole, shown, shown_size, size_of
from vitprobe.runs.progress import progress_bar
from vitprobe.runs.same import require_same


def verify(
    model: Any = "mae_vit_nano",
    data: Any = None,
    aggregators: Sequence[str | Callable[..., Aggregator]] | str | Callable[..., Aggregator] | None = None,
    *,
    protocol: str | Protocol = "fast",
    checkpoint: str | Path | None = None,
    arch: str | None = None,
    weights_key: str | None = None,
    img_size: int | tuple[int, int] | None = None,
    mean: float | int | Sequence[float | int] | None = None,
    std: float | int | Sequence[float | int] | None = None,
    blocks: Sequence[int] | None = None,
    norm: bool | None = None,
    dtype: str | None = None,
    device: Any = None,
    workers: int | None = None,
    seed: int = 0,
    independent_seeds: bool = False,
    out: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: bool | None = None,
) -> Verification:
    """Train light probes on a model's frozen tokens and measure what each way of aggregating them gives.

    The question is the paper's ("Beyond [cls]", arXiv 2412.03215): would selective aggregation of the patch tokens
    represent an image better than [cls] does? All probes of a seed see the same crops of the same images in the same
    order, so that differences are paired; seeds differ in all of that and in initial weights. Learning rates are
    selected on a slice held out from the training images; the test images select nothing.

    Args:
        model: anything that `load_model` takes.
        data: anything that `vitprobe.data.labelled.open_labelled` takes: a folder with train/ and val/, tars of that
            shape, a pair of paths; without it scikit-learn's digits.
        aggregators: names that `vitprobe.aggregation.create` takes, with options in brackets, or classes of your own
            (subclasses of `vitprobe.aggregation.Aggregator`, or functions that make one); without it cls, gap, abmilp
            and ep (for protocols that train none: cls and gap), less what the model has not.
        protocol: "fast", "cached", "knn", "logistic", or a `Protocol`.
        checkpoint: as for `load_model`.
        arch: as for `load_model`.
        weights_key: as for `load_model`.
        img_size: the input size in pixels, where it is not the model's own: a side or (height, width).
        mean: as for `analyze`: subtracted from each channel of a picture.
        std: as for `analyze`: what each channel is divided by.
        blocks: the blocks whose output is read, negative from the last; the last one without. Several are probed in
            the same pass.
        norm: whether the model's final norm is applied to the tokens; as the protocol says without.
        dtype: what the forward pass runs in: "float32", "bfloat16", "float16"; the weights' own precision without.
        device: "cpu", "cuda", …; a CUDA GPU where there is one without.
        workers: processes that read images; chosen for the machine without.
        seed: of orders, crops, the held-out slice and initial weights.
        independent_seeds: let each seed make all passes over the images by itself, instead of taking several steps for
            each batch that it reads; takes as many times the passes through the model as there are seeds. For protocols
            that train on images.
        out: the run's folder: `manifest.json`, `accuracy.csv`, per-image correctness, the selected probes as
            safetensors. Without it nothing stays on the disk.
        overwrite: replace a run that is there already.
        resume: go on with the run in `out` where it was broken off, or begin it; the result is an unbroken run's.
        progress: show progress bars; by default on a terminal and in a notebook.

    Raises:
        UserError: for bad input, in one line; nothing is written then.
    """
    settled = find_protocol(protocol)
    if independent_seeds:
        settled = settled.independent()
    check_whole(workers=(workers, 0), seed=(seed, 0))
    check_resume(resume, overwrite, out)
    if resume and has_loader(data):
        raise UserError(
            "a DataLoader gives its images in an order that only it knows, so a run on it cannot be resumed: give the "
            "data set's folder, or leave --resume out"
        )
    several = [aggregators] if isinstance(aggregators, str) or callable(aggregators) else aggregators
    asked = None if several is None else [as_name(each) for each in several]
    img_size = size_of(img_size)
    normalisation = {"mean": check_normalisation("mean", mean), "std": check_normalisation("std", std)}
    options = {
        "checkpoint": checkpoint,
        "arch": arch,
        "weights_key": weights_key,
        "img_size": img_size,
        "dtype": dtype,
        "device": device,
    }
    arguments = {
        "model": shown(model),
        "data": ", ".join(str(shown(part)) for part in data) if isinstance(data, list | tuple) else shown(data),
        "aggregators": None if asked is None else list(asked),
        "protocol": str(settled),
        **{name: shown(value) for name, value in options.items()},
        "device": None if device is None else str(device),
        "img_size": shown_size(img_size),
        **normalisation,
        "blocks": None if blocks is None else list(blocks),
        "norm": norm,
        "workers": workers,
        "seed": seed,
        "independent_seeds": independent_seeds,
        "out": shown(out),
        "overwrite": overwrite,
        "resume": resume,
    }
    folder = None if out is None else Path(out)
    if folder is not None:
        check_output(folder, overwrite, resume, "verify")
    begun = read_manifest(folder, "verify") if folder is not None and resume and is_run(folder) else None
    plan = make_plan(
        model,
        data,
        asked,
        settled,
        blocks=blocks,
        norm=norm,
        workers=workers,
        seed=seed,
        arguments=arguments,
        **normalisation,
        **options,
    )
    with ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if begun is None:
            _clear_unfinished(folder)  # another run's, which this one must not go on with
        else:
            require_same(folder, begun, plan.manifest)
            if begun["status"] == "complete" and (folder / CORRECTNESS).is_file():
                return _finished(folder)

        @cache
        def claim() -> None:
            """Make the folder this run's: not before it has something to write, so that an error costs nothing."""
            if begun is None:
                _clear(folder)
            write_manifest(folder, plan.manifest)

        return _carry_out(plan, folder, claim, progress)


def _finished(folder: Path) -> Verification:
    """A run that is complete, but for what a kill in its last moment may have left undone."""
    found = Verification.load(folder)
    if not (folder / ACCURACY).is_file():
        found.write(folder)
    _clear_unfinished(folder)
    return found


def _carry_out(plan: Plan, folder: Path, claim: Callable[[], Any], progress: bool | None) -> Verification:
    """From a plan to the results, in a folder."""
    method = train_probes if plan.protocol.trains else classify_vectors
    with ExitStack() as bars:

        def bar(words: str, total: int, done: int) -> Callable[[int], Any]:
            bars.close()  # the one before
            made = progress_bar(f"{plan.model.spec.name}: {words}", total, progress, done=done)
            return bars.enter_context(made).update

        outcome = method(plan, folder, claim, bar)
    lost = plan.aggregators.keys() - {result.name for result in outcome.results}
    manifest = plan.manifest | {
        "status": "complete",
        "ended": datetime.now(UTC).isoformat(timespec="seconds"),
        "diverged": outcome.diverged,
        "anchors": outcome.anchors,
        "undefined": plan.manifest["undefined"] | {name: "diverged at every learning rate" for name in sorted(lost)},
    }
    manifest["data"] = {
        **manifest["data"],
        "skipped": [{"name": name, "reason": reason} for name, reason in outcome.skipped],
    }
    claim()
    test = plan.data.test
    found = Verification(
        manifest, [test.ids[index] for index in outcome.tested], test.labels[outcome.tested], outcome.results
    )
    for spec, probe in outcome.probes:
        save_probe(
            folder,
            spec,
            probe,
            dim=plan.dim,
            classes=plan.data.classes,
            manifest=manifest,
        )
    found.write(folder)
    _clear_unfinished(folder)
    return found


def _clear(folder: Path) -> None:
    """Remove a run's own files from its folder, and nothing else; its manifest stays until another replaces it."""
    _clear_unfinished(folder)
    with disk_errors(folder):
        for name in (CORRECTNESS, ACCURACY):
            (folder / name).unlink(missing_ok=True)
        for path in (folder / PROBES).glob(PROBE_FILES):
            path.unlink()
        with suppress(OSError):  # not there, or it holds something else
            (folder / PROBES).rmdir()


def _clear_unfinished(folder: Path) -> None:
    """Remove what only an unfinished run needs."""
    with disk_errors(folder):
        for name in (MANIFEST, CORRECTNESS, ACCURACY, TRAINING):
            partial_of(folder / name).unlink(missing_ok=True)
        for path in (folder / PROBES).glob(partial_of(Path(PROBE_FILES)).name):
            path.unlink()
        (folder / TRAINING).unlink(missing_ok=True)
        for part in ("train", "test"):
            shutil.rmtree(folder / TOKENS / part, ignore_errors=True)
        with suppress(OSError):
            (folder / TOKENS).rmdir()
