"""Requests and answers: whose counts, of which files, and what tampering does to them."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from limbeck.registry.core import signing
from limbeck.registry.core.errors import BadInput, Refused
from limbeck.registry.gate import approvals
from limbeck.registry.gate.promotion import Vetoed, promote, rollback
from limbeck.registry.gate.protection import protect
from limbeck.registry.ledger import log
from limbeck.registry.policy.schema import ApprovalRules, Policy
from limbeck.registry.records import Version
from tests.conftest import Result
from tests.registry.conftest import POLICY, Still

Limbeck = Callable[..., Result]
ASKS_BOB = POLICY.model_copy(update={"approvals": ApprovalRules(needed=1, people=("bob", "carol"))})


@pytest.fixture(autouse=True)
def _as_ann(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who makes and asks in these tests is ann; nothing is signed."""
    monkeypatch.setenv("LIMBECK_USER", "ann")
    monkeypatch.delenv(signing.KEY_FILE_VARIABLE, raising=False)


def ask(still: Still, number: int = 3, who: str = "ann") -> None:
    approvals.request_approval(still.store, f"still/{number}", "production", who=who, reason="smaller")


def say(still: Still, who: str, answer: approvals.Answer = "approve", number: int = 3) -> None:
    approvals.answer_request(still.store, f"still/{number}", "production", answer, who=who, reason="looked")


def try_to_promote(still: Still, policy: Policy = ASKS_BOB) -> str | None:
    """None where still/3 passes, else what does not."""
    try:
        promote(still.store, "still/3", "production", policy, dry_run=True)
    except Vetoed as veto:
        return str(veto)
    return None


def tags(still: Still, version: Version, prefix: str) -> dict[str, str]:
    found = still.store.client.get_model_version(version.name, str(version.version)).tags
    return {key: value for key, value in found.items() if key.startswith(prefix)}


def test_an_approval_opens_the_gate(scored: Still) -> None:
    assert try_to_promote(scored)
    ask(scored)
    assert try_to_promote(scored)
    say(scored, "bob")
    assert try_to_promote(scored) is None
    other = promote(scored.store, "still/3", "production", POLICY).entry
    assert other is not None
    version = scored.variants["fp32"]
    request, answers = approvals.request_and_answers(scored.store, version, "production")
    assert request is not None
    assert [answer.who for answer in answers] == ["bob"]
    assert (request.artifact, request.reason) == (version.digest, "smaller")
    assert approvals.request_and_answers(scored.store, version, "staging") == (None, ())
    assert approvals.request_and_answers(scored.store, scored.variants["int8"], "production") == (None, ())


def test_whose_answer_does_not_count(scored: Still) -> None:
    protect(scored.store, "still", "production", ASKS_BOB)
    with pytest.raises(BadInput, match="nobody asks that production may point at still/3"):
        say(scored, "bob")
    ask(scored, who="carol")
    for who, why in [
        ("ann", "ann made still/3, and the author does not approve"),
        ("carol", "carol asked for it, and who asks does not approve"),
        ("dave", "the policy of production asks bob, carol"),
    ]:
        with pytest.raises(Refused, match=why):
            say(scored, who)
    assert tags(scored, scored.variants["fp32"], approvals.APPROVAL_TAG_PREFIX) == {}
    (waits,) = approvals.open_requests(scored.store)
    assert (waits.needed, waits.eligible_approvers, waits.approved_by) == (1, ("bob",), ())


def test_the_newest_answer_counts_and_none_is_lost(scored: Still) -> None:
    ask(scored)
    say(scored, "bob")
    say(scored, "bob", "reject")
    assert len(tags(scored, scored.variants["fp32"], approvals.APPROVAL_TAG_PREFIX)) == 2
    asked = approvals.load_approval_state(scored.store, scored.variants["fp32"], "production")
    assert (asked.is_rejected, [a.answer for a in asked.answers]) == (True, ["approve", "reject"])
    assert approvals.open_requests(scored.store) == []
    assert "bob" in (try_to_promote(scored) or "")
    say(scored, "carol")  # a rejection stands until who rejected changes their mind
    assert try_to_promote(scored)
    say(scored, "bob")
    assert try_to_promote(scored) is None
    ask(scored)  # anew: nobody has answered that
    asked = approvals.load_approval_state(scored.store, scored.variants["fp32"], "production")
    assert (asked.answers, len(asked.earlier_answers)) == ((), 4)
    assert try_to_promote(scored)


def test_a_request_ends_where_the_alias_leaves_the_version(scored: Still) -> None:
    ask(scored)
    say(scored, "bob")
    promote(scored.store, "still/3", "production", ASKS_BOB)
    assert try_to_promote(scored) is None  # it is there: still approved
    assert approvals.open_requests(scored.store, "still") == []
    rollback(scored.store, "still", "production", reason="slow")
    assert "ended when production was moved off the version" in (try_to_promote(scored) or "")
    asked = approvals.load_approval_state(scored.store, scored.variants["fp32"], "production")
    assert (asked.request, len(asked.ended_requests)) == (None, 1)
    assert approvals.open_requests(scored.store) == []
    ask(scored)  # after the alias left
    say(scored, "carol")
    assert try_to_promote(scored) is None


def test_other_files_need_another_approval(scored: Still) -> None:
    ask(scored)
    say(scored, "bob")
    scored.store.client.set_model_version_tag("still", "3", "limbeck.digest", scored.variants["int8"].digest)
    version = scored.store.get("still/3")
    assert approvals.request_and_answers(scored.store, version, "production") == (None, ())
    (problem,) = approvals.load_approval_state(scored.store, version, "production").problems
    assert problem.startswith("the request of ann (")
    assert f"is of other files: {scored.variants['fp32'].digest[:12]}" in problem
    with pytest.raises(BadInput, match="is of other files"):
        say(scored, "bob")


