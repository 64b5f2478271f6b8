"""`docs/coverage.md`, from the results of `benchmarks.coverage`."""

from __future__ import annotations

from typing import Any

import timm
import torch

from benchmarks.checking import MILLIONS_WHOLE, OWN_TOLERANCE, TOKENS_WHOLE
from benchmarks.peaked import TARGET_PEAK
from helpers import TOLERANCE
from vitprobe.layout import TokenLayout
from vitprobe.statistics import STATISTICS

Line = dict[str, Any]
_PEAKED = 0.3
_HEADER = [
    *("model", "blocks", "run", "heads", "tokens", "layout", "statistics", "largest logit", "mean peak"),
    *("worst error", "bound", "of", "own attention", "s"),
]


def coverage_page(lines: list[Line], wanted: int) -> str:
    """The page: what was done, what came out, a table of all models."""
    seen = [line for line in lines if line["seen"]]
    ran = [line for line in seen if "ran" in line]
    passed = [line for line in ran if line["passed"]]
    whole = sum(line["depth"] is None for line in ran)
    parts = [
        _INTRODUCTION.format(
            timm=timm.__version__,
            torch=torch.__version__.partition("+")[0],
            target=TARGET_PEAK,
            parameters=MILLIONS_WHOLE,
            tokens=TOKENS_WHOLE,
            bound=_number(TOLERANCE),
            own=_number(OWN_TOLERANCE),
        ),
        f"- seen: **{len(seen)} of {wanted}**\n- within the bounds: **{len(passed)} of {len(ran)}** that ran "
        f"({whole} with all of their blocks, {len(ran) - whole} with fewer)",
    ]
    if ran:
        worst = max(ran, key=lambda line: line["error"] / line["bound"])
        own = max(ran, key=lambda line: line["own_error"] / line["own_bound"])
        flat = [line["model"] for line in ran if line["peak"] < _PEAKED]
        parts.append(
            f"- worst error of a statistic, as a share of its bound: {worst['error'] / worst['bound']:.1%} "
            f"(`{worst['statistic']}` of {worst['model']})\n"
            f"- worst difference from a model's own weights, likewise: {own['own_error'] / own['own_bound']:.1%} "
            f"({own['model']})\n"
            f"- attention less peaked than {_PEAKED}: {', '.join(flat) or 'none'}"
        )
        parts.append("\n".join(["", _row(_HEADER), _row(["---"] * len(_HEADER)), *map(_of_model, ran)]))
    parts += [f"- not seen or failed: {line['model']}, {line['failure']}" for line in lines if "failure" in line]
    return "\n".join(parts) + "\n"


def _of_model(line: Line) -> str:
    blocks = "all" if line["depth"] is None else f"{line['ran']} blocks"
    grid = f"{line['grid'][0]}×{line['grid'][1]}"
    layout = TokenLayout(
        (line["grid"][0], line["grid"][1]),
        line["cls"],
        line["prefix"] - line["cls"] - line["registers"],
        line["registers"],
    )
    prefix = [
        *(["[cls]"] if layout.has_cls else []),
        *(["distillation"] if layout.num_distillation else []),
        *([f"{layout.num_registers} registers"] if layout.num_registers else []),
    ]
    return _row(
        [
            line["model"],
            line["blocks"],
            blocks,
            line["heads"],
            line["tokens"],
            " + ".join([*prefix, grid]),
            f"{line['defined']} of {len(STATISTICS)}",
            f"{line['max_logit']:.0f}",
            f"{line['peak']:.2f}",
            _number(line["error"]),
            _number(line["bound"]),
            f"`{line['statistic']}`",
            f"{_number(line['own_error'])} ≤ {_number(line['own_bound'])}",
            line["seconds"],
        ]
    )


def _row(cells: list[Any]) -> str:
    return f"| {' | '.join(str(cell).strip() for cell in cells)} |"


def _number(value: float) -> str:
    return f"{value:.1e}".replace("e-0", "e-")


_INTRODUCTION = """\
# Coverage: every isotropic model of timm

Made by `python -m benchmarks.coverage --write` from what `python -m benchmarks.coverage` measured: timm {timm}, torch
{torch}, float32 on the CPU, one thread. Every number on this page is of these two commands.

All models of timm whose blocks attend from all tokens to all tokens, each at its own input size. On the meta device
each model is captured whole: *blocks*, *heads*, *tokens*, *layout* and *statistics* (how many of the table are
defined) are of the full model. Then it runs on one random image with random weights: whole (column *run*: all), or
with fewer blocks, which are alike, where it has over {parameters} M parameters or {tokens} tokens and memory
(8 GB) or time forbade more.

- **Peaked attention.** Block by block, queries and keys are multiplied by one number such that the largest weight of a
  row is {target} on average (*mean peak*; by their norms' gains where a model normalises them). Uniform attention
  would hide most mistakes.
- **Are the queries and keys the model's own?** What entered each block of the captured run goes through that block
  alone, fused kernels off, and its weights are read where they enter the dropout. *Own attention* is the largest
  difference from the softmax, in float64, of the captured queries, keys, scale and bias; the bound is
  {own}·max(1, largest logit / 10), float32's rounding of the logits.
- **Are the statistics right?** Every statistic of every block and head against the float64 reference of the tests
  (`tests/reference.py`: whole attention matrices, sums, nothing shared with the package). *Worst error* is
  |a − b| / max(1e-2, |b|), the *bound* {bound}·max(1, largest logit / 100), *of* the statistic. Statistics of the
  residual stream are against the tokens of the unfused run. Models with differential attention, A1 − λ·A2, have those
  statistics that are linear in the weights, against the difference of the two matrices.
"""
