"""Every isotropic model of timm: seen, its queries and keys its own, its statistics those of float64.

`python -m benchmarks.coverage` runs what is not in its results yet (a line a model in `runs/coverage/results.jsonl`;
the same command goes on after a stop) and `--write` makes `docs/coverage.md` of them. Exit status 1 where a model was
not seen or is out of bound.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import sys
import traceback
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import timm
import torch

from benchmarks.checking import MILLIONS_WHOLE, TOKENS_WHOLE, check, survey
from benchmarks.coverage_page import coverage_page
from vitprobe.models.anatomy.unsupported import ISOTROPIC

MEMORY_BYTES = 8 * 2**30
PAGE = Path("docs/coverage.md")
MODELS_A_WORKER = 12  # a worker that ends gives its memory back


def isotropic_models() -> list[str]:
    """The models of class (a), by name."""
    return sorted(name for family in ISOTROPIC for name in timm.list_models(module=family))


def cover(name: str, depth: int, max_parameters: float, max_tokens: int) -> dict[str, Any]:
    """The line of one model: all of its blocks where it is small enough, else `depth` of them."""
    try:
        known = survey(name)
    except Exception as error:
        return {"model": name, "seen": False, "failure": _short(error)}
    whole = is_small(known, max_parameters, max_tokens)
    result = known | {"seen": True, "depth": None if whole else min(depth, known["blocks"])}
    try:
        return result | check(known, result["depth"])
    except Exception as error:
        return result | {"passed": False, "failure": _short(error)}


def is_small(known: dict[str, Any], max_parameters: float, max_tokens: int) -> bool:
    """Whether a model is run whole."""
    return known["parameters"] <= max_parameters and known["tokens"] <= max_tokens


def _short(error: Exception) -> str:
    traceback.print_exception(error)
    return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"


def _start_worker() -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    torch.set_num_threads(1)  # matrices this small are slower on two cores that others use as well


def _pool() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(
        1, multiprocessing.get_context("spawn"), _start_worker, max_tasks_per_child=MODELS_A_WORKER
    )


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """The last line of each model."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {line["model"]: line for line in map(json.loads, lines)}


_WRITTEN_BY_HAND = "\n## Wrappers, orders of tokens"


def _kept(page: Path) -> str:
    """The last section of the page as it is, which no run makes: its rows name the tests that hold them."""
    text = page.read_text() if page.exists() else ""
    return text[text.index(_WRITTEN_BY_HAND) :] if _WRITTEN_BY_HAND in text else ""


def main() -> int:
    """Run, write, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="of timm; by default all isotropic ones")
    parser.add_argument("--out", type=Path, default=Path("runs/coverage"), help="folder of the results")
    parser.add_argument("--depth", type=int, default=3, help="blocks of all other models")
    parser.add_argument("--max-params", type=float, default=MILLIONS_WHOLE, help="run whole up to so many millions")
    parser.add_argument("--max-tokens", type=int, default=TOKENS_WHOLE, help="and up to so many tokens")
    parser.add_argument("--again", action="store_true", help="also run what is in the results already")
    parser.add_argument(
        "--write", type=Path, nargs="?", const=Path("docs/coverage.md"), help="write the page, run nothing"
    )
    arguments = parser.parse_args()

    wanted = arguments.models or isotropic_models()
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "results.jsonl"
    if arguments.write is None:
        limits = (arguments.max_params * 1e6, arguments.max_tokens)
        done = {} if arguments.again else read_results(path)
        run([name for name in wanted if not _is_done(done.get(name, {}), limits)], path, arguments.depth, limits)
    results = read_results(path)
    if arguments.write is not None:
        page = coverage_page([results[name] for name in wanted if name in results], len(wanted))
        arguments.write.write_text(page + _kept(arguments.write))
    failed = [name for name in wanted if not results.get(name, {}).get("passed")]
    for name in failed:
        print(f"{name}: {results.get(name, {}).get('failure', 'not run, or out of bound')}")
    print(f"{len(wanted) - len(failed)} of {len(wanted)} seen and within the bound")
    return int(bool(failed))


def _is_done(line: dict[str, Any], limits: tuple[float, int]) -> bool:
    """Whether a model has passed with as many blocks as it is to be run with."""
    return bool(line.get("passed")) and (line["depth"] is None or not is_small(line, *limits))


def run(names: list[str], path: Path, depth: int, limits: tuple[float, int]) -> None:
    """Append a line for each model; a worker that dies (out of memory) costs its model, not the run."""
    pool = _pool()
    for count, name in enumerate(names, 1):
        try:
            line = pool.submit(cover, name, depth, *limits).result()
        except BrokenProcessPool:
            line = {"model": name, "seen": False, "passed": False, "failure": "its process died"}
            pool = _pool()
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        state = "ok" if line.get("passed") else f"FAILED {line.get('failure', '')}"
        print(f"{count}/{len(names)} {name} {line.get('seconds')} s {state}", flush=True)
    pool.shutdown()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
