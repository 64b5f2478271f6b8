"""Which checkpoint files `torch.load(weights_only=True, mmap=True)` refuses; the table in docs/architecture.md.

    python -m benchmarks.torch_load        # 10 seconds

Each file is made as the training code named beside it saves one: the same containers and classes around a small state
dict. Classes of packages that are not installed are stood in for by classes of the same name. Three ways are tried:
torch's defaults; `safe_globals` with the real classes of Python and numpy; and `safe_globals` with an inert class under
each name that the file asks for.
"""

from __future__ import annotations

import argparse
import pathlib
import posixpath
import sys
import types
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from enum import Enum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import nn

from vitprobe.errors import UserError
from vitprobe.models.checkpoints import read_checkpoint

WEIGHTS = {"pos_embed": torch.randn(1, 5, 8), "blocks.0.attn.qkv.weight": torch.randn(24, 8)}
OPTIMIZER = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}


class Inert:
    """Takes everything and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        """Another one."""
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def foreign(path: str, base: type = object) -> Any:
    """A class that pickles as `path`, of a package that need not be installed."""
    module, _, name = path.rpartition(".")
    made = type(name, (base,), {"__module__": module})
    parts = module.split(".")
    for count in range(1, len(parts) + 1):
        sys.modules.setdefault(".".join(parts[:count]), types.ModuleType(".".join(parts[:count])))
    setattr(sys.modules[module], name, made)
    return made


CfgNode = foreign("yacs.config.CfgNode", dict)
HistoryBuffer = foreign("mmengine.logging.history_buffer.HistoryBuffer")
Stage = Enum("Stage", {"FIT": 1}, module="trainer.stages")
foreign("trainer.stages.Unused")
sys.modules["trainer.stages"].Stage = Stage  # type: ignore[attr-defined]


def mmengine_buffer() -> Any:
    """What MMEngine's message hub logs."""
    buffer = HistoryBuffer()
    buffer.__dict__ = {"_log_history": np.array([0.5]), "_statistics_methods": {}}
    return buffer


def omegaconf() -> Any:
    """A config of OmegaConf, of a plain dict where that is not installed."""
    try:
        from omegaconf import OmegaConf
    except ImportError:
        return foreign("omegaconf.dictconfig.DictConfig")()
    return OmegaConf.create({"model": {"depth": 12}, "blocks": [1, 2]})


def args() -> argparse.Namespace:
    """The arguments of a training script."""
    return argparse.Namespace(lr=1e-3, output_dir="out", data=pathlib.PurePosixPath("/data"))


# name → what is saved, and how. "released" files are those that the registry's aliases download.
RELEASED: dict[str, Any] = {
    "MAE, MAE fine-tuned, BEiT, BEiT v2": {"model": WEIGHTS},
    "iBOT (teacher), CAPI, MaskFeat": {"model_state": WEIGHTS, "epoch": 1600, "cfg": "MODEL: ViT"},
    "MoCo v3": {"epoch": 300, "arch": "vit_small", "state_dict": WEIGHTS, "optimizer": OPTIMIZER, "scaler": {}},
    "I-JEPA": {"target_encoder": WEIGHTS, "encoder": WEIGHTS, "opt": OPTIMIZER, "epoch": 300, "loss": 0.1},
    "data2vec": {"model": WEIGHTS, "optimizer": OPTIMIZER, "scaler": {}, "args": args()},
    "data2vec 2.0 (fairseq)": {"args": None, "cfg": {"model": {"depth": 12}}, "model": WEIGHTS},
    "SimMIM": {"model": WEIGHTS, "config": CfgNode(depth=12), "max_accuracy": 0.0},
    "Franca": {"teacher": WEIGHTS},
}
TRAINED: dict[str, Any] = {
    "MAE, DINO, iBOT, DeiT training (argparse.Namespace)": {"model": WEIGHTS, "args": args()},
    "timm training (Namespace, metric)": {"state_dict": WEIGHTS, "args": args(), "metric": np.float64(71.5)},
    "accuracy as a numpy scalar": {"model": WEIGHTS, "best": np.float64(0.7)},
    "statistics as a numpy array": {"model": WEIGHTS, "mean": np.zeros(3)},
    "a path (pathlib.PosixPath)": {"model": WEIGHTS, "folder": pathlib.Path("out")},
    "a config (OmegaConf)": {"model": WEIGHTS, "cfg": omegaconf()},
    "a config (yacs)": {"model": WEIGHTS, "config": CfgNode(depth=12)},
    "an enum of a trainer": {"state_dict": WEIGHTS, "stage": Stage["FIT"]},
    "MMEngine (HistoryBuffer)": {"state_dict": WEIGHTS, "message_hub": {"log": mmengine_buffer()}},
    "Lightning (hyper_parameters, plain)": {"state_dict": WEIGHTS, "hyper_parameters": {"lr": 0.1}, "loops": {}},
    "Lightning (a loss module among them)": {"state_dict": WEIGHTS, "hyper_parameters": {"loss": nn.MSELoss()}},
    "a function by its name": {"model": WEIGHTS, "hyper_parameters": {"join": posixpath.join}},
    "a defaultdict(list)": {"model": WEIGHTS, "log": defaultdict(list, a=[1])},
    "a set": {"model": WEIGHTS, "seen": {1, 2}},
    "a frozenset": {"model": WEIGHTS, "seen": frozenset({1})},
    "a complex number": {"model": WEIGHTS, "value": 1j},
    "a state_dict with _metadata": {"model": nn.Linear(2, 2).state_dict()},
}


