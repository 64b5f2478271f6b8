"""`TokenNorm`: batch normalisation of tokens, as a map that is folded into what comes after it."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitprobe.aggregation.batch import TokenBatch, Which
from vitprobe.aggregation.weighing import Tokens


class TokenNorm(nn.Module):
    """Each channel at mean 0 and variance 1 over the tokens of a batch; in eval mode by running averages of these.

    Nothing of it is trained; what it does equals torch's BatchNorm1d without gain and shift.
    """

    running_mean: Float[Tensor, " dim"]
    running_variance: Float[Tensor, " dim"]

    def __init__(self, dim: int, eps: float = 1e-6, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_variance", torch.ones(dim))

    def forward(self, batch: TokenBatch, which: Which) -> Tokens:
        """The tokens as they would be."""
        mean, variance = self.running_mean, self.running_variance
        if self.training:
            mean, variance = batch.moments(which)
            self._follow(mean, variance, len(batch) * batch.read(which).shape[1])
        gain = (variance + self.eps).rsqrt()
        return Tokens(batch.read(which), gain=gain, shift=-mean * gain)

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor, count: int) -> None:
        self.running_mean.lerp_(mean, self.momentum)
        self.running_variance.lerp_(variance * (count / max(1, count - 1)), self.momentum)  # unbiased, as torch's is
