"""Names of aggregators, their options, and what does not fit."""

from __future__ import annotations

import pytest
import torch

from helpers import message
from vitprobe.aggregation import TokenBatch, create, names
from vitprobe.errors import UserError
from vitprobe.layout import TokenLayout

LAYOUT = TokenLayout(grid=(2, 3), has_cls=True)


def test_names():
    found = names()
    assert len(found) == len(set(found)) == 31
    for name in found:
        aggregator = create(name.replace("<model>", "vit"), dim=64, layout=LAYOUT)
        assert aggregator.name == name.replace("<model>", "vit") and aggregator.dim == 64


@pytest.mark.parametrize(
    ("given", "options", "name"),
    [
        ("abmilp(depth=2, activation=tanh)", {}, "abmilp(depth=2,activation=tanh)"),
        ("abmilp", {"activation": "tanh", "depth": 2}, "abmilp(depth=2,activation=tanh)"),
        ("abmilp(activation=relu,depth=1)", {}, "abmilp"),
        ("abmilp_all(depth=2)", {}, "abmilp_all(depth=2)"),
        ("abmilp", {"tokens": "all"}, "abmilp_all"),
        ("abmilp_all", {"tokens": "patches"}, "abmilp"),
        ("ep()", {"queries": 32.0}, "ep"),
        ("gem(p=4)", {}, "gem(p=4.0)"),
        ("oracle:vit_base_patch16_224.dino", {}, "oracle:vit_base_patch16_224.dino"),
        ("oracle:of_all", {}, "oracle:of_all"),
        ("center_attention3", {}, "center_attention3"),
        ("center_attention3(scale=sum)", {}, "center_attention3"),
        ("center_attention3", {"scale": "paper"}, "center_attention3(scale=paper)"),
        ("oracle:vit(scale=paper)", {"renormalise": False}, "oracle:vit(renormalise=false,scale=paper)"),
    ],
)
def test_a_name_says_what_differs_from_the_defaults(given, options, name):
    aggregator = create(given, dim=32, **options)
    assert aggregator.name == name
    again = create(name, dim=32)
    assert again.name == name and str(again) == str(aggregator)


@pytest.mark.parametrize(
    ("given", "options", "text"),
    [
        ("abmlip", {}, "no aggregator is called 'abmlip'; the nearest: abmilp"),
        ("gap_all", {}, "no aggregator is called 'gap_all'; the nearest: gap"),
        ("oracle:", {}, "no aggregator is called 'oracle:'; the nearest: oracle:<model>"),
        ("ep(queries=8", {}, "no aggregator is called 'ep(queries=8'"),
        ("gap(size=2)", {}, "gap has no option 'size': it has none"),
        ("center2(size=3)", {}, "center2 has no option 'size': it has none"),
        ("oracle:vit(model=other)", {}, "oracle:vit has no option 'model': it has renormalise, scale"),
        ("center_attention2(size=3)", {}, "center_attention2 has no option 'size': it has scale"),
        ("center_attention2(scale=mean)", {}, "scale is one of sum, paper, not 'mean'"),
        ("oracle:vit(scale=papers)", {}, "scale is one of sum, paper, not 'papers'"),
        ("center2(scale=paper)", {}, "center2 has no option 'scale': it has none"),
        ("ep", {"query": 8}, "ep has no option 'query': it has tokens, queries, d_out"),
        ("ep(8)", {}, "ep: '8' is no option; write option=value"),
        ("ep(queries=many)", {}, "ep: queries is a whole number, not 'many'"),
        ("ep", {"queries": 2.5}, "ep: queries is a whole number, not 2.5"),
        ("gem(p=x)", {}, "gem: p is a number, not 'x'"),
        ("oracle:vit(renormalise=maybe)", {}, "oracle:vit: renormalise is true or false, not 'maybe'"),
        ("abmilp(tokens=registers)", {}, "tokens is one of patches, all, not 'registers'"),
        ("abmilp(activation=gelu)", {}, "activation is one of relu, tanh, not 'gelu'"),
        ("abmilp(depth=0)", {}, "depth must be at least 1, not 0"),
        ("gem(p=nan)", {}, "p must be at least 1, not nan"),
        ("tokencut(kind=soft)", {}, "kind is one of bipartition, eigenvector, eigenvector_bipartition, eigenvector_so"),
        ("ep(queries=12)", {}, "queries=12 does not divide the width 100: choose one of 1, 2, 4, 5, 10, 20, 25, 50"),
        ("ep(queries=4,d_out=3)", {}, "d_out=3 does not divide the width 100: choose one of 1, 2, 4, 5, 10, 20, 25, 5"),
        ("ep(queries=4,d_out=2)", {}, "queries=4 does not divide the vector's width 50: choose one of 1, 2, 5, 10, 25"),
        ("aim", {}, "heads=16 does not divide the width 100"),
        ("vit_block", {}, "heads=8 does not divide the width 100"),
        ("cae(heads=0)", {}, "heads=0 does not divide the width 100"),
        ("clip", {}, "clip learns a position for each token: say how many there are, with layout="),
    ],
)
def test_what_there_is_not_and_what_does_not_fit(given, options, text):
    with pytest.raises(UserError) as error:
        create(given, dim=100, **options)
    assert message(error).startswith(text)


def test_positions_need_a_width_of_sines_and_cosines():
    with pytest.raises(UserError) as error:
        create("abmilp(conditioning=position)", dim=30)
    assert message(error) == "positions are sines and cosines of row and column: the width 30 is no multiple of 4"


def test_models_without_cls():
    layout = TokenLayout(grid=(2, 3), has_cls=False)
    for name in ("cls", "cls+gap", "cls_attention", "cls_attention_min_entropy", "abmilp_all", "vit_block_all"):
        aggregator = create(name, dim=32, layout=layout)
        with pytest.raises(UserError) as error:
            aggregator.check(layout, "tiny")
        text = "reads the [cls] token, which tiny does not have: leave it out, or use gap"
        assert message(error) == f"{name} {text}"
        aggregator.check(LAYOUT, "tiny")
    for name in ("gap", "abmilp", "ep(queries=8)", "tokencut", "center2", "clip", "cbam"):
        create(name, dim=32, layout=layout).check(layout, "tiny")


def test_no_patch_is_taken_for_cls():
    layout = TokenLayout(grid=(2, 3), has_cls=False, num_registers=1)
    batch = TokenBatch(torch.randn(2, 7, 32), layout)
    for name in ("cls", "cls+gap", "abmilp_all", "cae_all", "vit_block_all"):
        with pytest.raises(UserError) as error:
            create(name, dim=32)(batch)
        assert message(error) == "these tokens have no [cls]: read the patches"
    with pytest.raises(UserError) as error:
        create("cls_attention", dim=32)(batch)
    assert message(error).startswith("cls_attention reads the [cls] token, which the model does not have")


def test_positions_of_another_number_of_tokens():
    clip = create("clip", dim=32, layout=LAYOUT)
    with pytest.raises(UserError) as error:
        clip(TokenBatch(torch.randn(2, 10, 32), TokenLayout(grid=(3, 3), has_cls=True)))
    assert message(error).startswith("clip was made for 6 tokens, not 9")


def test_a_batch_knows_its_size():
    batch = TokenBatch(torch.randn(4, 7, 32), LAYOUT)
    assert len(batch) == 4 and torch.equal(batch.cls, batch.tokens[:, 0])
