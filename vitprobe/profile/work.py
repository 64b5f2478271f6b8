"""What an analysis is about to do: images, model, device and manifest, brought together before the first batch."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vitprobe.data.batches import Batch, default_workers, iterate_loader
from vitprobe.data.images import Groups, Images, LoaderImages
from vitprobe.data.shards import SHARD_IMAGES, Share, cut_loader, iterate_shards
from vitprobe.data.sources import open_images
from vitprobe.data.streams import StreamImages, iterate_stream
from vitprobe.data.transforms import ImageTransform, model_transform
from vitprobe.errors import UserError
from vitprobe.models.loaded import LoadedModel
from vitprobe.models.loading import load_model
from vitprobe.profile.distributed import World
from vitprobe.profile.launch import local_processes, local_rank
from vitprobe.profile.manifest import new_manifest
from vitprobe.profile.state import choose_batch_size, choose_device


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
        num_images = self.manifest["arguments"]["num_images"]
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
        num_images, seed, tolerance = (self.manifest["arguments"][key] for key in ("num_images", "seed", "tolerance"))
        if num_images is None and tolerance is None:
            return range(len(self.images))
        return np.random.default_rng(seed).permutation(len(self.images))[:num_images].tolist()

    def total(self, share: Share) -> int | None:
        """How many images a share has, as far as that is known."""
        num_images = self.manifest["arguments"]["num_images"]
        if isinstance(self.images, StreamImages):
            return None if num_images is None else num_images // share.size
        if isinstance(self.images, LoaderImages):
            return min((count for count in (self.images.announced, num_images) if count is not None), default=None)
        total = len(self.order)
        return sum(min(SHARD_IMAGES, total - number * SHARD_IMAGES) for number in share.shards(total))

    def _workers(self, n_images: int | None) -> int:
        workers = self.manifest["arguments"]["workers"]
        return default_workers(n_images, processes=local_processes()) if workers is None else workers


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
    if isinstance(images, LoaderImages) and (arguments["resume"] or world.size > 1):
        raise UserError(
            "a DataLoader gives its images in an order that only it knows, so they can neither be shared by processes "
            "nor resumed; give the data set's folder or a list"
        )
    img_size = arguments["img_size"]
    arch, weights_key = arguments["arch"], arguments["weights_key"]
    loaded = load_model(model, checkpoint=checkpoint, arch=arch, weights_key=weights_key, img_size=img_size)
    transform = model_transform(loaded.module, arguments["transform"], img_size or loaded.transform.size)
    layout, width = loaded.anatomy.layout(transform.size), loaded.anatomy.width or 768
    batch_size = arguments["batch_size"] or choose_batch_size(layout, width, chosen, local_processes())
    manifest = new_manifest(loaded, chosen, arguments) | {
        "batch_size": min(int(batch_size), SHARD_IMAGES),
        "processes": world.size,
        "out_of_memory": [],
        "transform": transform.describe(),
        "data": {
            "source": images.source,
            "fingerprint": images.fingerprint(),
            "grouped": groups is not None or images.groups != images.names,  # whether images share groups
            "groups_sha256": None if groups is None else sha256("\0".join(images.groups).encode()).hexdigest(),
        },
    }
    work = Work(loaded, images, transform, chosen, manifest)
    if not isinstance(images, LoaderImages | StreamImages):
        manifest["data"]["shards"] = -(-len(work.order) // SHARD_IMAGES)
    return work


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
