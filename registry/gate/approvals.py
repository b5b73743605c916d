"""Requests that an alias may point at a version, and the answers to them: who, when, why, and for which exact files.

They are tags of the version, `limbeck.request.DIGEST` and `limbeck.approval.DIGEST`, which are only ever added. A
request is bound to the digest of the version's files, and an answer to its request: if the files differ, both are
ignored. A request ends when the alias moves off the version again, for example by a rollback.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, TypeVar

from pydantic import ValidationError

from limbeck.registry.core import signing
from limbeck.registry.core.errors import BadInput, Refused
from limbeck.registry.gate import protection
from limbeck.registry.ledger import log
from limbeck.registry.mlflow import identity
from limbeck.registry.mlflow.listing import list_versions
from limbeck.registry.mlflow.store import Store
from limbeck.registry.policy.schema import Policy
from limbeck.registry.records import Approval, LedgerEntry, Request, Verdict, Version

REQUEST_TAG_PREFIX = "limbeck.request."
APPROVAL_TAG_PREFIX = "limbeck.approval."
Answer = Literal["approve", "reject"]
StoredRecord = TypeVar("StoredRecord", Request, Approval)


@dataclass(frozen=True)
class ApprovalState:
    """The requests for one version and one alias, and the answers to them."""

    version: Version
    request: Request | None = None  # the newest that has not ended
    answers: tuple[Approval, ...] = ()  # to `request`, oldest first
    ended_requests: tuple[Request, ...] = ()  # oldest first
    earlier_answers: tuple[Approval, ...] = ()  # to other requests than `request`, oldest first
    problems: tuple[str, ...] = ()  # records that were changed, or are of other files

    @property
    def ignored_records(self) -> tuple[str, ...]:
        """Why requests and answers are ignored, a line for each."""
        if self.request or not self.ended_requests:
            return self.problems
        last = self.ended_requests[-1]
        ended = f"the request of {last.who} ({last.when:%Y-%m-%d}) ended when {last.alias} was moved off the version"
        return (*self.problems, ended)

    @property
    def newest_answer_by_person(self) -> dict[str, Approval]:
        """Person -> newest answer to `request`."""
        return {answer.who: answer for answer in self.answers}

    @property
    def is_rejected(self) -> bool:
        """Whether the newest answer of anybody is a rejection."""
        return any(answer.answer == "reject" for answer in self.newest_answer_by_person.values())


@dataclass(frozen=True)
class OpenRequest:
    """A request that was neither carried out nor rejected."""

    state: ApprovalState
    request: Request
    needed: int | None  # number of approvals that the alias's policy requires; None: it requires none
    eligible_approvers: tuple[str, ...] = ()  # who may still answer, by that policy

    @property
    def approved_by(self) -> tuple[str, ...]:
        """The people whose newest answer is an approval."""
        return tuple(who for who, answer in self.state.newest_answer_by_person.items() if answer.answer == "approve")


def request_approval(store: Store, ref: str, alias: str, *, who: str | None = None, reason: str) -> Request:
    """Request that `alias` may point at a version.

    Raises BadInput: no such version, an alias that cannot be used, no reason or one that is too long.
    """
    log.check_alias(alias)
    _check_reason(reason, "a request")
    version = store.get(ref)
    who = who or identity.current_user(store.tracking_uri)
    request = Request(
        name=version.name,
        alias=alias,
        version=version.version,
        artifact=version.digest,
        who=who,
        when=datetime.now(UTC),
        reason=reason,
    )
    _write_tag(store, version, REQUEST_TAG_PREFIX + request.digest()[:16], request.model_dump_json())
    return request


@dataclass(frozen=True)
class ShownToApprover:
    """What a person was shown before they answered a request."""

    verdict: Verdict | None = None  # the policy's; None without a policy
    request: str | None = None  # digest of the request; None: not checked


def answer_request(
    store: Store,
    ref: str,
    alias: str,
    answer: Answer,
    *,
    who: str | None = None,
    reason: str,
    shown: ShownToApprover = ShownToApprover(),
) -> Approval:
    """Approve or reject the newest request that `alias` may point at a version.

    The answer is signed if a key is configured, see `limbeck.registry.core.signing`. A second answer of a person is
    stored beside the first, and counts instead of it.

    Raises:
        Refused: the answer of this person would not count, or there is a newer request than the one shown.
        BadInput: no request, no such version, no reason or one that is too long.
    """
    log.check_alias(alias)
    if answer == "reject":
        _check_reason(reason, "a rejection")
    else:
        _check_length(reason)
    version = store.get(ref)
    who = who or identity.current_user(store.tracking_uri)
    request = request_to_answer(store, load_approval_state(store, version, alias), alias, who)
    if shown.request not in (None, request.digest()):
        raise Refused(f"{request.who} has made a new request for {version.ref}", fix="look at the new request")
    policy = protection.protecting_policy(store, version.name, alias)
    approval = Approval(
        request=request.digest(),
        artifact=version.digest,
        verdict=shown.verdict.content_digest if shown.verdict else None,
        answer=answer,
        who=who,
        when=datetime.now(UTC),
        reason=reason,
    )
    signature = signing.sign(signature_payload(approval))
    if signature is not None:
        approval = approval.model_copy(update=signature._asdict())
    why = _wrong_key_reason(policy, approval)
    if why is not None:
        raise Refused(
            f"an answer of {who} on {version.ref} would not count: {why}",
            fix=f"name the file of that key: {signing.KEY_FILE_VARIABLE}=FILE",
        )
    _write_tag(store, version, APPROVAL_TAG_PREFIX + approval.digest()[:16], approval.model_dump_json())
    return approval


def signature_payload(approval: Approval) -> bytes:
    """The bytes that the signature of an approval signs: the digest of all fields but the key and the signature."""
    return signing.APPROVAL_DOMAIN + approval.model_copy(update={"key": None, "signature": None}).digest().encode()


def request_to_answer(store: Store, state: ApprovalState, alias: str, who: str | None = None) -> Request:
    """The request that `who` may answer. Raises BadInput if there is none, Refused if their answer would not count."""
    version, who = state.version, who or identity.current_user(store.tracking_uri)
    if state.request is None:
        message = f"there is no request that {alias} may point at {version.ref}"
        raise BadInput(
            "\n".join([message, *(f"  {why}" for why in state.ignored_records)]),
            fix=f"make one: limbeck request {version.ref} --alias {alias} --reason ...",
        )
    policy = protection.protecting_policy(store, version.name, alias)
    why = ineligibility_reason(version, state.request, policy, who)
    if why is not None:
        raise Refused(f"an answer of {who} on {version.ref} would not count: {why}")
    return state.request


def ineligibility_reason(version: Version, request: Request, policy: Policy | None, who: str) -> str | None:
    """Why an answer of `who` does not count; None if it does, as far as the policy is known."""
    if who == version.author:
        return f"{who} is the author of {version.ref}"
    if who == request.who:
        return f"{who} made the request"
    rules = policy.approvals if policy else None
    if rules and rules.people and who not in rules.people:
        return f"the policy of {request.alias} lets only {', '.join(rules.people)} approve"
    if rules and rules.keys and who not in rules.keys:
        return f"the policy of {request.alias} requires signed approvals, and has no key of {who}"
    return None


def _wrong_key_reason(policy: Policy | None, approval: Approval) -> str | None:
    """Why an approval is not signed with the key that the policy requires; None if it is."""
    key = policy.approvals.keys.get(approval.who) if policy and policy.approvals else None
    if key is None or approval.key == key:
        return None
    signed = f"it is signed with {approval.key}" if approval.key else "it is not signed"
    return f"the policy requires a signature with {key}, and {signed}"


def request_and_answers(store: Store, version: Version, alias: str) -> tuple[Request | None, tuple[Approval, ...]]:
    """The newest open request for the exact files of a version, and the answers to it, oldest first."""
    state = load_approval_state(store, version, alias)
    return state.request, state.answers


def load_approval_state(store: Store, version: Version, alias: str) -> ApprovalState:
    """The requests and answers about a version and an alias."""
    tags = store.client.get_model_version(version.name, str(version.version)).tags
    if not any(key.startswith(REQUEST_TAG_PREFIX) for key in tags):
        return ApprovalState(version)
    return approval_state_from_tags(version, tags, log.read_entries(store, version.name), alias)


def approval_state_from_tags(
    version: Version, tags: Mapping[str, str], entries: list[LedgerEntry], alias: str
) -> ApprovalState:
    """The same, from the tags of the version and the entries of its model's ledger."""
    problems: list[str] = []
    requests = [r for r in _parse_records(tags, REQUEST_TAG_PREFIX, Request, problems) if r.alias == alias]
    answers = _parse_records(tags, APPROVAL_TAG_PREFIX, Approval, problems)
    ended_requests, current_requests = [], []
    for each in requests:
        if (each.name, each.version, each.artifact) != (version.name, version.version, version.digest):
            problems.append(f"the request of {each.who} ({each.when:%Y-%m-%d}) is of other files: {each.artifact[:12]}")
        elif any(_ends_request(entry, each) for entry in entries):
            ended_requests.append(each)
        else:
            current_requests.append(each)
    newest = current_requests[-1] if current_requests else None
    newest_digest = newest.digest() if newest else None
    known_digests = {each.digest() for each in requests}
    current_answers = tuple(a for a in answers if a.request == newest_digest and a.artifact == version.digest)
    return ApprovalState(
        version,
        request=newest,
        answers=current_answers,
        ended_requests=tuple(ended_requests),
        earlier_answers=tuple(a for a in answers if a not in current_answers and a.request in known_digests),
        problems=tuple(problems),
    )


