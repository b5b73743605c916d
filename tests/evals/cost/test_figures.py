"""A new cost figure is one field of `Cost`: its column, policy limit and sort key follow from that."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests import ROOT

RECORD = ROOT / "registry/records/cost.py"
FIELD = '    joules_per_token: Annotated[float | None, Figure("J a token", "joules per token", ".2f")] = None\n'
LAST_FIGURE = "    intervals: dict[str, Estimate] = {}"  # the first field of `Cost` that is not a figure

# Imports limbeck.registry.records.cost from another file, then lists what knows the new figure.
PROGRAM = """
import importlib.util, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "limbeck.registry.records.cost":
            return importlib.util.spec_from_file_location(name, sys.argv[1])

sys.meta_path.insert(0, Finder())
from limbeck.evals.leaderboard import ranking
from limbeck.registry.policy import schema
from limbeck.registry.records import FIGURES

assert FIGURES["joules_per_token"].title == "J a token"
assert "joules_per_token" in ranking.sort_keys([])
assert "max_joules_per_token" in schema.CostLimits.model_fields
"""


def test_a_new_figure_needs_one_field(tmp_path: Path) -> None:
    source = RECORD.read_text()
    assert source.count(LAST_FIGURE) == 1
    changed = tmp_path / "cost.py"
    changed.write_text(source.replace(LAST_FIGURE, FIELD + LAST_FIGURE))
    subprocess.run([sys.executable, "-c", PROGRAM, str(changed)], cwd=ROOT, check=True)
