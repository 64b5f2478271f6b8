"""What a verification is about to do: model, data, aggregators, places and protocol, all checked before it begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from numpy import ndarray

from vitprobe.aggregation import Aggregator, create
from vitprobe.data.augment import Augmentation
from vitprobe.data.labelled import LabelledData, open_labelled
from vitprobe.errors import UserError
from vitprobe.frozen.device import choose_device
from vitprobe.models.anatomy.final_norm import find_final_norm
from vitprobe.models.loaded import LoadedModel, without_transform
from vitprobe.probing.heldout import held_out
from vitprobe.probing.knn import fitting
from vitprobe.probing.options import VerifyOptions
from vitprobe.probing.probe import ProbeSpec
from vitprobe.probing.protocols import Protocol
from vitprobe.probing.tap import Tap
from vitprobe.probing.tokens import FrozenModel
from vitprobe.probing.verification import KIND
from vitprobe.runs.manifest import new_manifest

TRAINED_DEFAULT = ("cls", "gap", "abmilp", "ep")
POOLED_DEFAULT = ("cls", "gap")


@dataclass(frozen=True, eq=False)
class Plan:
    """A verification before its first image.

    Attributes:
        model: the frozen model.
        data: labelled images.
        protocol: how probes are trained and selected.
        aggregators: by the name of their result, made once, with the place they read.
        dim: numbers a token.
        device: where all of it runs.
        dtype: of the forward pass, as `FrozenModel` takes it.
        seed: of orders, crops, the held-out slice and initial weights.
        workers: processes that read; chosen for the machine without.
        manifest: what it is made of.
    """

    model: LoadedModel
    data: LabelledData
    protocol: Protocol
    aggregators: dict[str, tuple[Aggregator, Tap]]
    dim: int
    device: torch.device
    dtype: str | None
    seed: int
    workers: int | None
    manifest: dict[str, Any]

    @property
    def taps(self) -> tuple[Tap, ...]:
        """The places that are read."""
        return tuple(dict.fromkeys(tap for _, tap in self.aggregators.values()))

    @property
    def augmentation(self) -> Augmentation | None:
        """The protocol's, without flips where mirrored pictures are of other classes."""
        given = self.protocol.augmentation
        return given and replace(given, flip=given.flip and self.data.mirrors)

    def frozen(self) -> FrozenModel:
        """The model with all that the aggregators read of it."""
        return FrozenModel(
            self.model,
            self.taps,
            attention=any(aggregator.needs_attention for aggregator, _ in self.aggregators.values()),
            oracles=sorted({aggregator.oracle for aggregator, _ in self.aggregators.values() if aggregator.oracle}),
            dtype=self.dtype,
            device=self.device,
        )

    def held_out(self) -> Bool[ndarray, " image"]:
        """Which training images are held out for selection."""
        return held_out(self.data.train.labels, self.protocol.heldout, self.seed)

    def specs(self) -> list[ProbeSpec]:
        """The probes of a bank: of each result every rate and decay with every seed."""
        protocol = self.protocol
        return [
            ProbeSpec(aggregator.name, tap, protocol.optimizer, rate, decay, self.seed * protocol.seeds + number)
            for aggregator, tap in self.aggregators.values()
            for rate in protocol.learning_rates
            for decay in protocol.weight_decays
            for number in range(protocol.seeds)
        ]


def make_plan(options: VerifyOptions) -> Plan:
    """Load, open and check everything that can be known before the first image.

    Raises:
        UserError: for what cannot be loaded, opened or put together.
    """
    chosen, protocol = choose_device(options.device), options.settled_protocol
    opened = open_labelled(options.data, seed=options.seed)
    loaded = options.load()
    labelled = opened.for_model(loaded.transform.wanted)
    remarks = [*labelled.remarks, *labelled.look_at(loaded.spec.name)]
    if labelled.normalised:
        loaded = without_transform(loaded)
        _require_prepared(labelled, loaded, options)
    undefined: dict[str, str] = {}
    taps = _taps(loaded, options, protocol, undefined)
    with FrozenModel(loaded, taps, dtype=options.dtype, device=chosen) as frozen:
        dim, forward_dtype = frozen.dim, frozen.forward_dtype
    protocol, dropped = _fitted(protocol, labelled, options.seed)
    made = _aggregators(loaded, options.aggregators, protocol, dim, undefined)
    if protocol.method == "cached" and any(each.needs_attention or each.oracle for each in made):
        names = ", ".join(each.name for each in made if each.needs_attention or each.oracle)
        raise UserError(
            f"{names} needs attention, which the cache does not hold: use the protocol fast, knn or logistic"
        )
    manifest = new_manifest(KIND, loaded, chosen, options.describe()) | {
        "protocol": protocol.describe(),
        "transform": loaded.transform.describe(),
        "layout": asdict(loaded.layout),
        "undefined": undefined,
        "forward_dtype": forward_dtype.describe(),
        "data": {
            "source": labelled.name,
            "fingerprint": labelled.fingerprint,
            "groups_sha256": None,
            "classes": len(labelled.classes),
            "train": len(labelled.train),
            "test": len(labelled.test),
            "left_out": list(
                dict.fromkeys(name for part in (labelled.train, labelled.test) for name in part.images.left_out.names)
            ),
        },
    }
    manifest["remarks"] += [*remarks, *dropped]
    manifest["model"]["by_name"] = isinstance(options.model, str | Path)
    return Plan(
        loaded,
        labelled,
        protocol,
        {f"{aggregator.name}@{tap}": (aggregator, tap) for tap in taps for aggregator in made},
        dim,
        chosen,
        options.dtype,
        options.seed,
        options.workers,
        manifest,
    )


