"""Training a bank of probes to its end, selecting on the held-out slice, testing: resumable at any moment."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vitprobe.data.labelled_batches import shuffled
from vitprobe.errors import UserError
from vitprobe.files import write_atomically
from vitprobe.probing.bank import Bank
from vitprobe.probing.feeds import Feed
from vitprobe.probing.inputs import Inputs
from vitprobe.probing.probe import Probe, ProbeSpec
from vitprobe.probing.scores import TOP, correct

SAVE_SECONDS = 20.0  # between two savings of a training: what a kill loses at most, and little beside what saving takes
_HALFWAY = "heldout_losses_halfway"


@dataclass
class Training:
    """A bank on its way through its steps: each seed on images in an order, and with crops, of its own.

    The images of a seed pass through the frozen model in batches. `pool` batches of each seed are kept at once; from
    them, mixed, the seed takes `echoes` steps a batch before they give way to the next (data echoing, Choi et al.,
    arXiv 1907.05550). No image that one seed reads is read by another in the same form, and with as many echoes as
    there are seeds all of them take the passes of one.

    Attributes:
        bank: the probes.
        feed: gives the tokens of training images.
        positions: of the images to train on.
        steps: optimiser steps.
        batch_size: images a step.
        path: where the state is saved.
        claim: called before it is.
        echoes: steps for each batch that a seed reads.
        pool: batches of each seed that are mixed.
        watched: positions of held-out images, on which losses are taken half way and at the end.
        batches: steps done so far.
        skipped: name and reason of each image that could not be read.
        halfway: each probe's loss on each watched image after half of the steps; NaN for a retired one.
    """

    bank: Bank
    feed: Feed
    positions: Sequence[int]
    steps: int
    batch_size: int
    path: Path
    claim: Callable[[], Any]
    echoes: int = 1
    pool: int = 1
    watched: Sequence[int] = ()
    batches: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
    halfway: Float[Tensor, "probe image"] | None = None

    @property
    def images(self) -> int:
        """Images, each with one crop, that all seeds read together."""
        return self._read_in(0, -(-self.steps // self.echoes))

    @property
    def images_done(self) -> int:
        """Those of the pools before the one that is next."""
        return self._read_in(0, self.batches // (self.pool * self.echoes) * self.pool)

    def _read_in(self, first: int, last: int) -> int:
        return len(self.bank.seeds) * (last - first) * min(self.batch_size, len(self.positions))

    def run(self, progress: Callable[[int], Any]) -> None:
        """Train to the end from where it stands.

        Args:
            progress: called with the number of images of each batch that is read.

        Raises:
            UserError: where every probe diverged, or the disk is full.
        """
        saved = time.monotonic()
        while self.batches < self.steps:
            number, done = divmod(self.batches, self.pool * self.echoes)
            first = number * self.pool
            count = min(self.pool, -(-self.steps // self.echoes) - first)
            pools = {seed: self._read(seed, first, count, progress) for seed in self.bank.seeds}
            for step in range(done, min(count * self.echoes, self.steps - first * self.echoes)):
                drawn = {
                    seed: _drawn(inputs, labels, count, step, [seed, number])
                    for seed, (inputs, labels) in pools.items()
                }
                if min(len(labels) for _, labels in drawn.values()) > 1:  # one image has no deviation to normalise by
                    self.bank.train_step(
                        {seed: inputs for seed, (inputs, _) in drawn.items()},
                        {seed: labels for seed, (_, labels) in drawn.items()},
                    )
                self.batches += 1
                if self.batches == self.steps // 2 and self.bank.step:
                    self.halfway = heldout_losses(self.bank, self.feed, self.watched)
                if time.monotonic() - saved > SAVE_SECONDS:
                    self.save()
                    saved = time.monotonic()
        self.save()

    def _read(self, seed: int, first: int, count: int, progress: Callable[[int], Any]) -> tuple[Inputs, Tensor]:
        """So many of a seed's batches from one on, together, with the images' classes."""
        parts, labels = [], []
        a_pass = steps_of_a_pass(len(self.positions), self.batch_size)
        while count:
            epoch, begin = divmod(first, a_pass)
            here = min(count, a_pass - begin)  # images beyond the last whole batch wait for another epoch's order
            order = shuffled(self.positions, seed, epoch)
            for fed in self.feed(order[begin * self.batch_size : (begin + here) * self.batch_size], (seed, epoch)):
                self.skipped |= dict(fed.skipped)
                if fed.indices:
                    parts.append(self.bank.read(fed.tokens))
                    labels.append(fed.labels)
                progress(fed.count)
            first, count = first + here, count - here
        if not parts:
            return Inputs({}, {}), torch.zeros(0, dtype=torch.int64)
        return Inputs.joined(parts), torch.cat(labels)

    def watched_losses(self) -> dict[ProbeSpec, Float[np.ndarray, "2 image"]]:
        """The loss of each live probe on each watched image, half way and now; empty where half way none was taken."""
        if self.halfway is None or not self.halfway.shape[1]:
            return {}
        both = torch.stack([self.halfway, heldout_losses(self.bank, self.feed, self.watched)], dim=1).double().numpy()
        return {spec: both[number] for number, spec in enumerate(self.bank.specs) if spec not in self.bank.retired}

    def save(self) -> None:
        """Write the state, atomically."""
        state = self.bank.state_dict()
        tensors = {name: tensor.contiguous().cpu() for name, tensor in state.pop("tensors").items()}
        if self.halfway is not None:
            tensors[_HALFWAY] = self.halfway
        words = json.dumps({**state, "batches": self.batches, "skipped": self.skipped})
        self.claim()
        write_atomically(self.path, save(tensors, metadata={"training": words}))

    def load(self) -> None:
        """Go on from the state that was saved, if there is one.

        Raises:
            UserError: where that cannot be read, or is another bank's.
        """
        if not self.path.is_file():
            return
        try:
            with safe_open(self.path, framework="pt") as file:
                words = json.loads(file.metadata()["training"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
        except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
            raise UserError(f"{self.path} cannot be read ({error}); start anew with --overwrite") from None
        self.batches, self.skipped = words.pop("batches"), words.pop("skipped")
        self.halfway = tensors.pop(_HALFWAY, None)
        self.bank.load_state_dict({**words, "tensors": tensors})


def _drawn(inputs: Inputs, labels: Tensor, count: int, step: int, key: list[int]) -> tuple[Inputs, Tensor]:
    """What one step reads of a pool of `count` batches: once every `count` steps the pool is shuffled and cut anew."""
    if count == 1:
        return inputs, labels
    echo, part = divmod(step, count)
    order = np.random.default_rng([*key, echo]).permutation(len(labels))
    rows = torch.from_numpy(np.array_split(order, count)[part]).to(labels.device)
    return inputs.pick(rows), labels[rows]


@torch.no_grad()
def heldout_losses(bank: Bank, feed: Feed, positions: Sequence[int]) -> Float[Tensor, "probe image"]:
    """The cross-entropy of each probe on each of these images that can be read; NaN for a retired probe."""
    parts = []
    for fed in feed(positions):
        if fed.indices:
            losses = torch.full((len(bank.specs), len(fed.indices)), torch.nan)
            for spec, scores in bank.logits(fed.tokens).items():
                losses[bank.specs.index(spec)] = F.cross_entropy(scores, fed.labels, reduction="none").cpu()
            parts.append(losses)
    return torch.cat(parts, dim=1) if parts else torch.zeros(len(bank.specs), 0)


def steps_of_a_pass(num_images: int, batch_size: int) -> int:
    """Whole batches in so many images; one where there are fewer than a batch."""
    return max(1, num_images // batch_size)


def heldout_accuracy(
    bank: Bank, feed: Feed, positions: Sequence[int], progress: Callable[[int], Any]
) -> tuple[dict[ProbeSpec, float], list[tuple[str, str]]]:
    """The accuracy of each live probe on the held-out images, as the model's own transform makes them.

    Returns:
        The accuracies, and name and reason of each image that could not be read.

    Raises:
        UserError: where none could be read.
    """
    right: dict[ProbeSpec, int] = dict.fromkeys(bank.live, 0)
    seen, skipped = 0, []
    for fed in feed(positions):
        seen += len(fed.indices)
        skipped += fed.skipped
        if fed.indices:
            for spec, scores in bank.logits(fed.tokens).items():
                right[spec] += int(correct(scores, fed.labels).sum())
        progress(fed.count)
    if not seen:
        raise UserError(f"no held-out image could be read, the first: {skipped[0][0]} ({skipped[0][1]})")
    return {spec: count / seen for spec, count in right.items()}, skipped


def select(specs: Sequence[ProbeSpec], accuracy: Mapping[ProbeSpec, float]) -> dict[str, tuple[list[ProbeSpec], float]]:
    """For each name the probes of the best rate and decay, one a seed, with their mean held-out accuracy.

    The best has the highest mean over seeds; of equal ones the first. A setting that diverged with some seed is out,
    and so is a name all of whose settings are.

    Raises:
        UserError: where nothing is left.
    """
    settings: dict[str, dict[tuple[str, float, float], list[ProbeSpec]]] = {}
    for spec in specs:
        key = (spec.optimizer, spec.learning_rate, spec.weight_decay)
        settings.setdefault(spec.name, {}).setdefault(key, []).append(spec)
    chosen = {}
    for name, of_name in settings.items():
        means = [
            (float(np.mean([accuracy[spec] for spec in of_setting])), of_setting)
            for of_setting in of_name.values()
            if all(spec in accuracy for spec in of_setting)
        ]
        if means:
            mean, best = max(means, key=lambda pair: pair[0])
            chosen[name] = best, mean
    if not chosen:
        raise UserError("every aggregator diverged with some seed at every learning rate: lower the rates")
    return chosen


@dataclass(frozen=True, eq=False)
class Tested:
    """What probes did on the test images that could be read.

    Attributes:
        indices: positions of these images.
        top1: of each probe, whether it was right.
        top5: of each probe, whether the class was among its best five.
        skipped: name and reason of each image that could not be read.
    """

    indices: list[int]
    top1: list[Bool[np.ndarray, " image"]]
    top5: list[Bool[np.ndarray, " image"]]
    skipped: list[tuple[str, str]]


@torch.no_grad()
def test(probes: Sequence[tuple[ProbeSpec, Probe]], feed: Feed, count: int, progress: Callable[[int], Any]) -> Tested:
    """Try probes, in eval mode, on all `count` images of a set."""
    indices: list[int] = []
    skipped: list[tuple[str, str]] = []
    right: dict[int, list[list[Tensor]]] = {top: [[] for _ in probes] for top in (1, TOP)}
    for fed in feed(range(count)):
        indices += fed.indices
        skipped += fed.skipped
        if fed.indices:
            for number, (spec, probe) in enumerate(probes):
                scores = probe(fed.tokens[spec.tap])
                for top in (1, TOP):
                    right[top][number].append(correct(scores, fed.labels, top).cpu())
        progress(fed.count)
    top1, top5 = (
        [torch.cat(parts).numpy() if parts else np.zeros(0, bool) for parts in right[top]] for top in (1, TOP)
    )
    return Tested(indices, top1, top5, skipped)
