"""The policy that an alias is protected by: who may bring it, who may go over it, and which one holds.

Without it each promotion brings a policy of its own. The policy is kept with the registered model, and an entry
of the ledger, of the action `protect`, says that it holds from then on.
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
    """The policy that an alias is protected by; None where it is not.

    Raises:
        Refused: the policy is not what the ledger says that it is.
        BadInput: no such model.
    """
    return protecting_policy_in(log.read_ledger(store, name), alias)


def protecting_policy_in(ledger_snapshot: Ledger, alias: str) -> Policy | None:
    """The same, from a ledger that was read already."""
    entry = stored.protection_entry(ledger_snapshot.entries, alias)
    return stored.read_stored_policy(ledger_snapshot.tags, entry.policy or "") if entry else None


def governing_policy(
    store: Store, name: str, alias: str, policy: Policy | None, *, ledger_snapshot: Ledger | None = None
) -> Policy:
    """The policy that a promotion is judged by: the one that protects the alias, else the given one.

    Args:
        ledger_snapshot: the ledger of `name`, where it was read already.

    Raises:
        Refused: the alias is protected by another policy than the given one, or by one that was tampered with.
        BadInput: there is neither.
    """
    holds = protecting_policy_in(ledger_snapshot or log.read_ledger(store, name), alias)
    if holds is None and policy is None:
        raise BadInput(f"{name}@{alias} is protected by no policy, and none is given", fix="give one: --policy FILE")
    if holds is None or policy is None:
        return holds or policy  # type: ignore[return-value]
    if policy.digest() != holds.digest():
        raise Refused(
            "\n".join([f"{name}@{alias} is protected by another policy:", *policy_differences(holds, policy)]),
            fix=f"leave out --policy; to change the one that holds: limbeck protect {name} --alias {alias}",
        )
    return holds


def policy_differences(current: Policy, given: Policy) -> list[str]:
    """What a given policy asks otherwise than the one that holds, a line for each."""
    was, now = (dict(policy_settings(policy)) for policy in (current, given))
    keys = [key for key in {**was, **now} if was.get(key) != now.get(key)]
    return [
        f"  {key}: it says {_format_value(was.get(key))}, the given one {_format_value(now.get(key))}" for key in keys
    ]


def policy_settings(policy: Policy) -> Iterator[tuple[str, Any]]:
    """(`section.key`, value) of all that a policy asks."""
    return ((key, value) for key, value in _flat(policy.model_dump(mode="json")) if value not in (None, []))


def override_refusal(policy: Policy, who: str, store: Store, name: str) -> str | None:
    """Why somebody may not override a verdict by this policy; None where they may."""
    if not policy.override.people:
        return "the policy lets nobody override it: it has no [override] people"
    if who not in policy.override.people:
        return f"the policy lets {_names(policy.override.people)} override it, not {who}"
    return _missing_permission(store, name)


def can_override(policy: Policy, who: str, store: Store, name: str) -> bool:
    """Whether somebody may promote what did not pass this policy."""
    return override_refusal(policy, who, store, name) is None


def protect(
    store: Store, name: str, alias: str, policy: Policy | None, *, who: str | None = None, reason: str = ""
) -> LedgerEntry | None:
    """Protect an alias by a policy from now on; with None, no longer.

    Once it is protected, only those who may override its policy, and who protected it last, can change that. The
    same policy again is no change: its tags are written anew, and no entry.

    Returns:
        The entry; None where nothing changed.

    Raises:
        Refused: it is not theirs to change; or the ledger and the aliases do not agree.
        BadInput: no such model, an alias that cannot be used.
    """
    log.check_alias(alias)
    who = who or identity.current_user(store.tracking_uri)
    log.read_ledger(store, name)  # no lock for a name that is not there
    with alias_lock(name):
        book = log.finish_pending_moves(store, name, who=who)
        holds = stored.protection_entry(book.entries, alias)
        if policy is None and holds is None:
            raise BadInput(f"{name}@{alias} is not protected")
        same = policy is not None and holds is not None and policy.digest() == holds.policy
        if not same and (why := _change_refusal(store, book, holds, who)):
            raise Refused(f"the policy of {name}@{alias} stays: {why}")
        for key, part in (stored.policy_tags(policy) if policy else {}).items():
            store.client.set_registered_model_tag(name, key, part)
        if same:
            return None
        if moved := book.external_move_problem(alias):
            raise Refused(moved, fix=f"look at: limbeck models history {name} --verify")
        now = book.aliases.get(alias)
        entry = log.append_entry(
            store,
            name,
            based_on=book,  # who may change it was told from there
            who=who,
            alias=alias,
            action="protect",
            from_version=now,
            to_version=now,
            artifact=None,
            verdict=None,
            reason=reason,
            policy=policy.digest() if policy else None,
        )
        log.apply_entry(store, entry)
        return entry


def _change_refusal(store: Store, ledger_snapshot: Ledger, protection: LedgerEntry | None, who: str) -> str | None:
    """Why somebody may not say which policy protects an alias; None where they may."""
    if protection is not None and who != protection.who:
        try:
            allowed = stored.read_stored_policy(ledger_snapshot.tags, protection.policy or "").override.people
        except Refused:
            allowed = ()  # who may is not known any more, but for who protected it
        if who not in allowed:
            return f"{_names((protection.who, *allowed))} may change it, not {who}"
    return _missing_permission(store, ledger_snapshot.name)


def _missing_permission(store: Store, name: str) -> str | None:
    """What to say where MLflow's server has accounts and does not let this one manage the model."""
    if identity.can_manage(store.tracking_uri, name) is False:
        return f"{store.tracking_uri} does not give you MANAGE on {name}"
    return None


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(`section.key`, value) of a policy's JSON."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{path}.{key}" if path else key)
    else:
        yield path, value


def _format_value(value: Any) -> str:
    return "nothing" if value in (None, []) else str(value)


def _names(names: tuple[str, ...]) -> str:
    return " or ".join(dict.fromkeys(names))