def _require_prepared(data: LabelledData, model: LoadedModel, options: VerifyOptions) -> None:
    """Raises a UserError for tensors that are not of the model's size, or for a normalisation of them."""
    if options.mean is not None:
        raise UserError(
            f"{data.name} is taken as normalised for the model already: leave mean and std out, or give pictures (a "
            f"folder, files)"
        )
    for images in (part.images for part in (data.train, data.test) if part.images.normalised):
        pixels = torch.as_tensor(images.read(0))  # what is normalised already is a tensor
        size = (pixels.shape[-2], pixels.shape[-1])
        if size != model.transform.size:
            came, takes = ("×".join(map(str, pixels)) for pixels in (size, model.transform.size))
            raise UserError(
                f"the tensors of {data.name} have {came} pixels, and {model.spec.name} takes {takes}: give tensors of "
                f"that size, or say theirs with img_size"
            )


def _fitted(protocol: Protocol, data: LabelledData, seed: int) -> tuple[Protocol, list[str]]:
    """The protocol with those numbers of neighbours that the training images allow, and what is said of others.

    Raises:
        UserError: where nothing can be held out, or k-NN has too few images for any of its numbers.
    """
    held = held_out(data.train.labels, protocol.heldout, seed)
    if not held.any():
        raise UserError(f"{data.name} has one training image a class: nothing can be held out to select on; give more")
    if protocol.method != "knn":
        return protocol, []
    grid, size = dict(protocol.grid), int((~held).sum())
    fit = fitting([int(k) for k in grid["k"]], size)
    if len(fit) == len(grid["k"]):
        return protocol, []
    said = (
        f"k is chosen from {', '.join(map(str, fit))} of {', '.join(map(str, grid['k']))}: k-NN searches among {size} "
        f"training images (held-out ones not counted)"
    )
    return replace(protocol, grid=tuple((grid | {"k": fit}).items())), [said]


def _taps(model: LoadedModel, options: VerifyOptions, protocol: Protocol, undefined: dict[str, str]) -> list[Tap]:
    """The places to read: the last block by default, and the protocol's norms."""
    count, blocks, norm = len(model.anatomy.blocks), options.blocks, options.norm
    for block in blocks or ():
        if not -count <= block < count:
            raise UserError(f"{model.spec.name} has blocks 0 to {count - 1}, not {block}: choose one of these")
    numbers = sorted({block % count for block in blocks}) if blocks else [count - 1]
    norms = protocol.norms if norm is None else (norm,)
    if norm is None and True in norms:
        try:
            find_final_norm(model.anatomy, model.spec.name)
        except UserError as error:
            undefined["+norm"] = str(error)
            norms = (False,)
    return [Tap(number, normed) for number in numbers for normed in norms]


def _aggregators(
    model: LoadedModel, asked: Sequence[str] | None, protocol: Protocol, dim: int, undefined: dict[str, str]
) -> list[Aggregator]:
    """The aggregators, each checked against the model's tokens and the protocol."""
    names = list(asked) if asked else list(TRAINED_DEFAULT if protocol.trains else POOLED_DEFAULT)
    made: dict[str, Aggregator] = {}
    for name in names:
        try:
            aggregator = create(name, dim=dim, layout=model.layout)
            aggregator.check(model.layout, model.spec.name)
        except UserError as error:
            if asked:
                raise
            undefined[name] = str(error)
            continue
        if aggregator.learned and not protocol.trains:
            raise UserError(
                f"{name} is trained, and {protocol.name} trains no aggregators: leave it out, or use the protocol fast"
            )
        if aggregator.name in made:
            raise UserError(f"{name} was asked for twice; give each aggregator once")
        made[aggregator.name] = aggregator
    return list(made.values())
