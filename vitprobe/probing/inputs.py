"""`Inputs`: what the probes of a bank read of some images, which can be mixed with that of others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vitprobe.aggregation.batch import TokenBatch
from vitprobe.probing.tap import Tap


@dataclass(frozen=True, eq=False)
class Inputs:
    """What the probes of a bank read of some images: vectors where nothing of the aggregator is trained, else tokens.

    Attributes:
        vectors: by a probe's name, `(B, dim)`; not normalised.
        tokens: by tap, without attention, which no learned aggregator reads.
    """

    vectors: Mapping[str, Float[Tensor, "batch dim"]]
    tokens: Mapping[Tap, TokenBatch]

    def pick(self, rows: Int64[Tensor, " row"]) -> Inputs:
        """Return the same of the images at these positions."""
        return Inputs(
            {name: vector[rows] for name, vector in self.vectors.items()},
            {tap: TokenBatch(batch.tokens[rows], batch.layout) for tap, batch in self.tokens.items()},
        )

    def outside_inference(self) -> Inputs:
        """Return the same on which a backward pass can run: tensors of inference mode cannot take part, copies can."""
        return Inputs(
            {name: vector.clone() if vector.is_inference() else vector for name, vector in self.vectors.items()},
            {
                tap: replace(batch, tokens=batch.tokens.clone()) if batch.tokens.is_inference() else batch
                for tap, batch in self.tokens.items()
            },
        )

    @staticmethod
    def joined(parts: Sequence[Inputs]) -> Inputs:
        """Return the images of all parts, in their order."""
        if len(parts) == 1:
            return parts[0]
        first = parts[0]
        return Inputs(
            {name: torch.cat([part.vectors[name] for part in parts]) for name in first.vectors},
            {
                tap: TokenBatch(torch.cat([part.tokens[tap].tokens for part in parts]), batch.layout)
                for tap, batch in first.tokens.items()
            },
        )
