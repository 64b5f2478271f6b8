"""What a capture costs, against the model's own forward pass and the usual ways, in one run."""

from __future__ import annotations

import json
import platform
import statistics as numbers
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch

from vitprobe.bench.memory import peak_memory
from vitprobe.bench.timing import pairs
from vitprobe.bench.ways import WAYS, WORDS, set_up, suitable
from vitprobe.errors import UserError
from vitprobe.files import write_atomically
from vitprobe.models.loading import load_model

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Cost:
    """What one way to see attention costs.

    Attributes:
        way: its name, a key of `WAYS`.
        ratio: median over rounds of its time / the plain forward pass's.
        lowest: the smallest of these ratios.
        highest: the largest.
        seconds: median seconds of a forward pass this way.
        plain_seconds: of the plain one.
        memory_ratio: peak memory above the model at rest / the plain forward pass's; None where that cannot be read.
    """

    way: str
    ratio: float
    lowest: float
    highest: float
    seconds: float
    plain_seconds: float
    memory_ratio: float | None


def benchmark(
    model: str,
    *,
    img_size: int | tuple[int, int] | None = None,
    batch_size: int = 8,
    rounds: int = 7,
    device: str = "cpu",
    dtype: str | None = None,
    ways: Sequence[str] | None = None,
    memory: bool = True,
    progress: Callable[[str], None] = lambda line: None,
    autocast: str | None = None,
) -> list[Cost]:
    """What each way to see attention costs for a model with random weights, on this machine.

    Args:
        model: a name that `load_model` takes.
        img_size: a side in pixels or (height, width); the model's own by default.
        batch_size: images in the batch.
        rounds: pairs of timings, after one that warms up.
        device: "cpu" or "cuda".
        dtype: "bfloat16" or "float16" (autocast), or "float32"; default: the precision of the weights.
        ways: keys of `WAYS`; all that suit the model without: "eager hooks" is for timm's models, "output_attentions"
            for plain Vision Transformers where transformers is installed.
        memory: measure peak memory too.
        progress: gets a line when a way is done.
        autocast: the old name of `dtype`.

    Raises:
        UserError: for an unknown way or model, or numbers below one.
    """
    for way in ways or ():
        if way not in WAYS or way == "plain":
            raise UserError(f"there is no way {way!r} to measure; choose from {', '.join(list(WAYS)[1:])}")
    for name, number in (("batch_size", batch_size), ("rounds", rounds)):
        if number < 1:
            raise UserError(f"{name} is {number}; it must be at least 1")
    if autocast is not None:
        warnings.warn("benchmark(autocast=…) is benchmark(dtype=…) now", DeprecationWarning, stacklevel=2)
        dtype = autocast
    if dtype not in (None, *DTYPES):
        raise UserError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}, or left out")
    dtype = None if dtype == "float32" else dtype
    loaded = load_model(model, img_size=img_size, pretrained=False)
    setting = (model, img_size, batch_size, device, dtype)
    costs = []
    for way in ways or suitable(loaded):
        module, images = set_up(*setting[:4], way)
        plain, this = pairs(module, images, way, rounds, dtype)
        del module, images
        ratios = [seconds / base for seconds, base in zip(this, plain, strict=True)]
        peak = peak_memory(*setting, way, way) if memory else None
        resting = peak_memory(*setting, way, "plain") if memory else None
        cost = Cost(
            way=way,
            ratio=numbers.median(ratios),
            lowest=min(ratios),
            highest=max(ratios),
            seconds=numbers.median(this),
            plain_seconds=numbers.median(plain),
            memory_ratio=peak / resting if peak and resting else None,
        )
        costs.append(cost)
        progress(line_of(cost))
    return costs


def line_of(cost: Cost) -> str:
    """A cost in one line."""
    memory = "" if cost.memory_ratio is None else f", peak memory {cost.memory_ratio:.2f}×"
    return (
        f"{WORDS[cost.way]}: {cost.ratio:.2f}× the plain forward pass ({cost.lowest:.2f} to {cost.highest:.2f}){memory}"
    )


def report(path: Path, costs: Sequence[Cost], setting: dict[str, Any]) -> None:
    """Writes costs to a JSON file, with what they were measured with and on.

    Raises:
        UserError: where the file cannot be written.
    """
    machine = {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    content = {"setting": setting, "machine": machine, "costs": [asdict(cost) for cost in costs]}
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
