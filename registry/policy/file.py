"""Reads a policy from its TOML file and checks that its values make sense together."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from limbeck.registry.core import toml
from limbeck.registry.core.toml import Problem
from limbeck.registry.policy.plugins import plugin_problems
from limbeck.registry.policy.schema import ApprovalRules, DeployRules, OverrideRules, Policy

PUBLIC_KEY_PATTERN = re.compile(r"[A-Za-z0-9+/]{42}[AEIMQUYcgkosw048]=")  # base64 of 32 bytes


def load_policy(path: Path | str) -> Policy:
    """The policy in a TOML file.

    Raises BadInput, with the lines, if the file is not a policy, if no model can pass it, or if it has no rule.
    """
    text = toml.read_toml_text(path)
    policy = toml.parse_toml(text, Policy, source_name=str(path))
    problems = [*_policy_problems(policy), *plugin_problems(policy.rules)]
    if problems:
        raise toml.problems_error(problems, text, source_name=str(path))
    return policy


def _policy_problems(policy: Policy) -> Iterator[Problem]:
    """Why no model, or every model, passes a policy whose values are each valid."""
    if policy.model_copy(update={"override": OverrideRules(), "deploy": DeployRules()}) == Policy():
        yield Problem("it has no rule: any version passes", fix="add a rule, such as quality.min_retention")
    repeated = _first_duplicate(policy.quality.tasks)
    if repeated:
        yield Problem(f"quality.tasks names {repeated} twice", (("quality", "tasks"),))
    for kind, names in policy.licence:
        if names == ():
            message = f"licence.{kind} allows no licence, so no model can pass"
            yield Problem(message, (("licence", kind),), fix="name one, or leave the key out")
    if policy.approvals != ApprovalRules():
        yield from _approval_problems(policy.approvals)


def _approval_problems(rules: ApprovalRules) -> Iterator[Problem]:
    """Why the approvals that a policy requires are impossible, or worth nothing."""
    needed, people, keys = ("approvals", "needed"), ("approvals", "people"), ("approvals", "keys")
    if not rules.needed:
        fix = "set how many people have to approve: needed = 1"
        yield Problem("approvals has people or keys, but needs no approval: needed is 0", (needed,), fix=fix)
    repeated = _first_duplicate(rules.people)
    if repeated:
        yield Problem(f"approvals.people names {repeated} twice", (people,))
    elif rules.people and len(rules.people) < rules.needed:
        message = f"approvals.needed is {rules.needed} people, approvals.people names {len(rules.people)}"
        yield Problem(f"{message}, so no model can pass", (needed, people))
    for name, key in rules.keys.items():
        path = (*keys, name)
        if rules.people and name not in rules.people:
            yield Problem(f"approvals.keys has a key of {name}, who is not one of approvals.people", (path, people))
        if not PUBLIC_KEY_PATTERN.fullmatch(key):
            fix = "a key is 44 characters of base64, as `limbeck keys show` prints it"
            yield Problem(f"approvals.keys.{name} is not a public key of ed25519", (path,), fix=fix)
    shared = _first_duplicate(list(rules.keys.values()))
    if shared:
        one, other = [name for name, key in rules.keys.items() if key == shared][:2]
        yield Problem(f"{one} and {other} share one key: either could approve for both", ((*keys, one), (*keys, other)))
    if rules.keys and len(rules.keys) < rules.needed:
        message = f"approvals.needed is {rules.needed} people, approvals.keys has the keys of {len(rules.keys)}"
        yield Problem(f"{message}, so no model can pass", (needed, keys))


def _first_duplicate(values: Sequence[str]) -> str | None:
    """The first value that occurs twice."""
    return next((value for place, value in enumerate(values) if value in values[:place]), None)
