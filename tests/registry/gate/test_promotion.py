"""Promotion and rollback: no alias moves to a version that does not pass or is damaged, and each move is recorded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from limbeck.registry.core.errors import BadInput, DamagedArtifact, Refused
from limbeck.registry.core.home import home
from limbeck.registry.gate.promotion import PromotionOptions, Vetoed, promote, rollback, skipped_versions
from limbeck.registry.ledger import log
from limbeck.registry.mlflow.client import Forbidden
from limbeck.registry.mlflow.identity import current_user
from limbeck.registry.policy.schema import DeployRules
from limbeck.registry.records import NewVersion, Verdict, Version
from tests.registry.conftest import POLICY, Still

DRY_RUN = PromotionOptions(dry_run=True)


def production(still: Still) -> int | None:
    return still.store.aliases("still").get("production")


def damage(still: Still, version: Version) -> None:
    (still.store.artifacts.verified_folder(version) / "model.onnx").write_text("damaged")


def is_consistent(still: Still) -> bool:
    """Whether the ledger and the aliases agree."""
    return log.read_ledger(still.store, "still").problems() == []


def test_a_version_that_passes(scored: Still) -> None:
    int8 = scored.variants["int8-weight"]
    done = promote(scored.store, int8.ref, "production", POLICY, who="ada", reason="smaller")
    assert (done.chosen, done.previous_version, production(scored)) == (int8, None, int8.version)
    (entry,) = log.read_entries(scored.store, "still")
    assert done.entry == entry
    assert (entry.who, entry.reason, entry.action, entry.artifact) == ("ada", "smaller", "promote", int8.digest)
    (verdict,) = scored.store.findings.verdicts(int8)
    assert (verdict.outcome, verdict.artifact, verdict.digest()) == ("pass", int8.digest, entry.verdict)
    again = promote(scored.store, "still@production", "production", POLICY)
    assert (again.chosen.ref, again.previous_version, again.entry) == (int8.ref, int8.version, None)
    assert log.read_entries(scored.store, "still") == [entry]


def test_a_bare_name_promotes_the_cheapest_variant_that_passes(scored: Still) -> None:
    done = promote(scored.store, "still", "production", POLICY)
    assert [(c.version.precision, c.usd_per_million_tokens, c.verdict.outcome) for c in done.candidates] == [
        ("int4", 0.5, "fail"),
        ("int8-weight", 1.0, "pass"),
        ("fp32", 2.0, "pass"),
    ]
    assert production(scored) == done.chosen.version == scored.variants["int8-weight"].version


def test_a_torch_version_goes_through_the_same_gate(still: Still) -> None:
    still.score(still.student)
    assert promote(still.store, still.student.ref, "baseline", POLICY).chosen.ref == still.student.ref
    with pytest.raises(Vetoed, match=r"deploy\.aliases \(fail\): .*; export it: limbeck export still/2"):
        promote(still.store, still.student.ref, "production", POLICY)
    unserved = POLICY.model_copy(update={"deploy": DeployRules(aliases=())})
    assert promote(still.store, still.student.ref, "production", unserved).chosen.ref == still.student.ref
    still.score(still.teacher)
    with pytest.raises(Vetoed, match="scored against itself"):
        promote(still.store, still.teacher.ref, "production", POLICY)


def test_a_version_that_does_not_pass_moves_nothing(scored: Still) -> None:
    promote(scored.store, "still", "production", POLICY)
    before = log.read_entries(scored.store, "still")
    int4 = scored.variants["int4"]
    message = r"still/5: fail\n.*min_retention \(fail\): retention 0\.5000 \[0\.4000, 0\.6000\], at least 0\.8000"
    with pytest.raises(Refused, match=message) as refused:
        promote(scored.store, int4.ref, "production", POLICY)
    assert refused.value.exit_code == 1
    assert (production(scored), log.read_entries(scored.store, "still")) == (
        scored.variants["int8-weight"].version,
        before,
    )
    assert [verdict.outcome for verdict in scored.store.findings.verdicts(int4)] == ["fail"]  # it is stored


def test_a_bare_name_skips_what_cannot_be_served(still: Still, make_folder: Callable[..., Path]) -> None:
    new = still.store.register(NewVersion(name="still", kind="student"), make_folder("new"))
    assert skipped_versions(still.store, new.ref) == {}
    assert skipped_versions(still.store, "still") == {
        "still/1": "a PyTorch model, which limbeck serve does not run; export it: limbeck export still/1",
        "still/2": "PyTorch, with ONNX variants among the candidates",
        "still/6": "a PyTorch model, which limbeck serve does not run; export it: limbeck export still/6",
    }


def test_if_none_passes_the_nearest_candidates_come_first(still: Still) -> None:
    for version, retention in zip(still.variants.values(), (0.1, 0.85, 0.3), strict=True):
        still.score(version, retention=(retention, retention - 0.1, retention + 0.1), cost_ratio=1 - retention)
    with pytest.raises(Vetoed) as veto:
        promote(still.store, "still", "production", POLICY)
    assert [c.version.precision for c in veto.value.candidates] == ["int8-weight", "fp32", "int4"]
    assert "still/4: inconclusive" in veto.value.message.split("\n")[1]
    assert "cost_ratio 0.9, at most 0.5 is required" in veto.value.message
    assert (production(still), log.read_entries(still.store, "still")) == (None, [])


def test_the_veto_of_an_unscored_version_names_the_command_to_run(still: Still) -> None:
    with pytest.raises(Vetoed, match=r"inconclusive\n.*run: limbeck eval still/3 --tasks \.\.\. --against still/1"):
        promote(still.store, "still/3", "production", POLICY)


def test_a_dry_run_writes_nothing(scored: Still) -> None:
    done = promote(scored.store, "still", "production", POLICY, options=DRY_RUN)
    assert (done.chosen.precision, done.entry, production(scored)) == ("int8-weight", None, None)
    assert scored.store.findings.verdicts(done.chosen) == log.read_entries(scored.store, "still") == []
    scored.store.client.set_registered_model_alias("still", "production", "1")
    with pytest.raises(Refused, match="somebody moved it"):  # as the real one would be
        promote(scored.store, "still", "production", POLICY, options=DRY_RUN)
    promote(scored.store, "still", "production", POLICY, options=PromotionOptions(dry_run=True, adopt=True))
    assert log.read_entries(scored.store, "still") == []


def test_damaged_files_are_refused_and_the_alias_stays(scored: Still) -> None:
    promote(scored.store, "still/3", "production", POLICY)
    damage(scored, scored.variants["int8-weight"])
    with pytest.raises(DamagedArtifact):
        promote(scored.store, "still", "production", POLICY)
    assert (production(scored), len(log.read_entries(scored.store, "still"))) == (3, 1)


def test_rollback(scored: Still) -> None:
    store = scored.store
    promote(store, "still/3", "production", POLICY)
    promote(store, "still/4", "production", POLICY)
    promote(store, "still/3", "staging", POLICY)  # another alias has its own history
    entry = rollback(store, "still", "production", who="ada", reason="too slow")
    assert (entry.action, entry.from_version, entry.to_version) == ("rollback", 4, 3)
    assert (entry.who, entry.reason, entry.artifact) == ("ada", "too slow", scored.variants["fp32"].digest)
    assert production(scored) == 3
    assert rollback(store, "still", "production").to_version is None  # the first promotion: removed
    assert store.aliases("still") == {"staging": 3}
    with pytest.raises(Refused, match="no promotion to production to roll back"):
        rollback(store, "still", "production")
    promote(store, "still/4", "production", POLICY)
    assert is_consistent(scored)


def test_no_rollback_to_damaged_files(scored: Still) -> None:
    promote(scored.store, "still/3", "production", POLICY)
    promote(scored.store, "still/4", "production", POLICY)
    damage(scored, scored.variants["fp32"])
    with pytest.raises(DamagedArtifact):
        rollback(scored.store, "still", "production")
    assert (production(scored), len(log.read_entries(scored.store, "still"))) == (4, 2)


def test_an_alias_that_was_moved_through_mlflow(scored: Still) -> None:
    store = scored.store
    promote(store, "still/3", "production", POLICY)
    store.client.set_registered_model_alias("still", "production", "5")
    for act in (
        lambda adopt: promote(store, "still/4", "production", POLICY, who="ada", options=PromotionOptions(adopt=adopt)),
        lambda adopt: rollback(store, "still", "production", adopt=adopt, who="ada"),
    ):
        with pytest.raises(Refused, match=r"points at version 5, but the ledger says version 3.*\n.*--adopt"):
            act(False)
        assert (production(scored), len(log.read_entries(store, "still"))) == (5, 1)
    promote(store, "still/3", "staging", POLICY)  # another alias goes on
    promote(store, "still/4", "production", POLICY, who="ada", options=PromotionOptions(adopt=True))
    adopted, promoted = log.read_entries(store, "still")[-2:]
    assert (adopted.action, adopted.from_version, adopted.to_version, adopted.who) == ("adopt", 3, 5, "ada")
    assert "somebody moved it" in adopted.reason
    assert (promoted.from_version, promoted.to_version, production(scored)) == (5, 4, 4)
    assert is_consistent(scored)


def test_an_alias_that_was_set_before_limbeck(scored: Still) -> None:
    scored.store.client.set_registered_model_alias("still", "production", "5")
    with pytest.raises(Refused, match="the ledger does not know it"):
        promote(scored.store, "still/4", "production", POLICY)
    promote(scored.store, "still/4", "production", POLICY, options=PromotionOptions(adopt=True))
    assert rollback(scored.store, "still", "production").to_version == 5


def test_a_ledger_with_a_missing_entry_allows_no_rollback(scored: Still) -> None:
    """Without the middle entry, the previous version is unknown."""
    store = scored.store
    for number in (3, 4, 3):
        promote(store, f"still/{number}", "production", POLICY)
    rollback(store, "still", "production")
    key = next(k for k in store.client.get_registered_model("still").tags if k.startswith("limbeck.ledger.000002"))
    store.client.delete_registered_model_tag("still", key)
    with pytest.raises(Refused, match=r"entry 2 \(\w{12}\) is missing"):
        rollback(store, "still", "production")
    for _ in range(2):
        with pytest.raises(Refused, match="does not have the previous version of production"):
            rollback(store, "still", "production", adopt=True)
    assert production(scored) == 4
    promote(store, "still/3", "production", POLICY)  # adopted problems block nothing
    assert rollback(store, "still", "production").to_version == 4


@pytest.mark.parametrize("model", ["still/9", "stil", "still@nothing", "../x", "still/1/2"])
def test_unknown_models(scored: Still, model: str) -> None:
    with pytest.raises(BadInput):
        promote(scored.store, model, "production", POLICY)
    with pytest.raises(BadInput):
        rollback(scored.store, model, "production")
    assert [p.name for p in (home() / "locks").iterdir() if "x" in p.name] == []


def test_a_model_without_variants(still: Still) -> None:
    with pytest.raises(BadInput, match="reserved by MLflow"):
        promote(still.store, "still", "v1", POLICY)
    for version in still.variants.values():
        still.store.client.delete_model_version("still", str(version.version))
    with pytest.raises(BadInput, match=r"has no ONNX variant to promote\n.*limbeck export still/2"):
        promote(still.store, "still", "production", POLICY)


def test_the_current_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIMBECK_USER", "ada")
    assert current_user("sqlite:///x.db") == "ada"
    monkeypatch.delenv("LIMBECK_USER")
    monkeypatch.setenv("LOGNAME", "grace")
    assert current_user("sqlite:///x.db") == "grace"


def test_the_gate_decision_has_to_be_the_one_shown(scored: Still) -> None:
    """A promotion is made on the gate decision that a person was shown, or not at all."""

    def expecting(verdict: Verdict) -> PromotionOptions:
        return PromotionOptions(expected_verdict=verdict.content_digest)

    shown = promote(scored.store, "still/4", "production", POLICY, options=DRY_RUN).candidates[0].verdict
    later = promote(scored.store, "still/4", "production", POLICY, options=DRY_RUN).candidates[0].verdict
    assert shown.content_digest == later.content_digest
    assert shown.digest() != later.digest()  # another time
    scored.score(scored.variants["int8-weight"], usd=0.9)
    with pytest.raises(Refused, match="the gate decision on still/4 differs from the one shown"):
        promote(scored.store, "still/4", "production", POLICY, options=expecting(shown))
    assert production(scored) is None
    now = promote(scored.store, "still/4", "production", POLICY, options=DRY_RUN).candidates[0].verdict
    assert promote(scored.store, "still/4", "production", POLICY, options=expecting(now)).entry


@pytest.mark.parametrize(("model", "reason"), [("still", "why"), ("still/5", " ")])
def test_an_override_needs_one_version_and_a_reason(scored: Still, model: str, reason: str) -> None:
    with pytest.raises(BadInput, match="an override needs one named version and a reason"):
        promote(scored.store, model, "production", POLICY, reason=reason, options=PromotionOptions(override=True))
    with pytest.raises(Vetoed, match="the policy lets nobody override it"):
        promote(scored.store, "still/5", "production", POLICY, reason="why", options=PromotionOptions(override=True))
    assert (production(scored), log.read_entries(scored.store, "still")) == (None, [])


def test_a_move_that_the_server_refuses_is_reverted(scored: Still, monkeypatch: pytest.MonkeyPatch) -> None:
    promote(scored.store, "still/4", "production", POLICY, who="ada")

    def refuse(*_: object) -> None:  # as MLflow's server does to somebody with EDIT alone
        raise Forbidden("it does not let bob do this")

    with monkeypatch.context() as patch:
        patch.setattr(scored.store.client._client, "delete_registered_model_alias", refuse, raising=False)
        with pytest.raises(Forbidden, match="does not let bob"):
            rollback(scored.store, "still", "production", who="bob")
    assert production(scored) == 4
    assert is_consistent(scored)
    entries = log.read_entries(scored.store, "still")
    assert [(e.action, e.to_version) for e in entries] == [("promote", 4), ("rollback", None), ("adopt", 4)]
    assert "entry 2 was never carried out: it does not let bob do this" in entries[-1].reason
    assert rollback(scored.store, "still", "production", who="ada").to_version is None
    assert (production(scored), is_consistent(scored)) == (None, True)
