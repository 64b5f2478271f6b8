"""What `verify` is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vitprobe.aggregation.registering import as_name
from vitprobe.data.labelled import has_loader
from vitprobe.errors import UserError
from vitprobe.probing.protocols import Protocol, find_protocol
from vitprobe.runs.options import RunOptions


@dataclass(frozen=True, kw_only=True, eq=False)
class VerifyOptions(RunOptions):
    """The arguments of `vitprobe.verify`, which explains them; checked before anything is loaded."""

    aggregators: Any = None
    protocol: str | Protocol = "fast"
    blocks: Sequence[int] | None = None
    norm: bool | None = None
    independent_seeds: bool = False

    def __post_init__(self) -> None:
        """Raises a UserError for the first option that makes no sense."""
        settled = find_protocol(self.protocol)
        object.__setattr__(self, "protocol", settled.independent() if self.independent_seeds else settled)
        if self.aggregators is not None:
            given = self.aggregators
            if isinstance(given, str) or callable(given):
                given = [given]
            object.__setattr__(self, "aggregators", [as_name(each) for each in given])
        super().__post_init__()
        if self.resume and has_loader(self.data):
            raise UserError(
                "a DataLoader gives its images in an order that only it knows, so a run on it cannot be resumed: give "
                "the data set's folder, or leave --resume out"
            )

    @property
    def settled_protocol(self) -> Protocol:
        """The protocol, with independent seeds where that is asked for."""
        return find_protocol(self.protocol)

    def describe(self) -> dict[str, Any]:
        """Every option by its name, as JSON holds it."""
        return {
            **super().describe(),
            "protocol": str(self.protocol),
            "blocks": None if self.blocks is None else list(self.blocks),
        }
