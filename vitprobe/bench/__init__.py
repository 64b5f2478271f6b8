"""`benchmark`: what a capture costs, against the model's own forward pass and the usual ways, in one run.

Times are paired: each round runs the plain forward pass and one way after the other, in turning order, and the figure
is the median of the ratios. Peak memory is read in a process of its own for each way.
"""

from vitprobe.bench.costs import Cost, benchmark, line_of, report
from vitprobe.bench.memory import in_a_fresh_process, peak_of
from vitprobe.bench.timing import pairs
from vitprobe.bench.ways import PAPERS, WAYS, WORDS

__all__ = [
    "PAPERS",
    "WAYS",
    "WORDS",
    "Cost",
    "benchmark",
    "in_a_fresh_process",
    "line_of",
    "pairs",
    "peak_of",
    "report",
]
