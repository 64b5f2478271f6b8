"""Trained probes on disk, and back as something that gives an image's improved representation."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from vitprobe.aggregation import Aggregator, create
from vitprobe.aggregation.finding import resolve
from vitprobe.aggregation.registering import as_name
from vitprobe.aggregation.registry import is_known
from vitprobe.data.reading import Reading
from vitprobe.data.sources import open_images
from vitprobe.errors import UserError
from vitprobe.files import write_atomically
from vitprobe.models.identity import weights_sha256
from vitprobe.models.loaded import LoadedModel, with_transform
from vitprobe.models.loading import load_model
from vitprobe.probing.probe import Probe, ProbeSpec
from vitprobe.probing.tap import Tap
from vitprobe.probing.tokens import FrozenModel
from vitprobe.runs.manifest import package_version

FOLDER, FILES = "probes", "*@block*-seed*.safetensors"
_KEY, _VERSION = "vitprobe_probe", 1
# Arguments that say which model it was.
_GIVEN = ("model", "checkpoint", "arch", "weights_key", "img_size", "mean", "std")


@dataclass(frozen=True, eq=False)
class LoadedProbe:
    """A trained probe with its frozen model.

    Attributes:
        model: the model.
        probe: aggregator, normalisation and classifier, in eval mode.
        spec: what the probe is and how it was trained.
        classes: what its scores are of.
        about: the protocol and the data it was trained with.
        dtype: what the model's forward pass ran in then, and runs in now.
    """

    model: LoadedModel
    probe: Probe
    spec: ProbeSpec
    classes: tuple[str, ...]
    about: Mapping[str, Any]
    dtype: str | None = None

    def __repr__(self) -> str:
        """Result name, model, classes."""
        return f"LoadedProbe({self.spec.name!r} of {self.model.spec.name!r}, {len(self.classes)} classes)"

    def embed(self, images: Any, *, batch_size: int = 64, device: Any = None) -> Float[Tensor, "image dim"]:
        """The representation that the probe reads: the aggregated tokens, normalised as in training; `(n, D)`.

        Args:
            images: anything that `vitprobe.open_images` takes but streams, whose images nobody has counted.
            batch_size: images a forward pass.
            device: "cpu", "cuda", …; a CUDA GPU where there is one without.

        Raises:
            UserError: for images that cannot be opened or read.
        """
        return self._over(images, batch_size, device, classify=False)

    def classify(self, images: Any, *, batch_size: int = 64, device: Any = None) -> Float[Tensor, "image classes"]:
        """The score of each of `classes`, `(n, classes)`, before a softmax; arguments and errors as of `embed`."""
        return self._over(images, batch_size, device, classify=True)

    @torch.no_grad()
    def _over(self, images: Any, batch_size: int, device: Any, *, classify: bool) -> Tensor:
        source = open_images(images).for_model(self.model.transform.wanted)
        if source.streamed:
            raise UserError(f"{source.source} is a stream: give a folder, a tar, a list, a tensor or a DataLoader")
        aggregator, tap = self.probe.aggregator, self.spec.tap
        frozen = FrozenModel(
            self.model,
            [tap],
            attention=aggregator.needs_attention,
            oracles=[aggregator.oracle] if aggregator.oracle else [],
            dtype=self.dtype,
            device=device,
        )
        probe, found = self.probe.to(frozen.device), []
        loaded = source.batches(Reading(self.model.transform, batch_size, workers=0))
        with frozen, closing(loaded):
            for batch in loaded:
                if batch.skipped:  # a row an image, in their order, is what is promised
                    name, reason = batch.skipped[0]
                    raise UserError(f"{name} cannot be read ({reason}): leave it out")
                tokens = frozen(batch.pixels, batch.names)[tap]
                found.append((probe(tokens) if classify else probe.vector(tokens)).cpu())
        return torch.cat(found)


def save_probe(
    folder: Path,
    spec: ProbeSpec,
    probe: Probe,
    *,
    dim: int,
    classes: tuple[str, ...],
    manifest: Mapping[str, Any],
) -> Path:
    """Write one probe as safetensors into a run's folder, with all that `load_probe` needs; its path."""
    words = {
        "version": _VERSION,
        "vitprobe": package_version("vitprobe"),
        "spec": asdict(spec),
        "dim": dim,
        "aggregator_source": probe.aggregator.source,
        "classes": list(classes),
        "arguments": {key: manifest["arguments"].get(key) for key in _GIVEN},
        **{key: manifest[key] for key in ("model", "protocol", "data")},
        "forward_dtype": manifest["forward_dtype"]["asked"],
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in probe.state_dict().items()}
    path = folder / FOLDER / (re.sub(r"[^\w.+@=,()-]", "_", f"{spec.name}-seed{spec.seed}") + ".safetensors")
    write_atomically(path, save(tensors, metadata={_KEY: json.dumps(words)}))
    return path


