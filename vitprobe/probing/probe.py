"""`Probe`: aggregator, normalisation, linear classifier; `ProbeSpec`: what one is and how it is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from vitprobe.aggregation.base import Aggregator
from vitprobe.aggregation.batch import TokenBatch
from vitprobe.probing.tap import Tap

Init = Literal["trunc_normal", "default"]


@dataclass(frozen=True)
class ProbeSpec:
    """What one probe is and how it is trained.

    Attributes:
        aggregator: a name that `vitprobe.aggregation.create` takes.
        tap: where the frozen model's tokens are read.
        optimizer: "lars", "sgd" or "adamw".
        learning_rate: the highest of the schedule.
        weight_decay: the optimiser's.
        seed: of the initial weights, and of the order and the crops of the images that it is trained on.
    """

    aggregator: str
    tap: Tap
    optimizer: Literal["lars", "sgd", "adamw"]
    learning_rate: float
    weight_decay: float = 0.0
    seed: int = 0

    @property
    def name(self) -> str:
        """Aggregator and tap: what a result is called, whatever it was trained with."""
        return f"{self.aggregator}@{self.tap}"


class Probe(nn.Module):
    """From tokens to class scores: aggregator, batch normalisation without gain and bias, linear classifier.

    An aggregator whose published probe has no batch normalisation (CAPI's) goes without.

    Args:
        aggregator: from tokens to one vector.
        num_classes: classes.
        init: of the classifier: "trunc_normal" draws weights with the aggregator's `classifier_std` (0.01 as in MAE's
            linear probe, 0.02 for CAPI's) and sets biases to 0; "default" is torch's own, which the paper's released
            code uses.
        norm: another probe's normalisation, to be shared; its own without.
    """

    def __init__(
        self, aggregator: Aggregator, num_classes: int, *, init: Init = "trunc_normal", norm: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.aggregator = aggregator
        if norm is None:
            normalised = aggregator.normalised
            norm = nn.BatchNorm1d(aggregator.out_dim, affine=False, eps=1e-6) if normalised else nn.Identity()
        self.norm = norm
        self.head = nn.Linear(aggregator.out_dim, num_classes)
        if init == "trunc_normal":
            nn.init.trunc_normal_(self.head.weight, std=aggregator.classifier_std)
            nn.init.zeros_(self.head.bias)

    def forward(self, batch: TokenBatch) -> Float[Tensor, "batch classes"]:
        """The score of each class, `(B, classes)`."""
        return self.head(self.vector(batch))

    def vector(self, batch: TokenBatch) -> Float[Tensor, "batch out_dim"]:
        """What the classifier reads: the aggregated tokens, normalised as published; `(B, out_dim)`."""
        return self.norm(self.aggregator(batch))
