"""Read a policy from its file, checked as a whole."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from limbeck.registry.core import toml
from limbeck.registry.core.toml import Problem
from limbeck.registry.policy.plugins import plugin_problems
from limbeck.registry.policy.schema import ApprovalRules, OverrideRules, Policy

PUBLIC_KEY_PATTERN = re.compile(r"[A-Za-z0-9+/]{42}[AEIMQUYcgkosw048]=")  # base64 of 32 bytes


def load_policy(path: Path | str) -> Policy:
    """The policy in a TOML file.

    Raises BadInput, with the lines, for what is no policy, for one that no model can pass, and for one that asks
    nothing.
    """
    text = toml.read_toml_text(path)
    policy = toml.parse_toml(text, Policy, source_name=str(path))
    if found := [*_policy_problems(policy), *plugin_problems(policy.rules)]:
        raise toml.problems_error(found, text, source_name=str(path))
    return policy


def _policy_problems(policy: Policy) -> Iterator[Problem]:
    """Why no model, or any model, can pass a policy whose values are each in order."""
    if policy.model_copy(update={"override": OverrideRules()}) == Policy():
        yield Problem("it asks nothing: any version passes", fix="ask for something, such as quality.min_retention")
    if repeated := _first_duplicate(policy.quality.tasks):
        yield Problem(f"quality.tasks names {repeated} twice", (("quality", "tasks"),))
    for kind, names in policy.licence:
        if names == ():
            words = f"licence.{kind} allows no licence, so no model can pass"
            yield Problem(words, (("licence", kind),), fix="name one, or leave the key out")
    if policy.approvals != ApprovalRules():
        yield from _approval_problems(policy.approvals)


def _approval_problems(rules: ApprovalRules) -> Iterator[Problem]:
    """Why nobody can approve as a policy asks."""
    needed, people, keys = ("approvals", "needed"), ("approvals", "people"), ("approvals", "keys")
    if not rules.needed:
        fix = "say how many have to agree: needed = 1"
        yield Problem("approvals has people or keys, but asks for nobody: needed is 0", (needed,), fix=fix)
    if repeated := _first_duplicate(rules.people):
        yield Problem(f"approvals.people names {repeated} twice", (people,))
    elif rules.people and len(rules.people) < rules.needed:
        words = f"approvals.needed asks for {rules.needed} people, approvals.people names {len(rules.people)}"
        yield Problem(f"{words}, so no model can pass", (needed, people))
    for name, key in rules.keys.items():
        where = (*keys, name)
        if rules.people and name not in rules.people:
            yield Problem(f"approvals.keys has a key of {name}, who is not one of approvals.people", (where, people))
        if not PUBLIC_KEY_PATTERN.fullmatch(key):
            fix = "a key is 44 characters of base64, as `limbeck keys show` prints it"
            yield Problem(f"approvals.keys.{name} is no public key of ed25519", (where,), fix=fix)
    if twice := _first_duplicate(list(rules.keys.values())):
        one, other = [name for name, key in rules.keys.items() if key == twice][:2]
        yield Problem(f"{one} and {other} have one key: either could approve for both", ((*keys, one), (*keys, other)))
    if rules.keys and len(rules.keys) < rules.needed:
        words = f"approvals.needed asks for {rules.needed} people, approvals.keys has the keys of {len(rules.keys)}"
        yield Problem(f"{words}, so no model can pass", (needed, keys))


def _first_duplicate(values: Any) -> str | None:
    """The first that is there twice."""
    return next((value for place, value in enumerate(values) if value in values[:place]), None)
