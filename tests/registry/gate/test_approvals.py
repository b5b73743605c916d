"""Requests and answers: whose answer counts, for which files, and what happens if records are changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from limbeck.registry.core import signing
from limbeck.registry.core.errors import BadInput, Refused
from limbeck.registry.gate import approvals
from limbeck.registry.gate.promotion import PromotionOptions, Vetoed, promote, rollback
from limbeck.registry.gate.protection import protect
from limbeck.registry.ledger import log
from limbeck.registry.policy.schema import ApprovalRules, Policy
from limbeck.registry.records import Version
from tests.conftest import Result
from tests.registry.conftest import POLICY, Still

Limbeck = Callable[..., Result]
DRY_RUN = PromotionOptions(dry_run=True)
NEEDS_APPROVAL = POLICY.model_copy(update={"approvals": ApprovalRules(needed=1, people=("bob", "carol"))})


@pytest.fixture(autouse=True)
def _as_ann(monkeypatch: pytest.MonkeyPatch) -> None:
    """ann is the author of the versions and makes the requests; nothing is signed."""
    monkeypatch.setenv("LIMBECK_USER", "ann")
    monkeypatch.delenv(signing.KEY_FILE_VARIABLE, raising=False)


def make_request(still: Still, number: int = 3, who: str = "ann") -> None:
    approvals.request_approval(still.store, f"still/{number}", "production", who=who, reason="smaller")


def give_answer(still: Still, who: str, given: approvals.Answer = "approve", number: int = 3) -> None:
    approvals.answer_request(still.store, f"still/{number}", "production", given, who=who, reason="looked")


def try_to_promote(still: Still, policy: Policy = NEEDS_APPROVAL) -> str | None:
    """None if still/3 passes, else the message of the veto."""
    try:
        promote(still.store, "still/3", "production", policy, options=DRY_RUN)
    except Vetoed as veto:
        return str(veto)
    return None


def tags(still: Still, version: Version, prefix: str) -> dict[str, str]:
    found = still.store.client.get_model_version(version.name, str(version.version)).tags
    return {key: value for key, value in found.items() if key.startswith(prefix)}


def test_an_approval_lets_the_alias_move(scored: Still) -> None:
    assert try_to_promote(scored)
    make_request(scored)
    assert try_to_promote(scored)
    give_answer(scored, "bob")
    assert try_to_promote(scored) is None
    unprotected = promote(scored.store, "still/3", "production", POLICY).entry
    assert unprotected is not None
    version = scored.variants["fp32"]
    request, answers = approvals.request_and_answers(scored.store, version, "production")
    assert request is not None
    assert [answer.who for answer in answers] == ["bob"]
    assert (request.artifact, request.reason) == (version.digest, "smaller")
    assert approvals.request_and_answers(scored.store, version, "staging") == (None, ())
    assert approvals.request_and_answers(scored.store, scored.variants["int8-weight"], "production") == (None, ())


def test_people_whose_answer_does_not_count(scored: Still) -> None:
    protect(scored.store, "still", "production", NEEDS_APPROVAL)
    with pytest.raises(BadInput, match="there is no request that production may point at still/3"):
        give_answer(scored, "bob")
    make_request(scored, who="carol")
    for who, why in [
        ("ann", "ann is the author of still/3"),
        ("carol", "carol made the request"),
        ("dave", "the policy of production lets only bob, carol approve"),
    ]:
        with pytest.raises(Refused, match=why):
            give_answer(scored, who)
    assert tags(scored, scored.variants["fp32"], approvals.APPROVAL_TAG_PREFIX) == {}
    (waits,) = approvals.open_requests(scored.store)
    assert (waits.needed, waits.eligible_approvers, waits.approved_by) == (1, ("bob",), ())


def test_the_newest_answer_counts_and_none_is_lost(scored: Still) -> None:
    make_request(scored)
    give_answer(scored, "bob")
    give_answer(scored, "bob", "reject")
    assert len(tags(scored, scored.variants["fp32"], approvals.APPROVAL_TAG_PREFIX)) == 2
    state = approvals.load_approval_state(scored.store, scored.variants["fp32"], "production")
    assert (state.is_rejected, [a.answer for a in state.answers]) == (True, ["approve", "reject"])
    assert approvals.open_requests(scored.store) == []
    assert "bob" in (try_to_promote(scored) or "")
    give_answer(scored, "carol")  # a rejection stands until the same person approves
    assert try_to_promote(scored)
    give_answer(scored, "bob")
    assert try_to_promote(scored) is None
    make_request(scored)  # nobody has answered the new request
    state = approvals.load_approval_state(scored.store, scored.variants["fp32"], "production")
    assert (state.answers, len(state.earlier_answers)) == ((), 4)
    assert try_to_promote(scored)


def test_a_request_ends_when_the_alias_moves_off_the_version(scored: Still) -> None:
    make_request(scored)
    give_answer(scored, "bob")
    promote(scored.store, "still/3", "production", NEEDS_APPROVAL)
    assert try_to_promote(scored) is None  # the alias points at it: still approved
    assert approvals.open_requests(scored.store, "still") == []
    rollback(scored.store, "still", "production", reason="slow")
    assert "ended when production was moved off the version" in (try_to_promote(scored) or "")
    state = approvals.load_approval_state(scored.store, scored.variants["fp32"], "production")
    assert (state.request, len(state.ended_requests)) == (None, 1)
    assert approvals.open_requests(scored.store) == []
    make_request(scored)  # after the rollback
    give_answer(scored, "carol")
    assert try_to_promote(scored) is None


def test_other_files_need_another_approval(scored: Still) -> None:
    make_request(scored)
    give_answer(scored, "bob")
    scored.store.client.set_model_version_tag("still", "3", "limbeck.digest", scored.variants["int8-weight"].digest)
    version = scored.store.get("still/3")
    assert approvals.request_and_answers(scored.store, version, "production") == (None, ())
    (problem,) = approvals.load_approval_state(scored.store, version, "production").problems
    assert problem.startswith("the request of ann (")
    assert f"is of other files: {scored.variants['fp32'].digest[:12]}" in problem
    with pytest.raises(BadInput, match="is of other files"):
        give_answer(scored, "bob")


@pytest.mark.parametrize("prefix", [approvals.REQUEST_TAG_PREFIX, approvals.APPROVAL_TAG_PREFIX])
def test_records_that_were_changed_are_ignored(scored: Still, prefix: str) -> None:
    make_request(scored)
    give_answer(scored, "bob")
    version = scored.variants["fp32"]
    ((key, value),) = tags(scored, version, prefix).items()
    for changed in (json.dumps(json.loads(value) | {"who": "carol"}), "no JSON"):
        scored.store.client.set_model_version_tag("still", "3", key, changed)
        assert approvals.request_and_answers(scored.store, version, "production")[1] == ()
        (problem,) = approvals.load_approval_state(scored.store, version, "production").problems
        assert "it is ignored" in problem
        assert problem in (try_to_promote(scored) or "")
    scored.store.client.set_model_version_tag("still", "3", key, value)
    assert try_to_promote(scored) is None


def test_signed_answers(scored: Still, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {who: signing.create_key(tmp_path / f"{who}.pem") for who in ("bob", "carol")}
    rules = ApprovalRules(needed=1, people=("bob", "carol"), keys={"bob": keys["bob"]})
    policy = POLICY.model_copy(update={"approvals": rules})
    make_request(scored)
    give_answer(scored, "bob")  # before the alias is protected, so no signature is required
    assert try_to_promote(scored, policy)
    protect(scored.store, "still", "production", policy)
    with pytest.raises(Refused, match="it is not signed"):
        give_answer(scored, "bob")
    monkeypatch.setenv(signing.KEY_FILE_VARIABLE, str(tmp_path / "carol.pem"))
    with pytest.raises(Refused, match="it is signed with"):
        give_answer(scored, "bob")
    with pytest.raises(Refused, match="has no key of carol"):
        give_answer(scored, "carol")
    assert try_to_promote(scored, policy)
    monkeypatch.setenv(signing.KEY_FILE_VARIABLE, str(tmp_path / "bob.pem"))
    give_answer(scored, "bob")
    assert try_to_promote(scored, policy) is None

    _, answers = approvals.request_and_answers(scored.store, scored.variants["fp32"], "production")
    good = answers[-1]
    signature = signing.Signature(str(good.key), str(good.signature))
    assert signing.verify_signature(approvals.signature_payload(good), signature, keys["bob"])
    # Somebody with access to the database, but without the key, writes an approval under its own digest.
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


def test_requests_and_answers_that_are_refused(scored: Still) -> None:
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
    make_request(scored)
    with pytest.raises(BadInput, match="a rejection needs a reason"):
        approvals.answer_request(store, "still/3", "production", "reject", who="bob", reason="")
    shown = approvals.ShownToApprover(request=approvals.open_requests(store)[0].request.digest())
    make_request(scored, who="carol")
    with pytest.raises(Refused, match="carol has made a new request for still/3"):
        approvals.answer_request(store, "still/3", "production", "approve", who="bob", reason="", shown=shown)
