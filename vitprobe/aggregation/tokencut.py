"""TokenCut (Wang et al., arXiv 2202.11539): the object as one side of a normalised cut of the patches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from vitprobe.aggregation.batch import TokenBatch
from vitprobe.aggregation.choices import at_least, one_of
from vitprobe.aggregation.weighing import Tokens
from vitprobe.aggregation.weighted import WeightedPool

KINDS = ("bipartition", "eigenvector", "eigenvector_bipartition", "eigenvector_softmax")


def normalised_cut(
    joined: Bool[Tensor, "batch patch patch"], eps: float
) -> tuple[Float[Tensor, "batch patch"], Bool[Tensor, "batch patch"]]:
    """The second eigenvector of a graph of patches, and the side of the cut that is taken for the object.

    Patches that are joined are so by 1, the others by `eps`. The cut is where the second smallest solution v of
    `(D − W)·v = λ·D·v` crosses its mean; the object is the side with the largest |v|, and v is turned so that it is
    large there. Of each image on its own, in float64.
    """
    edges = joined.double().clamp(min=eps)
    root = edges.sum(dim=-1).sqrt()
    first = F.normalize(root, dim=-1)
    # D^-½·W·D^-½ has the same eigenvectors as D^-½·(D − W)·D^-½, in the opposite order. The trivial first one, which
    # is known, is put last, so that the second is the one with the largest eigenvalue.
    graph = edges / (root[..., None] * root[:, None]) - 2 * first[..., None] * first[:, None]
    vector = torch.linalg.eigh(graph).eigenvectors[..., -1] / root
    above = vector > vector.mean(dim=-1, keepdim=True)
    turn = ~above.gather(1, vector.abs().argmax(dim=-1, keepdim=True))
    return torch.where(turn, -vector, vector), above ^ turn


class TokenCut(WeightedPool):
    """Patches weighted by a normalised cut of the image, from the cosines of their tokens.

    The paper on aggregation only names such weights; these are ours: "bipartition", the mean of the object's patches;
    "eigenvector", v − min v; "eigenvector_bipartition", the same on the object alone; "eigenvector_softmax", the
    softmax of v at mean 0 and deviation 1. Where all patches are alike, or no two, nothing can be cut: weights are 1/N.

    Args:
        dim: numbers a token.
        kind: one of these.
        tau: the cosine above which two patches are alike.
        eps: how much two patches that are not alike are joined.
    """

    def __init__(self, dim: int, *, kind: str = "bipartition", tau: float = 0.2, eps: float = 1e-5) -> None:
        super().__init__(dim)
        at_least("eps", eps, 1e-12)
        self.kind, self.tau, self.eps = one_of("kind", kind, KINDS), tau, eps

    @torch.no_grad()
    def token_weights(self, batch: TokenBatch, keys: Tokens) -> Float[Tensor, "batch query patch"]:
        """The weights of the chosen kind."""
        unit = F.normalize(batch.patches.double(), dim=-1)
        alike = unit @ unit.mT > self.tau
        vector, object_ = normalised_cut(alike, self.eps)
        if self.kind == "bipartition":
            weights = object_.double()
        elif self.kind == "eigenvector_softmax":
            centred = vector - vector.mean(dim=-1, keepdim=True)
            weights = (centred / centred.std(dim=-1, correction=0, keepdim=True)).softmax(dim=-1)
        else:
            weights = vector - vector.amin(dim=-1, keepdim=True)
            if self.kind == "eigenvector_bipartition":
                weights = weights * object_
        weights = weights / weights.sum(dim=-1, keepdim=True)
        patches = batch.layout.num_patches
        pairs = alike.sum(dim=(1, 2))[:, None]
        uncut = (pairs == patches) | (pairs == patches**2)  # each patch is like itself
        return torch.where(uncut, 1 / patches, weights).to(batch.tokens.dtype)[:, None]
