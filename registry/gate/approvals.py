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
from limbeck.registry.mlflow.listing import listed
from limbeck.registry.mlflow.store import Store
from limbeck.registry.policy.schema import Policy
from limbeck.registry.records import Approval, LedgerEntry, Request, Verdict, Version

REQUEST = "limbeck.request."
APPROVAL = "limbeck.approval."
Answer = Literal["approve", "reject"]
Kept = TypeVar("Kept", Request, Approval)


@dataclass(frozen=True)
class Asked:
    """What was asked and answered about one version and one alias."""

    version: Version
    request: Request | None = None  # the newest that still counts
    answers: tuple[Approval, ...] = ()  # to it, oldest first
    ended: tuple[Request, ...] = ()  # that do not count any more, oldest first
    earlier: tuple[Approval, ...] = ()  # answers to other requests than `request`, oldest first
    problems: tuple[str, ...] = ()  # what was tampered with, or is of other files

    @property
    def void(self) -> tuple[str, ...]:
        """What counts for nothing, and why."""
        if self.request or not self.ended:
            return self.problems
        last = self.ended[-1]
        words = f"the request of {last.who} ({last.when:%Y-%m-%d}) ended when {last.alias} was moved off the version"
        return (*self.problems, words)

    @property
    def by_person(self) -> dict[str, Approval]:
        """The newest answer of each."""
        return {answer.who: answer for answer in self.answers}

    @property
    def rejected(self) -> bool:
        return any(answer.answer == "reject" for answer in self.by_person.values())


@dataclass(frozen=True)
class OpenRequest:
    """A request that was neither carried out nor rejected."""

    asked: Asked
    request: Request
    needed: int | None  # approvals that the policy which protects the alias asks for; None: it asks for none
    waiting: tuple[str, ...] = ()  # who may still answer, by that policy

    @property
    def approved_by(self) -> tuple[str, ...]:
        return tuple(who for who, answer in self.asked.by_person.items() if answer.answer == "approve")


def request(store: Store, ref: str, alias: str, *, who: str | None = None, reason: str) -> Request:
    """Ask that `alias` may point at a version.

    Raises BadInput: no such version, an alias that cannot be used, no reason or too long a one.
    """
    log.check_alias(alias)
    _check_reason(reason, "a request")
    version = store.get(ref)
    who = who or identity.user(store.tracking_uri)
    asked = Request(
        name=version.name,
        alias=alias,
        version=version.version,
        artifact=version.digest,
        who=who,
        when=datetime.now(UTC),
        reason=reason,
    )
    _write(store, version, REQUEST + asked.digest()[:16], asked.model_dump_json())
    return asked


def answer(
    store: Store,
    ref: str,
    alias: str,
    said: Answer,
    *,
    who: str | None = None,
    reason: str,
    verdict: Verdict | None = None,
    expected: str | None = None,
) -> Approval:
    """Say yes or no to the newest request that `alias` may point at a version.

    Signed where a key is configured, see registry.core.signing. A second answer of the same person is kept beside the
    first, and counts instead of it.

    Args:
        verdict: that the person was shown.
        expected: digest of the request that the person was shown.

    Raises:
        Refused: the answer of this person would not count; or there is a newer request than the one shown.
        BadInput: nobody asks for it; no such version, no reason or too long a one.
    """
    log.check_alias(alias)
    if said == "reject":
        _check_reason(reason, "a rejection")
    else:
        _check_length(reason)
    version = store.get(ref)
    who = who or identity.user(store.tracking_uri)
    asked = about(store, version, alias)
    asked_for = check(store, asked, alias, who)
    if expected not in (None, asked_for.digest()):
        raise Refused(f"{asked_for.who} asks for {version.ref} anew", fix="look at the request again")
    policy = protection.policy_of(store, version.name, alias)
    draft = Approval(
        request=asked_for.digest(),
        artifact=version.digest,
        verdict=verdict.judgement if verdict else None,
        answer=said,
        who=who,
        when=datetime.now(UTC),
        reason=reason,
    )
    if signature := signing.sign(signed(draft)):
        draft = draft.model_copy(update=signature._asdict())
    if why := _other_key(policy, draft):
        raise Refused(
            f"an answer of {who} on {version.ref} would not count: {why}",
            fix=f"name the file of that key: {signing.KEY_FILE}=FILE",
        )
    _write(store, version, APPROVAL + draft.digest()[:16], draft.model_dump_json())
    return draft


def signed(approval: Approval) -> bytes:
    """What the signature of an approval is over: the digest of all but the key and the signature."""
    return signing.APPROVAL + approval.model_copy(update={"key": None, "signature": None}).digest().encode()


def check(store: Store, asked: Asked, alias: str, who: str | None = None) -> Request:
    """The request that somebody may answer. Raises BadInput where there is none, Refused where they may not."""
    version, who = asked.version, who or identity.user(store.tracking_uri)
    if asked.request is None:
        raise BadInput(
            "\n".join([f"nobody asks that {alias} may point at {version.ref}", *(f"  {why}" for why in asked.void)]),
            fix=f"ask first: limbeck request {version.ref} --to {alias} --reason ...",
        )
    policy = protection.policy_of(store, version.name, alias)
    if why := no_say(version, asked.request, policy, who):
        raise Refused(f"an answer of {who} on {version.ref} would not count: {why}")
    return asked.request


