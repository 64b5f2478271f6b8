"""`Layout`: what one family of official checkpoints needs beyond its entries in the table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from vitprobe.models.official.entries import OfficialCheckpoint

State = dict[str, Tensor]


def _accept(entry: OfficialCheckpoint, state: State, source: str) -> None:
    """Most layouts have nothing to check that a load by names and shapes does not notice."""


@dataclass(frozen=True)
class Layout:
    """How the checkpoints of one family look, and how they become a module.

    Attributes:
        words: what its keys look like in the file, once the holder ("model", "state_dict" …) is opened; for messages.
        convert: the weights by the file's keys → by the module's; a pure function. Keys that it does not know it
            passes on, so that the load that follows names them.
        build: arguments of the architecture's constructor → the module, with random weights.
        check: (entry, converted weights, what messages call the file); raises `UserError` for another model's weights
            that fit by names and shapes. Default: accepts all.
        has_classifier: whether `build` takes `num_classes`, default True.
    """

    words: str
    convert: Callable[[State], State]
    build: Callable[..., nn.Module]
    check: Callable[[OfficialCheckpoint, State, str], None] = _accept
    has_classifier: bool = True


def behind(state: State, prefix: str) -> State:
    """Return the weights whose keys begin with a prefix, without it; all weights where none do."""
    part = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
    return part or state


def without(state: State, *prefixes: str) -> State:
    """Return the weights whose keys begin with none of these prefixes."""
    return {name: value for name, value in state.items() if not name.startswith(prefixes)}
