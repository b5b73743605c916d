"""Policies stored as tags; those that were changed are refused. See also tests/registry/gate/test_protection.py."""

from __future__ import annotations

import json

import pytest

from limbeck.registry.core.digest import json_digest
from limbeck.registry.core.errors import Refused
from limbeck.registry.policy.schema import OverrideRules, Policy, QualityRules
from limbeck.registry.policy.stored import PART, policy_tags, read_stored_policy


def test_a_policy_is_read_back_and_a_change_is_refused() -> None:
    people = tuple(f"somebody-number-{number}" for number in range(600))
    policy = Policy(quality=QualityRules(min_retention=0.5), override=OverrideRules(people=people))
    tags = policy_tags(policy)
    assert len(tags) > 1
    assert max(map(len, tags.values())) <= PART
    assert read_stored_policy(tags, policy.digest()) == policy
    changed = {key: text.replace("number-7", "number-8") for key, text in tags.items()}
    with pytest.raises(Refused, match="was changed through MLflow itself"):
        read_stored_policy(changed, policy.digest())
    with pytest.raises(Refused, match="is gone"):
        read_stored_policy({}, policy.digest())


def test_a_policy_of_a_newer_version_with_an_unknown_rule() -> None:
    value = {"quality": {"min_retention": 0.5}, "telepathy": {"required": True}}
    tags = {f"limbeck.policy.{json_digest(value)[:16]}.000": json.dumps(value)}
    with pytest.raises(Refused, match="rules that are unknown to this version of Limbeck"):
        read_stored_policy(tags, json_digest(value))
