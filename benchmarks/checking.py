"""One model of timm: is it seen, are the queries and keys its own, are the statistics those of float64?"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import timm
import torch
from numpy import ndarray
from torch import Tensor, nn

from benchmarks.peaked import make_peaked
from comparing import reference_of
from helpers import TOLERANCE
from reference import BlockTrace, largest_logit, reference_attention, unfused, watch_tokens
from vitprobe.attention.view import AttentionView
from vitprobe.hooks.capture import Capture, capture
from vitprobe.statistics import STATISTICS

OWN_TOLERANCE = 1e-5  # of weights, float32 against float64 of the same queries and keys; grows with the logits
MILLIONS_WHOLE, TOKENS_WHOLE = 100, 1100  # a model of more parameters or tokens is run with fewer blocks
_CHUNK = 2**24  # attention weights in float64 at a time


def survey(name: str) -> dict[str, Any]:
    """Counts and shapes of a model at its full size, from a capture on the meta device."""
    with torch.device("meta"):
        model: Any = timm.create_model(name).eval()
    with torch.no_grad(), capture(model) as attention:
        model(torch.empty(1, *model.pretrained_cfg["input_size"], device="meta"))
    layout = attention.layout
    assert layout is not None
    for view in attention:
        assert view.shape[2] == layout.num_tokens == layout.num_prefix_tokens + layout.num_patches
    return {
        "model": name,
        "family": type(model).__module__.rpartition(".")[2],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "blocks": len(attention),
        "heads": attention[0].num_heads,
        "tokens": layout.num_tokens,
        "prefix": layout.num_prefix_tokens,
        "cls": layout.has_cls,
        "registers": layout.num_registers,
        "grid": list(layout.grid),
        "defined": len(STATISTICS) - len(attention.undefined),
        "signed": attention.signed,
        "input": list(model.pretrained_cfg["input_size"]),
    }


def check(known: dict[str, Any], depth: int | None) -> dict[str, Any]:
    """Run a surveyed model (of `depth` blocks, or all) on one random image and compare all of its blocks."""
    began = time.perf_counter()
    images = torch.randn(1, *known["input"], generator=torch.Generator().manual_seed(1))
    model = make_peaked(known["model"], images, depth)
    attention, inputs = _captured(model, images)
    values = attention.statistics()
    worst = Comparison()
    for view in attention:
        block = attention.anatomy.blocks[view.block]
        trace, own = _run_alone(block, *inputs[view.block])
        of_block = {name: value[:, view.block].double().numpy() for name, value in values.items()}
        worst.take(view, of_block, trace, own)
        inputs[view.block] = ((), {})
    return {
        "ran": len(attention),
        "max_logit": worst.max_logit,
        "peak": float(np.mean(worst.peaks)),
        "error": worst.error,
        "bound": worst.bound,
        "statistic": worst.statistic,
        "own_error": worst.own_error,
        "own_bound": worst.own_bound,
        "passed": bool(worst.error <= worst.bound and worst.own_error <= worst.own_bound),
        "seconds": round(time.perf_counter() - began, 1),
    }


Inputs = list[tuple[tuple[Any, ...], dict[str, Any]]]


def _captured(model: nn.Module, images: Tensor) -> tuple[Capture, Inputs]:
    """A captured forward pass, fused kernels on, and what entered each block in it."""
    inputs: Inputs = []
    with torch.no_grad(), capture(model) as attention:
        handles = [
            block.register_forward_pre_hook(lambda _, args, kwargs: inputs.append((args, kwargs)), with_kwargs=True)
            for block in attention.anatomy.blocks
        ]
        model(images)
        for handle in handles:
            handle.remove()
    return attention, inputs


def _run_alone(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[BlockTrace, Tensor]:
    """A block on the input that it had, softmax by hand: its tokens, and its weights as they enter the dropout."""
    trace, weights = BlockTrace(), []
    handles = watch_tokens(block, trace)
    for module in block.modules():
        drop = getattr(module, "attn_drop", None)
        if drop is not None:
            handles.append(drop.register_forward_pre_hook(lambda _, given: weights.append(given[0])))
    with torch.no_grad(), unfused(block):
        block(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return trace, torch.cat(weights, dim=1)


@dataclass
class Comparison:
    """The worst of all blocks, each error in proportion to its bound."""

    max_logit: float = 0.0
    error: float = 0.0
    bound: float = TOLERANCE
    statistic: str = ""
    own_error: float = 0.0
    own_bound: float = OWN_TOLERANCE

    def __post_init__(self) -> None:
        self.peaks: list[float] = []

    def take(self, view: AttentionView, values: dict[str, ndarray], trace: BlockTrace, own: Tensor) -> None:
        """Compare a block: its weights with the `own` ones of the model, its statistics with float64."""
        logit, own_error, peaks, expected = 0.0, 0.0, [], {}
        for heads in _chunks(view):
            A, logits = _reference(view, heads)
            logit = max(logit, logits)
            peaks.append(A[0].max(-1).mean())
            for attention, number in zip(A, range(len(A)), strict=True):  # of differential attention A1 and A2
                weights = own[:, number :: len(A)][:, heads].double().numpy()
                own_error = max(own_error, _largest(np.abs(weights - attention)))
            whole = A[0]
            if view.subtracted_weight is not None:
                whole = A[0] - float(view.subtracted_weight) * A[1]
            with np.errstate(all="ignore"):  # a difference has entropies that make no sense, and nobody asks for
                of_heads = reference_of(view, whole, trace.tokens)
            for name, value in of_heads.items():
                expected.setdefault(name, []).append(value)
        self.peaks.append(float(np.mean(peaks)))
        self.max_logit = max(self.max_logit, logit)
        self._own(own_error, OWN_TOLERANCE * max(1.0, logit / 10))
        for name, value in values.items():
            reference = np.concatenate(expected[name], axis=1) if STATISTICS[name].per_head else expected[name][0]
            self._statistic(name, _error(value, reference), TOLERANCE * max(1.0, logit / 100))

    def _own(self, error: float, bound: float) -> None:
        if error / bound > self.own_error / self.own_bound:
            self.own_error, self.own_bound = error, bound

    def _statistic(self, name: str, error: float, bound: float) -> None:
        if error / bound > self.error / self.bound:
            self.error, self.bound, self.statistic = error, bound, name


def _error(value: ndarray, reference: ndarray) -> float:
    """max |a − b| / max(1e-2, |b|); infinite counts as equal where float32 ends."""
    assert value.shape == reference.shape
    reference = np.where(np.abs(reference) > np.finfo(np.float32).max, np.inf, reference)
    with np.errstate(invalid="ignore"):
        error = np.where(value == reference, 0, np.abs(value - reference) / np.maximum(1e-2, np.abs(reference)))
    return _largest(error)


def _largest(errors: ndarray) -> float:
    """The largest error; infinite for NaN, which no comparison would notice."""
    return float(np.nan_to_num(errors, nan=np.inf).max())


def _chunks(view: AttentionView) -> Iterator[slice]:
    """Heads, so many at a time that their attention matrices fit in memory."""
    _, heads, tokens = view.shape
    step = max(1, _CHUNK // tokens**2)
    return (slice(first, first + step) for first in range(0, heads, step))


def _reference(view: AttentionView, heads: slice) -> tuple[list[ndarray], float]:
    """Attention of these heads in float64 from the captured queries and keys (A1 and A2 of a difference); max |s|."""
    matrices, largest = [], 0.0
    for part in (view, view.subtracted):
        if part is not None:
            assert part.query is not None and part.key is not None
            bias = part.bias
            if bias is not None and bias.ndim > 2 and bias.shape[-3] > 1:
                bias = bias[..., heads, :, :]
            factors = (part.query[:, heads], part.key[:, heads], part.scale, bias)
            matrices.append(reference_attention(*factors))
            largest = max(largest, largest_logit(*factors))
    return matrices, largest
