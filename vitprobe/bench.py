"""`benchmark`: what a capture costs, against the model's own forward pass and the usual way, in one run.

Times are paired: each round runs the plain forward pass and one way after the other, in turning order, and the figure
is the median of the ratios. Peak memory is read in a process of its own for each way.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import statistics as numbers
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vitprobe.errors import UserError
from vitprobe.files import write_atomically
from vitprobe.hooks.capture import capture
from vitprobe.models.loaded import LoadedModel
from vitprobe.models.loading import load_model
from vitprobe.statistics import of_the_paper

PASSES = {"cuda": 10}  # forward passes that are timed together, where one alone is over in milliseconds
_GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**16), "MKL_DISABLE_FAST_MM": "1"}  # of glibc and of Intel's library
PAPERS = tuple(statistic.name for statistic in of_the_paper())


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


def _plain(module: nn.Module, images: Tensor) -> None:
    module(images)


def _papers(module: nn.Module, images: Tensor) -> None:
    with capture(module, keep="statistics", statistics=PAPERS) as attention:
        module(images)
    attention.statistics()


def _every(module: nn.Module, images: Tensor) -> None:
    with capture(module, keep="statistics") as attention:
        module(images)
    attention.statistics()


def _eager_hooks(module: nn.Module, images: Tensor) -> None:
    """As is usual with timm: fused attention off, whole matrices read where they enter their dropout, of all blocks.

    The paper's three statistics are computed of these.
    """
    matrices: list[Tensor] = []
    with ExitStack() as stack:
        for name, part in module.named_modules():
            if hasattr(part, "fused_attn"):
                stack.callback(setattr, part, "fused_attn", part.fused_attn)
                part.fused_attn = False  # type: ignore[assignment]
            if name.endswith("attn_drop"):
                hook = part.register_forward_pre_hook(lambda _, args: matrices.append(args[0]))
                stack.callback(hook.remove)
        module(images)
    for matrix in matrices:
        of_cls, patches = matrix[:, :, 0], matrix[:, :, 1:, 1:]
        shares = of_cls[..., 1:] / of_cls[..., 1:].sum(-1, keepdim=True)
        _ = of_cls[..., 0], torch.special.entr(shares).sum(-1)
        _ = (patches.diagonal(dim1=-2, dim2=-1) / patches.sum(-1)).mean(-1)


def _output_attentions(module: nn.Module, images: Tensor) -> None:
    """As is usual with transformers: its eager attention, which returns the matrices of all blocks."""
    model: Any = module
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        model(images, output_attentions=True)
    finally:
        model.set_attn_implementation(implementation)


WAYS: dict[str, Callable[[nn.Module, Tensor], None]] = {
    "plain": _plain,
    "papers": _papers,
    "every": _every,
    "eager hooks": _eager_hooks,
    "output_attentions": _output_attentions,
}
WORDS = {
    "plain": "the model's own forward pass",
    "papers": "the paper's three statistics",
    "every": "every statistic",
    "eager hooks": "whole matrices from hooks, fused attention off (usual with timm)",
    "output_attentions": "output_attentions of the same ViT in transformers",
}


def benchmark(
    model: str,
    *,
    img_size: int | tuple[int, int] | None = None,
    batch_size: int = 8,
    rounds: int = 7,
    device: str = "cpu",
    autocast: str | None = None,
    ways: Sequence[str] | None = None,
    memory: bool = True,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Cost]:
    """What each way to see attention costs for a model with random weights, on this machine.

    Args:
        model: a name that `load_model` takes.
        img_size: a side in pixels or (height, width); the model's own by default.
        batch_size: images in the batch.
        rounds: pairs of timings, after one that warms up.
        device: "cpu" or "cuda".
        autocast: "bfloat16" or "float16"; the weights' own precision without.
        ways: keys of `WAYS`; all that suit the model without: "eager hooks" is for timm's models, "output_attentions"
            for plain Vision Transformers where transformers is installed.
        memory: measure peak memory too.
        progress: gets a line when a way is done.

    Raises:
        UserError: for an unknown way or model, or numbers below one.
    """
    for way in ways or ():
        if way not in WAYS or way == "plain":
            raise UserError(f"there is no way {way!r} to measure; choose from {', '.join(list(WAYS)[1:])}")
    for name, number in (("batch_size", batch_size), ("rounds", rounds)):
        if number < 1:
            raise UserError(f"{name} is {number}; it must be at least 1")
    if autocast not in (None, "bfloat16", "float16"):
        raise UserError(f"autocast is {autocast!r}; it must be 'bfloat16' or 'float16', or left out")
    loaded = load_model(model, img_size=img_size, pretrained=False)
    setting = (model, img_size, batch_size, device, autocast)
    costs = []
    for way in ways or _suitable(loaded):
        module, images = _set_up(*setting[:4], way)
        plain, this = pairs(module, images, way, rounds, autocast)
        del module, images
        ratios = [seconds / base for seconds, base in zip(this, plain, strict=True)]
        peak = _peak_memory(*setting, way, way) if memory else None
        resting = _peak_memory(*setting, way, "plain") if memory else None
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


def _suitable(loaded: LoadedModel) -> list[str]:
    """Ways that can be measured for a model."""
    ways = ["papers", "every"]
    if any(hasattr(part, "fused_attn") for part in loaded.module.modules()):
        ways.append("eager hooks")
    plain = type(loaded.module) is VisionTransformer and loaded.layout.has_cls and loaded.layout.num_prefix_tokens == 1
    if plain and find_spec("transformers") is not None:
        ways.append("output_attentions")
    return ways


def _set_up(
    model: str, img_size: int | tuple[int, int] | None, batch_size: int, device: str, way: str
) -> tuple[nn.Module, Tensor]:
    """The model and the images; in the way of transformers its own ViT of the same sizes."""
    torch.manual_seed(0)
    loaded = load_model(model, img_size=img_size, pretrained=False)
    module = _of_transformers(loaded) if way == "output_attentions" else loaded.module
    images = torch.randn(batch_size, loaded.anatomy.channels, *loaded.transform.size, device=device)
    return module.to(device).eval(), images


def _of_transformers(loaded: LoadedModel) -> nn.Module:
    from transformers import ViTConfig, ViTModel

    width, block = loaded.anatomy.width or 768, loaded.anatomy.blocks[0]
    config = ViTConfig(
        hidden_size=width,
        num_hidden_layers=len(loaded.anatomy.blocks),
        num_attention_heads=loaded.anatomy.num_heads or 12,
        intermediate_size=block.mlp.fc1.out_features,  # type: ignore[union-attr]
        image_size=loaded.transform.size,
        patch_size=loaded.layout.patch_size[0],
    )
    return ViTModel(config, add_pooling_layer=False)


def pairs(
    module: nn.Module, images: Tensor, way: str, rounds: int, autocast: str | None
) -> tuple[list[float], list[float]]:
    """Seconds of the plain forward pass and of this way, round by round."""
    seconds: dict[str, list[float]] = {"plain": [], "this": []}
    runs = {"plain": _plain, "this": WAYS[way]}
    for turn in range(rounds + 1):
        for name in ("plain", "this") if turn % 2 else ("this", "plain"):
            elapsed = _time(runs[name], module, images, autocast)
            if turn:  # the first warms up
                seconds[name].append(elapsed)
    return seconds["plain"], seconds["this"]


def _time(run: Callable[[nn.Module, Tensor], None], module: nn.Module, images: Tensor, autocast: str | None) -> float:
    passes = PASSES.get(images.device.type, 1)
    _synchronize(images)
    began = time.perf_counter()
    with torch.inference_mode(), _autocast(images, autocast):
        for _ in range(passes):
            run(module, images)
    _synchronize(images)
    return (time.perf_counter() - began) / passes


def _synchronize(images: Tensor) -> None:
    if images.device.type == "cuda":
        torch.cuda.synchronize()


def _autocast(images: Tensor, autocast: str | None) -> Any:
    dtype = None if autocast is None else getattr(torch, autocast)
    return torch.autocast(images.device.type, dtype=dtype, enabled=dtype is not None)


def _peak_memory(*setting: Any) -> float | None:
    """Bytes that one pass takes at its peak above the model at rest, from a fresh process; None where unreadable."""
    return in_a_fresh_process(_peak_in_this_process, *setting)


def in_a_fresh_process(function: Callable[..., float | None], *arguments: Any) -> float | None:
    """What a function gives in a process of its own, whose memory goes back to the system as soon as it is freed.

    Otherwise what an allocator keeps for later would count, and differ from run to run by more than what is measured.
    """
    with patch.dict(os.environ, _GIVE_BACK), multiprocessing.get_context("spawn").Pool(1) as pool:  # read at its start
        return pool.apply(function, arguments)


def _peak_in_this_process(
    model: str,
    img_size: int | tuple[int, int] | None,
    batch_size: int,
    device: str,
    autocast: str | None,
    of: str,
    way: str,
) -> float | None:
    """The peak of `way`, with the model that the way `of` is measured with."""
    return peak_of(*_set_up(model, img_size, batch_size, device, of), way, autocast)


def peak_of(module: nn.Module, images: Tensor, way: str, autocast: str | None = None) -> float | None:
    """Bytes that one pass takes at its peak above the model at rest, in this process; None where unreadable."""
    _time(WAYS[way], module, images[:1], autocast)  # libraries that load on first use
    if images.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        resting = torch.cuda.memory_allocated()
        _time(WAYS[way], module, images, autocast)
        return float(torch.cuda.max_memory_allocated() - resting)
    resting = _status("VmRSS")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    except OSError:
        return None
    _time(WAYS[way], module, images, autocast)
    peak = _status("VmHWM")
    return None if resting is None or peak is None else float(peak - resting)


def _status(field: str) -> int | None:
    """Bytes of a field of this process's status; None where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), None)