@pytest.mark.parametrize("what", [approvals.REQUEST_TAG_PREFIX, approvals.APPROVAL_TAG_PREFIX])
def test_what_was_tampered_with_counts_for_nothing(scored: Still, what: str) -> None:
    ask(scored)
    say(scored, "bob")
    version = scored.variants["fp32"]
    ((key, value),) = tags(scored, version, what).items()
    for changed in (json.dumps(json.loads(value) | {"who": "carol"}), "no JSON"):
        scored.store.client.set_model_version_tag("still", "3", key, changed)
        assert approvals.request_and_answers(scored.store, version, "production")[1] == ()
        (problem,) = approvals.load_approval_state(scored.store, version, "production").problems
        assert "counts for nothing" in problem
        assert problem in (try_to_promote(scored) or "")
    scored.store.client.set_model_version_tag("still", "3", key, value)
    assert try_to_promote(scored) is None


def test_signed_answers(scored: Still, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {who: signing.create_key(tmp_path / f"{who}.pem") for who in ("bob", "carol")}
    rules = ApprovalRules(needed=1, people=("bob", "carol"), keys={"bob": keys["bob"]})
    policy = POLICY.model_copy(update={"approvals": rules})
    ask(scored)
    say(scored, "bob")  # before the alias is protected nobody knows that a signature is asked
    assert try_to_promote(scored, policy)
    protect(scored.store, "still", "production", policy)
    with pytest.raises(Refused, match="it is not signed"):
        say(scored, "bob")
    monkeypatch.setenv(signing.KEY_FILE_VARIABLE, str(tmp_path / "carol.pem"))
    with pytest.raises(Refused, match="it is signed by"):
        say(scored, "bob")
    with pytest.raises(Refused, match="has no key of carol"):
        say(scored, "carol")
    assert try_to_promote(scored, policy)
    monkeypatch.setenv(signing.KEY_FILE_VARIABLE, str(tmp_path / "bob.pem"))
    say(scored, "bob")
    assert try_to_promote(scored, policy) is None

    _, answers = approvals.request_and_answers(scored.store, scored.variants["fp32"], "production")
    good = answers[-1]
    signature = signing.Signature(str(good.key), str(good.signature))
    assert signing.verify_signature(approvals.signature_payload(good), signature, keys["bob"])
    # Somebody with the database, and without the key, writes a new yes under its own digest.
    version = scored.variants["fp32"]
    for key in tags(scored, version, approvals.APPROVAL_TAG_PREFIX):
        scored.store.client.delete_model_version_tag("still", "3", key)
    for changed in ({"reason": "forged"}, {"when": datetime.now(UTC)}):
        forged = good.model_copy(update=changed)
        key = approvals.APPROVAL_TAG_PREFIX + forged.digest()[:16]
        scored.store.client.set_model_version_tag("still", "3", key, forged.model_dump_json())
        assert approvals.request_and_answers(scored.store, version, "production")[1] == (forged,)
        assert try_to_promote(scored, policy)
        scored.store.client.delete_model_version_tag("still", "3", key)


def test_what_cannot_be_asked(scored: Still) -> None:
    store = scored.store
    with pytest.raises(BadInput, match="a request needs a reason"):
        approvals.request_approval(store, "still/3", "production", reason=" ")
    with pytest.raises(BadInput, match="at most 2000 are kept"):
        approvals.request_approval(store, "still/3", "production", reason="x" * (log.LONGEST_REASON + 1))
    with pytest.raises(BadInput, match="reserved by MLflow"):
        approvals.request_approval(store, "still/3", "latest", reason="x")
    with pytest.raises(BadInput, match="has no version 9"):
        approvals.request_approval(store, "still/9", "production", reason="x")
    with pytest.raises(BadInput, match='no model is registered as "still'):
        approvals.open_requests(store, "still' OR")
    ask(scored)
    with pytest.raises(BadInput, match="a rejection needs a reason"):
        approvals.answer_request(store, "still/3", "production", "reject", who="bob", reason="")
    shown = approvals.open_requests(store)[0].request.digest()
    ask(scored, who="carol")
    with pytest.raises(Refused, match="carol asks for still/3 anew"):
        approvals.answer_request(
            store, "still/3", "production", "approve", who="bob", reason="", expected_request=shown
        )


def test_the_commands(scored: Still, limbeck: Limbeck, monkeypatch: pytest.MonkeyPatch) -> None:
    protect(scored.store, "still", "production", ASKS_BOB)
    assert limbeck("request", "still/4").code == 2
    asked = limbeck("request", "still/4", "--reason", "<b>cheap</b>\x1b[2J", "--format", "json")
    assert json.loads(asked.out)["reason"] == "<b>cheap</b>\x1b[2J"
    assert asked.err == "ann asks for still/4 at production; to answer: limbeck approve still/4 --alias production\n"
    refused = limbeck("approve", "still/4")
    assert (refused.code, "ann made still/4" in refused.err, refused.out) == (1, True, "")
    refused = limbeck("promote", "still/4")
    assert refused.code == 1
    monkeypatch.setenv("LIMBECK_USER", "bob")
    table = limbeck("requests")
    assert (table.code, r"<b>cheap</b>\x1b[2J" in table.out, "bob, carol" in table.out) == (0, True, True)
    no = limbeck("reject", "still/4", "--reason", "not yet")
    assert (no.code, no.err) == (0, "bob rejects still/4 for production (not signed)\n")
    assert limbeck("requests", "still").err == "nothing waits\n"
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
