"""The protocols' methods, from a plan to results: probes trained in one bank, or classifiers of pooled vectors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vitprobe.data.labelled import LabelledData
from vitprobe.errors import UserError
from vitprobe.files import free_bytes
from vitprobe.probing.anchor import Pooling, anchor_positions, fit_anchors
from vitprobe.probing.bank import Bank
from vitprobe.probing.cache import TokenCache
from vitprobe.probing.feeds import CacheFeed, Feed, ImageFeed
from vitprobe.probing.knn import fitting, knn
from vitprobe.probing.logistic import logistic
from vitprobe.probing.plan import Plan
from vitprobe.probing.pooled import pool
from vitprobe.probing.probe import Probe, ProbeSpec
from vitprobe.probing.tokens import FrozenModel
from vitprobe.probing.trained import fall
from vitprobe.probing.training import Training, heldout_accuracy, select, steps_of_a_pass, test
from vitprobe.probing.verification import TOKENS, TRAINING, Result
from vitprobe.runs.folder import RunFolder

WATCHED = 512  # held-out images on which losses are taken during training
Progress = Callable[[str, int, int], Callable[[int], Any]]  # words, images in all, images done → call with more


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a method found.

    Attributes:
        tested: positions of the test images that could be read.
        results: one an aggregator and place.
        probes: the selected ones, if any were trained.
        skipped: name and reason of each image, first of the training part, that could not be read.
        diverged: probes that were retired, with the reason.
        anchors: logistic regression on the vectors of each result whose aggregator has no weights, if probes were
            trained.
    """

    tested: list[int]
    results: list[Result]
    probes: list[tuple[ProbeSpec, Probe]]
    skipped: list[tuple[str, str]]
    diverged: dict[str, str]
    anchors: dict[str, dict[str, Any]] = field(default_factory=dict)


def train_probes(plan: Plan, folder: RunFolder, progress: Progress) -> Outcome:
    """Train a bank on the plan's images or on their stored tokens, select, test.

    Args:
        plan: what to do.
        folder: where the training's state is kept, and the tokens; claimed before anything is written.
        progress: makes what is called as images are done.

    Raises:
        UserError: see `verify`.
    """
    data, protocol = plan.data, plan.protocol
    held = plan.held_out()
    positions, heldout = np.flatnonzero(~held).tolist(), np.flatnonzero(held).tolist()
    steps = protocol.epochs_for(len(positions)) * steps_of_a_pass(len(positions), protocol.batch_size)
    with ExitStack() as stack:
        frozen = stack.enter_context(plan.frozen())
        train_feed, test_feed = _feeds(plan, frozen, folder, progress)
        bank = Bank(
            plan.specs(),
            dim=plan.dim,
            layout=plan.model.layout,
            num_classes=len(data.classes),
            steps=steps,
            warmup_steps=round(protocol.warmup * steps),
            init=protocol.init,
            device=plan.device,
        )
        training = Training(
            bank,
            train_feed,
            positions,
            steps,
            protocol.batch_size,
            folder.path / TRAINING,
            folder.claim,
            protocol.steps_a_batch,
            protocol.pool_of(protocol.batch_size * bank.bytes_an_image),
            heldout[:WATCHED],
        )
        training.load()
        training.run(progress(f"train {len(bank.specs)} probes", training.images, training.images_done))
        if not bank.step:
            raise _unread(data, "training", list(training.skipped.items()))
        weightless = {name: place for name, place in plan.aggregators.items() if not place[0].learned}
        of_train, of_heldout, of_test = (Pooling(feed, weightless) for feed in (train_feed, train_feed, test_feed))
        accuracy, unread = heldout_accuracy(bank, of_heldout, heldout, progress("select", len(heldout), 0))
        chosen = select(bank.specs, accuracy)
        probes = [(spec, bank.probe(spec)) for specs, _ in chosen.values() for spec in specs]
        tested = test(probes, of_test, len(data.test), progress("test", len(data.test), 0))
        if not tested.indices:
            raise _unread(data, "test", tested.skipped)
        fitted = anchor_positions(positions, data.train.labels, plan.seed) if weightless else []
        of_train.read(fitted, progress("vectors for the anchors", len(fitted), 0))
        anchors = fit_anchors(of_train, of_heldout, of_test, len(data.classes), progress("anchors", len(weightless), 0))
        losses = training.watched_losses()
    rows = {spec: (tested.top1[number], tested.top5[number]) for number, (spec, _) in enumerate(probes)}
    results = [
        Result(
            name,
            plan.aggregators[name][0].num_parameters,
            {
                "learning_rate": specs[0].learning_rate,
                "weight_decay": specs[0].weight_decay,
                "heldout_accuracy": mean,
                "rate_at_edge": specs[0].learning_rate in (protocol.learning_rates[0], protocol.learning_rates[-1]),
                **(_fall(specs, losses, len(data.classes)) if plan.aggregators[name][0].learned else {}),
            },
            np.stack([rows[spec][0] for spec in specs]),
            np.stack([rows[spec][1] for spec in specs]),
        )
        for name, (specs, mean) in chosen.items()
    ]
    diverged = {
        f"{spec.name}, {spec.optimizer} {spec.learning_rate:g}, decay {spec.weight_decay:g}, seed {spec.seed}": reason
        for spec, reason in bank.retired.items()
    }
    skipped = [*(training.skipped | dict(unread)).items(), *tested.skipped]
    kept = {name: asdict(anchors[name]) for name in chosen if name in anchors}
    return Outcome(tested.indices, results, probes, skipped, diverged, kept)


