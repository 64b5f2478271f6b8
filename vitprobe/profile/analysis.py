"""`analyze`: stream images through a model and keep one value an image, block and head."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, replace
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from vitprobe.data.batches import Batch, default_workers, iterate, iterate_loader
from vitprobe.data.images import Images, LoaderImages, printable
from vitprobe.data.sources import open_images
from vitprobe.data.transforms import ImageTransform, model_transform
from vitprobe.errors import UserError
from vitprobe.hooks.capture import Capture, capture
from vitprobe.models.loaded import LoadedModel
from vitprobe.models.loading import load_model
from vitprobe.profile.folder import check_output, clear_run, write_manifest
from vitprobe.profile.manifest import new_manifest
from vitprobe.profile.profile import Profile
from vitprobe.profile.state import choose_batch_size, choose_device, prepared
from vitprobe.profile.values import MemoryValues, Sharder, ShardValues
from vitprobe.statistics import select


def analyze(
    model: str | Path | nn.Module | LoadedModel,
    data: Any = None,
    *,
    checkpoint: str | Path | None = None,
    arch: str | None = None,
    num_images: int | None = None,
    transform: str = "model",
    img_size: int | None = None,
    statistics: Sequence[str] | None = None,
    groups: Sequence[str] | Callable[[str], str] | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    overwrite: bool = False,
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
        num_images: analyse this many, drawn at random without replacement (from a DataLoader: its first ones); all of
            them without.
        transform: "model" (the model's own preprocessing) or "paper" (shorter side to 256 for a 224 crop, bicubic,
            ImageNet mean and std).
        img_size: the input size, where it is not the model's own.
        statistics: names from `vitprobe.statistics.STATISTICS`; all without.
        groups: what each image was taken from, a sequence or a function of its name; intervals count groups.
        batch_size: images a batch; sized to the free memory without.
        workers: processes that read images; chosen for the machine without.
        device: "cpu", "cuda", …; a CUDA GPU where there is one without.
        seed: of the drawing of images.
        out: the run's folder; shards of at most 64 images are written to it as they are finished.
        overwrite: replace a run that is there already.
        progress: show a progress bar; by default on a terminal and in a notebook.

    Returns:
        The profile. With `out` it is saved there too.

    Raises:
        UserError: for bad input, in one line; nothing is written then.
    """
    arguments = {
        "model": _shown(model),
        "checkpoint": None if checkpoint is None else _shown(checkpoint),
        "arch": arch,
        "data": None if data is None else _shown(data),
        "num_images": num_images,
        "transform": transform,
        "img_size": img_size,
        "statistics": None if statistics is None else list(statistics),
        "groups": None if groups is None else "given",
        "batch_size": batch_size,
        "workers": workers,
        "device": None if device is None else str(device),
        "seed": seed,
        "out": None if out is None else _shown(out),
        "overwrite": overwrite,
    }
    select(statistics)
    for name, number, least in (
        ("num_images", num_images, 1),
        ("batch_size", batch_size, 1),
        ("workers", workers, 0),
        ("seed", seed, 0),
    ):
        if number is not None and not (isinstance(number, Integral) and int(number) >= least):
            raise UserError(f"{name} is {number!r}; it must be a whole number of at least {least}")
    folder = None if out is None else Path(out)
    if folder is not None:
        check_output(folder, overwrite)
    chosen_device = choose_device(device)
    images = open_images(data, groups=groups)
    loaded = load_model(model, checkpoint=checkpoint, arch=arch, img_size=img_size)
    preprocess = model_transform(loaded.module, transform, img_size or loaded.transform.size)
    layout = loaded.anatomy.layout(preprocess.size)
    size = batch_size or choose_batch_size(layout, loaded.anatomy.width or 768, chosen_device)

    manifest = new_manifest(loaded, chosen_device, arguments)
    manifest["batch_size"] = size
    manifest["transform"] = preprocess.describe()
    run = _Run(loaded, manifest, folder)
    began = time.perf_counter()
    try:
        batches = _batches(images, preprocess, num_images, seed, size, workers, chosen_device)
        with prepared(loaded.module, chosen_device), closing(batches):  # or reading processes would outlive an error
            run.go(batches, chosen_device, progress, _total(images, num_images), statistics)
        run.finish("complete", images, began)
    except KeyboardInterrupt:
        run.finish("interrupted", images, began)
        raise
    except BaseException as error:
        kept = run.abandon()
        if kept and isinstance(error, UserError):
            raise UserError(f"{error}; the {kept} images finished before are kept in {folder}") from error
        raise
    return run.profile


def _shown(thing: Any) -> str:
    """An argument as the manifest holds it: text as it is, made printable; of anything else its type."""
    if isinstance(thing, str | Path):
        return printable(str(thing))
    return type(getattr(thing, "module", thing)).__name__


def _total(images: Images, num_images: int | None) -> int | None:
    """Images that there will be, as far as that is known."""
    known = images.announced if isinstance(images, LoaderImages) else len(images)
    return min((count for count in (known, num_images) if count is not None), default=None)


def _batches(
    images: Images,
    transform: ImageTransform,
    num_images: int | None,
    seed: int,
    batch_size: int,
    workers: int | None,
    device: torch.device,
) -> Generator[Batch, None, None]:
    """The batches to analyse, in the order of the draw."""
    if isinstance(images, LoaderImages):
        return _first(iterate_loader(images), num_images)
    order = np.arange(len(images))
    if num_images is not None:
        order = np.random.default_rng(seed).permutation(len(images))[:num_images]
    return iterate(
        images,
        order.tolist(),
        transform,
        batch_size,
        default_workers(len(order)) if workers is None else workers,
        pin_memory=device.type == "cuda",
    )


