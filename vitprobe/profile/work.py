"""What an analysis is about to do: images, model, device and manifest, brought together before the first batch."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import Any

import numpy as np
import torch

from vitprobe.data.batches import Batch, default_workers, iterate_loader
from vitprobe.data.images import Images, LoaderImages
from vitprobe.data.looking import look_at
from vitprobe.data.shards import SHARD_IMAGES, Share, cut_loader, iterate_shards
from vitprobe.data.sources import open_images
from vitprobe.data.streams import StreamImages, iterate_stream
from vitprobe.data.transforms import ImageTransform
from vitprobe.errors import UserError
from vitprobe.frozen.device import choose_batch_size, choose_device
from vitprobe.models.loaded import LoadedModel, without_transform
from vitprobe.profile.options import AnalyzeOptions
from vitprobe.profile.profile import KIND
from vitprobe.runs.manifest import new_manifest
from vitprobe.runs.processes import World
from vitprobe.runs.torchrun import local_processes, local_rank


@dataclass
class Work:
    """A model, images for it, and how they get there.

    Attributes:
        model: loaded, on the device that it came on.
        images: the source.
        transform: from a picture to what the model expects.
        device: where the model is to run.
        manifest: what the run is made of.
        options: what is asked for.
    """

    options: AnalyzeOptions
    model: LoadedModel
    images: Images
    transform: ImageTransform
    device: torch.device
    manifest: dict[str, Any]

    def batches(self, share: Share) -> Generator[Batch, None, None]:
        """The batches of a share, in the order of the draw."""
        if self.images.normalised and self.options.img_size is not None:
            return _of_size(self._batches(share), self.transform.size)
        return self._batches(share)

    def _batches(self, share: Share) -> Generator[Batch, None, None]:
        num_images = self.options.num_images
        if isinstance(self.images, LoaderImages):
            return cut_loader(iterate_loader(self.images), num_images)
        size, pin = self.manifest["batch_size"], self.device.type == "cuda"
        if isinstance(self.images, StreamImages):
            workers = self._workers(num_images)
            return iterate_stream(self.images, self.transform, size, share, num_images, workers, pin)
        order = self.order
        workers = self._workers(len(order))
        return iterate_shards(self.images, order, self.transform, size, share, workers, pin)

    @cached_property
    def order(self) -> Sequence[int]:
        """Positions of the images, in the order in which they are analysed: as they come, or as they were drawn."""
        num_images = self.options.num_images
        if num_images is None and self.options.tolerance is None:
            return range(len(self.images))
        return np.random.default_rng(self.options.seed).permutation(len(self.images))[:num_images].tolist()

    def total(self, share: Share) -> int | None:
        """How many images a share has, as far as that is known."""
        num_images = self.options.num_images
        if isinstance(self.images, StreamImages):
            return None if num_images is None else num_images // share.size
        if isinstance(self.images, LoaderImages):
            return min((count for count in (self.images.announced, num_images) if count is not None), default=None)
        total = len(self.order)
        return sum(min(SHARD_IMAGES, total - number * SHARD_IMAGES) for number in share.shards(total))

    def _workers(self, n_images: int | None) -> int:
        workers = self.options.workers
        return default_workers(n_images, processes=local_processes()) if workers is None else workers


def prepare(options: AnalyzeOptions, world: World) -> Work:
    """All that is known before the first batch.

    Raises:
        UserError: for what cannot be loaded or opened, or a source that several processes cannot share.
    """
    chosen = choose_device(options.device, local_rank() if world.size > 1 else None)
    images = open_images(options.data, groups=options.groups)
    if isinstance(images, LoaderImages) and (options.resume or world.size > 1):
        raise UserError(
            "a DataLoader gives its images in an order that only it knows, so they can neither be shared by processes "
            "nor resumed; give the data set's folder or a list"
        )
    loaded = options.load()
    transform = loaded.transform
    images = images.for_model(transform.wanted)
    remarks = look_at(images, loaded.spec.name)
    if images.normalised:
        _require_unprepared(images, options)
        loaded = without_transform(loaded)
    layout, width = loaded.anatomy.layout(transform.size), loaded.anatomy.width or 768
    batch_size = options.batch_size or choose_batch_size(layout, width, chosen, local_processes())
    manifest = new_manifest(KIND, loaded, chosen, options.describe()) | {
        "batch_size": min(int(batch_size), SHARD_IMAGES),
        "processes": world.size,
        "out_of_memory": [],
        "transform": transform.describe(),
        "data": {
            "source": images.source,
            "images": None,
            "left_out": images.left_out.names,
            "fingerprint": images.fingerprint(),
            "grouped": options.groups is not None or images.groups != images.names,  # whether images share groups
            "groups_sha256": None if options.groups is None else sha256("\0".join(images.groups).encode()).hexdigest(),
        },
    }
    manifest["remarks"] += [*remarks, *_unheeded(images, options)]
    work = Work(options, loaded, images, transform, chosen, manifest)
    if isinstance(images, LoaderImages | StreamImages):
        known = (getattr(images, "announced", None), options.num_images)
        manifest["data"]["images"] = min((count for count in known if count is not None), default=None)
    else:
        manifest["data"]["images"] = len(work.order)
        manifest["data"]["shards"] = -(-len(work.order) // SHARD_IMAGES)
    return work


def _unheeded(images: Images, options: AnalyzeOptions) -> list[str]:
    """What is said of options that a source or a shard leaves no room for."""
    said = []
    if (options.batch_size or 0) > SHARD_IMAGES:
        said.append(f"batch_size {options.batch_size}: a batch is cut at the {SHARD_IMAGES} images of a shard")
    if images.normalised and options.transform == "paper":
        said.append(f"transform='paper' is for pictures: {images.source} is taken as it is")
    if isinstance(images, LoaderImages) and options.workers is not None:
        said.append("workers are those of the DataLoader (num_workers)")
    if isinstance(images, StreamImages) and options.num_images is not None:
        said.append(f"{images.source} is a stream, of which the first {options.num_images} images are taken")
    return said


def _require_unprepared(images: Images, options: AnalyzeOptions) -> None:
    """Raises a UserError where a normalisation is asked for of images that are taken as they are."""
    if options.mean is not None:
        raise UserError(
            f"{images.source} is taken as normalised for the model already: leave mean and std out, or give pictures "
            f"(a folder, files, PIL images)"
        )


def _of_size(batches: Generator[Batch, None, None], size: tuple[int, int]) -> Generator[Batch, None, None]:
    """Batches of tensors as they come, if they have the size that was asked for."""
    with closing(batches):
        for batch in batches:
            if len(batch) and batch.pixels.shape[-2:] != size:
                height, width = batch.pixels.shape[-2:]
                raise UserError(
                    f"img_size is {size[0]}×{size[1]} and the tensors have {height}×{width} pixels, which are taken as "
                    f"they are: leave img_size out, or give pictures, which are resized"
                )
            yield batch


def require_agreement(manifests: list[dict[str, Any]]) -> None:
    """Returns where every process sees the same arguments, weights and images.

    Raises:
        UserError: naming the first that does not, and what.
    """
    for rank, other in enumerate(manifests):
        for what, place, key in (
            ("was given other arguments", manifests[0], "arguments"),
            ("loaded other weights", manifests[0], "model"),
            ("sees other images", manifests[0], "data"),
        ):
            if other[key] != place[key]:
                raise UserError(f"process {rank} {what} than process 0; each needs the same model, data and options")
