"""`WeightedPool`: the aggregators that are weights over tokens, weighted sums, and perhaps small matrices."""

from __future__ import annotations

from abc import abstractmethod

from jaxtyping import Float
from torch import Tensor

from vitprobe.aggregation.base import Aggregator
from vitprobe.aggregation.batch import TokenBatch
from vitprobe.aggregation.weighing import Tokens


class WeightedPool(Aggregator):
    """Weights over the tokens, Q sets of them; the sums of tokens under each; what is made of the sums.

    A subclass gives the weights and, where it must, says what else than the tokens themselves is weighted, or what
    is made of the sums. Other tokens that are weighted too come before the patches.
    """

    def keys(self, batch: TokenBatch) -> Tokens:
        """The tokens that weights are computed from."""
        return Tokens(batch.read(self.tokens))

    def values(self, batch: TokenBatch, keys: Tokens) -> Tokens:
        """The tokens that are summed; without more, the keys."""
        return keys

    @abstractmethod
    def token_weights(self, batch: TokenBatch, keys: Tokens) -> Float[Tensor, "batch query token"]:
        """The weights over the tokens, each set of them summing to 1."""

    def project(self, sums: Float[Tensor, "batch query dim"]) -> Float[Tensor, "batch out"]:
        """The vector; without more, the one sum."""
        return sums.flatten(1)

    def forward(self, batch: TokenBatch) -> Float[Tensor, "batch out"]:
        """Weights, sums, vector."""
        keys = self.keys(batch)
        return self.project(self.values(batch, keys).sums(self.token_weights(batch, keys)))

    def weights(self, batch: TokenBatch) -> Float[Tensor, "batch query patch"] | None:
        """The weights of the patches; what is missing to 1 lies on other tokens."""
        return self.token_weights(batch, self.keys(batch))[..., -batch.layout.num_patches :]
