"""The forward pass in smaller precisions: captured right, chosen by measurement, said."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor, nn

from helpers import assert_all_close, assert_close, captured, images, message, tiny, tiny_vit
from reference import largest_logit, reference_attention, reference_statistics
from test_capture_by_hand import hand_made
from test_capture_libraries import Multihead
from vitprobe.cli import main
from vitprobe.errors import UserError
from vitprobe.frozen import dtype as dtype_module
from vitprobe.frozen.dtype import (
    ForwardDtype,
    check_dtype,
    choose_dtype,
    dtype_line,
    floor,
    relative_errors,
    weights_dtype,
)
from vitprobe.layout import TokenLayout
from vitprobe.profile.analysis import analyze
from vitprobe.profile.profile import Profile

CPU = torch.device("cpu")
LOWER = [torch.bfloat16, torch.float16]


# What a capture sees under autocast -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", LOWER, ids=str)
@pytest.mark.parametrize(
    "build",
    [
        tiny_vit,
        lambda: tiny("beit_base_patch16_224", img_size=64),
        lambda: tiny("vit_small_patch14_reg4_dinov2", img_size=56),
        lambda: tiny("eva02_tiny_patch14_224", img_size=56),
    ],
    ids=["vit", "beit: float32 bias", "registers, LayerScale", "rotary"],
)
def test_statistics_are_exact_for_the_queries_and_keys_that_autocast_made(build, dtype):
    model = build()
    x = images(2, *model.patch_embed.img_size)
    with torch.autocast("cpu", dtype):
        attention = captured(model, x)
        values = attention.statistics()
    plain = captured(model, x).statistics()
    for index, view in enumerate(attention):
        assert view.query is not None and view.key is not None
        weights = reference_attention(view.query, view.key, view.scale, view.bias)
        layout = view.layout
        expected = reference_statistics(
            weights,
            grid=layout.grid,
            prefix=layout.num_prefix_tokens,
            has_cls=layout.has_cls,
            registers=layout.num_registers,
            patch_size=layout.patch_size,
        )
        found = {name: values[name][:, index] for name in expected}
        assert_all_close(found, expected, max_logit=largest_logit(view.query, view.key, view.scale, view.bias))
    for of_all in values.values():
        assert of_all.dtype == torch.float32
        assert torch.isfinite(of_all).all()
    assert max(relative_errors(values, plain).values()) < 0.1
    assert any(not torch.equal(values[name], plain[name]) for name in plain)  # it did run in another precision


@pytest.mark.parametrize("dtype", LOWER, ids=str)
def test_softmax_by_hand_is_captured_before_its_output_is_rounded(dtype):
    model = hand_made()
    with torch.autocast("cpu", dtype):
        attention = captured(model)
    assert attention[0].logits is not None and attention[0].logits.dtype == dtype
    blocks: Any = model.blocks
    for view, block in zip(attention, blocks, strict=True):
        assert_close(view.probabilities(), block.attn.weights[0], tolerance=torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", LOWER, ids=str)
def test_multihead_attention_is_captured_within_its_rounding(dtype):
    torch.manual_seed(0)
    model = Multihead(batch_first=True).eval()
    with torch.no_grad(), torch.autocast("cpu", dtype):
        attention = captured(model)
        model(images(), keep_weights=True)
    for view, weights in zip(attention, model.weights, strict=True):
        assert view.query is not None and view.query.dtype == dtype
        assert_close(view.probabilities(), weights.float(), tolerance=0.05)


# The choice -----------------------------------------------------------------------------------------------------------


def measuring(errors: dict[str, float]) -> tuple[list[ForwardDtype], Callable[[ForwardDtype], dict[str, Tensor]]]:
    """A measurement in which bfloat16 is off by these errors, and what it was called with."""
    calls: list[ForwardDtype] = []

    def measure(dtype: ForwardDtype) -> dict[str, Tensor]:
        calls.append(dtype)
        off = {name: error if dtype.taken == "bfloat16" else 0.0 for name, error in errors.items()}
        return {name: torch.full((3, 2, 4), 1 + amount) for name, amount in off.items()}

    return calls, measure


def never(dtype: ForwardDtype) -> dict[str, Tensor]:
    raise AssertionError("nothing is to be measured")


def test_without_a_dtype_the_weights_own_precision_is_left_alone():
    for own in (torch.float32, torch.bfloat16, torch.float64):
        settled = choose_dtype(None, 0.01, nn.Linear(2, 2).to(own), CPU, never)
        assert settled == ForwardDtype(None, str(own).removeprefix("torch."))
        with settled.autocast(CPU):
            assert not torch.is_autocast_enabled("cpu")
    assert weights_dtype(nn.Identity()) == torch.float32
    assert dtype_line(ForwardDtype(None, "float32").describe()) is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_dtype_asked_for_is_taken_unmeasured(dtype):
    settled = choose_dtype(dtype, 0.01, tiny_vit(), CPU, never)
    assert settled == ForwardDtype(dtype, dtype)
    with settled.autocast(CPU):
        assert torch.is_autocast_enabled("cpu") == (dtype != "float32")
        if dtype != "float32":
            assert torch.get_autocast_dtype("cpu") == getattr(torch, dtype)
    assert dtype_line(settled.describe()) == f"dtype: {dtype}, as asked"


def test_auto_takes_bfloat16_where_every_statistic_is_within_the_bound():
    calls, measure = measuring({"cls_entropy": 0.004, "patch_entropy": 0.009})
    settled = choose_dtype("auto", 0.01, tiny_vit(), CPU, measure)
    assert (settled.taken, settled.images, settled.bound) == ("bfloat16", 3, 0.01)
    assert settled.errors == pytest.approx({"cls_entropy": 0.004, "patch_entropy": 0.009}, rel=1e-3)
    assert {call.taken for call in calls} == {"bfloat16", "float32"}
    with settled.autocast(CPU):
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
    assert dtype_line(settled.describe()) == (
        "dtype: bfloat16; the errors of bfloat16 against float32 in block means (over heads and the first 3 images) "
        "are within 0.01 of the mean, or of its floor where that is larger (0.01: the value under uniform attention, "
        "at most 0.01); single heads and images are not bounded. Errors: patch_entropy 9.0e-03, cls_entropy 4.0e-03"
    )


@pytest.mark.parametrize("error", [0.011, math.inf, math.nan])
def test_auto_takes_float32_where_one_statistic_is_not(error):
    _, measure = measuring({"cls_entropy": 0.004, "patch_entropy": error})
    settled = choose_dtype("auto", 0.01, tiny_vit(), CPU, measure)
    assert settled.taken == "float32"
    with settled.autocast(CPU):
        assert not torch.is_autocast_enabled("cpu")
    line = dtype_line(settled.describe())
    assert line is not None
    assert line.startswith(
        "dtype: float32; the errors of bfloat16 against float32 in block means (over heads and the first 3 images) are "
        "not all within 0.01 of the mean, or of its floor"
    )
    assert f"Errors: patch_entropy {'1.1e-02' if error == 0.011 else 'inf'}, " in line


def test_the_description_is_json_and_comes_back_the_same():
    settled = ForwardDtype("auto", "float32", 0.01, 8, {"cls_entropy": math.inf, "patch_entropy": 0.1})
    described = json.loads(json.dumps(settled.describe(), allow_nan=False))
    assert ForwardDtype.from_description(described) == settled


def test_errors_are_of_means_over_images_and_heads_the_worst_block_counts():
    reference = {"a": torch.tensor([[[1.0, 3.0], [1e-4, 1e-4]], [[2.0, 2.0], [1e-4, 1e-4]]])}
    values = {"a": reference["a"] + torch.tensor([[[0.5, -0.5], [0, 0]], [[0.02, 0.02], [0, 4e-4]]])}
    # Block 0: the mean is off by 0.01 of 2; block 1: by 1e-4, of 0.01 at least.
    assert relative_errors(values, reference) == pytest.approx({"a": 0.01}, rel=1e-4)
    infinite = {"a": torch.full((2, 2, 2), math.inf)}
    assert relative_errors(infinite, infinite) == {"a": 0.0}
    assert relative_errors(reference, infinite) == {"a": math.inf}


@pytest.mark.parametrize(
    ("layout", "name", "expected"),
    [
        (TokenLayout((14, 14), has_cls=True), "cls_self_attention", 1 / 197),
        (TokenLayout((14, 14), has_cls=True), "patch_self_attention_ratio", 1 / 196),
        (TokenLayout((16, 16), has_cls=True, num_registers=4), "patches_to_registers", 0.01),  # 4/261 is more
        (TokenLayout((32, 32), has_cls=True, num_registers=4), "patches_to_registers", 4 / 1029),
        (TokenLayout((64, 64), has_cls=True), "cls_to_patches", 1 / 4097),
        (TokenLayout((8, 8), has_cls=True), "cls_self_attention", 0.01),  # 1/65 is more
        (TokenLayout((32, 32), has_cls=True), "cls_entropy", 0.01),
        (TokenLayout((32, 32), has_cls=True), "cls_entropy_share", 0.01),
        (TokenLayout((32, 32), has_cls=True), "patch_norm_max_ratio", 0.01),  # no value under uniform attention
        (TokenLayout((1, 1), has_cls=True), "attention_distance", 0.01),  # whose value there is 0
    ],
)
def test_the_floor_of_a_statistic_follows_its_value_under_uniform_attention(layout, name, expected):
    assert floor(name, layout) == pytest.approx(expected)


@pytest.mark.parametrize(("moved", "taken"), [(0.02, "float32"), (0.005, "bfloat16")])
def test_two_percent_of_a_small_share_do_not_pass(moved, taken):
    """Of 197 tokens, an even share is 0.005; by 2 % of it moved, the mean is off by 1e-4."""
    layout = TokenLayout((14, 14), has_cls=True)

    def measure(dtype: ForwardDtype) -> dict[str, Tensor]:
        return {"cls_self_attention": torch.full((3, 2, 4), 0.005 * (1 + moved * (dtype.taken == "bfloat16")))}

    settled = choose_dtype("auto", 0.01, tiny_vit(), CPU, measure, lambda: layout)
    assert settled.taken == taken
    assert settled.errors["cls_self_attention"] == pytest.approx(moved * 0.005 * 197, rel=1e-2)
    described = settled.describe()
    assert described["floors"] == {"cls_self_attention": pytest.approx(1 / 197)}
    assert "over heads and these images" in described["bounded"] and "not bounded" in described["bounded"]
    assert "floor where that is larger (0.0051: " in str(dtype_line(described))


def test_auto_without_an_image_to_measure_on_is_float32():
    settled = choose_dtype("auto", 0.01, tiny_vit(), CPU, lambda dtype: {})
    assert (settled.taken, settled.errors) == ("float32", {})
    assert dtype_line(settled.describe()) == "dtype: float32, as there was no image to measure bfloat16 on"


# What cannot be -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bf16", "double", "", torch.bfloat16, 16])
def test_an_unknown_dtype_is_refused(dtype):
    with pytest.raises(UserError) as error:
        check_dtype(dtype, 0.01)
    assert message(error) == (f"dtype is {dtype!r}; choose one of float32, bfloat16, float16, auto, or leave it out")


@pytest.mark.parametrize("bound", [0, -1, math.nan, math.inf, "0.1", None, True])
def test_a_bound_that_is_none_is_refused(bound):
    with pytest.raises(UserError) as error:
        check_dtype("auto", bound)
    assert message(error) == f"dtype_bound is {bound!r}; it must be a number above 0, such as 0.01"
    check_dtype(None, 0.5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "auto"])
def test_weights_that_are_not_float32_run_as_they_are(dtype):
    with pytest.raises(UserError) as error:
        choose_dtype(dtype, 0.01, tiny_vit().half(), CPU, never)
    assert message(error) == (
        f"dtype='{dtype}' is for float32 weights and these are float16: leave it out to run them as they are, or "
        f"convert the model first"
    )


@pytest.mark.parametrize("how", ["warning", "error"])
def test_a_device_that_cannot_is_said_and_auto_goes_on_in_float32(monkeypatch, how):
    class Cannot:
        def __init__(self, *args):
            if how == "error":
                raise RuntimeError("Current CUDA Device does not support bfloat16. Please switch dtype to float16.")
            warnings.warn("In CPU autocast, bfloat16 is not supported. Disabling autocast.", stacklevel=1)

        def __enter__(self):
            return self

        def __exit__(self, *args):
            return None

    monkeypatch.setattr(dtype_module.torch, "autocast", Cannot)
    with pytest.raises(UserError) as error:
        choose_dtype("bfloat16", 0.01, tiny_vit(), CPU, never)
    text = message(error)
    assert re.fullmatch(r"dtype='bfloat16' cannot be used on cpu \((In|Current) .*bfloat16.*\); choose .*", text)
    settled = choose_dtype("auto", 0.01, tiny_vit(), CPU, never)
    assert settled.taken == "float32"
    line = dtype_line(settled.describe())
    assert line is not None and line.startswith("dtype: float32, as cpu cannot run bfloat16: ")


# Whole runs -----------------------------------------------------------------------------------------------------------


def values_of(profile: Profile) -> dict[str, Tensor]:
    return {name: torch.from_numpy(profile.values.read(name)) for name in profile.statistics}


@pytest.fixture(scope="module")
def float32() -> Profile:
    return analyze(tiny_vit(), images(100), batch_size=20)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_run_in_a_dtype_has_float32_values_near_those_of_float32(float32, dtype):
    model = tiny_vit()
    profile = analyze(model, images(100), batch_size=20, dtype=dtype)
    found, expected = values_of(profile), values_of(float32)
    errors = relative_errors(found, expected)
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    assert max(errors.values()) == 0 if dtype == "float32" else 0 < max(errors.values()) < 0.05
    assert profile.manifest["forward_dtype"]["taken"] == dtype
    assert profile.manifest["dtype"] == "float32"  # the weights'
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize(("bound", "taken"), [(0.2, "bfloat16"), (1e-6, "float32")])
def test_auto_measures_on_the_first_images_and_runs_all_in_what_it_took(float32, bound, taken):
    profile = analyze(tiny_vit(), images(100), batch_size=20, dtype="auto", dtype_bound=bound)
    settled = profile.manifest["forward_dtype"]
    assert (settled["asked"], settled["taken"], settled["bound"], settled["images"]) == ("auto", taken, bound, 8)
    assert set(settled["errors"]) == set(profile.statistics)
    as_taken = analyze(tiny_vit(), images(100), batch_size=20, dtype=taken)
    for name, of_all in values_of(profile).items():
        assert torch.equal(of_all, values_of(as_taken)[name])
    eight = [analyze(tiny_vit(), images(100)[:8], dtype=one) for one in ("bfloat16", "float32")]
    assert settled["floors"] == {name: floor(name, profile.layout) for name in profile.statistics}
    expected = relative_errors(values_of(eight[0]), values_of(eight[1]), settled["floors"])
    assert settled["errors"] == pytest.approx(expected, abs=1e-7)


def test_auto_measures_on_the_first_batch_with_an_image(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    for i in range(3):
        (tmp_path / f"{i}.png").write_text("no image")
    profile = analyze(tiny_vit(), tmp_path, batch_size=2, dtype="auto", statistics=["cls_entropy"])
    assert profile.manifest["forward_dtype"]["images"] == 1  # batches of two: none, one, two
    assert profile.num_images == 3
    assert len(profile.manifest["data"]["skipped"]) == 3


def test_a_resumed_run_goes_on_in_what_was_taken(tmp_path):
    def go(**options: Any) -> Profile:
        return analyze(tiny_vit(), images(100), batch_size=20, dtype="auto", out=tmp_path / "run", **options)

    whole = values_of(go(dtype_bound=0.2))
    path = tmp_path / "run" / "manifest.json"
    manifest = json.loads(path.read_text())
    assert manifest["forward_dtype"]["taken"] == "bfloat16"
    manifest["status"] = "running"
    manifest["forward_dtype"]["images"] = 5  # which a new measurement would not give
    path.write_text(json.dumps(manifest))
    (tmp_path / "run" / "statistics" / "shard-00001.safetensors").unlink()
    with pytest.raises(UserError, match=r"was begun with dtype_bound 0\.2, not 0\.3"):
        go(dtype_bound=0.3, resume=True)
    resumed = go(dtype_bound=0.2, resume=True)
    assert resumed.manifest["forward_dtype"]["images"] == 5
    for name, of_all in values_of(resumed).items():
        assert torch.equal(of_all, whole[name])


def test_what_float16_cannot_hold_has_a_way_out():
    model = tiny_vit()
    with torch.no_grad():
        model.blocks[0].mlp.fc2.bias += 1e5  # type: ignore[union-attr]  # float16 ends at 65504
    assert analyze(model, images(4), dtype="bfloat16").num_images == 4
    with pytest.raises(UserError) as error:
        analyze(model, images(4), dtype="float16")
    assert message(error).endswith(
        "check its weights and the images' preprocessing, or take bfloat16, whose range is float32's"
    )


def test_weights_of_another_precision_leave_nothing_behind(tmp_path):
    model = tiny_vit().bfloat16()
    with pytest.raises(UserError, match="for float32 weights and these are bfloat16"):
        analyze(model, images(4), dtype="auto", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert analyze(model, images(4)).manifest["forward_dtype"]["taken"] == "bfloat16"


def test_the_command_line_says_what_auto_took(tmp_path):
    arguments = ["analyze", "--model", "mae_vit_nano", "--statistic", "cls_entropy_share", "--num-images", "16"]
    result = CliRunner().invoke(main, [*arguments, "--out", str(tmp_path / "a"), "--dtype", "auto"])
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert re.search(
        r"dtype: bfloat16; the errors of bfloat16 against float32 in block means \(over heads and the first 8 images\) "
        r"are within 0\.01 of the mean, .* single heads and images are not bounded\. "
        r"Errors: cls_entropy_share \d\.\de-0\d",
        said,
    )


@pytest.mark.parametrize("given", [["--dtype", "bf16"], ["--dtype", "auto", "--dtype-bound", "0"]])
def test_a_bad_dtype_on_the_command_line_is_one_line(tmp_path, given):
    result = CliRunner().invoke(main, ["analyze", *given, "--out", str(tmp_path / "a")])
    assert result.exit_code == 2
    assert "dtype" in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert not (tmp_path / "a").exists()
