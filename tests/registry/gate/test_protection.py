"""The policy that protects an alias, who may change it, and who may override it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from limbeck.registry.core.errors import BadInput, Refused
from limbeck.registry.gate import protection
from limbeck.registry.gate.promotion import PromotionOptions, promote, rollback
from limbeck.registry.gate.protection import governing_policy, protect, protecting_policy
from limbeck.registry.ledger import log
from limbeck.registry.mlflow import identity
from limbeck.registry.mlflow.store import Store
from limbeck.registry.policy import stored
from limbeck.registry.policy.schema import OverrideRules, Policy
from tests.conftest import Result
from tests.registry.conftest import POLICY, Still

Limbeck = Callable[..., Result]
OVERRIDE = PromotionOptions(override=True)
STRICT = POLICY.model_copy(update={"override": OverrideRules(people=("carol",))})
LAX = Policy.model_validate({"quality": {"min_retention": 0.1}})


def policy_tags(store: Store) -> dict[str, str]:
    """The tags of the model that store policies."""
    tags = store.client.get_registered_model("still").tags
    return {key: value for key, value in tags.items() if key.startswith(stored.POLICY_TAG_PREFIX)}


def test_a_protected_alias_moves_only_by_its_policy(scored: Still) -> None:
    store = scored.store
    assert protecting_policy(store, "still", "production") is None
    assert governing_policy(store, "still", "production", LAX) == LAX
    with pytest.raises(BadInput, match="is not protected, and no policy is given"):
        governing_policy(store, "still", "production", None)
    with pytest.raises(BadInput, match="no model is registered as 'stil'"):
        protect(store, "stil", "production", STRICT)
    promote(store, "still/3", "production", LAX)
    entry = protect(store, "still", "production", STRICT, who="ann", reason="ours")
    assert entry is not None
    assert (entry.action, entry.who, entry.from_version, entry.to_version) == ("protect", "ann", 3, 3)
    assert entry.policy == STRICT.digest()
    assert (
        protecting_policy(store, "still", "production")
        == governing_policy(store, "still", "production", None)
        == STRICT
    )
    assert protecting_policy(store, "still", "staging") is None
    with pytest.raises(Refused) as refused:
        promote(store, "still/5", "production", LAX)
    assert "  quality.min_retention: 0.8, in the given policy 0.1\n" in str(refused.value)
    assert "  cost.max_cost_ratio: 0.5, in the given policy not set\n" in str(refused.value)
    with pytest.raises(Refused, match=r"still/5: fail\n"):
        promote(store, "still/5", "production", None)
    assert promote(store, "still/4", "production", None).chosen.version == 4
    promote(store, "still/5", "staging", LAX)  # another alias
    assert rollback(store, "still", "production").to_version == 3  # needs no gate decision
    assert log.read_ledger(store, "still").problems() == []


def test_who_may_change_the_protection(scored: Still) -> None:
    store = scored.store
    protect(store, "still", "production", STRICT, who="ann")
    for policy in (LAX, None):
        with pytest.raises(Refused, match="ann or carol may change it, not bob"):
            protect(store, "still", "production", policy, who="bob")
    assert protecting_policy(store, "still", "production") == STRICT
    assert protect(store, "still", "production", STRICT, who="bob") is None  # the same policy
    assert protect(store, "still", "production", LAX, who="carol") is not None
    with pytest.raises(Refused, match="carol may change it, not ann"):
        protect(store, "still", "production", None, who="ann")
    assert protect(store, "still", "production", None, who="carol") is not None
    assert protecting_policy(store, "still", "production") is None
    with pytest.raises(BadInput, match="is not protected"):
        protect(store, "still", "production", None, who="carol")
    assert [entry.policy for entry in log.read_entries(store, "still")] == [STRICT.digest(), LAX.digest(), None]


def test_a_policy_that_was_changed_through_mlflow(scored: Still) -> None:
    store = scored.store
    protect(store, "still", "production", STRICT, who="ann")
    ((key, text),) = policy_tags(store).items()
    for changed in (text.replace("0.8", "0.1"), "no JSON", None):
        if changed is None:
            store.client.delete_registered_model_tag("still", key)
        else:
            store.client.set_registered_model_tag("still", key, changed)
        for policy in (None, LAX, STRICT):
            with pytest.raises(Refused, match="is gone" if changed is None else "was changed through MLflow itself"):
                promote(store, "still/5", "production", policy, options=PromotionOptions(adopt=True))
        (problem,) = log.read_ledger(store, "still").problems()
        assert problem.startswith("production is protected, but the policy")
        with pytest.raises(Refused, match="ann may change it, not carol"):
            protect(store, "still", "production", LAX, who="carol")
    assert protect(store, "still", "production", STRICT, who="bob") is None  # restores it
    assert protecting_policy(store, "still", "production") == STRICT
    assert log.read_ledger(store, "still").problems() == []


def test_a_long_policy_is_stored_in_parts(scored: Still) -> None:
    names = tuple(f"somebody-number-{number}" for number in range(600))
    long = POLICY.model_copy(update={"override": OverrideRules(people=names)})
    protect(scored.store, "still", "production", long)
    parts = policy_tags(scored.store)
    assert len(parts) == 4
    assert max(map(len, parts.values())) <= 5000  # what MLflow's databases hold
    assert protecting_policy(scored.store, "still", "production") == long
    scored.store.client.delete_registered_model_tag("still", max(parts))
    with pytest.raises(Refused, match="its digest does not match"):
        protecting_policy(scored.store, "still", "production")


def test_who_may_override(scored: Still) -> None:
    store = scored.store
    assert protection.override_refusal(POLICY, "carol", store, "still") == (
        "the policy lets nobody override it: it has no [override] people"
    )
    assert protection.override_refusal(STRICT, "ann", store, "still") == "the policy lets carol override it, not ann"
    assert protection.can_override(STRICT, "carol", store, "still")
    assert identity.can_manage(store.tracking_uri, "still") is None  # a database has no accounts
    for who, policy in (("ann", STRICT), ("carol", POLICY)):
        with pytest.raises(Refused, match="the policy lets"):
            promote(store, "still/5", "production", policy, who=who, reason="now", options=OVERRIDE)
    for model, reason in (("still", "now"), ("still/5", " ")):
        with pytest.raises(BadInput):
            promote(store, model, "production", STRICT, who="carol", reason=reason, options=OVERRIDE)
    assert store.aliases("still") == {}
    done = promote(store, "still/5", "production", STRICT, who="carol", reason="now", options=OVERRIDE).entry
    assert done is not None
    assert (done.override, done.reason, done.policy) == (True, "now", STRICT.digest())
    (failing,) = done.overridden_rules
    assert failing.startswith("quality.min_retention (fail): retention 0.5000")
    fine = promote(store, "still/4", "production", STRICT, who="ann", reason="now", options=OVERRIDE).entry
    assert fine is not None
    assert (fine.override, fine.overridden_rules) == (False, ())  # it passes, so nothing is overridden
