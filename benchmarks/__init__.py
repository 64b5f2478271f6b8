"""What vitprobe is measured by: scripts that make the tables of docs/."""

import sys
from pathlib import Path

# The float64 reference and the recipe for random weights are those of the tests, which are no package.
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