def no_say(version: Version, asked: Request, policy: Policy | None, who: str) -> str | None:
    """Why the answer of somebody does not count; None where it does, as far as the policy is known."""
    if who == version.author:
        return f"{who} made {version.ref}, and the author does not approve"
    if who == asked.who:
        return f"{who} asked for it, and who asks does not approve"
    rules = policy.approvals if policy else None
    if rules and rules.people and who not in rules.people:
        return f"the policy of {asked.alias} asks {', '.join(rules.people)}"
    if rules and rules.keys and who not in rules.keys:
        return f"the policy of {asked.alias} asks for signed approvals, and has no key of {who}"
    return None


def _other_key(policy: Policy | None, given: Approval) -> str | None:
    """How an approval is not signed as a policy asks; None where it is."""
    key = policy.approvals.keys.get(given.who) if policy and policy.approvals else None
    if key is None or given.key == key:
        return None
    by = f"it is signed by {given.key}" if given.key else "it is not signed"
    return f"the policy asks for a signature by {key}, and {by}"


def find(store: Store, version: Version, alias: str) -> tuple[Request | None, tuple[Approval, ...]]:
    """The newest request that counts, for the very files of a version, and the answers to it, oldest first."""
    asked = about(store, version, alias)
    return asked.request, asked.answers


def about(store: Store, version: Version, alias: str) -> Asked:
    """All that was asked and answered about a version and an alias."""
    tags = store.client.get_model_version(version.name, str(version.version)).tags
    if not any(key.startswith(REQUEST) for key in tags):
        return Asked(version)
    return read(version, tags, log.entries(store, version.name), alias)


def read(version: Version, tags: Mapping[str, str], entries: list[LedgerEntry], alias: str) -> Asked:
    """The same, from the tags of the version and the ledger of its model."""
    problems: list[str] = []
    requests = [r for r in _parsed(tags, REQUEST, Request, problems) if r.alias == alias]
    answers = _parsed(tags, APPROVAL, Approval, problems)
    ended = []
    counts = []
    for each in requests:
        if (each.name, each.version, each.artifact) != (version.name, version.version, version.digest):
            problems.append(f"the request of {each.who} ({each.when:%Y-%m-%d}) is of other files: {each.artifact[:12]}")
        elif any(_moved_off(entry, each) for entry in entries):
            ended.append(each)
        else:
            counts.append(each)
    newest = counts[-1] if counts else None
    digest = newest.digest() if newest else None
    known = {each.digest() for each in requests}
    to_it = tuple(a for a in answers if a.request == digest and a.artifact == version.digest)
    return Asked(
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
    books = {name: log.read(store, name)} if name is not None else {}  # raises BadInput
    found = []
    for each in listed(store.client, store.tracking_uri, name):
        if not any(key.startswith(REQUEST) for key in each.tags):
            continue
        version = store.get(f"{each.name}/{each.version}")
        book = books.get(each.name) or log.read(store, each.name)
        books[each.name] = book
        for alias in sorted({r.alias for r in _parsed(each.tags, REQUEST, Request, [])}):
            asked = read(version, each.tags, book.entries, alias)
            if asked.request and not asked.rejected and book.aliases.get(alias) != version.version:
                found.append(_open(store, asked, asked.request))
    return sorted(found, key=lambda each: each.request.when)


def _open(store: Store, asked: Asked, request: Request) -> OpenRequest:
    try:
        policy = protection.policy_of(store, request.name, request.alias)
    except Refused:  # it was tampered with: `limbeck models history --verify` tells
        policy = None
    rules = policy.approvals if policy else None
    if rules is None:
        return OpenRequest(asked, request, None)
    may = [who for who in rules.people if not no_say(asked.version, request, policy, who)]
    return OpenRequest(asked, request, rules.needed or None, tuple(who for who in may if who not in asked.by_person))


def _parsed(tags: Mapping[str, str], prefix: str, record: type[Kept], problems: list[str]) -> list[Kept]:
    """The records of the tags that begin with `prefix`, oldest first; what is not as it was written is a problem."""
    found: list[Kept] = []
    for key, value in sorted(tags.items()):
        if not key.startswith(prefix):
            continue
        what = f"the {record.__name__.lower()} {key.removeprefix(prefix)}"
        try:
            kept = record.model_validate_json(value)
        except ValidationError:
            problems.append(f"{what} cannot be read: it counts for nothing")
            continue
        if key == prefix + kept.digest()[:16]:
            found.append(kept)
        else:
            problems.append(f"{what} was changed through MLflow itself: it counts for nothing")
    return sorted(found, key=lambda kept: kept.when)


def _moved_off(entry: LedgerEntry, request: Request) -> bool:
    """Whether an entry takes the alias off the version that was asked for, after it was asked."""
    leaves = entry.from_version == request.version and entry.to_version != request.version
    return leaves and entry.alias == request.alias and entry.when > request.when


def _write(store: Store, version: Version, key: str, value: str) -> None:
    store.client.set_model_version_tag(version.name, str(version.version), key, value)


def _check_reason(reason: str, what: str) -> None:
    if not reason.strip():
        raise BadInput(f"{what} needs a reason", fix="give one: --reason ...")
    _check_length(reason)


def _check_length(reason: str) -> None:
    if len(reason) > log.LONGEST_REASON:
        raise BadInput(f"the reason has {len(reason)} characters, at most {log.LONGEST_REASON} are kept")