def load_probe(
    path: str | Path,
    model: Any = None,
    *,
    checkpoint: str | Path | None = None,
    aggregator: str | Callable[..., Aggregator] | None = None,
) -> LoadedProbe:
    """A probe that `verify` trained, with its model, ready to embed images.

    Args:
        path: a file from a run's `probes/`.
        model: the frozen model, as `load_model` takes it; by default the one the probe was trained on, by its name.
        checkpoint: the file with that model's weights, where it was loaded from one and has moved.
        aggregator: the class or function of an aggregator from outside the package that is not registered here, or
            where it is found, as in `my_module:MyAggregator`. No code is imported because a file names it.

    Returns:
        What has `embed(images)` and `classify(images)`.

    Raises:
        UserError: where the file is no probe, its aggregator is not known here (with what to do), or the model's
            weights are not those it was trained on.
    """
    path = Path(path)
    words, tensors = _read(path)
    if model is None and not words["model"]["by_name"]:
        raise UserError(f"{path} was trained on a model given in Python: give the same with load_probe(path, model)")
    loaded = _load_model(words["arguments"], model, checkpoint)
    mean, std = (words["arguments"].get(key) for key in ("mean", "std"))
    loaded = with_transform(loaded, "model", loaded.transform.size, mean, std)
    if words["model"]["weights_sha256"] is None:
        raise UserError(
            f"{path} was trained on weights that have no digest, so that no model can be shown to be the one it "
            f"belongs to: run verify on the same weights in plain tensors"
        )
    if weights_sha256(loaded.module) != words["model"]["weights_sha256"]:
        raise UserError(
            f"{path} was trained on other weights of {words['model']['name']} than those of {loaded.spec.name}: give "
            f"the ones of SHA-256 {words['model']['weights_sha256'][:12]}… with load_probe(path, model)"
        )
    spec = ProbeSpec(**{**words["spec"], "tap": Tap(**words["spec"]["tap"])})
    _require_aggregator(path, spec.aggregator, words.get("aggregator_source", ""), aggregator)
    probe = Probe(create(spec.aggregator, dim=words["dim"], layout=loaded.layout), len(words["classes"]))
    try:
        probe.load_state_dict(tensors)
    except RuntimeError as error:
        older = "" if "vitprobe" in words else "; an older vitprobe wrote it: train it again with vitprobe verify"
        raise UserError(
            f"{path} lacks weights of its own probe, or has others ({type(error).__name__}){older}"
        ) from None
    about = {"protocol": words["protocol"], "data": words["data"]}
    dtype = words["forward_dtype"]
    return LoadedProbe(loaded, probe.requires_grad_(False).eval(), spec, tuple(words["classes"]), about, dtype)


def _require_aggregator(path: Path, name: str, source: str, given: Any) -> None:
    """Register the aggregator that was given.

    Raises:
        UserError: where that of the probe is not known then.
    """
    if isinstance(given, str):
        resolve(given)
    elif given is not None:
        as_name(given)
    if not is_known(name):
        advice = f"give aggregator={source!r}" if source and given is None else "give its class as aggregator="
        raise UserError(
            f"{path} was trained with the aggregator {name}, which is not registered here: {advice} to load_probe"
        )


def _load_model(given: Mapping[str, Any], model: Any, checkpoint: str | Path | None) -> LoadedModel:
    """The model of the arguments that `verify` had, with what `load_probe` was given in their place."""
    size = tuple(given["img_size"]) if isinstance(given["img_size"], list) else given["img_size"]
    if isinstance(model, nn.Module | LoadedModel):
        return load_model(model, checkpoint=checkpoint, img_size=size)
    name, weights = given["model"] if model is None else model, given["checkpoint"]
    if checkpoint is not None and model is None and weights is None and given["arch"] is not None:
        name = checkpoint  # the model was a file itself
    elif checkpoint is not None:
        weights = checkpoint
    key = given.get("weights_key")  # probes of earlier versions do not say
    return load_model(name, checkpoint=weights, arch=given["arch"], weights_key=key, img_size=size)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            words = json.loads((file.metadata() or {})[_KEY])
            if words["version"] != _VERSION:
                raise UserError(
                    f"{path} is a probe of format {words['version']}, this vitprobe reads {_VERSION}: upgrade"
                )
            return words, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else type(error).__name__
        raise UserError(
            f"{path} is no probe of vitprobe ({reason}): give a file from the folder {FOLDER}/ of a run of verify"
        ) from None