def open_requests(store: Store, name: str | None = None) -> list[OpenRequest]:
    """The requests that were neither carried out nor rejected, for one model or all, oldest first.

    Raises BadInput if there is no such model.
    """
    ledgers = {name: log.read_ledger(store, name)} if name is not None else {}  # raises BadInput
    found = []
    for each in list_versions(store.client, store.tracking_uri, name):
        if not any(key.startswith(REQUEST_TAG_PREFIX) for key in each.tags):
            continue
        version = store.get(f"{each.name}/{each.version}")
        if each.name not in ledgers:
            ledgers[each.name] = log.read_ledger(store, each.name)
        ledger = ledgers[each.name]
        for alias in sorted({r.alias for r in _parse_records(each.tags, REQUEST_TAG_PREFIX, Request, [])}):
            state = approval_state_from_tags(version, each.tags, ledger.entries, alias)
            if state.request and not state.is_rejected and ledger.aliases.get(alias) != version.version:
                found.append(_open_request(store, state, state.request))
    return sorted(found, key=lambda each: each.request.when)


def _open_request(store: Store, state: ApprovalState, request: Request) -> OpenRequest:
    try:
        policy = protection.protecting_policy(store, request.name, request.alias)
    except Refused:  # it was changed: `limbeck models history --verify` reports that
        policy = None
    rules = policy.approvals if policy else None
    if rules is None:
        return OpenRequest(state, request, None)
    answered = state.newest_answer_by_person
    waiting_for = [who for who in rules.people if who not in answered]
    eligible = (who for who in waiting_for if not ineligibility_reason(state.version, request, policy, who))
    return OpenRequest(state, request, rules.needed or None, tuple(eligible))


