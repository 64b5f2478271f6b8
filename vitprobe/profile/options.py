"""What `analyze` is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from vitprobe.errors import UserError
from vitprobe.frozen.dtype import DTYPE_BOUND, check_dtype
from vitprobe.hooks.capture import check_kernel
from vitprobe.profile.stopping import check_tolerance
from vitprobe.runs.options import RunOptions, check_whole
from vitprobe.statistics import select


@dataclass(frozen=True, kw_only=True, eq=False)
class AnalyzeOptions(RunOptions):
    """The arguments of `vitprobe.analyze`, which explains them; checked before anything is loaded."""

    free: ClassVar[frozenset[str]] = RunOptions.free | {"distributed"}

    num_images: int | None = None
    statistics: Sequence[str] | None = None
    groups: Sequence[str] | Callable[[str], str] | None = None
    tolerance: float | None = None
    dtype_bound: float = DTYPE_BOUND
    kernel: str = "auto"
    batch_size: int | None = None
    distributed: bool = False

    def __post_init__(self) -> None:
        """Raises a UserError for the first option that makes no sense."""
        check_tolerance(self.tolerance)
        check_dtype(self.dtype, self.dtype_bound)
        if self.dtype != "auto" and float(self.dtype_bound) != DTYPE_BOUND:
            raise UserError(
                f"dtype_bound={self.dtype_bound:g} is for dtype='auto' (--dtype auto): give that too, or leave it out"
            )
        check_kernel(self.kernel)
        select(self.statistics)
        check_whole(num_images=(self.num_images, 1), batch_size=(self.batch_size, 1))
        super().__post_init__()

    def describe(self) -> dict[str, Any]:
        """Every option by its name, as JSON holds it."""
        return {
            **super().describe(),
            "statistics": None if self.statistics is None else list(self.statistics),
            "groups": None if self.groups is None else "given",
            "dtype_bound": float(self.dtype_bound),
            "tolerance": None if self.tolerance is None else float(self.tolerance),
        }
