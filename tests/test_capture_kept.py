"""What a capture keeps of each batch, how long, and what is read from it."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import SMALL, LargestTensor, assert_all_close, assert_close, captured, images, tiny, tiny_vit
from vitprobe.attention.rows import PART_BYTES
from vitprobe.errors import UserError
from vitprobe.hooks import capture as capture_module
from vitprobe.hooks.capture import capture
from vitprobe.statistics import STATISTICS, compute_statistics


@pytest.mark.parametrize("name", ["vit_base_patch14_reg4_dinov2", "beit_base_patch16_224"])
def test_keeping_statistics_gives_the_same_as_keeping_queries_and_keys(name: str) -> None:
    model = tiny(name, **SMALL)
    expected = captured(model, keep="qk").statistics()
    assert_all_close(captured(model, keep="statistics", kernel="model").statistics(), expected, tolerance=1e-9)
    assert_all_close(captured(model, keep="statistics").statistics(), expected, tolerance=1e-5)
    for value in expected.values():
        assert value.shape in ((2, 2, 4), (2, 2, 1))


@pytest.mark.parametrize("keep", ["qk", "statistics"])
def test_batches_replace_each_other_or_pile_up_when_asked(keep: str) -> None:
    model = tiny("beit_base_patch16_224", **SMALL)
    x = images(5)
    with torch.no_grad(), capture(model, keep=keep) as last, capture(model, keep=keep, accumulate=True) as everything:
        for batch in x.split(2):
            model(batch)
    assert_all_close(last.statistics(), captured(model, x[4:]).statistics(), tolerance=1e-5)
    assert_all_close(everything.statistics(), captured(model, x).statistics(), tolerance=1e-5)
    if keep == "qk":
        assert last[0].query.shape[0] == 1 and everything[0].query.shape[0] == 5
        assert_close(everything[1].probabilities(), captured(model, x)[1].probabilities())


def test_views_of_earlier_batches_are_freed() -> None:
    model = tiny_vit()
    with torch.no_grad(), capture(model) as attention:
        model(images())
        earlier = [weakref.ref(attention[0]), weakref.ref(attention[0].query)]
        assert all(ref() is not None for ref in earlier)
        model(images())
        gc.collect()
        assert all(ref() is None for ref in earlier)


def test_keeping_statistics_frees_queries_and_keys_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[weakref.ref] = []

    def watched(view: Any, names: Any) -> dict[str, Tensor]:
        assert all(ref() is None for ref in seen), "the block before is freed already"
        seen.extend([weakref.ref(view), weakref.ref(view.query), weakref.ref(view.key)])
        return compute_statistics(view, names)

    monkeypatch.setattr(capture_module, "compute_statistics", watched)
    model = tiny("vit_base_patch16_siglip_224", **SMALL)
    with torch.no_grad(), capture(model, keep="statistics", accumulate=True) as attention:
        model(images())
        model(images())
        assert len(seen) == 12 and all(ref() is None for ref in seen)
        assert attention.pooling_attention == []


def test_no_matrix_of_all_heads_is_made_while_a_model_runs() -> None:
    model = tiny_vit(img_size=240)  # 900 patches
    x = images(2, 240)
    with torch.no_grad(), LargestTensor() as largest, capture(model, keep="statistics") as attention:
        model(x)
    assert attention.statistics()["cls_entropy"].shape == (2, 2, 2)
    assert largest.bytes <= PART_BYTES["cpu"] < 2 * 2 * 901**2 * 4


def test_accumulated_batches_of_different_grids() -> None:
    model = tiny_vit(dynamic_img_size=True)
    with torch.no_grad(), capture(model, accumulate=True) as attention:
        model(images(2, 32))
        model(images(1, 32, 48))
    assert attention.statistics()["cls_entropy"].shape == (3, 2, 2)
    with pytest.raises(UserError, match="these images have different patch grids"):
        attention[0]


def test_one_capture_of_several_grids() -> None:
    model = tiny_vit(dynamic_img_size=True)
    with torch.no_grad(), capture(model) as attention:
        model(images(2, 32))
        assert attention.layout is not None and attention.layout.grid == (4, 4)
        model(images(2, 24, 40))
        assert attention.layout.grid == attention[0].layout.grid == (3, 5)
        assert attention[0].probabilities(head=1).shape == (2, 16, 16)


def test_blocks_by_number_and_in_turn() -> None:
    attention = captured(tiny_vit(depth=3))
    assert len(attention) == 3
    assert [view.block for view in attention] == [0, 1, 2]
    assert attention[-1].block == 2 and attention[-3].block == 0


def test_chosen_statistics() -> None:
    model = tiny_vit()
    names = ["patch_entropy", "cls_entropy"]
    for keep in ("qk", "statistics"):
        attention = captured(model, keep=keep, statistics=names)
        assert list(attention.statistics()) == ["cls_entropy", "patch_entropy"]
        assert list(attention.statistics(["patch_entropy"])) == ["patch_entropy"]
        assert attention.undefined == {}
    assert list(captured(model, statistics=names).statistics(["patches_to_cls"])) == ["patches_to_cls"]
    with pytest.raises(UserError) as error:
        attention.statistics(["patches_to_cls"])
    assert str(error.value) == (
        "patches_to_cls was not computed in this capture; name it in capture(statistics=…), or leave that out"
    )


def test_undefined_statistics_are_absent_and_named_with_the_reason() -> None:
    for keep in ("qk", "statistics"):
        attention = captured(tiny("vit_medium_patch16_reg4_gap_256", **SMALL), keep=keep)
        values, undefined = attention.statistics(), attention.undefined
        assert set(values) | set(undefined) == set(STATISTICS) and not set(values) & set(undefined)
        assert set(undefined) == {name for name, statistic in STATISTICS.items() if "cls" in statistic.needs}
        assert set(undefined.values()) == {"needs a [cls] token"}
        assert list(attention.statistics(["cls_entropy", "patch_entropy"])) == ["patch_entropy"]

    undefined = captured(tiny("vit_base_patch16_xp_224", **SMALL)).undefined
    assert undefined["patch_update_ratio"] == (
        "needs an attention update that the block adds on its own, apart from its MLP's"
    )
    assert undefined["patches_to_registers"] == "needs register tokens"
    assert set(undefined) == {name for name, s in STATISTICS.items() if s.needs & {"registers", "update"}}
