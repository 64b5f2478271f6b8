"""`analyze`: stream images through a model and keep one value an image, block and head."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from vitprobe.data.batches import Batch
from vitprobe.data.prefetch import on_their_way
from vitprobe.data.shards import Share
from vitprobe.errors import UserError
from vitprobe.frozen.device import prepared
from vitprobe.frozen.dtype import DTYPE_BOUND, ForwardDtype, choose_dtype
from vitprobe.hooks.capture import capture
from vitprobe.profile.begun import Begun, read_begun
from vitprobe.profile.measuring import Measurement
from vitprobe.profile.options import AnalyzeOptions
from vitprobe.profile.profile import KIND, Profile
from vitprobe.profile.run import Run
from vitprobe.profile.work import Work, prepare, require_agreement
from vitprobe.runs.folder import RunFolder
from vitprobe.runs.options import DtypeOrAuto, ImageSize, Kernel, ModelLike, Numbers, Transform
from vitprobe.runs.processes import joined
from vitprobe.runs.progress import progress_bar
from vitprobe.runs.same import require_same


def analyze(
    model: ModelLike,
    data: Any = None,
    *,
    checkpoint: str | Path | None = None,
    arch: str | None = None,
    weights_key: str | None = None,
    name: str | None = None,
    paradigm: str | None = None,
    num_images: int | None = None,
    transform: Transform = "model",
    img_size: ImageSize | None = None,
    mean: Numbers | None = None,
    std: Numbers | None = None,
    statistics: Sequence[str] | None = None,
    groups: Sequence[str] | Callable[[str], str] | None = None,
    tolerance: float | None = None,
    dtype: DtypeOrAuto | None = None,
    dtype_bound: float = DTYPE_BOUND,
    kernel: Kernel = "auto",
    batch_size: int | None = None,
    workers: int | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    distributed: bool = False,
    progress: bool | None = None,
) -> Profile:
    """Measure how attention flows in a model on a set of images.

    The module is in eval mode meanwhile, and comes back in the mode and on the device it had. Memory does not grow
    with the number of images when `out` is given.

    Args:
        model: anything that `load_model` takes.
        data: anything that `open_images` takes; without it the packaged sample photographs.
        checkpoint: as for `load_model`: a file with the weights of the named model.
        arch: as for `load_model`: the architecture of a checkpoint file.
        weights_key: as for `load_model`: which of several sets of weights in that file.
        name: what tables and figures call the model; its own name without.
        paradigm: its place on the paper's axis, as for `load_model`: "MIM", "JEA", "hybrid", "supervised", "VLM"; what
            is known of the model without.
        num_images: analyse this many, drawn at random without replacement (from a DataLoader or a stream: its first
            ones); all of them without.
        transform: "model" (the model's own preprocessing) or "paper" (shorter side to 256 for a 224 crop, bicubic,
            ImageNet mean and std).
        img_size: the input size, where it is not the model's own: a side or (height, width).
        mean: subtracted from each channel of a picture, in 0..1: one value for each channel or one for all. Above 1,
            mean and std are of the values that the files hold. The model's own without.
        std: what each channel is divided by; mean and std belong together.
        statistics: names from `vitprobe.statistics.STATISTICS`; all without.
        groups: what each image was taken from, a sequence or a function of its name; intervals count groups.
        tolerance: draw images in random order and stop when the half-width of every interval of a mean over heads is
            at most this share of the mean (of an entropy's maximum; of 1 on the log scale of ratios), after 64 groups
            or more; `vitprobe.profile.stopping` says all of it. From a DataLoader images come in its own order.
        dtype: what the forward pass runs in: "float32", "bfloat16" or "float16" (autocast), or "auto" (bfloat16 where
            that is measured to move no block's mean, over heads and the first images, by more than `dtype_bound`); the
            weights' own precision without. Statistics are computed in float32 in any case.
        dtype_bound: the error |a − b| / max(floor, |b|) of such a mean that "auto" allows; the floor of a statistic is
            0.01, or its value under uniform attention where that is less. Single heads and images are not bounded.
        kernel: "auto", "torch" or "model", as for `capture`: which kernel gives attention's output; the manifest says
            what ran.
        batch_size: images a batch, at most a shard's 64; sized to the free memory without, and halved where that runs
            out.
        workers: processes that read images; chosen for the machine without.
        device: "cpu", "cuda", …; a CUDA GPU where there is one without.
        seed: of the drawing of images.
        out: the run's folder; shards of at most 64 images are written to it as they are finished, each whole
            or not at all.
        overwrite: replace a run that is there already.
        resume: go on with the run in `out` where it was broken off, or begin it; the values are those of an unbroken
            run. Arguments, weights and data must be the same.
        distributed: under torchrun, share the work with the other processes; all call this, and all see `out`.
        progress: show a progress bar; by default on a terminal and in a notebook.

    Returns:
        The profile. With `out` it is saved there too.

    Raises:
        UserError: for bad input, in one line; nothing is written then.

    Example:
        >>> import vitprobe as vp
        >>> profile = vp.analyze("mae_vit_nano", num_images=8, progress=False)
        >>> profile
        Profile('mae_vit_nano', 8 images, 12 blocks)
        >>> bool(profile.estimate("patch_self_attention_ratio").mean[-1] > 1 / profile.layout.num_patches)
        True
    """
    options = AnalyzeOptions(**{name: value for name, value in locals().items() if name != "progress"})
    with joined(distributed) as world, RunFolder.of(out, KIND) as folder:
        if world.size > 1 and folder.temporary:
            raise UserError("several processes put their values into one folder: give --out DIR, which all of them see")
        world.together(lambda: folder.check(overwrite, resume))
        begun = world.on_first(lambda: read_begun(folder)) if resume else None
        work = world.together(lambda: prepare(options, world))
        manifests = world.gather(work.manifest)
        require_agreement(manifests)
        work.manifest["batch_size"] = min(manifest["batch_size"] for manifest in manifests)
        if begun is not None:
            require_same(folder.path, begun.manifest, work.manifest, options.free)
            if begun.complete:
                return Profile.load(folder.path)
            work.manifest["batch_size"] = begun.manifest["batch_size"]
        run = Run(options, work.manifest, folder, world, begun)
        try:
            return _measure_all(work, run, progress)
        except KeyboardInterrupt:
            run.interrupt()
            raise
        except BaseException as error:
            kept = run.abandon()
            if kept and isinstance(error, UserError):
                raise UserError(f"{error}; the {kept} images finished before are kept in {folder.path}") from error
            raise


def _measure_all(work: Work, run: Run, progress: bool | None) -> Profile:
    """This process's share of the work, one batch after the other."""
    options, world, begun = work.options, run.world, run.begun
    share = Share(world.rank, world.size) if begun is None else begun.rest(world.rank, world.size)
    batches = work.batches(share)
    # Batches closed, or reading processes would outlive an error.
    with (
        prepared(work.model.module, work.device),
        closing(batches),
        progress_bar(work.model.spec.name, work.total(share), progress if world.first else False) as bar,
        capture(work.model, keep="statistics", statistics=options.statistics, kernel=options.kernel) as attention,
        torch.inference_mode(),
    ):
        manifest = work.manifest
        measure = Measurement(work.model, attention, work.device, manifest["batch_size"], manifest["out_of_memory"])
        read = _to_first_image(batches)
        manifest["forward_dtype"] = world.on_first(lambda: _settled_dtype(work, measure, read, begun).describe())
        measure.forward.dtype = ForwardDtype.from_description(manifest["forward_dtype"])
        for batch in on_their_way(chain(read, batches), work.device):
            finished = run.add(batch, measure(batch) if len(batch) else None, attention)
            bar.update(len(batch) + len(batch.skipped))
            if finished and run.enough():
                break
    return run.finish()


def _to_first_image(batches: Iterator[Batch]) -> list[Batch]:
    """Batches up to the first with a readable image."""
    read: list[Batch] = []
    while not (read and len(read[-1])) and (batch := next(batches, None)) is not None:
        read.append(batch)
    return read


def _settled_dtype(work: Work, measure: Measurement, read: list[Batch], begun: Begun | None) -> ForwardDtype:
    """What the forward pass runs in, for all processes and sittings alike: with "auto" as the first images show."""
    if begun is not None:
        return ForwardDtype.from_description(begun.manifest["forward_dtype"])
    return choose_dtype(
        work.options.dtype,
        work.options.dtype_bound,
        work.model.module,
        work.device,
        lambda dtype: measure.trial(read[-1], dtype) if read else {},
        lambda: measure.attention.layout,
    )