def _first(batches: Iterator[Batch], num_images: int | None) -> Generator[Batch, None, None]:
    """Batches until `num_images` have come."""
    seen = 0
    for batch in batches:
        if num_images is not None:
            keep = num_images - seen
            batch = replace(
                batch,
                pixels=batch.pixels[:keep],
                indices=batch.indices[:keep],
                names=batch.names[:keep],
                groups=batch.groups[:keep],
            )
        yield batch
        seen += len(batch)
        if num_images is not None and seen >= num_images:
            return


class _Run:
    """One analysis under way: where its values go; its folder is claimed when the first batch has gone well."""

    def __init__(self, model: LoadedModel, manifest: dict[str, Any], folder: Path | None) -> None:
        self.model, self.manifest, self.folder = model, manifest, folder
        self.values: MemoryValues | ShardValues = MemoryValues()
        self.sharder: Sharder | None = None
        self.claimed = False
        self.skipped: list[tuple[str, str]] = []

    def go(
        self,
        batches: Iterator[Batch],
        device: torch.device,
        progress: bool | None,
        total: int | None,
        statistics: Sequence[str] | None,
    ) -> None:
        """All batches, one after the other."""
        module = self.model.module
        dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
        # Plain text also in a notebook: tqdm's widget there needs ipywidgets, and warns without.
        shown = (sys.stderr and sys.stderr.isatty()) or "ipykernel" in sys.modules if progress is None else progress
        bar = tqdm(total=total, desc=self.model.spec.name, unit="img", disable=not shown, dynamic_ncols=True)
        with bar, capture(self.model, keep="statistics", statistics=statistics) as attention, torch.inference_mode():
            for batch in batches:
                self.skipped += batch.skipped
                if len(batch):
                    values = self._measure(attention, batch, device, dtype)
                    self._keep(attention, batch, values)
                bar.update(len(batch) + len(batch.skipped))

    def _measure(self, attention: Capture, batch: Batch, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        module, name = self.model.module, self.model.spec.name
        try:
            module(batch.pixels.to(device, dtype, non_blocking=True))
        except AssertionError as error:  # timm's way to say that an input has the wrong size
            height, width = batch.pixels.shape[-2:]
            raise UserError(f"{name} cannot take images of {height}x{width} pixels: {error}") from None
        values = {key: value.float().cpu() for key, value in attention.statistics().items()}
        # Infinite is right in one place: where [cls] gives the patches less than float32 can hold.
        bad = [
            (value.isnan() if key == "cls_self_attention_ratio" else ~value.isfinite()).any(dim=2)
            for key, value in values.items()
        ]
        images, blocks = torch.stack(bad).any(dim=0).nonzero(as_tuple=True)
        if len(blocks):
            first = int(blocks.argmin())
            raise UserError(
                f"the activations of {name} are NaN or infinite from block {blocks[first]} on (image "
                f"{batch.names[int(images[first])]}); check its weights and the images' preprocessing"
            )
        return values

    def _keep(self, attention: Capture, batch: Batch, values: dict[str, Tensor]) -> None:
        if self.sharder is None:
            self._begin(attention)
        assert self.sharder is not None
        self.sharder.add(batch.names, batch.groups, {name: value.numpy() for name, value in values.items()})

    def _begin(self, attention: Capture) -> None:
        """Claim the folder: from here on the run is worth keeping."""
        self.manifest["layout"] = asdict(attention.layout) if attention.layout else None
        self.manifest["undefined"] = attention.undefined
        self.manifest["signed"] = attention.signed
        if self.folder is not None:
            check_output(self.folder, overwrite=True)
            self.claimed = True
            clear_run(self.folder)
            write_manifest(self.folder, self.manifest)
            self.values = ShardValues(self.folder)
        self.sharder = Sharder(self.values)

    def finish(self, status: str, images: Images, began: float) -> None:
        """Write what is left, and the manifest's last word."""
        if self.sharder is None:
            if status == "complete":
                reason = f"; the first: {self.skipped[0][0]} ({self.skipped[0][1]})" if self.skipped else ""
                raise UserError(f"none of the {len(self.skipped)} images of {images.source} could be read{reason}")
            return
        self.sharder.flush()
        self.manifest["status"] = status
        self.manifest["wall_seconds"] = round(time.perf_counter() - began, 2)
        self.manifest["data"] = {
            "source": images.source,
            "fingerprint": images.fingerprint(),
            "analysed": len(self.values.names),
            "groups": len(set(self.values.groups)),
            "skipped": [{"name": name, "reason": reason} for name, reason in self.skipped],
        }
        if self.folder is not None:
            self.profile.save(self.folder)

    def abandon(self) -> int:
        """After an error: how many images are kept in finished shards; without any, no folder is left."""
        if self.folder is None or not self.claimed:
            return 0
        with suppress(UserError, OSError):  # the disk may be why we are here
            if self.values.names:
                write_manifest(self.folder, {**self.manifest, "status": "failed"})
            else:
                clear_run(self.folder)
                self.folder.rmdir()  # unless it holds something else
        return len(self.values.names)

    @property
    def profile(self) -> Profile:
        """The result so far."""
        return Profile(self.manifest, self.values)
