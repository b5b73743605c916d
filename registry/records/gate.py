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
        """The digest of all fields except the time: verdicts with the same content have the same."""
        return json_digest({name: value for name, value in self.model_dump(mode="json").items() if name != "created"})


class Request(Record):
    """Somebody requests that an alias may point at a version."""

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
    """One move of an alias, or a change of its protection. Each entry has the hash of the one before."""

    sequence: int  # from 1
    when: datetime
    who: str
    name: str
    alias: str
    # adopt: somebody moved it through MLflow, and that is accepted; protect: the alias stays, its policy changes
    action: Literal["promote", "rollback", "adopt", "protect"]
    from_version: int | None
    to_version: int | None  # None: the alias was deleted (a rollback of the first promotion)
    artifact: str | None  # digest of the artifact that the alias now points at
    verdict: str | None  # digest of the verdict
    reason: str
    previous: str  # hash of the entry before; "" for the first
    hash: str  # over all other fields except key and signature
    anchor: str  # the MLflow run that anchors the ledger, see limbeck.registry.ledger.anchor
    override: bool = False  # the verdict did not pass, and somebody with the permission moved it anyway
    overridden_rules: tuple[str, ...] = ()  # the rules that were overridden, with their numbers
    policy: str | None = None  # digest of the policy
    approvals: tuple[str, ...] = ()  # digests of the approvals
    sbom: str | None = None  # digest of the artifact's SBOM
    adopted: tuple[
        str, ...
    ] = ()  # of an adopt entry: the problems it accepts, by limbeck.registry.ledger.chain.problem_id
    key: str | None = None  # public ed25519 key of the writer, base64; None: not signed
    signature: str | None = None  # over the hash, base64
