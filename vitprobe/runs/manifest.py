"""`manifest.json`: what a run is made of, in one dialect for all commands; older ones are read as today's."""

from __future__ import annotations

import dataclasses
import json
import platform
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from vitprobe.errors import UserError
from vitprobe.models.identity import unidentified, weights_sha256
from vitprobe.models.loaded import LoadedModel
from vitprobe.runs.kind import Kind

MANIFEST = "manifest.json"
FORMAT_VERSION = 2
REQUIRED = ("format_version", "model", "layout", "undefined", "arguments")
PACKAGES = ("vitprobe", "torch", "torchvision", "timm", "numpy", "scipy", "pandas", "safetensors", "pillow")
_READERS = {"analyze": "vitprobe.Profile.load", "verify": "vitprobe.Verification.load"}  # of format 1, which names none


def new_manifest(kind: Kind, model: LoadedModel, device: torch.device, arguments: dict[str, Any]) -> dict[str, Any]:
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
        "command": kind.command,
        "reader": kind.reader,
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
        "started": now(),
    }


def now() -> str:
    """The time, as manifests hold it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest in a folder, in today's dialect; None where there is none of vitprobe's.

    Raises:
        UserError: for one of a newer format.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(manifest, dict):
        return None
    version = manifest.get("format_version", FORMAT_VERSION)
    if version not in range(1, FORMAT_VERSION + 1):
        raise UserError(
            f"{path} has format {version}, this vitprobe reads formats up to {FORMAT_VERSION}; upgrade vitprobe, or "
            f"give another folder"
        )
    if not all(key in manifest for key in REQUIRED):
        return None
    return upgraded(manifest) if version == 1 else manifest


def upgraded(manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest of format 1 in today's dialect.

    There `verify` wrote a "kind", called its data's source "name", and named the dtype alone.
    """
    verifies = bool(manifest.get("kind"))
    today = {**manifest, "format_version": FORMAT_VERSION, "command": "verify" if verifies else "analyze"}
    today.pop("kind", None)
    if verifies:
        data = dict(today.get("data", {}))
        if "name" in data:
            data["source"] = data.pop("name")
        asked = today.get("forward_dtype")
        today["arguments"] = {"transform": "model", **today["arguments"]}
        today |= {"data": data, "forward_dtype": {"asked": asked, "taken": asked or today.get("dtype"), "errors": {}}}
    return today


def command_of(manifest: dict[str, Any]) -> str:
    """Which command wrote a run."""
    return manifest.get("command", "analyze")


def reader_of(manifest: dict[str, Any]) -> str:
    """Python that reads a run."""
    command = command_of(manifest)
    return manifest.get("reader") or _READERS.get(command, f"vitprobe {command}")


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
