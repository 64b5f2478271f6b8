"""Protocols: all that decides an accuracy beside the model, the data and the aggregator, under a name and a hash."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from hashlib import sha256
from typing import Any, Literal

from vitprobe.data.augment import Augmentation
from vitprobe.errors import UserError
from vitprobe.probing.heldout import SHARE
from vitprobe.probing.knn import NEIGHBOURS, TEMPERATURES
from vitprobe.probing.logistic import ITERATIONS, STRENGTHS
from vitprobe.probing.probe import Init

Method = Literal["bank", "cached", "knn", "logistic"]

POOL_BYTES = 1 << 30  # of the pools of all seeds, if more than one batch each is to be mixed


@dataclass(frozen=True)
class Protocol:
    """How probes are trained and selected. A number says little without it, so its name and hash stand beside each.

    Attributes:
        name: what tables call it.
        words: what it is, in a sentence.
        method: "bank" (probes trained on augmented images), "cached" (probes trained on tokens stored once, without
            augmentation), "knn" or "logistic" (on pooled vectors).
        norms: whether tokens are read without the model's final norm, with it, or both, where nothing else is asked.
        heldout: the share of the training images on which all is selected; test images select nothing.
        seeds: probes of each kind, differing in initial weights, order of the images, and crops.
        echoes: optimiser steps for each batch that a seed reads (data echoing); None for as many as there are seeds,
            so that all seeds together read what one would alone. Stored tokens cost nothing to read: "cached" takes 1.
        pool: batches of a seed that are mixed before its steps are cut from them, where there are several echoes; fewer
            where they would take more than `POOL_BYTES`.
        batch_size: images a step.
        epochs: passes over the training images, at least.
        least_steps: optimiser steps, at least: small sets are passed over more often.
        warmup: the share of the steps in which learning rates rise.
        optimizer: "lars", "sgd" or "adamw".
        learning_rates: of which the best one is selected, for each aggregator.
        weight_decays: likewise.
        init: of the classifiers; see `vitprobe.probing.probe.Probe`.
        augmentation: of the training images.
        grid: what k-NN or logistic regression selects from.
    """

    name: str
    words: str
    method: Method
    norms: tuple[bool, ...] = (False,)
    heldout: float = SHARE
    seeds: int = 1
    echoes: int | None = None
    pool: int = 4
    batch_size: int = 64
    epochs: int = 1
    least_steps: int = 0
    warmup: float = 0.0
    optimizer: Literal["lars", "sgd", "adamw"] = "adamw"
    learning_rates: tuple[float, ...] = ()
    weight_decays: tuple[float, ...] = (0.0,)
    init: Init = "trunc_normal"
    augmentation: Augmentation | None = None
    grid: tuple[tuple[str, tuple[int | float, ...]], ...] = ()

    def __post_init__(self) -> None:
        """Raises a UserError for what no probe can be trained or selected with."""
        if self.batch_size < 2:
            raise UserError(f"protocol {self.name}: a batch of {self.batch_size} cannot be normalised, give 2 or more")
        if not 0 < self.heldout < 1:
            raise UserError(f"protocol {self.name}: heldout is a share between 0 and 1, not {self.heldout}")
        if self.trains and not (self.learning_rates and self.weight_decays and self.seeds > 0):
            raise UserError(f"protocol {self.name} trains probes, and needs learning rates, weight decays and seeds")
        if self.pool < 1 or (self.echoes is not None and self.echoes < 1):
            raise UserError(f"protocol {self.name}: pool and echoes are whole numbers of at least 1")
        wanted = {"knn": {"k", "temperature"}, "logistic": {"c", "iterations"}}.get(self.method, set())
        if dict(self.grid).keys() != wanted or not all(values for _, values in self.grid):
            words = f"a grid of {' and '.join(sorted(wanted))}" if wanted else "no grid"
            raise UserError(f"protocol {self.name}: the method {self.method} takes {words}")

    @cached_property
    def digest(self) -> str:
        """The first twelve digits of the SHA-256 of all its fields."""
        return sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]

    @property
    def trains(self) -> bool:
        """Whether probes are trained by gradient descent, so that aggregators may have weights of their own."""
        return self.method in ("bank", "cached")

    @property
    def steps_a_batch(self) -> int:
        """Optimiser steps that a seed takes for each batch that it reads."""
        if self.method == "cached":
            return 1
        return self.seeds if self.echoes is None else self.echoes

    def pool_of(self, batch_bytes: int) -> int:
        """Batches of a seed that are mixed, where what probes read of a batch takes so many bytes."""
        if self.steps_a_batch == 1:
            return 1
        return max(1, min(self.pool, POOL_BYTES // (self.seeds * max(1, batch_bytes))))

    def independent(self) -> Protocol:
        """The same with one step a batch: each seed makes all passes over the images by itself.

        Raises:
            UserError: for a method whose seeds read no images of their own.
        """
        if self.method != "bank":
            words = "reads each seed's images by itself already" if self.trains else "has no seeds"
            raise UserError(f"{self.name} {words}: leave independent seeds out, or use the protocol fast")
        return replace(self, echoes=1)

    def __str__(self) -> str:
        return f"{self.name} ({self.digest})"

    def describe(self) -> dict[str, Any]:
        """As JSON holds it, for a manifest."""
        return {"hash": self.digest, **json.loads(json.dumps(asdict(self)))}

    def epochs_for(self, num_images: int) -> int:
        """Passes over so many training images."""
        a_pass = max(1, num_images // self.batch_size)
        return max(self.epochs, -(-self.least_steps // a_pass))


_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)

# Square pictures whole, of others as large a part; smaller crops of small pictures are other pictures than those that
# probes are tested on, and docs/verification.md has what that costs.
_WHOLE = Augmentation(scale=(1.0, 1.0), ratio=(1.0, 1.0))

PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            name="fast",
            words="AdamW on whole images and their mirror images, 6 epochs or 300 steps, the learning rate selected "
            "from seven on a tenth of the training images, as CAPI does; 3 seeds, each with an order and draws of its "
            "own, which take 6 steps for each batch that they read",
            method="bank",
            seeds=3,
            echoes=6,
            batch_size=128,
            epochs=6,
            least_steps=300,
            warmup=0.1,
            learning_rates=_RATES,
            augmentation=_WHOLE,
        ),
        Protocol(
            name="cached",
            words="AdamW on tokens stored once in fp16, without augmentation, 20 epochs or 1,000 steps, the learning "
            "rate selected as in fast; 3 seeds; not comparable with protocols that augment",
            method="cached",
            seeds=3,
            batch_size=128,
            epochs=20,
            least_steps=1000,
            warmup=0.1,
            learning_rates=_RATES,
        ),
        Protocol(
            name="knn",
            words="k nearest neighbours by cosine among all training images, softmax weights, k and temperature "
            "selected on a tenth of them; raw tokens and those after the final norm",
            method="knn",
            norms=(False, True),
            grid=(("k", NEIGHBOURS), ("temperature", TEMPERATURES)),
        ),
        Protocol(
            name="logistic",
            words="multinomial logistic regression by L-BFGS on standardised vectors without augmentation, C selected "
            "on a tenth of the training images, then fitted on all",
            method="logistic",
            grid=(("c", STRENGTHS), ("iterations", (ITERATIONS,))),
        ),
    )
}


def find_protocol(protocol: str | Protocol) -> Protocol:
    """The protocol of a name; one that is given as it is.

    Raises:
        UserError: for an unknown name.
    """
    if isinstance(protocol, Protocol):
        return protocol
    if protocol not in PROTOCOLS:
        raise UserError(f"there is no protocol {protocol!r}; choose from {', '.join(PROTOCOLS)}")
    return PROTOCOLS[protocol]
