"""The ledger compared with the versions that it names, and `limbeck models history` as a user types it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from limbeck.registry.core import signing
from limbeck.registry.core.errors import BadInput
from limbeck.registry.gate import approvals, audit
from limbeck.registry.gate.promotion import PromotionOptions, promote, rollback
from limbeck.registry.ledger.chain import entry_tag
from limbeck.registry.policy.schema import ApprovalRules, OverrideRules, Policy
from tests.conftest import Result
from tests.registry.conftest import POLICY, Still

Limbeck = Callable[..., Result]
VERIFY = ("models", "history", "still", "--verify")


@pytest.fixture
def promoted(scored: Still) -> Still:
    """`production` points at version 4, with a verdict, an approval and an SBOM."""
    approvals.request_approval(scored.store, "still/4", "production", who="bob", reason="smaller")
    approvals.answer_request(scored.store, "still/4", "production", "approve", who="ada", reason="as good")
    policy = POLICY.model_copy(update={"approvals": ApprovalRules(needed=1, people=("ada",))})
    promote(scored.store, "still/4", "production", policy, who="carl")
    return scored


@pytest.mark.parametrize("change", ["gone", "unreadable", "changed"])
@pytest.mark.parametrize("record", ["verdict", "approval", "SBOM"])
def test_a_record_that_an_entry_names_is_gone_or_changed(promoted: Still, record: str, change: str) -> None:
    client = promoted.store.client
    prefix = f"limbeck.{record.lower()}."
    tags = client.get_model_version("still", "4").tags
    (key,) = (key for key in tags if key.startswith(prefix))
    assert audit.audit_ledger(promoted.store, "still").problems() == []
    if change == "gone":
        client.delete_model_version_tag("still", "4", key)
    else:
        changed = tags[key].replace("still/4", "still/5").replace("as good", "as bad")
        client.set_model_version_tag("still", "4", key, changed if change == "changed" else "no JSON")
    (problem,) = audit.audit_ledger(promoted.store, "still").problems()
    assert problem.startswith(f"the {record} ")
    assert "of version 4, which entry 1 is about, " in problem
    assert ("is gone" if change == "gone" else "was changed: it is ") in problem


def test_the_digest_that_an_entry_names_was_changed(promoted: Still) -> None:
    promoted.store.client.set_model_version_tag("still", "4", "limbeck.digest", "f" * 64)
    was = promoted.variants["int8-weight"].digest[:12]
    problem = f"the digest of version 4, which entry 1 is about, was {was} and is ffffffffffff"
    assert audit.audit_ledger(promoted.store, "still").problems() == [problem]


def test_deleted_versions(promoted: Still) -> None:
    """A version without an alias may be deleted; one with an alias takes its alias with it, which is reported."""
    promote(promoted.store, "still/3", "production", POLICY)
    promoted.store.client.delete_model_version("still", "4")
    assert audit.audit_ledger(promoted.store, "still").problems() == []
    promoted.store.client.delete_model_version("still", "3")
    assert "production points at no version" in audit.audit_ledger(promoted.store, "still").problems()[0]


def test_adopting_records_the_problems_and_stops_reporting_them(promoted: Still, limbeck: Limbeck) -> None:
    client = promoted.store.client
    client.set_registered_model_alias("still", "production", "5")
    client.set_registered_model_alias("still", "canary", "1")
    client.set_model_version_tag("still", "4", "limbeck.digest", "f" * 64)
    wrong = limbeck(*VERIFY)
    assert wrong.code == 1
    assert "limbeck models history still --adopt --reason ..." in wrong.err
    assert limbeck("models", "history", "still").err.startswith("problems:\n")  # without --verify, too
    assert (limbeck(*VERIFY, "--adopt").code, limbeck("models", "history", "still", "--reason", "x").code) == (2, 2)
    adopted = limbeck(*VERIFY, "--adopt", "--reason", "a restored backup")
    assert adopted.code == 0
    assert "ffffffffffff (adopted in entry 2)" in adopted.err
    report = json.loads(limbeck("models", "history", "still", "--format", "json").out)
    assert [(e["alias"], e["action"], e["from_version"], e["to_version"]) for e in report["entries"][1:]] == [
        ("canary", "adopt", None, 1),
        ("production", "adopt", 4, 5),
    ]
    assert (report["problems"], len(report["adopted"])) == ([], 1)
    assert limbeck("models", "history", "still", "--adopt", "--reason", "again").code == 0
    assert len(audit.audit_ledger(promoted.store, "still").entries) == 3  # nothing was left to adopt
    with pytest.raises(BadInput, match="needs a reason"):
        audit.adopt_problems(promoted.store, "still", reason=" ")


def test_a_ledger_whose_tags_were_all_deleted(promoted: Still, limbeck: Limbeck) -> None:
    """The anchor still has the hashes of the entries, and adopting continues after them."""
    client = promoted.store.client
    for key in client.get_registered_model("still").tags:
        client.delete_registered_model_tag("still", key)
    assert "entry 1 (" in limbeck(*VERIFY).err
    assert limbeck(*VERIFY, "--adopt", "--reason", "lost").code == 0
    (entry,) = audit.audit_ledger(promoted.store, "still").entries
    assert (entry.sequence, entry.to_version) == (2, 4)


def test_the_history_of_one_alias(promoted: Still, limbeck: Limbeck) -> None:
    promote(promoted.store, "still/3", "staging", POLICY)
    shown = json.loads(limbeck("models", "history", "still", "--alias", "staging", "--format", "json").out)
    assert [entry["alias"] for entry in shown["entries"]] == ["staging"]
    assert shown["entries"][0]["previous"] == audit.audit_ledger(promoted.store, "still").entries[0].hash
    result = limbeck("models", "history", "still", "--alias", "stagging")
    assert (result.code, "it had production, staging" in result.err) == (2, True)


def test_an_override_is_reported_everywhere(scored: Still, limbeck: Limbeck) -> None:
    lax = POLICY.model_copy(update={"override": OverrideRules(people=("ada",))})
    assert isinstance(lax, Policy)
    promote(
        scored.store, "still/5", "production", lax, who="ada", reason="a demo", options=PromotionOptions(override=True)
    )
    shown = limbeck(*VERIFY)
    assert shown.code == 0
    assert "promote OVERRIDE" in shown.out
    message = (
        "OVERRIDE: in entry 1 ada moved production to still/5, which did not pass:\n  quality.min_retention (fail): "
    )
    assert message in shown.err
    assert "production is version 5 by an override of ada: a demo" in limbeck("doctor").out
    promote(scored.store, "still/4", "production", POLICY)
    back = limbeck("rollback", "still")
    assert (back.code, scored.store.aliases("still")) == (0, {"production": 5})
    assert "OVERRIDE" in back.err  # also when a rollback goes back to it
    rollback(scored.store, "still", "production")


def test_entries_are_signed_by_trusted_keys(scored: Still, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chain that was rewritten together with its anchor still has no signature of a trusted key."""
    key = signing.create_key(tmp_path / "key.pem")
    other = signing.create_key(tmp_path / "other.pem")
    trusted = tmp_path / "trusted"
    trusted.write_text(f"{key} ada\n")
    promote(scored.store, "still/3", "production", POLICY)
    monkeypatch.setenv(signing.KEY_FILE_VARIABLE, str(tmp_path / "key.pem"))
    promote(scored.store, "still/4", "production", POLICY)
    monkeypatch.setenv(signing.KEY_FILE_VARIABLE, str(tmp_path / "other.pem"))
    rollback(scored.store, "still", "production")
    assert audit.audit_ledger(scored.store, "still").problems() == []
    monkeypatch.setenv(signing.TRUSTED_KEYS_VARIABLE, str(trusted))
    problems = ["entry 1 is not signed", f"entry 3 is signed by a key that is not trusted: {other}"]
    assert audit.audit_ledger(scored.store, "still").problems() == problems
    second = audit.audit_ledger(scored.store, "still").entries[1]
    forged = second.model_copy(update={"signature": audit.audit_ledger(scored.store, "still").entries[2].signature})
    scored.store.client.set_registered_model_tag("still", entry_tag(2, second.hash), forged.model_dump_json())
    assert f"entry 2 is not what the key {key} has signed" in audit.audit_ledger(scored.store, "still").problems()
