"""`limbeck request`, `approve`, `reject` and `requests`, as a user types them."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from limbeck.registry.core import signing
from limbeck.registry.gate.protection import protect
from limbeck.registry.policy.schema import ApprovalRules
from tests.conftest import Result
from tests.registry.conftest import POLICY, Still

Limbeck = Callable[..., Result]
NEEDS_APPROVAL = POLICY.model_copy(update={"approvals": ApprovalRules(needed=1, people=("bob", "carol"))})


@pytest.fixture(autouse=True)
def _as_ann(monkeypatch: pytest.MonkeyPatch) -> None:
    """ann is the author of the versions and makes the requests; nothing is signed."""
    monkeypatch.setenv("LIMBECK_USER", "ann")
    monkeypatch.delenv(signing.KEY_FILE_VARIABLE, raising=False)


def test_request_approve_reject_and_requests(scored: Still, limbeck: Limbeck, monkeypatch: pytest.MonkeyPatch) -> None:
    protect(scored.store, "still", "production", NEEDS_APPROVAL)
    assert limbeck("request", "still/4").code == 2
    asked = limbeck("request", "still/4", "--reason", "<b>cheap</b>\x1b[2J", "--format", "json")
    assert json.loads(asked.out)["reason"] == "<b>cheap</b>\x1b[2J"
    assert asked.err == (
        "ann requests that production may point at still/4; to answer: limbeck approve still/4 --alias production\n"
    )
    refused = limbeck("approve", "still/4")
    assert (refused.code, "ann is the author of still/4" in refused.err, refused.out) == (1, True, "")
    refused = limbeck("promote", "still/4")
    assert refused.code == 1
    monkeypatch.setenv("LIMBECK_USER", "bob")
    table = limbeck("requests")
    assert (table.code, r"<b>cheap</b>\x1b[2J" in table.out, "bob, carol" in table.out) == (0, True, True)
    no = limbeck("reject", "still/4", "--reason", "not yet")
    assert (no.code, no.err) == (0, "bob rejects still/4 for production (not signed)\n")
    assert limbeck("requests", "still").err == "no open requests\n"
    yes = limbeck("approve", "still/4", "--reason", "fine")
    assert "approvals.people" in yes.out  # the policy
    assert "retention 0.9700 [0.9500, 0.9900]" in yes.out  # the verdict
    assert "not yet" in yes.out  # the answers so far
    (waits,) = json.loads(limbeck("requests", "--format", "json").out)
    assert (waits["version"], waits["approved_by"], waits["eligible_approvers"]) == (4, ["bob"], ["carol"])
    assert [answer["answer"] for answer in waits["answers"]] == ["reject", "approve"]
    assert waits["answers"][1]["verdict"]
    assert limbeck("promote", "still/4").code == 0
    assert limbeck("requests", "still").out == ""
