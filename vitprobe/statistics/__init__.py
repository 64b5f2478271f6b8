"""Statistics of attention: pure functions on an `AttentionView`, the table `STATISTICS`, and `declare` for your own."""

from vitprobe.statistics import attention, residual
from vitprobe.statistics.computing import compute_statistics
from vitprobe.statistics.declaring import declare
from vitprobe.statistics.table import NEEDS, STATISTICS, Statistic, comparable, is_known, of_the_paper, select

__all__ = [
    "NEEDS",
    "STATISTICS",
    "Statistic",
    "attention",
    "comparable",
    "compute_statistics",
    "declare",
    "is_known",
    "of_the_paper",
    "residual",
    "select",
]
