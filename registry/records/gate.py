"""Verdicts of a policy, requests and approvals, and the entries of the ledger."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from limbeck.registry.core.digest import json_digest
from limbeck.registry.records.base import Outcome, Record


class RuleResult(Record):
    """One rule of a policy applied to one scorecard."""

    rule: str  # such as "quality.min_retention"
    outcome: Outcome
    message: str  # with the numbers


class Verdict(Record):
    """A policy applied to a scorecard, bound to the exact artifact, tasks and prompts."""

    outcome: Outcome
    rules: tuple[RuleResult, ...]
    model: str
    artifact: str
    tasks_digest: str
    prompts_digest: str
    scorecard: str  # digest of the scorecard
    policy: str  # digest of the policy
    created: datetime

    @property
    def content_digest(self) -> str:
        """The digest of all but the time: the same for two verdicts that say the same."""
        return json_digest({name: value for name, value in self.model_dump(mode="json").items() if name != "created"})


class Request(Record):
    """Somebody asks that an alias may point at a version."""

    name: str
    alias: str
    version: int
    artifact: str  # digest of the version's files
    who: str
    when: datetime
    reason: str


class Approval(Record):
    """An answer to a request."""

    request: str  # digest of the request
    artifact: str  # digest of the version's files, as the approver saw them
    verdict: str | None  # digest of the verdict that the approver saw
    answer: Literal["approve", "reject"]
    who: str
    when: datetime
    reason: str
    key: str | None = None  # public ed25519 key of the approver, base64; None: not signed
    signature: str | None = None  # over the digest of all other fields, base64


class LedgerEntry(Record):
    """An alias moved; each entry carries the hash of the one before."""

    sequence: int
    when: datetime
    who: str
    name: str
    alias: str
    # adopt: moved through MLflow itself, and taken over; protect: the alias stays, its policy changes
    action: Literal["promote", "rollback", "adopt", "protect"]
    from_version: int | None
    to_version: int | None  # None: the alias was taken away (a rollback of the first promotion)
    artifact: str | None  # digest of the artifact it now points at
    verdict: str | None  # digest of the verdict
    reason: str
    previous: str  # hash of the entry before; "" for the first
    hash: str  # over all the other fields but key and signature
    override: bool = False  # the verdict did not pass: somebody with the permission moved it all the same
    overridden_rules: tuple[str, ...] = ()  # the rules that an override went over, with their numbers
    policy: str | None = None  # digest of the policy
    approvals: tuple[str, ...] = ()  # digests of the approvals
    sbom: str | None = None  # digest of the bill of materials of the artifact
    anchor: str | None = None  # the MLflow run that holds the ledger in place
    adopted: tuple[
        str, ...
    ] = ()  # of an adopt entry: the problems that it takes as they are, see limbeck.registry.ledger.chain
    key: str | None = None  # public ed25519 key of who wrote it, base64; None: not signed
    signature: str | None = None  # over the hash, base64
