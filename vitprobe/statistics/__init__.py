"""Statistics of attention: pure functions on an `AttentionView`, and the table `STATISTICS` that declares them."""

from vitprobe.statistics import attention, residual
from vitprobe.statistics.table import NEEDS, STATISTICS, Statistic, compute_statistics, select

__all__ = ["NEEDS", "STATISTICS", "Statistic", "attention", "compute_statistics", "residual", "select"]
