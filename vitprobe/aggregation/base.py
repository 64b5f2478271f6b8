"""`Aggregator`: tokens → one vector an image. Each way of doing it is one small subclass."""

from __future__ import annotations

from abc import abstractmethod

from jaxtyping import Float
from torch import Tensor, nn

from vitprobe.aggregation.batch import TokenBatch, Which
from vitprobe.aggregation.choices import one_of
from vitprobe.attention.view import AttentionView
from vitprobe.errors import UserError
from vitprobe.layout import TokenLayout


class Aggregator(nn.Module):
    """From the tokens of a frozen block to one vector an image.

    Attributes:
        name: as in `create`, with the options that are not the defaults.
        source: of one registered outside the package, where `create` finds it (`module:Name`); else empty.
        dim: numbers a token.
        tokens: "patches", or "all" for [cls] and the patches (registers never).
        out_dim: numbers of the vector.
        needs_cls: whether it reads a [cls] token.
        needs_attention: whether it reads the attention inside the block.
        oracle: another model whose [cls] attention it reads, or the empty string.
        normalised: whether a probe normalises its vector over the batch before the classifier; all do but CAPI's.
        classifier_std: deviation of the initial weights of a probe's classifier, where they are drawn as published.
    """

    name: str = ""
    source: str = ""
    needs_cls: bool = False
    needs_attention: bool = False
    oracle: str = ""
    normalised: bool = True
    classifier_std: float = 0.01

    def __init__(self, dim: int, tokens: str = "patches", out_dim: int | None = None) -> None:
        super().__init__()
        self.dim = dim
        self.tokens: Which = "all" if one_of("tokens", tokens, ("patches", "all")) == "all" else "patches"
        self.needs_cls = self.needs_cls or self.tokens == "all"
        self.out_dim = dim if out_dim is None else out_dim

    @abstractmethod
    def forward(self, batch: TokenBatch) -> Float[Tensor, "batch out_dim"]:
        """One vector an image, `(B, out_dim)`."""

    def weights(self, batch: TokenBatch) -> Float[Tensor, "batch query patch"] | None:
        """The weight of each patch in the vector, for drawing: `(B, queries, N)`; None where there is no such thing."""
        return None

    @property
    def learned(self) -> bool:
        """Whether anything of it is trained."""
        return self.num_parameters > 0

    @property
    def num_parameters(self) -> int:
        """How many numbers of it are trained."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)

    def check(self, layout: TokenLayout, model: str) -> None:
        """Raises a UserError where a model's tokens are not what this aggregator reads.

        Args:
            layout: the tokens.
            model: the model's name, for the message.
        """
        if self.needs_cls and not layout.has_cls:
            raise UserError(f"{self.name} reads the [cls] token, which {model} does not have: leave it out, or use gap")

    def attention_of(self, batch: TokenBatch) -> AttentionView:
        """The attention inside the block that a batch comes from.

        Raises:
            UserError: where it was not captured.
        """
        if batch.attention is None:
            raise UserError(f"{self.name} reads the attention inside the block: give it to TokenBatch as attention=")
        return batch.attention
