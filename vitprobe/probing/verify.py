"""`verify`: does aggregating the patch tokens selectively give more than [cls]? Measured, with intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from vitprobe.aggregation import Aggregator
from vitprobe.probing.methods import classify_vectors, train_probes
from vitprobe.probing.options import VerifyOptions
from vitprobe.probing.plan import Plan, make_plan
from vitprobe.probing.protocols import Protocol
from vitprobe.probing.saved import save_probe
from vitprobe.probing.verification import ACCURACY, CORRECTNESS, KIND, Verification
from vitprobe.runs.folder import RunFolder
from vitprobe.runs.manifest import now
from vitprobe.runs.options import Dtype, ImageSize, ModelLike, Numbers, ProtocolName, Transform
from vitprobe.runs.progress import progress_bar
from vitprobe.runs.same import require_same


def verify(
    model: ModelLike,
    data: Any = None,
    aggregators: Sequence[str | Callable[..., Aggregator]] | str | Callable[..., Aggregator] | None = None,
    *,
    protocol: ProtocolName | Protocol = "fast",
    checkpoint: str | Path | None = None,
    arch: str | None = None,
    weights_key: str | None = None,
    name: str | None = None,
    paradigm: str | None = None,
    transform: Transform = "model",
    img_size: ImageSize | None = None,
    mean: Numbers | None = None,
    std: Numbers | None = None,
    blocks: Sequence[int] | None = None,
    norm: bool | None = None,
    dtype: Dtype | None = None,
    device: str | torch.device | None = None,
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
        name: as for `analyze`: what tables and figures call the model.
        paradigm: as for `analyze`: its place on the paper's axis.
        transform: as for `analyze`: "model" or "paper".
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

    Example:
        >>> import vitprobe as vp
        >>> found = vp.verify("mae_vit_nano", protocol="knn", blocks=[0], norm=False, progress=False)
        >>> found
        Verification('mae_vit_nano', 2 aggregators, 599 images)
        >>> found.table()["label"].tolist()
        ['cls@block0', 'gap@block0']
    """
    options = VerifyOptions(**{name: value for name, value in locals().items() if name != "progress"})
    with RunFolder.of(out, KIND) as folder:
        folder.check(overwrite, resume)
        begun = folder.read() if resume and folder.holds_run else None
        plan = make_plan(options)
        if begun is None:
            folder.clear_unfinished()  # another run's, which this one must not go on with
        else:
            require_same(folder.path, begun, plan.manifest, options.free)
            if begun["status"] == "complete" and (folder.path / CORRECTNESS).is_file():
                return _finished(folder)
        folder.begin(plan.manifest, go_on=begun is not None)
        return _verified(plan, folder, progress)


def _finished(folder: RunFolder) -> Verification:
    """A run that is complete, but for what a kill in its last moment may have left undone."""
    found = Verification.load(folder.path)
    if not (folder.path / ACCURACY).is_file():
        found.write(folder)
    folder.clear_unfinished()
    return found


def _verified(plan: Plan, folder: RunFolder, progress: bool | None) -> Verification:
    """From a plan to the results, in a folder."""
    method = train_probes if plan.protocol.trains else classify_vectors
    with ExitStack() as bars:

        def bar(words: str, total: int, done: int) -> Callable[[int], Any]:
            bars.close()  # the one before
            made = progress_bar(f"{plan.model.spec.name}: {words}", total, progress, done=done)
            return bars.enter_context(made).update

        outcome = method(plan, folder, bar)
    lost = plan.aggregators.keys() - {result.name for result in outcome.results}
    manifest = plan.manifest | {
        "status": "complete",
        "ended": now(),
        "diverged": outcome.diverged,
        "anchors": outcome.anchors,
        "undefined": plan.manifest["undefined"] | {name: "diverged at every learning rate" for name in sorted(lost)},
    }
    manifest["data"] = {
        **manifest["data"],
        "skipped": [{"name": name, "reason": reason} for name, reason in outcome.skipped],
    }
    folder.claim()
    test = plan.data.test
    found = Verification(
        manifest, [test.ids[index] for index in outcome.tested], test.labels[outcome.tested], outcome.results
    )
    for spec, probe in outcome.probes:
        save_probe(folder.path, spec, probe, dim=plan.dim, classes=plan.data.classes, manifest=manifest)
    found.write(folder)
    folder.clear_unfinished()
    return found
