"""The rule on approvals: whose answers count, and how many are needed."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from limbeck.registry.core import signing
from limbeck.registry.gate.approvals import signature_payload
from limbeck.registry.gate.evidence import Evidence
from limbeck.registry.records import Approval, Request
from tests.registry.gate.rules.rule_helpers import STUDENT, results

NOW = datetime(2026, 1, 2, tzinfo=UTC)
VERSION = STUDENT.model_copy(update={"author": "ann"})
REQUEST = Request(
    name="still", alias="production", version=4, artifact=VERSION.digest, who="bob", when=NOW, reason="better"
)


def approval_by(who: str, **changes: Any) -> Approval:
    """The approval of `REQUEST` by a person."""
    approval = Approval(
        request=REQUEST.digest(),
        artifact=VERSION.digest,
        verdict=None,
        answer="approve",
        who=who,
        when=NOW,
        reason="fine",
    )
    return approval.model_copy(update=changes)


def outcome(*answers: Approval, request: Request | None = REQUEST, **rules: Any) -> str:
    """Of the rule; one approval is needed."""
    evidence = Evidence(VERSION, None, alias="production", request=request, approvals=answers)
    return results({"approvals": {"needed": 1} | rules}, evidence)["approvals.needed"][0]


def test_whose_approvals_count() -> None:
    later = NOW + timedelta(hours=1)
    cy, dee = approval_by("cy"), approval_by("dee")
    assert outcome(cy) == "pass"
    assert outcome(approval_by("ann")) == "inconclusive"  # the author
    assert outcome(approval_by("bob")) == "inconclusive"  # who made the request
    assert outcome() == "inconclusive"
    assert outcome(cy, people=["dee"]) == "inconclusive"
    assert outcome(cy, approval_by("cy", when=later), needed=2) == "inconclusive"  # one person counts once
    assert outcome(cy, dee, needed=2) == "pass"
    assert outcome(cy, approval_by("dee", answer="reject", when=later)) == "fail"
    assert outcome(approval_by("cy", answer="reject"), approval_by("cy", when=later)) == "pass"


def test_an_approval_is_of_one_request_and_of_its_exact_files() -> None:
    assert outcome(approval_by("cy", artifact="b" * 64)) == "inconclusive"
    assert outcome(approval_by("cy", request="other")) == "inconclusive"
    assert outcome(approval_by("cy"), request=None) == "inconclusive"
    other_files = REQUEST.model_copy(update={"artifact": "b" * 64})
    assert outcome(approval_by("cy"), request=other_files) == "inconclusive"


def test_a_policy_with_keys_needs_their_signatures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    key = signing.create_key(tmp_path / "key")
    assert outcome(approval_by("cy"), keys={"cy": key}) == "inconclusive"
    monkeypatch.setenv(signing.KEY_FILE_VARIABLE, str(tmp_path / "key"))
    signature = signing.sign(signature_payload(approval_by("cy")))
    assert signature is not None
    signed = approval_by("cy", **signature._asdict())
    assert outcome(signed, keys={"cy": key}) == "pass"
    assert outcome(signed.model_copy(update={"reason": "changed"}), keys={"cy": key}) == "inconclusive"
    assert outcome(signed, keys={"cy": signing.create_key(tmp_path / "other")}) == "inconclusive"
