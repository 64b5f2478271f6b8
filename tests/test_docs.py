"""What the pages in docs/ say of this repository is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_row_of_the_coverage_table_names_a_test_file() -> None:
    section = (ROOT / "docs" / "coverage.md").read_text().split("## Wrappers, orders of tokens", 1)[1]
    rows = [
        line for line in section.splitlines() if line.startswith("| ") and not line.startswith(("| tried", "| ---"))
    ]
    named = [re.search(r"`(tests/\w+\.py)` \|$", row) for row in rows if "**" not in row]
    assert len(named) > 20
    for found in named:
        assert found is not None and (ROOT / found.group(1)).is_file()
