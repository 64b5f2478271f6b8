"""What an analysis is about to do: images, model, device and manifest, brought together before the first batch."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch

from vitprobe.data.batches import Batch
from vitprobe.data.images import Images
from vitprobe.data.looking import look_at
from vitprobe.data.reading import Reading
from vitprobe.data.shards import SHARD_IMAGES, Share
from vitprobe.data.sources import open_images
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
        options: what is asked for.
        model: loaded, on the device that it came on.
        images: the source.
        transform: from a picture to what the model expects.
        device: where the model is to run.
        manifest: what the run is made of.
    """

    options: AnalyzeOptions
    model: LoadedModel
    images: Images
    transform: ImageTransform
    device: torch.device
    manifest: dict[str, Any]

    def batches(self, share: Share) -> Generator[Batch, None, None]:
        """The batches of a share, in the order of the draw."""
        batches = self.images.batches(self.reading, share)
        if self.images.normalised and self.options.img_size is not None:
            return _of_size(batches, self.transform.size)
        return batches

    @property
    def reading(self) -> Reading:
        """How the images are read: as they come, or drawn, where a number or a tolerance asks for that."""
        return reading_of(self.options, self.transform, self.manifest["batch_size"], self.device)

    def total(self, share: Share) -> int | None:
        """How many images a share has, as far as that is known."""
        return self.images.total(self.reading, share)


def prepare(options: AnalyzeOptions, world: World) -> Work:
    """All that is known before the first batch.

    Raises:
        UserError: for what cannot be loaded or opened, or a source that several processes cannot share.
    """
    chosen = choose_device(options.device, local_rank() if world.size > 1 else None)
    images = open_images(options.data, groups=options.groups)
    if not images.resumable and (options.resume or world.size > 1):
        raise UserError(
            f"{images.source} gives its images in an order that only it knows, so they can neither be shared by "
            f"processes nor resumed; give the data set's folder or a list"
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
    reading = reading_of(options, transform, min(int(batch_size), SHARD_IMAGES), chosen)
    total = images.total(reading)
    manifest = new_manifest(KIND, loaded, chosen, options.describe()) | {
        "batch_size": reading.batch_size,
        "processes": world.size,
        "out_of_memory": [],
        "transform": transform.describe(),
        "data": {
            "source": images.source,
            "images": total,
            "left_out": images.left_out.names,
            "fingerprint": images.fingerprint(),
            "grouped": options.groups is not None or images.groups != images.names,  # whether images share groups
            "groups_sha256": None if options.groups is None else sha256("\0".join(images.groups).encode()).hexdigest(),
        },
    }
    manifest["remarks"] += [*remarks, *_unheeded(images, reading, options)]
    if images.listed and total is not None:
        manifest["data"]["shards"] = -(-total // SHARD_IMAGES)
    return Work(options, loaded, images, transform, chosen, manifest)


def reading_of(options: AnalyzeOptions, transform: ImageTransform, batch_size: int, device: torch.device) -> Reading:
    """Return how an analysis reads its images."""
    return Reading(
        transform,
        batch_size,
        num_images=options.num_images,
        shuffled=options.tolerance is not None,
        seed=options.seed,
        workers=options.workers,
        processes=local_processes(),
        pin_memory=device.type == "cuda",
    )


def _unheeded(images: Images, reading: Reading, options: AnalyzeOptions) -> list[str]:
    """What is said of options that a source or a shard leaves no room for."""
    said = []
    if (options.batch_size or 0) > SHARD_IMAGES:
        said.append(f"batch_size {options.batch_size}: a batch is cut at the {SHARD_IMAGES} images of a shard")
    if images.normalised and options.transform == "paper":
        said.append(f"transform='paper' is for pictures: {images.source} is taken as it is")
    return [*said, *images.unheeded(reading)]


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
