"""Aggregators from outside: by decorator, as a class, by module and by file; saved probes find them again."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

import vitprobe as vp
from helpers import message, tiny_vit
from made_squares import BANK, write_squares
from vitprobe.aggregation import Aggregator, create, names, register
from vitprobe.aggregation.registering import SOURCES, as_name
from vitprobe.aggregation.registry import split_names
from vitprobe.aggregation.table import AGGREGATORS
from vitprobe.layout import TokenLayout

SOURCE = """
import torch
import vitprobe as vp

class Weighed(vp.aggregation.Aggregator):
    def __init__(self, dim, *, temperature: float = 1.0, tokens: str = "patches"):
        super().__init__(dim, tokens)
        self.score, self.temperature = torch.nn.Linear(dim, 1), temperature

    def forward(self, batch):
        tokens = batch.read(self.tokens)
        weights = (self.score(tokens) / self.temperature).softmax(dim=1)
        return (weights * tokens).sum(dim=1)

TEXT = "Weighed"
"""


class Median(Aggregator):
    def forward(self, batch: Any) -> Any:
        return batch.patches.median(dim=1).values


def twice(dim: int, layout: TokenLayout) -> Aggregator:
    made = Median(dim)
    made.layout = layout  # pyright: ignore
    return made


@pytest.fixture(autouse=True)
def own_table() -> Iterator[None]:
    kept, sources, modules = dict(AGGREGATORS), dict(SOURCES), set(sys.modules)
    yield
    for table, before in ((AGGREGATORS, kept), (SOURCES, sources)):
        table.clear()
        table.update(before)
    for name in set(sys.modules) - modules:
        if name == "weighing" or name.startswith("vitprobe_file_"):
            del sys.modules[name]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "weighing.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_squares(tmp_path_factory.mktemp("pictures") / "squares")


def refusal(call: Any) -> str:
    with pytest.raises(vp.UserError) as caught:
        call()
    return message(caught)


def batch(count: int = 3) -> vp.aggregation.TokenBatch:
    return vp.aggregation.TokenBatch(torch.randn(count, 5, 8), TokenLayout((2, 2), has_cls=True))


def test_a_registered_class_is_made_by_its_name() -> None:
    assert register("median")(Median) is Median and register("median")(Median) is Median  # a cell run twice
    made, tokens = create("median", dim=8), batch()
    assert made.name == "median" and made.source == f"{__name__}:Median" and "median" in names()
    torch.testing.assert_close(made(tokens), tokens.tokens[:, 1:].median(dim=1).values)


def test_a_factory_gets_the_layout() -> None:
    register("twice")(twice)
    layout = TokenLayout((2, 2), has_cls=True)
    assert create("twice", dim=8, layout=layout).layout is layout  # pyright: ignore


@pytest.mark.parametrize("place", ["weighing", "weighing.py", "./weighing.py", "{folder}/weighing.py"])
def test_a_module_or_a_file(folder: Path, place: str) -> None:
    text = f"{place.format(folder=folder)}:Weighed"
    assert split_names(f"cls,{text}(temperature=2.0,tokens=all),gap") == [
        "cls", f"{text}(temperature=2.0,tokens=all)", "gap",
    ]  # fmt: skip
    made = create(f"{text}_all(temperature=2)", dim=8)
    assert made.name == "Weighed_all(temperature=2.0)" and made.tokens == "all" and made.temperature == 2  # pyright: ignore
    expected = f"{folder}/weighing.py:Weighed" if ".py" in place else "weighing:Weighed"
    assert made.source == expected
    again = create("Weighed", dim=8)  # now by its name
    assert type(again) is type(made) and type(create(text, dim=8)) is type(made)


def test_a_name_that_the_module_registers_itself(folder: Path) -> None:
    (folder / "weighing.py").write_text(SOURCE.replace("class W", "@vp.aggregation.register('weighed')\nclass W"))
    assert create("weighing.py:Weighed(temperature=3)", dim=8).name == "weighed(temperature=3.0)"
    assert create("weighed", dim=8).source.endswith("weighing.py:Weighed")


def test_what_is_no_aggregator(folder: Path) -> None:
    class NoForward(Aggregator):
        pass

    class NoDim(Aggregator):
        def __init__(self) -> None:
            super().__init__(8)

        forward = Median.forward

    class Odd(Median):
        def __init__(self, dim: int, *, sizes: tuple = (1, 2)) -> None:
            super().__init__(dim)

    class Needy(Median):
        def __init__(self, dim: int, size: int) -> None:
            super().__init__(dim)

    for kind, expected in (
        (nn.Linear, "Linear is no aggregator: derive it from vitprobe.aggregation.Aggregator"),
        (7, "7 is no aggregator: give a name, a subclass of vitprobe.aggregation.Aggregator, or a function that makes "
            "one"),
        (Median(8), "Median(…) is an aggregator that is made already: give its class"),
        (NoForward, "NoForward has no forward(batch): define it, from a TokenBatch to (B, out_dim)"),
        (NoDim, "NoDim does not take dim: it is called with dim=, the width of the tokens"),
        (Odd, "Odd takes sizes, which no option can set: take options after a *, each with an int, float, bool or str "
              "as default"),
        (Needy, "Needy takes size, which no option can set: take options after a *, each with an int, float, bool or "
                "str as default"),
    ):  # fmt: skip
        assert refusal(lambda kind=kind: register("mine")(kind)) == expected
        assert refusal(lambda kind=kind: as_name(kind)) == expected
    assert refusal(lambda: vp.verify(tiny_vit(), aggregators=[nn.Linear])).startswith("Linear is no aggregator")
    assert refusal(lambda: vp.verify(tiny_vit(), aggregators=[lambda dim: Median(dim)])) == (
        "an aggregator without a name was given: register it with vitprobe.aggregation.register(NAME)"
    )
    register("linear")(partial(lambda dim: nn.Linear(dim, dim)))
    assert refusal(lambda: create("linear", dim=8)) == "linear made a Linear, not a vitprobe.aggregation.Aggregator"
    assert refusal(lambda: create("weighing.py:TEXT", dim=8)) == (
        "weighing.py:TEXT is a text, no aggregator: name a class or a function that makes one"
    )
    assert refusal(lambda: create("weighing.py:torch", dim=8)).endswith("or a function that makes one")


def test_names_that_are_taken_or_none() -> None:
    taken = "there is an aggregator gap already (vitprobe's own): register yours under another name"
    assert refusal(lambda: register("gap")(Median)) == taken
    register("mine")(Median)
    assert refusal(lambda: register("mine")(twice)) == (
        f"there is an aggregator mine already ({__name__}): register yours under another name"
    )
    for name in ("mine_all", "a:b", "a(b)", "a,b", ""):
        assert refusal(lambda name=name: register(name)(Median)) == (
            f"{name!r} is no name for an aggregator: use letters, digits and _+-., not ending in _all"
        )


def test_places_where_there_is_none(folder: Path) -> None:
    (folder / "broken.py").write_text("import weighing\nraise ValueError('on\\npurpose')\n")
    for text, expected in (
        ("nowhere.py:Mine", "nowhere.py does not exist: give a file as in path/to/file.py:MyAggregator"),
        ("nowhere:Mine", "nowhere of the aggregator nowhere:Mine cannot be imported (ModuleNotFoundError: No module "
                         "named 'nowhere')"),
        ("broken.py:Mine", "broken.py of the aggregator broken.py:Mine cannot be imported (ValueError: on purpose)"),
        ("weighing:Wieghed", "weighing has no 'Wieghed'; its aggregators: Weighed"),
        ("math:nothing", "math has no 'nothing'; it defines no aggregator"),
        ("math:pi", f"{math.pi} is no aggregator: give a name, a subclass of vitprobe.aggregation.Aggregator, or a "
                    f"function that makes one"),
    ):  # fmt: skip
        assert refusal(lambda text=text: create(text, dim=8)) == expected
    assert refusal(lambda: create("weighing:Weighed(depth=2)", dim=8)) == (
        "Weighed has no option 'depth': it has temperature, tokens"
    )


def test_vectors_of_another_width_than_announced() -> None:
    class Wide(Aggregator):
        def forward(self, batch: Any) -> Any:
            return torch.cat([batch.cls, batch.cls], dim=1)

    register("wide")(Wide)
    assert refusal(lambda: create("wide", dim=8)(batch())) == (
        "wide gave (3, 16), not (3, 8), (B, out_dim): return one vector per image, and say its width with "
        "super().__init__(dim, out_dim=…)"
    )


def test_verify_saves_and_finds_it_again(folder: Path, pictures: Path) -> None:
    sys.path.insert(0, str(folder))
    try:
        import weighing  # pyright: ignore[reportMissingImports]
    finally:
        sys.path.remove(str(folder))
    model = tiny_vit()
    asked = ["cls", weighing.Weighed, "weighing.py:Weighed(temperature=0.5)"]
    assert "there is an aggregator Weighed already" in refusal(lambda: vp.verify(model, pictures, asked, protocol=BANK))
    asked = ["cls", weighing.Weighed, "weighing:Weighed(temperature=0.5)"]
    found = vp.verify(model, pictures, asked, protocol=BANK, out=folder / "run", workers=0, norm=False)
    assert list(found.table()["aggregator"]) == ["cls", "Weighed", "Weighed(temperature=0.5)"]
    manifest = json.loads((folder / "run" / "manifest.json").read_text())
    assert manifest["arguments"]["aggregators"] == ["cls", "Weighed", "weighing:Weighed(temperature=0.5)"]
    path = folder / "run" / "probes" / "Weighed(temperature=0.5)@block1-seed0.safetensors"
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["vitprobe_probe"])["aggregator_source"] == "weighing:Weighed"
    probe = vp.load_probe(path, model)
    assert probe.probe.aggregator.temperature == 0.5  # pyright: ignore

    del AGGREGATORS["Weighed"], SOURCES["Weighed"]
    unknown = (
        f"{path} was trained with the aggregator Weighed(temperature=0.5), which is not registered here: give "
        f"aggregator='weighing:Weighed' to load_probe"
    )
    assert refusal(lambda: vp.load_probe(path, model)) == unknown
    assert vp.load_probe(path, model, aggregator="weighing:Weighed").spec == probe.spec
    del AGGREGATORS["Weighed"], SOURCES["Weighed"]
    assert vp.load_probe(path, model, aggregator=weighing.Weighed).spec == probe.spec
    del AGGREGATORS["Weighed"], SOURCES["Weighed"]
    assert refusal(lambda: vp.load_probe(path, model, aggregator=Median)).endswith(
        "not registered here: give its class as aggregator= to load_probe"
    )


def test_a_class_alone_and_one_of_a_script(pictures: Path, tmp_path: Path) -> None:
    class Local(Median):
        pass

    found = vp.verify(tiny_vit(), pictures, Local, protocol="knn", workers=0)
    assert [result.aggregator for result in found.results][:1] == ["Local"]
    assert create("Local", dim=8).source == ""
