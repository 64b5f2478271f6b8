"""What a run is made of, gathered into one dictionary that JSON can hold."""

from __future__ import annotations

import dataclasses
import platform
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from typing import Any

import torch

from vitprobe.errors import UserError
from vitprobe.models.identity import unidentified, weights_sha256
from vitprobe.models.loaded import LoadedModel
from vitprobe.profile.folder import FORMAT_VERSION

PACKAGES = ("vitprobe", "torch", "torchvision", "timm", "numpy", "scipy", "pandas", "safetensors", "pillow")


def new_manifest(model: LoadedModel, device: torch.device, arguments: dict[str, Any]) -> dict[str, Any]:
    """The manifest of a run that begins now; the run adds `data`, `layout` and `undefined`, and ends it.

    Raises:
        UserError: where the run is to be resumed and its weights cannot be known again.
    """
    parameters, remarks = list(model.module.parameters()), list(model.remarks)
    digest = weights_sha256(model.module)
    if digest is None:
        reason = f"the weights of {model.spec.name} have no digest ({unidentified(model.module)})"
        if arguments.get("resume"):
            raise UserError(
                f"--resume cannot tell whether the model is the same: {reason}; give --overwrite, or another --out"
            )
        remarks.append(f"{reason}: this run cannot be resumed")
    return {
        "format_version": FORMAT_VERSION,
        "status": "running",
        "model": {
            **dataclasses.asdict(model.spec),
            "signature": signature(model),
            "class": type(model.module).__name__,
            "num_blocks": len(model.anatomy.blocks),
            "num_parameters": sum(parameter.numel() for parameter in parameters),
            "weights_sha256": digest,
        },
        "remarks": remarks,
        "arguments": arguments,
        "device": device_name(device),
        "dtype": str(parameters[0].dtype).removeprefix("torch.") if parameters else "float32",
        "threads": torch.get_num_threads(),
        "packages": {name: version for name in PACKAGES if (version := package_version(name))},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def signature(model: LoadedModel) -> str:
    """What must be equal for two models to be of one architecture: class, blocks, width, heads and patch size."""
    layout, anatomy = model.layout, model.anatomy
    return (
        f"{type(anatomy.tower).__name__} depth {len(anatomy.blocks)} width {anatomy.width or '?'} "
        f"heads {anatomy.num_heads or '?'} patch {layout.patch_size[0]}x{layout.patch_size[1]} "
        f"prefix {layout.num_prefix_tokens}"
    )


def device_name(device: torch.device) -> str:
    """The device and, for a GPU, its model."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


@cache  # reading an installed package's metadata takes a hundredth of a second
def package_version(name: str) -> str | None:
    """An installed package's version, None where it has no metadata."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
