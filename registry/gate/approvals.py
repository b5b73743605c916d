"""Somebody asks that an alias may point at a version, others say yes or no: who, when, why, of which very files.

Kept as tags of the version, `limbeck.request.DIGEST` and `limbeck.approval.DIGEST`, that are only ever added. A
request is bound to the digest of the version's files, and an answer to the request: of other files both count for
nothing. It also ends where the alias was moved off the version again, as a rollback does.
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
Kept = TypeVar("Kept", Request, Approval)


@dataclass(frozen=True)
class ApprovalState:
    """What was asked and answered about one version and one alias."""

    version: Version
    request: Request | None = None  # the newest that still counts
    answers: tuple[Approval, ...] = ()  # to it, oldest first
    ended_requests: tuple[Request, ...] = ()  # that do not count any more, oldest first
    earlier_answers: tuple[Approval, ...] = ()  # answers to other requests than `request`, oldest first
    problems: tuple[str, ...] = ()  # what was tampered with, or is of other files

    @property
    def ignored_records(self) -> tuple[str, ...]:
        """What counts for nothing, and why."""
        if self.request or not self.ended_requests:
            return self.problems
        last = self.ended_requests[-1]
        words = f"the request of {last.who} ({last.when:%Y-%m-%d}) ended when {last.alias} was moved off the version"
        return (*self.problems, words)

    @property
    def newest_answer_by_person(self) -> dict[str, Approval]:
        """The newest answer of each."""
        return {answer.who: answer for answer in self.answers}

    @property
    def is_rejected(self) -> bool:
        return any(answer.answer == "reject" for answer in self.newest_answer_by_person.values())


@dataclass(frozen=True)
class OpenRequest:
    """A request that was neither carried out nor rejected."""

    state: ApprovalState
    request: Request
    needed: int | None  # approvals that the policy which protects the alias asks for; None: it asks for none
    eligible_approvers: tuple[str, ...] = ()  # who may still answer, by that policy

    @property
    def approved_by(self) -> tuple[str, ...]:
        return tuple(who for who, answer in self.state.newest_answer_by_person.items() if answer.answer == "approve")


def request_approval(store: Store, ref: str, alias: str, *, who: str | None = None, reason: str) -> Request:
    """Ask that `alias` may point at a version.

    Raises BadInput: no such version, an alias that cannot be used, no reason or too long a one.
    """
    log.check_alias(alias)
    _check_reason(reason, "a request")
    version = store.get(ref)
    who = who or identity.current_user(store.tracking_uri)
    asked = Request(
        name=version.name,
        alias=alias,
        version=version.version,
        artifact=version.digest,
        who=who,
        when=datetime.now(UTC),
        reason=reason,
    )
    _write(store, version, REQUEST_TAG_PREFIX + asked.digest()[:16], asked.model_dump_json())
    return asked


def answer_request(
    store: Store,
    ref: str,
    alias: str,
    answer: Answer,
    *,
    who: str | None = None,
    reason: str,
    verdict: Verdict | None = None,
    expected_request: str | None = None,
) -> Approval:
    """Say yes or no to the newest request that `alias` may point at a version.

    Signed where a key is configured, see registry.core.signing. A second answer of the same person is kept beside the
    first, and counts instead of it.

    Args:
        verdict: that the person was shown.
        expected_request: digest of the request that the person was shown.

    Raises:
        Refused: the answer of this person would not count; or there is a newer request than the one shown.
        BadInput: nobody asks for it; no such version, no reason or too long a one.
    """
    log.check_alias(alias)
    if answer == "reject":
        _check_reason(reason, "a rejection")
    else:
        _check_length(reason)
    version = store.get(ref)
    who = who or identity.current_user(store.tracking_uri)
    asked = load_approval_state(store, version, alias)
    asked_for = request_to_answer(store, asked, alias, who)
    if expected_request not in (None, asked_for.digest()):
        raise Refused(f"{asked_for.who} asks for {version.ref} anew", fix="look at the request again")
    policy = protection.protecting_policy(store, version.name, alias)
    draft = Approval(
        request=asked_for.digest(),
        artifact=version.digest,
        verdict=verdict.content_digest if verdict else None,
        answer=answer,
        who=who,
        when=datetime.now(UTC),
        reason=reason,
    )
    if signature := signing.sign(signature_payload(draft)):
        draft = draft.model_copy(update=signature._asdict())
    if why := _wrong_key_reason(policy, draft):
        raise Refused(
            f"an answer of {who} on {version.ref} would not count: {why}",
            fix=f"name the file of that key: {signing.KEY_FILE_VARIABLE}=FILE",
        )
    _write(store, version, APPROVAL_TAG_PREFIX + draft.digest()[:16], draft.model_dump_json())
    return draft


def signature_payload(approval: Approval) -> bytes:
    """What the signature of an approval is over: the digest of all but the key and the signature."""
    return signing.APPROVAL_DOMAIN + approval.model_copy(update={"key": None, "signature": None}).digest().encode()


def request_to_answer(store: Store, state: ApprovalState, alias: str, who: str | None = None) -> Request:
    """The request that somebody may answer. Raises BadInput where there is none, Refused where they may not."""
    version, who = state.version, who or identity.current_user(store.tracking_uri)
    if state.request is None:
        raise BadInput(
            "\n".join(
                [f"nobody asks that {alias} may point at {version.ref}", *(f"  {why}" for why in state.ignored_records)]
            ),
            fix=f"ask first: limbeck request {version.ref} --alias {alias} --reason ...",
        )
    policy = protection.protecting_policy(store, version.name, alias)
    if why := ineligibility_reason(version, state.request, policy, who):
        raise Refused(f"an answer of {who} on {version.ref} would not count: {why}")
    return state.request


def ineligibility_reason(version: Version, request: Request, policy: Policy | None, who: str) -> str | None:
    """Why the answer of somebody does not count; None where it does, as far as the policy is known."""
    if who == version.author:
        return f"{who} made {version.ref}, and the author does not approve"
    if who == request.who:
        return f"{who} asked for it, and who asks does not approve"
    rules = policy.approvals if policy else None
    if rules and rules.people and who not in rules.people:
        return f"the policy of {request.alias} asks {', '.join(rules.people)}"
    if rules and rules.keys and who not in rules.keys:
        return f"the policy of {request.alias} asks for signed approvals, and has no key of {who}"
    return None


def _wrong_key_reason(policy: Policy | None, approval: Approval) -> str | None:
    """How an approval is not signed as a policy asks; None where it is."""
    key = policy.approvals.keys.get(approval.who) if policy and policy.approvals else None
    if key is None or approval.key == key:
        return None
    by = f"it is signed by {approval.key}" if approval.key else "it is not signed"
    return f"the policy asks for a signature by {key}, and {by}"


def request_and_answers(store: Store, version: Version, alias: str) -> tuple[Request | None, tuple[Approval, ...]]:
    """The newest request that counts, for the very files of a version, and the answers to it, oldest first."""
    asked = load_approval_state(store, version, alias)
    return asked.request, asked.answers


def load_approval_state(store: Store, version: Version, alias: str) -> ApprovalState:
    """All that was asked and answered about a version and an alias."""
    tags = store.client.get_model_version(version.name, str(version.version)).tags
    if not any(key.startswith(REQUEST_TAG_PREFIX) for key in tags):
        return ApprovalState(version)
    return approval_state_from_tags(version, tags, log.read_entries(store, version.name), alias)


def approval_state_from_tags(
    version: Version, tags: Mapping[str, str], entries: list[LedgerEntry], alias: str
) -> ApprovalState:
    """The same, from the tags of the version and the ledger of its model."""
    problems: list[str] = []
    requests = [r for r in _parse_records(tags, REQUEST_TAG_PREFIX, Request, problems) if r.alias == alias]
    answers = _parse_records(tags, APPROVAL_TAG_PREFIX, Approval, problems)
    ended = []
    counts = []
    for each in requests:
        if (each.name, each.version, each.artifact) != (version.name, version.version, version.digest):
            problems.append(f"the request of {each.who} ({each.when:%Y-%m-%d}) is of other files: {each.artifact[:12]}")
        elif any(_ends_request(entry, each) for entry in entries):
            ended.append(each)
        else:
            counts.append(each)
    newest = counts[-1] if counts else None
    digest = newest.digest() if newest else None
    known = {each.digest() for each in requests}
    to_it = tuple(a for a in answers if a.request == digest and a.artifact == version.digest)
    return ApprovalState(
        version,
        newest,
        to_it,
        tuple(ended),
        tuple(a for a in answers if a not in to_it and a.request in known),
        tuple(problems),
    )


def open_requests(store: Store, name: str | None = None) -> list[OpenRequest]:
    """The requests that were neither carried out nor rejected, of one model or of all, oldest first.

    Raises BadInput where there is no such model.
    """
    books = {name: log.read_ledger(store, name)} if name is not None else {}  # raises BadInput
    found = []
    for each in list_versions(store.client, store.tracking_uri, name):
        if not any(key.startswith(REQUEST_TAG_PREFIX) for key in each.tags):
            continue
        version = store.get(f"{each.name}/{each.version}")
        book = books.get(each.name) or log.read_ledger(store, each.name)
        books[each.name] = book
        for alias in sorted({r.alias for r in _parse_records(each.tags, REQUEST_TAG_PREFIX, Request, [])}):
            asked = approval_state_from_tags(version, each.tags, book.entries, alias)
            if asked.request and not asked.is_rejected and book.aliases.get(alias) != version.version:
                found.append(_open(store, asked, asked.request))
    return sorted(found, key=lambda each: each.request.when)


def _open(store: Store, state: ApprovalState, request: Request) -> OpenRequest:
    try:
        policy = protection.protecting_policy(store, request.name, request.alias)
    except Refused:  # it was tampered with: `limbeck models history --verify` tells
        policy = None
    rules = policy.approvals if policy else None
    if rules is None:
        return OpenRequest(state, request, None)
    may = [who for who in rules.people if not ineligibility_reason(state.version, request, policy, who)]
    return OpenRequest(
        state, request, rules.needed or None, tuple(who for who in may if who not in state.newest_answer_by_person)
    )


def _parse_records(tags: Mapping[str, str], prefix: str, record_type: type[Kept], problems: list[str]) -> list[Kept]:
    """The records of the tags that begin with `prefix`, oldest first; what is not as it was written is a problem."""
    found: list[Kept] = []
    for key, value in sorted(tags.items()):
        if not key.startswith(prefix):
            continue
        what = f"the {record_type.__name__.lower()} {key.removeprefix(prefix)}"
        try:
            kept = record_type.model_validate_json(value)
        except ValidationError:
            problems.append(f"{what} cannot be read: it counts for nothing")
            continue
        if key == prefix + kept.digest()[:16]:
            found.append(kept)
        else:
            problems.append(f"{what} was changed through MLflow itself: it counts for nothing")
    return sorted(found, key=lambda kept: kept.when)


def _ends_request(entry: LedgerEntry, request: Request) -> bool:
    """Whether an entry takes the alias off the version that was asked for, after it was asked."""
    leaves = entry.from_version == request.version and entry.to_version != request.version
    return leaves and entry.alias == request.alias and entry.when > request.when


def _write(store: Store, version: Version, key: str, value: str) -> None:
    store.client.set_model_version_tag(version.name, str(version.version), key, value)


def _check_reason(reason: str, subject: str) -> None:
    if not reason.strip():
        raise BadInput(f"{subject} needs a reason", fix="give one: --reason ...")
    _check_length(reason)


def _check_length(reason: str) -> None:
    if len(reason) > log.LONGEST_REASON:
        raise BadInput(f"the reason has {len(reason)} characters, at most {log.LONGEST_REASON} are kept")