def files(folder: Path) -> dict[str, Path]:
    """Each file, by what it is."""
    made = {}

    def put(name: str, content: Any, **how: Any) -> None:
        made[name] = folder / f"{len(made)}.pth"
        torch.save(content, made[name], **how)

    for name, content in (RELEASED | TRAINED).items():
        put(name, content)
    put("pickle protocol 4", {"model": WEIGHTS}, pickle_protocol=4)
    put("pickle protocol 5 with a Namespace", {"model": WEIGHTS, "args": args()}, pickle_protocol=5)
    put("before torch 1.6 (no zip)", {"model": WEIGHTS}, _use_new_zipfile_serialization=False)
    put("before torch 1.6, with a Namespace", {"model": WEIGHTS, "args": args()}, _use_new_zipfile_serialization=False)
    put("a whole pickled module", nn.Sequential(nn.Linear(2, 2)))
    made["TorchScript (OpenAI's CLIP)"] = folder / "script.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), str(made["TorchScript (OpenAI's CLIP)"]))
    return made


def real_classes() -> list[Any]:
    """What a careful caller would call safe, of Python and numpy."""
    scalar, array = (value.__reduce__()[0] for value in (np.float64(1), np.zeros(1)))
    safe: list[Any] = [argparse.Namespace, scalar, array, np.dtype, np.ndarray, OrderedDict]
    safe += [type(np.dtype(kind)) for kind in ("f8", "f4", "i8")]
    return [*safe, defaultdict, list, pathlib.PosixPath, pathlib.PurePosixPath, set, frozenset, complex]


def asked_for(path: Path) -> list[str]:
    """Names in a file that torch does not allow by itself."""
    from torch.serialization import get_unsafe_globals_in_checkpoint

    try:
        return get_unsafe_globals_in_checkpoint(path)
    except Exception:  # it reads zip archives of a protocol that it knows
        return []


def attempt(path: Path, safe: Callable[[], list[Any]] | None, mmap: bool) -> str:
    """`yes`, or why not."""
    try:
        allowed = torch.serialization.safe_globals(safe()) if safe else nullcontext()
        with warnings.catch_warnings(), allowed:
            warnings.simplefilter("ignore")
            torch.load(path, weights_only=True, mmap=mmap, map_location="cpu")
    except Exception as error:
        return f"no: {' '.join(str(error).split())}"
    return "yes"


def ours(path: Path) -> str:
    """Whether vitprobe reads it."""
    try:
        read_checkpoint(path)
    except UserError as error:
        return f"no: {str(error).removeprefix(str(path))}"
    return "yes"


def main() -> None:
    """Print the table, then each reason once."""
    reasons: dict[str, str] = {}
    counts: dict[str, int] = dict.fromkeys(
        ("defaults", "defaults, no mmap", "real classes", "inert classes", "vitprobe"), 0
    )
    with TemporaryDirectory() as temporary:
        made = files(Path(temporary))
        print("| file | " + " | ".join(counts) + " |\n|---|" + "---|" * len(counts))
        for name, path in made.items():
            inert = [(Inert, asked) for asked in asked_for(path)]
            found = {
                "defaults": attempt(path, None, True),
                "defaults, no mmap": attempt(path, None, False),
                "real classes": attempt(path, real_classes, True),
                "inert classes": attempt(path, lambda inert=inert: inert, True),
                "vitprobe": ours(path),
            }
            for way, answer in found.items():
                counts[way] += answer == "yes"
                if answer != "yes":
                    reasons[f"{name}, {way}"] = answer
            print(f"| {name} | " + " | ".join(answer.partition(":")[0] for answer in found.values()) + " |")
        print("| read, of " + str(len(made)) + " | " + " | ".join(map(str, counts.values())) + " |\n")
        for name, reason in reasons.items():
            print(f"{name}: {reason.rpartition('WeightsUnpickler error: ')[2].removeprefix('no: ')[:100]}")


if __name__ == "__main__":
    main()