def _parse_records(
    tags: Mapping[str, str], prefix: str, record_type: type[StoredRecord], problems: list[str]
) -> list[StoredRecord]:
    """The records of the tags that begin with `prefix`, oldest first. Unreadable and changed ones go to `problems`."""
    found: list[StoredRecord] = []
    for key, value in sorted(tags.items()):
        if not key.startswith(prefix):
            continue
        label = f"the {record_type.__name__.lower()} {key.removeprefix(prefix)}"
        try:
            record = record_type.model_validate_json(value)
        except ValidationError:
            problems.append(f"{label} cannot be read: it is ignored")
            continue
        if key == prefix + record.digest()[:16]:
            found.append(record)
        else:
            problems.append(f"{label} was changed through MLflow itself: it is ignored")
    return sorted(found, key=lambda record: record.when)


def _ends_request(entry: LedgerEntry, request: Request) -> bool:
    """Whether an entry moves the alias off the requested version, after the request."""
    leaves = entry.from_version == request.version and entry.to_version != request.version
    return leaves and entry.alias == request.alias and entry.when > request.when


def _write_tag(store: Store, version: Version, key: str, value: str) -> None:
    store.client.set_model_version_tag(version.name, str(version.version), key, value)


def _check_reason(reason: str, subject: str) -> None:
    if not reason.strip():
        raise BadInput(f"{subject} needs a reason", fix="give one: --reason ...")
    _check_length(reason)


def _check_length(reason: str) -> None:
    if len(reason) > log.LONGEST_REASON:
        raise BadInput(f"the reason has {len(reason)} characters, at most {log.LONGEST_REASON} are kept")
