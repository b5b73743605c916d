"""The policy that protects an alias: which one it is, who may change it, and who may override it.

Without protection, each promotion brings its own policy. A protecting policy is stored with the registered model, and
an entry of the ledger with the action `protect` records from when on it applies.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from limbeck.registry.core.errors import BadInput, Refused
from limbeck.registry.ledger import log
from limbeck.registry.ledger.chain import Ledger
from limbeck.registry.ledger.lock import alias_lock
from limbeck.registry.mlflow import identity
from limbeck.registry.mlflow.store import Store
from limbeck.registry.policy import stored
from limbeck.registry.policy.schema import Policy
from limbeck.registry.records import LedgerEntry


def protecting_policy(store: Store, name: str, alias: str) -> Policy | None:
    """The policy that protects an alias; None if it is not protected.

    Raises:
        Refused: the stored policy is not the one that the ledger names.
        BadInput: no such model.
    """
    return protecting_policy_in(log.read_ledger(store, name), alias)


def protecting_policy_in(ledger: Ledger, alias: str) -> Policy | None:
    """The same, from a ledger that was read before."""
    entry = stored.protection_entry(ledger.entries, alias)
    return stored.read_stored_policy(ledger.tags, entry.policy or "") if entry else None


def governing_policy(
    store: Store, name: str, alias: str, policy: Policy | None, *, ledger: Ledger | None = None
) -> Policy:
    """The policy that applies to a promotion: the one that protects the alias, else the given one.

    Args:
        ledger: the ledger of `name` if it was read before.

    Raises:
        Refused: the alias is protected by another policy than the given one, or by one that was changed.
        BadInput: the alias is not protected and no policy is given.
    """
    protecting = protecting_policy_in(ledger or log.read_ledger(store, name), alias)
    if protecting is None:
        if policy is None:
            raise BadInput(f"{name}@{alias} is not protected, and no policy is given", fix="give one: --policy FILE")
        return policy
    if policy is not None and policy.digest() != protecting.digest():
        raise Refused(
            "\n".join([f"{name}@{alias} is protected by another policy:", *policy_differences(protecting, policy)]),
            fix=f"leave out --policy; to change the protecting policy: limbeck protect {name} --alias {alias}",
        )
    return protecting


def policy_differences(protecting: Policy, given: Policy) -> list[str]:
    """The keys whose values differ between the protecting policy and a given one, a line for each."""
    theirs, ours = dict(policy_settings(protecting)), dict(policy_settings(given))
    keys = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
    return [
        f"  {key}: {_format_value(theirs.get(key))}, in the given policy {_format_value(ours.get(key))}" for key in keys
    ]


def policy_settings(policy: Policy) -> Iterator[tuple[str, Any]]:
    """(`section.key`, value) of every key that a policy sets."""
    return ((key, value) for key, value in _flatten(policy.model_dump(mode="json")) if value not in (None, []))


def override_refusal(policy: Policy, who: str, store: Store, name: str) -> str | None:
    """Why `who` may not override this policy's verdict; None if they may."""
    if not policy.override.people:
        return "the policy lets nobody override it: it has no [override] people"
    if who not in policy.override.people:
        return f"the policy lets {_join_names(policy.override.people)} override it, not {who}"
    return _missing_permission(store, name)


def can_override(policy: Policy, who: str, store: Store, name: str) -> bool:
    """Whether `who` may promote a version that does not pass this policy."""
    return override_refusal(policy, who, store, name) is None


def protect(
    store: Store, name: str, alias: str, policy: Policy | None, *, who: str | None = None, reason: str = ""
) -> LedgerEntry | None:
    """Protect an alias by a policy from now on; with None, remove its protection.

    Only the people who may override the policy, and whoever protected the alias last, can change its protection. The
    same policy again only writes its tags again, without an entry.

    Returns:
        The entry; None if nothing changed.

    Raises:
        Refused: `who` may not change it, or the ledger and the aliases do not agree.
        BadInput: no such model, an alias that cannot be used, or no protection to remove.
    """
    log.check_alias(alias)
    who = who or identity.current_user(store.tracking_uri)
    log.read_ledger(store, name)  # raises for an unknown name, before there is a lock file for it
    with alias_lock(name):
        ledger = log.finish_pending_moves(store, name, who=who)
        protection = stored.protection_entry(ledger.entries, alias)
        if policy is None and protection is None:
            raise BadInput(f"{name}@{alias} is not protected")
        unchanged = policy is not None and protection is not None and policy.digest() == protection.policy
        why = None if unchanged else _change_refusal(store, ledger, protection, who)
        if why is not None:
            raise Refused(f"the policy of {name}@{alias} stays: {why}")
        for key, part in (stored.policy_tags(policy) if policy else {}).items():
            store.client.set_registered_model_tag(name, key, part)
        if unchanged:
            return None
        moved = ledger.external_move_problem(alias)
        if moved is not None:
            raise Refused(moved, fix=f"look at: limbeck models history {name} --verify")
        current_version = ledger.aliases.get(alias)
        entry = log.append_entry(
            store,
            name,
            based_on=ledger,  # `_change_refusal` read it
            who=who,
            alias=alias,
            action="protect",
            from_version=current_version,
            to_version=current_version,
            artifact=None,
            verdict=None,
            reason=reason,
            policy=policy.digest() if policy else None,
        )
        log.apply_entry(store, entry)
        return entry


def _change_refusal(store: Store, ledger: Ledger, protection: LedgerEntry | None, who: str) -> str | None:
    """Why `who` may not change the protection of an alias; None if they may."""
    if protection is not None and who != protection.who:
        try:
            allowed = stored.read_stored_policy(ledger.tags, protection.policy or "").override.people
        except Refused:
            allowed = ()  # the policy is lost: only whoever protected the alias may change it
        if who not in allowed:
            return f"{_join_names((protection.who, *allowed))} may change it, not {who}"
    return _missing_permission(store, ledger.name)


def _missing_permission(store: Store, name: str) -> str | None:
    """Why the user's account on MLflow's server may not manage the model; None if it may, or without accounts."""
    if identity.can_manage(store.tracking_uri, name) is False:
        return f"{store.tracking_uri} does not give you MANAGE on {name}"
    return None


def _flatten(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(`section.key`, value) of nested dicts."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flatten(inner, f"{path}.{key}" if path else key)
    else:
        yield path, value


def _format_value(value: Any) -> str:
    return "not set" if value in (None, []) else str(value)


def _join_names(names: tuple[str, ...]) -> str:
    return " or ".join(dict.fromkeys(names))
