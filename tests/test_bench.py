"""What a capture costs: the ways measured do what they say, and numbers come out, whatever these are."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from helpers import images, message, tiny_vit
from vitprobe.bench import WAYS, WORDS, Cost, benchmark, in_a_fresh_process, line_of, memory
from vitprobe.cli import main
from vitprobe.errors import UserError
from vitprobe.hooks.capture import capture

NANO: dict[str, Any] = {"model": "mae_vit_nano", "batch_size": 2, "rounds": 2}


def test_each_way_gives_a_cost() -> None:
    lines: list[str] = []
    costs = benchmark(**NANO, memory=False, progress=lines.append)
    ways = [cost.way for cost in costs]
    assert ways[:3] == ["papers", "every", "eager hooks"] and set(ways[3:]) <= {"output_attentions"}
    for cost, line in zip(costs, lines, strict=True):
        assert 0 < cost.lowest <= cost.ratio <= cost.highest
        assert cost.seconds > 0 and cost.plain_seconds > 0 and cost.memory_ratio is None
        assert line == line_of(cost) and WORDS[cost.way] in line


@pytest.mark.slow
def test_peak_memory_is_read() -> None:
    (whole,) = benchmark(**(NANO | {"batch_size": 256}), ways=["eager hooks"])
    (papers,) = benchmark(**(NANO | {"batch_size": 256}), ways=["papers"])
    if whole.memory_ratio is None or papers.memory_ratio is None:
        pytest.skip("this system does not tell a process's peak memory")
    assert whole.memory_ratio > 1.5 > papers.memory_ratio > 0.5


def test_the_usual_way_computes_the_papers_statistics_from_all_blocks() -> None:
    """A peer that did less than it must would be too cheap."""
    model, seen = tiny_vit(), []
    original = torch.special.entr

    def noting(shares: torch.Tensor) -> torch.Tensor:
        seen.append(original(shares).sum(-1))
        return original(shares)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch.special, "entr", noting)
        WAYS["eager hooks"](model, images())
    with torch.no_grad(), capture(model) as attention:
        model(images())
    torch.testing.assert_close(torch.stack(seen, dim=1), attention.statistics()["cls_entropy"], atol=1e-4, rtol=1e-4)
    assert all(part.fused_attn for part in model.modules() if hasattr(part, "fused_attn"))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"ways": ["plain"]}, "there is no way 'plain' to measure; choose from papers, every, eager hooks, output_att"),
        ({"rounds": 0}, "rounds is 0; it must be at least 1"),
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"dtype": "int8"}, "dtype is 'int8'; it must be one of float32, bfloat16, float16, or left out"),
        ({"model": "mae_vit_bb"}, "unknown model 'mae_vit_bb'"),
    ],
)
def test_bad_input(options: dict, text: str) -> None:
    with pytest.raises(UserError) as error:
        benchmark(**(NANO | options))
    assert message(error).startswith(text)


def test_a_line() -> None:
    cost = Cost("papers", 1.0199, 1.0, 1.05, 1.0, 0.98, 1.004)
    assert line_of(cost) == (
        "the paper's three statistics: 1.02× the plain forward pass (1.00 to 1.05), peak memory 1.00×"
    )


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitprobe.bench.costs.peak_memory", lambda *setting: 100.0)
    out = tmp_path / "new" / "bench.json"
    arguments = ["bench", "--model", "mae_vit_nano", "--batch-size", "2", "--rounds", "1", "--device", "cpu"]
    result = CliRunner().invoke(main, [*arguments, "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "the paper's three statistics: " in result.output and "peak memory 1.00×" in result.output
    content = json.loads(out.read_text())
    assert content["setting"]["model"] == "mae_vit_nano" and content["machine"]["torch"] == torch.__version__
    assert [cost["way"] for cost in content["costs"]][:2] == ["papers", "every"]


@pytest.mark.parametrize(
    ("options", "device", "dtype"),
    [
        ([], "cuda", "bfloat16"),
        (["--dtype", "float16"], "cuda", "float16"),
        (["--dtype", "float32"], "cuda", "float32"),
        (["--device", "cpu"], "cpu", "float32"),
        (["--device", "cpu", "--dtype", "bfloat16"], "cpu", "bfloat16"),
    ],
)
def test_a_gpu_is_measured_in_bfloat16(
    options: list[str], device: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("vitprobe.bench.benchmark", lambda model, **options: given.update(options) or [])
    result = CliRunner().invoke(main, ["bench", *options])
    assert result.exit_code == 0, result.output
    assert (given["device"], given["dtype"]) == (device, dtype)


def test_the_old_name_of_dtype_is_taken_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict = {}
    monkeypatch.setattr("vitprobe.bench.benchmark", lambda model, **options: given.update(options) or [])
    result = CliRunner().invoke(main, ["bench", "--device", "cpu", "--autocast", "bfloat16"])
    assert (result.exit_code, given["dtype"]) == (0, "bfloat16")
    assert result.stderr == "Note: --autocast is --dtype now; the next release takes --dtype alone\n"
    assert "--autocast" not in CliRunner().invoke(main, ["bench", "--help"]).output
    monkeypatch.undo()
    with pytest.warns(DeprecationWarning, match=r"^benchmark\(autocast=…\) is benchmark\(dtype=…\) now$"):
        (cost,) = benchmark(**NANO, autocast="float32", ways=["papers"], memory=False)
    assert cost.ratio > 0


def test_a_fresh_process_gives_memory_back_and_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MKL_DISABLE_FAST_MM", "0")
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    before = dict(os.environ)
    assert in_a_fresh_process(of_the_environment, "MKL_DISABLE_FAST_MM") == 1
    assert in_a_fresh_process(of_the_environment, "MALLOC_MMAP_THRESHOLD_") == 2**16
    assert dict(os.environ) == before


def of_the_environment(name: str) -> float:
    return float(os.environ[name])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_gpu() -> None:
    result = CliRunner().invoke(main, ["bench", "--device", "cuda"])
    assert result.exit_code == 2
    assert result.output == "Error: there is no CUDA GPU here: leave --device out, or choose cpu\n"


def test_a_system_that_tells_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nowhere:
        def __init__(self, *parts: str) -> None: ...

        def read_text(self) -> str:
            raise FileNotFoundError

        def write_text(self, text: str) -> int:
            raise PermissionError

    setting = ("mae_vit_nano", None, 1, "cpu", None, "papers", "papers")
    assert (memory._peak_in_this_process(*setting) or 1) > 0
    monkeypatch.setattr(memory, "Path", Nowhere)
    assert memory._peak_in_this_process(*setting) is None
    assert memory._status("VmRSS") is None
