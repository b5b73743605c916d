"""A policy as tags of a registered model, `limbeck.policy.DIGEST.PART`: named by its digest, so never changed in place.

Which policy protects which alias is said by the ledger's entries of the action `protect`, not here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from pydantic import ValidationError

from limbeck.registry.core.digest import json_digest
from limbeck.registry.core.errors import Refused
from limbeck.registry.policy.schema import Policy
from limbeck.registry.records import LedgerEntry

POLICY_TAG_PREFIX = "limbeck.policy."
PART = 4000  # characters; a tag of a registered model holds 5,000


def policy_tags(policy: Policy) -> dict[str, str]:
    """The tags that keep a policy."""
    text = policy.model_dump_json()
    parts = [text[start : start + PART] for start in range(0, len(text), PART)]
    return {_key(policy.digest(), place): part for place, part in enumerate(parts)}


def read_stored_policy(tags: Mapping[str, str], digest: str) -> Policy:
    """The policy of a digest, from the tags of a registered model. Raises Refused where it is not there as it was."""
    parts = sorted(key for key in tags if key.startswith(_key(digest)))
    problem = f"the policy {digest[:12]} is gone"
    if parts:
        problem = f"the policy {digest[:12]} was changed through MLflow itself: its digest does not fit"
        try:
            value = json.loads("".join(tags[key] for key in parts))
            if json_digest(value) == digest:
                return Policy.model_validate(value)
        except ValidationError:
            problem = f"the policy {digest[:12]} has rules that this version of Limbeck does not know"
        except ValueError:  # no JSON
            pass
    raise Refused(problem, fix="put it back: limbeck protect NAME --alias ALIAS --policy FILE, by one who may")


def protection_entry(entries: Iterable[LedgerEntry], alias: str) -> LedgerEntry | None:
    """The entry that an alias is protected by now; None where it is not."""
    entry = next((e for e in reversed(list(entries)) if e.alias == alias and e.action == "protect"), None)
    return entry if entry and entry.policy else None


def stored_policy_problems(tags: Mapping[str, str], entries: Iterable[LedgerEntry]) -> list[str]:
    """What is wrong with the policies that aliases are protected by; empty if nothing."""
    entries, found = list(entries), []
    for alias in sorted({entry.alias for entry in entries}):
        if entry := protection_entry(entries, alias):
            try:
                read_stored_policy(tags, entry.policy or "")
            except Refused as error:
                found.append(f"{alias} is protected, but {error.message}")
    return found


def _key(digest: str, place: int | None = None) -> str:
    return f"{POLICY_TAG_PREFIX}{digest[:16]}." + ("" if place is None else f"{place:03d}")
