"""The house: no import goes up, none in a circle, and the picture of it is current."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import house
from benchmarks.house import Import


def test_no_import_goes_up() -> None:
    found = house.upward(house.imports())
    assert list(map(str, found)) == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert " → ".join(house.circle(house.imports())) == ""


def test_results_of_probing_do_not_rest_on_those_of_attention() -> None:
    found = [each for each in house.imports() if each.rooms == ("probing", "profile")]
    assert list(map(str, found)) == []


def test_every_room_has_its_place() -> None:
    known = {name.partition(".")[0] for name in house.modules(house.ROOT / "vitprobe")} - set(house.DOORS)
    assert known == {room for level in house.LEVELS for room in level}


def test_the_picture_is_current() -> None:
    page = house.PAGE.read_text(encoding="utf-8")
    assert house.written(page, house.picture(house.imports())) == page, "run python -m benchmarks.house"


# The reader of imports ------------------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path: Path) -> Path:
    files = {
        "data/__init__.py": "",
        "data/images.py": "from house.errors import UserError\nimport numpy\nfrom . import nothing\n",
        "errors.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from house.data import images\n",
        "models/__init__.py": "from house.data import images\n",
        "models/loading.py": "def load():\n    from house.models.known import FOUND\n",
        "models/known.py": "import house.models.loading\nfrom house import data\n",
        "__init__.py": "from house.models.loading import load\n",
    }
    for name, text in files.items():
        (tmp_path / "house" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "house" / name).write_text(text)
    return tmp_path / "house"


def test_imports_are_read_also_in_functions_but_not_for_type_checkers(package: Path) -> None:
    assert house.imports(package) == [
        Import("__init__", "models.loading"),
        Import("data.images", "errors"),
        Import("models", "data.images"),
        Import("models.known", "data"),
        Import("models.known", "models.loading"),
        Import("models.loading", "models.known"),
    ]


def test_a_circle_is_named(package: Path) -> None:
    assert house.circle(house.imports(package)) in (
        ["models.known", "models.loading", "models.known"],
        ["models.loading", "models.known", "models.loading"],
    )


def test_what_goes_up_is_named() -> None:
    down, up = Import("models.loading", "data.images"), Import("data.images", "models.loading")
    beside, door = Import("profile.run", "aggregation.base"), Import("data.images", "__init__")
    inside, version = Import("models.a", "models.b"), Import("cli.group", "__init__")
    assert house.upward([down, up, beside, inside, door, version]) == [up, beside, door]
    assert str(up) == "vitprobe.data.images imports vitprobe.models.loading"


def test_an_import_that_follows_by_way_of_another_is_not_drawn() -> None:
    graph = {"errors": set(), "data": {"errors"}, "models": {"data", "errors"}}
    assert house.reduced(graph) == {"errors": [], "data": ["errors"], "models": ["data"]}
