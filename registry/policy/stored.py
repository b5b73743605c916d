"""A policy stored as tags of a registered model, `limbeck.policy.DIGEST.PART`. Named by its digest, it never changes.

The ledger's entries of the action `protect` record which policy protects which alias.
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
    """The tags that store a policy."""
    text = policy.model_dump_json()
    parts = [text[start : start + PART] for start in range(0, len(text), PART)]
    return {_key(policy.digest(), number): part for number, part in enumerate(parts)}


def read_stored_policy(tags: Mapping[str, str], digest: str) -> Policy:
    """The policy of a digest, from the tags of a registered model. Raises Refused if it is gone or was changed."""
    parts = sorted(key for key in tags if key.startswith(_key(digest)))
    problem = f"the policy {digest[:12]} is gone"
    if parts:
        problem = f"the policy {digest[:12]} was changed through MLflow itself: its digest does not match"
        try:
            value = json.loads("".join(tags[key] for key in parts))
            if json_digest(value) == digest:
                return Policy.model_validate(value)
        except ValidationError:
            problem = f"the policy {digest[:12]} has rules that are unknown to this version of Limbeck"
        except ValueError:  # not JSON
            pass
    raise Refused(
        problem, fix="restore it: limbeck protect NAME --alias ALIAS --policy FILE, by somebody who may change it"
    )


def protection_entry(entries: Iterable[LedgerEntry], alias: str) -> LedgerEntry | None:
    """The entry that protects an alias now; None if it is not protected."""
    last = next((e for e in reversed(list(entries)) if e.alias == alias and e.action == "protect"), None)
    return last if last and last.policy else None


def stored_policy_problems(tags: Mapping[str, str], entries: Iterable[LedgerEntry]) -> list[str]:
    """What is wrong with the policies that protect aliases; empty if nothing is."""
    entries, problems = list(entries), []
    for alias in sorted({entry.alias for entry in entries}):
        entry = protection_entry(entries, alias)
        if entry is None:
            continue
        try:
            read_stored_policy(tags, entry.policy or "")
        except Refused as error:
            problems.append(f"{alias} is protected, but {error.message}")
    return problems


def _key(digest: str, number: int | None = None) -> str:
    """The key of one part; without a number, the prefix of all parts."""
    return f"{POLICY_TAG_PREFIX}{digest[:16]}." + ("" if number is None else f"{number:03d}")
