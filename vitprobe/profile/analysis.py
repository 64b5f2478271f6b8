"""`analyze`: stream images through a model and keep one value an image, block and head."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitprobe.data.batches import Batch
from vitprobe.data.prefetch import on_their_way
from vitprobe.data.shards import Share
from vitprobe.data.transforms import check_normalisation
from vitprobe.errors import UserError
from vitprobe.frozen.device import prepared
from vitprobe.frozen.dtype import DTYPE_BOUND, ForwardDtype, check_dtype, choose_dtype
from vitprobe.frozen.forward import Measurement
from vitprobe.hooks.capture import capture, check_kernel
from vitprobe.models.loaded import LoadedModel
from vitprobe.profile.profile import Profile
from vitprobe.profile.run import Run
from vitprobe.profile.stopping import check_tolerance
from vitprobe.profile.work import Work, prepare, require_agreement
from vitprobe.runs.folder import check_output
from vitprobe.runs.options import check_resume, check_whole, shown, shown_size, size_of
from vitprobe.runs.processes import World, joined
from vitprobe.runs.progress import progress_bar
from vitprobe.runs.same import Begun, read_begun, require_same
from vitprobe.statistics import select


def analyze(
    model: str | Path | nn.Module | LoadedModel,
    data: Any = None,
    *,
    checkpoint: str | Path | None = None,
    arch: str | None = None,
    weights_key: str | None = None,
    num_images: int | None = None,
    transform: str = "model",
    img_size: int | tuple[int, int] | None = None,
    mean: float | int | Sequence[float | int] | None = None,
    std: float | int | Sequence[float | int] | None = None,
    statistics: Sequence[str] | None = None,
    groups: Sequence[str] | Callable[[str], str] | None = None,
    tolerance: float | None = None,
    dtype: str | None = None,
    dtype_bound: float = DTYPE_BOUND,
    kernel: str = "auto",
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
    """
    check_tolerance(tolerance)
    check_dtype(dtype, dtype_bound)
    if dtype != "auto" and float(dtype_bound) != DTYPE_BOUND:
        raise UserError(
            f"dtype_bound={dtype_bound:g} is for dtype='auto' (--dtype auto): give that too, or leave it out"
        )
    check_kernel(kernel)
    img_size = size_of(img_size)
    arguments = {
        "model": shown(model),
        "checkpoint": shown(checkpoint),
        "arch": arch,
        "weights_key": weights_key,
        "data": shown(data),
        "num_images": num_images,
        "transform": transform,
        "img_size": shown_size(img_size),
        "mean": check_normalisation("mean", mean),
        "std": check_normalisation("std", std),
        "statistics": None if statistics is None else list(statistics),
        "groups": None if groups is None else "given",
        "tolerance": tolerance if tolerance is None else float(tolerance),
        "dtype": dtype,
        "dtype_bound": float(dtype_bound),
        "kernel": kernel,
        "batch_size": batch_size,
        "workers": workers,
        "device": None if device is None else str(device),
        "seed": seed,
        "out": shown(out),
        "overwrite": overwrite,
        "resume": resume,
        "distributed": distributed,
    }
    select(statistics)
    check_whole(num_images=(num_images, 1), batch_size=(batch_size, 1), workers=(workers, 0), seed=(seed, 0))
    check_resume(resume, overwrite, out)
    folder = None if out is None else Path(out)
    with joined(distributed) as world:
        if world.size > 1 and folder is None:
            raise UserError("several processes put their values into one folder: give --out DIR, which all of them see")
        if folder is not None:
            world.together(lambda: check_output(folder, overwrite, resume))
        begun = world.on_first(lambda: read_begun(folder)) if folder is not None and resume else None
        work = world.together(lambda: prepare(model, checkpoint, data, groups, device, arguments, world))
        manifests = world.gather(work.manifest)
        require_agreement(manifests)
        work.manifest["batch_size"] = min(manifest["batch_size"] for manifest in manifests)
        if begun is not None:
            assert folder is not None
            require_same(folder, begun.manifest, work.manifest)
            if begun.complete:
                return Profile.load(folder)
            work.manifest["batch_size"] = begun.manifest["batch_size"]
        return _go(work, Run(work.manifest, folder, world, begun), _share(world, begun), progress)


def _go(work: Work, run: Run, share: Share, progress: bool | None) -> Profile:
    """This process's share of the work, one batch after the other."""
    module, manifest = work.model.module, work.manifest
    statistics = manifest["arguments"]["statistics"]
    batches = work.batches(share)
    bar = progress_bar(work.model.spec.name, work.total(share), progress if run.world.first else False)
    try:
        # Batches closed, or reading processes would outlive an error.
        with (
            prepared(module, work.device),
            closing(batches),
            bar,
            capture(
                work.model, keep="statistics", statistics=statistics, kernel=manifest["arguments"]["kernel"]
            ) as attention,
            torch.inference_mode(),
        ):
            measure = Measurement(work.model, attention, work.device, manifest["batch_size"], manifest["out_of_memory"])
            for batch in on_their_way(_settle_dtype(work, run, measure, batches), work.device):
                finished = run.add(batch, measure(batch) if len(batch) else None, attention)
                bar.update(len(batch) + len(batch.skipped))
                if finished and run.enough():
                    break
        return run.finish()
    except KeyboardInterrupt:
        run.interrupt()
        raise
    except BaseException as error:
        kept = run.abandon()
        if kept and isinstance(error, UserError):
            raise UserError(f"{error}; the {kept} images finished before are kept in {run.folder}") from error
        raise


def _settle_dtype(work: Work, run: Run, measure: Measurement, batches: Iterator[Batch]) -> Iterator[Batch]:
    """Settle what the forward pass runs in, for all processes and sittings alike; gives the batches on."""
    asked, bound = work.manifest["arguments"]["dtype"], work.manifest["arguments"]["dtype_bound"]
    read: list[Batch] = []

    def trial(dtype: ForwardDtype) -> dict[str, Tensor]:
        while not (read and len(read[-1])) and (batch := next(batches, None)) is not None:
            read.append(batch)
        return measure.trial(read[-1], dtype) if read else {}

    def choose() -> dict[str, Any]:
        if run.begun is not None:
            return run.begun.manifest["forward_dtype"]
        layout = lambda: measure.attention.layout  # noqa: E731
        return choose_dtype(asked, bound, work.model.module, work.device, trial, layout).describe()

    work.manifest["forward_dtype"] = run.world.on_first(choose)
    measure.forward = ForwardDtype.from_description(work.manifest["forward_dtype"])
    yield from read
    yield from batches


def _share(world: World, begun: Begun | None) -> Share:
    """What this process has to do."""
    if begun is None:
        return Share(world.rank, world.size)
    return Share(world.rank, world.size, begun.done, begun.ended)
