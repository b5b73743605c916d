"""`limbeck models diff`: two versions side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from limbeck.evals.leaderboard.diff import Diff
from limbeck.registry.records import Version
from tests.conftest import Result

ONE_RUN = {"cost_fields": {"run": "r", "protocol": 2}}
OTHER_HARNESS = {"harness": "lm-eval 1"}  # no documents in common


def diff_as_json(limbeck: Callable[..., Result]) -> Diff:
    """The diff of m/2 and m/1."""
    done = limbeck("models", "diff", "m/2", "m/1", "--format", "json")
    assert done.code == 0, done.err
    return Diff.model_validate_json(done.out)


def test_a_diff_has_fields_and_the_ratios_of_one_run(
    add_version: Callable[..., Version], limbeck: Callable[..., Result]
) -> None:
    add_version((0.9, 2.0, ONE_RUN), precision="fp32", recipe="small")
    add_version((0.8, 1.0, ONE_RUN | OTHER_HARNESS), precision="int8-weight", recipe="small")
    found = diff_as_json(limbeck)
    assert {row.name: (row.a, row.b) for row in found.fields if row.name != "digest"} == {
        "precision": ("int8-weight", "fp32")
    }
    assert {row.figure: row.ratio for row in found.cost}["usd_per_million_tokens"] == pytest.approx(0.5)
    assert (found.quality, found.no_cost) == (None, None)
    assert "no common documents" in str(found.no_quality)
    assert "no training run of m/2" in str(found.no_recipe)
    assert limbeck("models", "diff", "m/2", "m/1").code == 0


@pytest.mark.parametrize(
    ("changes", "reason", "memory"), [({}, "not measured in turn", 1.0), ({"machine": "another"}, "another", None)]
)
def test_costs_measured_differently_have_no_ratio(
    add_version: Callable[..., Version],
    limbeck: Callable[..., Result],
    changes: dict[str, Any],
    reason: str,
    memory: float | None,
) -> None:
    add_version((0.9, 2.0, {}))
    add_version((0.8, 1.0, {"cost_fields": changes} | OTHER_HARNESS))
    found = diff_as_json(limbeck)
    ratios = {row.figure: row.ratio for row in found.cost}
    assert reason in str(found.no_cost)
    assert (ratios["usd_per_million_tokens"], ratios["peak_rss_bytes"], ratios["disk_bytes"]) == (None, memory, 1.0)
