"""The schema of policies: docs/policy.md has every key, a cost limit for every figure, and digests depend on rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from limbeck.registry.policy.describe import cost_limits_table
from limbeck.registry.policy.file import load_policy
from limbeck.registry.policy.schema import CostLimits, Policy
from limbeck.registry.records import FIGURES, limit_name
from tests import ROOT

PAGE = (ROOT / "docs" / "policy.md").read_text()


def test_docs_have_every_key(tmp_path: Path) -> None:
    example = PAGE.split("```toml\n")[1].split("```")[0]
    (tmp_path / "policy.toml").write_text(example)
    policy = load_policy(tmp_path / "policy.toml")
    for section in set(Policy.model_fields) - {"cost", "rules"}:  # a table of its own; rules need a package
        keys = type(getattr(policy, section)).model_fields
        assert getattr(policy, section).model_fields_set == set(keys), section


def test_docs_have_every_cost_limit() -> None:
    table = PAGE.split("<!-- cost limits: made by `python -m tests.generate_docs` -->\n")[1]
    assert table.split("<!-- end of cost limits -->")[0] == cost_limits_table()
    assert all(f"`{key}`" in cost_limits_table() for key in CostLimits.model_fields)


def test_every_cost_figure_has_a_limit() -> None:
    assert set(CostLimits.model_fields) == {*map(limit_name, FIGURES), "max_cost_ratio"}


@pytest.mark.parametrize(
    "rules",
    [
        {"lineage": {"max_contamination": 0.1}},
        {"licence": {"data": ["mit"]}},
        {"approvals": {"needed": 1}},
        {"rules": {"a": {}}},
    ],
)
def test_the_digest_depends_on_the_rules_and_not_on_empty_sections(rules: dict[str, Any]) -> None:
    quality = {"min_retention": 0.8}
    policy = Policy.model_validate({"quality": quality})
    explicit = {"quality": quality | {"confidence": 0.95, "margin": {}}, "licence": {}, "approvals": {}, "rules": {}}
    assert Policy.model_validate(explicit).digest() == policy.digest()
    assert Policy.model_validate({"quality": quality} | rules).digest() != policy.digest()
