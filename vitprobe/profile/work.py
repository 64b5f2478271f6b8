"""What an analysis is about to do: images, model, device and manifest, brought together before the first batch."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from vitprobe.data.batches import Batch
from vitprobe.data.images import Groups, Images
from vitprobe.data.looking import look_at
from vitprobe.data.reading import Reading
from vitprobe.data.shards import SHARD_IMAGES, Share
from vitprobe.data.sources import open_images
from vitprobe.data.transforms import ImageTransform
from vitprobe.errors import UserError
from vitprobe.frozen.device import choose_batch_size, choose_device
from vitprobe.models.loaded import LoadedModel, with_transform, without_transform
from vitprobe.models.loading import load_model
from vitprobe.runs.manifest import new_manifest
from vitprobe.runs.options import size_of
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
        manifest: what the run is made of; `arguments` among it.
    """

    model: LoadedModel
    images: Images
    transform: ImageTransform
    device: torch.device
    manifest: dict[str, Any]

    def batches(self, share: Share) -> Generator[Batch, None, None]:
        """The batches of a share, in the order of the draw."""
        batches = self.images.batches(self.reading, share)
        if self.images.normalised and self.manifest["arguments"]["img_size"] is not None:
            return _of_size(batches, self.transform.size)
        return batches

    @property
    def reading(self) -> Reading:
        """How the images are read: as they come, or drawn, where a number or a tolerance asks for that."""
        return reading_of(self.transform, self.manifest["batch_size"], self.device, self.manifest["arguments"])

    def total(self, share: Share) -> int | None:
        """How many images a share has, as far as that is known."""
        return self.images.total(self.reading, share)


def prepare(
    model: Any,
    checkpoint: str | Path | None,
    data: Any,
    groups: Groups,
    device: str | torch.device | None,
    arguments: dict[str, Any],
    world: World,
) -> Work:
    """All that is known before the first batch.

    Raises:
        UserError: for what cannot be loaded or opened, or a source that several processes cannot share.
    """
    chosen = choose_device(device, local_rank() if world.size > 1 else None)
    images = open_images(data, groups=groups)
    if not images.resumable and (arguments["resume"] or world.size > 1):
        raise UserError(
            f"{images.source} gives its images in an order that only it knows, so they can neither be shared by "
            f"processes nor resumed; give the data set's folder or a list"
        )
    img_size, mean, std = size_of(arguments["img_size"]), arguments["mean"], arguments["std"]
    arch, weights_key = arguments["arch"], arguments["weights_key"]
    loaded = load_model(model, checkpoint=checkpoint, arch=arch, weights_key=weights_key, img_size=img_size)
    loaded = with_transform(loaded, arguments["transform"], img_size or loaded.transform.size, mean, std)
    transform = loaded.transform
    images = images.for_model(transform.wanted)
    remarks = look_at(images, loaded.spec.name)
    if images.normalised:
        _require_unprepared(images, arguments)
        loaded = without_transform(loaded)
    layout, width = loaded.anatomy.layout(transform.size), loaded.anatomy.width or 768
    batch_size = arguments["batch_size"] or choose_batch_size(layout, width, chosen, local_processes())
    reading = reading_of(transform, min(int(batch_size), SHARD_IMAGES), chosen, arguments)
    total = images.total(reading)
    manifest = new_manifest(loaded, chosen, arguments) | {
        "batch_size": reading.batch_size,
        "processes": world.size,
        "out_of_memory": [],
        "transform": transform.describe(),
        "data": {
            "source": images.source,
            "images": total,
            "left_out": images.left_out.names,
            "fingerprint": images.fingerprint(),
            "grouped": groups is not None or images.groups != images.names,  # whether images share groups
            "groups_sha256": None if groups is None else sha256("\0".join(images.groups).encode()).hexdigest(),
        },
    }
    manifest["remarks"] += [*remarks, *_unheeded(images, reading, arguments)]
    if images.listed and total is not None:
        manifest["data"]["shards"] = -(-total // SHARD_IMAGES)
    return Work(loaded, images, transform, chosen, manifest)


def reading_of(
    transform: ImageTransform, batch_size: int, device: torch.device, arguments: Mapping[str, Any]
) -> Reading:
    """Return how an analysis with these arguments reads its images."""
    return Reading(
        transform,
        batch_size,
        num_images=arguments["num_images"],
        shuffled=arguments["tolerance"] is not None,
        seed=arguments["seed"],
        workers=arguments["workers"],
        processes=local_processes(),
        pin_memory=device.type == "cuda",
    )


def _unheeded(images: Images, reading: Reading, arguments: dict[str, Any]) -> list[str]:
    """What is said of options that a source or a shard leaves no room for."""
    said = []
    if (arguments["batch_size"] or 0) > SHARD_IMAGES:
        said.append(f"batch_size {arguments['batch_size']}: a batch is cut at the {SHARD_IMAGES} images of a shard")
    if images.normalised and arguments["transform"] == "paper":
        said.append(f"transform='paper' is for pictures: {images.source} is taken as it is")
    return [*said, *images.unheeded(reading)]


def _require_unprepared(images: Images, arguments: dict[str, Any]) -> None:
    """Raises a UserError where a normalisation is asked for of images that are taken as they are."""
    if arguments["mean"] is not None:
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
