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
from jaxtyping import Bool
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vitprobe.data.labelled_batches import shuffled
from vitprobe.errors import UserError
from vitprobe.files import write_atomically
from vitprobe.probing.bank import Bank
from vitprobe.probing.feeds import Feed
from vitprobe.probing.probe import Probe, ProbeSpec
from vitprobe.probing.scores import TOP, correct

SAVE_SECONDS = 20.0  # between two savings of a training: what a kill loses at most, and little beside what saving takes


@dataclass
class Training:
    """A bank on its way through the epochs.

    Attributes:
        bank: the probes.
        feed: gives the tokens of training images.
        positions: of the images to train on.
        epochs: passes over them.
        batch_size: images a step.
        seed: of the order.
        path: where the state is saved.
        claim: called before it is.
        batches: batches done so far, of all epochs.
        skipped: name and reason of each image that could not be read.
    """

    bank: Bank
    feed: Feed
    positions: Sequence[int]
    epochs: int
    batch_size: int
    seed: int
    path: Path
    claim: Callable[[], Any]
    batches: int = 0
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def a_pass(self) -> int:
        """Batches of an epoch; images beyond the last whole one wait for another epoch's order."""
        return steps_of_a_pass(len(self.positions), self.batch_size)

    @property
    def images(self) -> int:
        """Images of all epochs."""
        return self.epochs * self.a_pass * min(self.batch_size, len(self.positions))

    @property
    def images_done(self) -> int:
        """Images of the batches done so far."""
        return self.batches * min(self.batch_size, len(self.positions))

    def run(self, progress: Callable[[int], Any]) -> None:
        """Train to the end from where it stands.

        Args:
            progress: called with the number of images of each batch.

        Raises:
            UserError: where every probe diverged, or the disk is full.
        """
        saved = time.monotonic()
        while self.batches < self.epochs * self.a_pass:
            epoch, first = divmod(self.batches, self.a_pass)
            order = shuffled(self.positions, self.seed, epoch)
            rest = order[first * self.batch_size : self.a_pass * self.batch_size]
            for fed in self.feed(rest, epoch):
                self.skipped |= dict(fed.skipped)
                if len(fed.indices) > 1:  # one image has no deviation to normalise by
                    self.bank.train_step(fed.tokens, fed.labels)
                self.batches += 1
                progress(fed.count)
                if time.monotonic() - saved > SAVE_SECONDS:
                    self.save()
                    saved = time.monotonic()
        self.save()

    def save(self) -> None:
        """Write the state, atomically."""
        state = self.bank.state_dict()
        tensors = {name: tensor.contiguous().cpu() for name, tensor in state.pop("tensors").items()}
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
        self.bank.load_state_dict({**words, "tensors": tensors})


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