def _fall(specs: Sequence[ProbeSpec], losses: Mapping[ProbeSpec, np.ndarray], num_classes: int) -> dict[str, Any]:
    """How far the held-out loss of a result's probes still fell, and whether they count as converged."""
    if not losses:
        return {}
    halfway, end = np.stack([losses[spec] for spec in specs], axis=1)
    share, steep = fall(halfway, end, math.log(num_classes))
    return {"loss_fall": share, "converged": not steep}


def _unread(data: LabelledData, which: str, skipped: list[tuple[str, str]]) -> UserError:
    """What is said where images of one part cannot be used."""
    name, reason = skipped[0]
    return UserError(f"too few {which} images of {data.name} could be read, the first: {name} ({reason})")


def _feeds(plan: Plan, frozen: FrozenModel, folder: RunFolder, progress: Progress) -> tuple[Feed, Feed]:
    """Of the training and of the test images."""
    parts = {"train": plan.data.train, "test": plan.data.test}
    size = plan.protocol.batch_size
    if plan.protocol.method == "bank":
        train, test = (ImageFeed(frozen, part, size, plan.augmentation, plan.workers) for part in parts.values())
        return train, test
    made_of = {key: plan.manifest[key] for key in ("transform", "dtype", "forward_dtype")}
    made_of["weights"] = plan.manifest["model"]["weights_sha256"]
    caches = {name: TokenCache(folder.path / TOKENS / name, frozen, part, made_of) for name, part in parts.items()}
    missing = {name: cache for name, cache in caches.items() if not cache.complete}
    _require_room(folder.path, missing)
    for name, cache in missing.items():
        bar = progress(f"store {name}", len(parts[name]), cache.done)
        cache.fill(size, workers=plan.workers, begin=folder.claim, progress=bar)
    train, test = (CacheFeed(cache, parts[name], size, plan.device) for name, cache in caches.items())
    return train, test


def _require_room(folder: Path, caches: dict[str, TokenCache]) -> None:
    """Raises a UserError where the disk has room for each cache, but not for both."""
    needed = sum(cache.bytes_missing for cache in caches.values())
    free = free_bytes(folder)
    if needed > free:
        raise UserError(
            f"the tokens of both parts take {needed:,} bytes more, and the disk of {folder} has {free:,} free: free "
            f"some, choose another folder (--out), or a protocol without a cache"
        )


def classify_vectors(plan: Plan, folder: RunFolder, progress: Progress) -> Outcome:
    """k-NN or logistic regression on the vector that each aggregator gives; arguments as of `train_probes`.

    Nothing is written.

    Raises:
        UserError: see `verify`.
    """
    data, protocol = plan.data, plan.protocol
    grid: dict[str, Any] = dict(protocol.grid)
    with plan.frozen() as frozen:
        train, test = (
            pool(
                plan.aggregators,
                ImageFeed(frozen, part, protocol.batch_size, workers=plan.workers),
                len(part),
                progress(f"vectors of {name}", len(part), 0),
            )
            for name, part in (("train", data.train), ("test", data.test))
        )
    held = torch.from_numpy(plan.held_out()[train.indices])
    labels = torch.from_numpy(data.train.labels[train.indices])
    test_labels = torch.from_numpy(data.test.labels[test.indices])
    if not held.any() or len(labels[~held].unique()) < 2:
        raise _unread(data, "training", train.skipped)
    if not test.indices:
        raise _unread(data, "test", test.skipped)
    results = []
    for name, (aggregator, _) in plan.aggregators.items():
        given = (train.vectors[name], labels, test.vectors[name], test_labels, held)
        if protocol.method == "knn":
            found = knn(
                *given,
                size=len(labels),
                num_classes=len(data.classes),
                ks=fitting(grid["k"], int((~held).sum())),  # images that could not be read are not there
                temperatures=grid["temperature"],
            )
            chosen: dict[str, Any] = {"k": found.k, "temperature": found.temperature}
        else:
            found = logistic(
                *given, num_classes=len(data.classes), strengths=grid["c"], iterations=int(grid["iterations"][0])
            )
            chosen = {"c": found.c, "converged": found.converged}
        chosen["heldout_accuracy"] = max(found.heldout_accuracy.values())
        top1, top5 = (right.numpy()[None] for right in (found.top1, found.top5))
        results.append(Result(name, aggregator.num_parameters, chosen, top1, top5))
    return Outcome(test.indices, results, [], train.skipped + test.skipped, {})
