"""Read a policy from its file, checked as a whole."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from limbeck.registry.core import toml
from limbeck.registry.core.toml import Problem
from limbeck.registry.policy.plugins import problems
from limbeck.registry.policy.schema import ApprovalRules, Override, Policy

KEY = re.compile(r"[A-Za-z0-9+/]{42}[AEIMQUYcgkosw048]=")  # base64 of 32 bytes


def load(path: Path | str) -> Policy:
    """The policy in a TOML file.

    Raises BadInput, with the lines, for what is no policy, for one that no model can pass, and for one that asks
    nothing.
    """
    text = toml.read(path)
    policy = toml.loads(text, Policy, where=str(path))
    if found := [*_impossible(policy), *problems(policy.rules)]:
        raise toml.located(found, text, where=str(path))
    return policy


def _impossible(policy: Policy) -> Iterator[Problem]:
    """Why no model, or any model, can pass a policy whose values are each in order."""
    if policy.model_copy(update={"override": Override()}) == Policy():
        yield Problem("it asks nothing: any version passes", fix="ask for something, such as quality.min_retention")
    if repeated := _repeated(policy.quality.tasks):
        yield Problem(f"quality.tasks names {repeated} twice", (("quality", "tasks"),))
    for kind, names in policy.licence:
        if names == ():
            words = f"licence.{kind} allows no licence, so no model can pass"
            yield Problem(words, (("licence", kind),), fix="name one, or leave the key out")
    if policy.approvals != ApprovalRules():
        yield from _unapprovable(policy.approvals)


def _unapprovable(asked: ApprovalRules) -> Iterator[Problem]:
    """Why nobody can approve as a policy asks."""
    needed, people, keys = ("approvals", "needed"), ("approvals", "people"), ("approvals", "keys")
    if not asked.needed:
        fix = "say how many have to agree: needed = 1"
        yield Problem("approvals has people or keys, but asks for nobody: needed is 0", (needed,), fix=fix)
    if repeated := _repeated(asked.people):
        yield Problem(f"approvals.people names {repeated} twice", (people,))
    elif asked.people and len(asked.people) < asked.needed:
        words = f"approvals.needed asks for {asked.needed} people, approvals.people names {len(asked.people)}"
        yield Problem(f"{words}, so no model can pass", (needed, people))
    for name, key in asked.keys.items():
        where = (*keys, name)
        if asked.people and name not in asked.people:
            yield Problem(f"approvals.keys has a key of {name}, who is not one of approvals.people", (where, people))
        if not KEY.fullmatch(key):
            fix = "a key is 44 characters of base64, as `limbeck keys show` prints it"
            yield Problem(f"approvals.keys.{name} is no public key of ed25519", (where,), fix=fix)
    if twice := _repeated(list(asked.keys.values())):
        one, other = [name for name, key in asked.keys.items() if key == twice][:2]
        yield Problem(f"{one} and {other} have one key: either could approve for both", ((*keys, one), (*keys, other)))
    if asked.keys and len(asked.keys) < asked.needed:
        words = f"approvals.needed asks for {asked.needed} people, approvals.keys has the keys of {len(asked.keys)}"
        yield Problem(f"{words}, so no model can pass", (needed, keys))


def _repeated(values: Any) -> str | None:
    """The first that is there twice."""
    return next((value for place, value in enumerate(values) if value in values[:place]), None)
