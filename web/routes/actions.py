"""The pages that change something: promote, roll back, request, approve, reject. They use the commands' gate.

A GET shows what the gate says and changes nothing. A POST contains what the page showed (verdict, last ledger entry)
and is refused if that has changed since.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import RedirectResponse

from limbeck.evals.leaderboard.diff import Diff, diff_versions
from limbeck.registry.core.errors import BadInput, LimbeckError, Refused, Unreachable
from limbeck.registry.gate import approvals, promotion
from limbeck.registry.records import FIGURES, HEADLINES, LedgerEntry, Version
from limbeck.web.render import model_link, query_string, render_page, version_link
from limbeck.web.routes.pages import not_found_as_404
from limbeck.web.security import NotLoggedIn, Session, require_session_form
from limbeck.web.site import Site, current_site
from limbeck.web.views import gate
from limbeck.web.views.gate import PRODUCTION, AliasGate

router = APIRouter()
SiteDependency = Annotated[Site, Depends(current_site)]
SentForm = Annotated[dict[str, str], Depends(require_session_form)]


# --- promote


@router.get("/models/{name}/promote")
def choose_version(request: Request, name: str, site: SiteDependency, alias: str = PRODUCTION) -> Response:
    """The candidates for promotion, each with its verdict."""
    with not_found_as_404():
        alias_gate = gate.read_alias_gate(site, name, alias)
    candidates, not_judged_count = gate.cheapest_candidates(site, alias_gate)
    return _alias_page(
        request, "choose.html", alias_gate, "promote", candidates=candidates, not_judged_count=not_judged_count
    )


@router.get("/models/{name}/{number}/promote")
def show_promotion(request: Request, name: str, number: int, site: SiteDependency, alias: str = PRODUCTION) -> Response:
    """The verdict on a version, what it would replace, and the request with its answers."""
    return _promotion_page(request, site, name, number, alias)


@router.post("/models/{name}/{number}/promote")
def promote(request: Request, name: str, number: int, site: SiteDependency, sent: SentForm) -> Response:
    """Promote a version, if its verdict is still the one that the page showed."""
    alias, reason, override = _field(sent, "alias"), sent.get("reason", ""), "override" in sent

    def act() -> str:
        alias_gate, version = _alias_and_version(site, name, number, alias)
        if override and sent.get("confirm", "").strip() != version.ref:
            raise BadInput(f"to override the verdict, type {version.ref} in the form")
        if alias_gate.last_entry_hash != _field(sent, "last_entry_hash"):
            raise Refused(f"{name}@{alias} was moved meanwhile", fix="check what is replaced now, then promote again")
        done = promotion.promote(
            site.store,
            version.ref,
            alias,
            alias_gate.fallback_policy,
            who=alias_gate.user,
            reason=reason,
            options=promotion.PromotionOptions(override=override, expected_verdict=_field(sent, "verdict_digest")),
        )
        return _history(name, done.entry)

    try:
        return _act_once(request, site, sent, act)
    except LimbeckError as error:
        return _promotion_page(request, site, name, number, alias, error, reason)


def _promotion_page(
    request: Request,
    site: Site,
    name: str,
    number: int,
    alias: str,
    error: LimbeckError | None = None,
    reason: str = "",
) -> Response:
    alias_gate, version = _alias_and_version(site, name, number, alias)
    candidate = gate.judge_candidate(site, alias_gate, version)
    verdict = candidate.verdict if candidate else None
    approval = gate.approval_state(site, alias_gate, version)
    current_ref = f"{name}/{alias_gate.current_version}" if alias_gate.current_version is not None else None
    is_current = alias_gate.current_version == number
    obstacles = _obstacles(request.state.session, alias_gate)
    if is_current:
        obstacles.append(f"{alias} is {version.ref} already")
    did_not_pass = verdict is not None and verdict.outcome != "pass"
    may_override = did_not_pass and not obstacles and gate.override_obstacle(site, alias_gate) is None
    if alias_gate.policy is None and not alias_gate.problem:
        obstacles.append("this alias has no policy")
    if verdict is not None and did_not_pass:
        obstacles.append(f"the verdict is {verdict.outcome}")
    return _alias_page(
        request,
        "promote.html",
        alias_gate,
        "promote",
        error,
        version=version,
        verdict=verdict,
        approval=approval,
        answer_obstacle=gate.answer_obstacle(alias_gate, approval),
        current_ref=current_ref,
        changes=_changes(site, version, current_ref) if current_ref and not is_current else None,
        obstacles=obstacles,
        may_override=may_override,
        reason=reason,
    )


def _changes(site: Site, version: Version, current_ref: str) -> dict[str, Any] | None:
    """The differences from the current version, per task and cost; None if the current version no longer exists."""
    try:
        found: Diff = diff_versions(site.store, version.ref, current_ref)
    except BadInput:
        return None
    costs = [
        (FIGURES[row.figure], row.b, row.a, row.ratio)
        for row in found.cost
        if row.figure in HEADLINES and (row.a is not None or row.b is not None)
    ]
    tasks = found.quality.tasks if found.quality else ()
    return {"costs": costs, "tasks": tasks, "no_quality": found.no_quality, "no_cost": found.no_cost}


# --- roll back


@router.get("/models/{name}/rollback")
def show_rollback(request: Request, name: str, site: SiteDependency, alias: str = PRODUCTION) -> Response:
    """The version that a rollback leads to, and its verdict at that time."""
    return _rollback_page(request, site, name, alias)


@router.post("/models/{name}/rollback")
def roll_back(request: Request, name: str, site: SiteDependency, sent: SentForm) -> Response:
    """Roll back, if the alias was not moved since the page was shown."""
    alias, reason = _field(sent, "alias"), sent.get("reason", "").strip()

    def act() -> str:
        if not reason:
            raise BadInput("a rollback needs a reason")
        with not_found_as_404():
            alias_gate = gate.read_alias_gate(site, name, alias)
        entry = promotion.rollback(
            site.store,
            name,
            alias,
            who=alias_gate.user,
            reason=reason,
            expected_last_entry=_field(sent, "last_entry_hash"),
        )
        return _history(name, entry)

    try:
        return _act_once(request, site, sent, act)
    except LimbeckError as error:
        return _rollback_page(request, site, name, alias, error, reason)


def _rollback_page(
    request: Request, site: Site, name: str, alias: str, error: LimbeckError | None = None, reason: str = ""
) -> Response:
    with not_found_as_404():
        alias_gate = gate.read_alias_gate(site, name, alias)
    target_with_entry = gate.rollback_target_with_entry(alias_gate)
    target, entry = target_with_entry or (None, None)
    obstacles = _obstacles(request.state.session, alias_gate)
    if target_with_entry is None:
        obstacles.append(f"nothing was promoted to {alias} that could be rolled back")
    version = None
    if target is not None:
        try:
            version = site.store.get(f"{name}/{target}")
        except BadInput as deleted:
            obstacles.append(str(deleted))
    verdict = gate.verdict_of_entry(site, version, entry) if version else None
    return _alias_page(
        request,
        "rollback.html",
        alias_gate,
        "roll back",
        error,
        has_target=target_with_entry is not None,
        version=version,
        entry=entry,
        verdict=verdict,
        obstacles=obstacles,
        reason=reason,
    )


# --- requests


@router.get("/requests")
def list_requests(request: Request, site: SiteDependency) -> Response:
    """The open approval requests of all models."""
    return render_page(request, "requests.html", requests=approvals.open_requests(site.store))


@router.post("/models/{name}/{number}/request")
def request_promotion(request: Request, name: str, number: int, site: SiteDependency, sent: SentForm) -> Response:
    """Request approval to point an alias at a version."""
    alias, reason = _field(sent, "alias"), sent.get("reason", "")

    def act() -> str:
        alias_gate, version = _alias_and_version(site, name, number, alias)
        approvals.request_approval(site.store, version.ref, alias, who=alias_gate.user, reason=reason)
        return version_link(version.ref, "promote") + query_string(alias=alias) + "#approval"

    try:
        return _act_once(request, site, sent, act)
    except LimbeckError as error:
        return _promotion_page(request, site, name, number, alias, error)


@router.post("/models/{name}/{number}/answer")
def answer_request(request: Request, name: str, number: int, site: SiteDependency, sent: SentForm) -> Response:
    """Approve or reject a request, if request and verdict are still those that the page showed."""
    alias = _field(sent, "alias")

    def act() -> str:
        alias_gate, version = _alias_and_version(site, name, number, alias)
        answer = _field(sent, "answer")
        if answer not in ("approve", "reject"):
            raise BadInput(f"the answer must be approve or reject, not {answer!r}")
        approval = gate.approval_state(site, alias_gate, version)
        candidate = gate.judge_candidate(site, alias_gate, version)
        verdict = candidate.verdict if candidate else None
        if approval.request is None or approval.request.digest() != sent.get("request"):
            raise Refused("the open request is not the one that the page showed", fix="reload the page, then answer")
        if (verdict.content_digest if verdict else "") != _field(sent, "verdict_digest"):
            raise Refused("the verdict has changed since the page was shown", fix="reload the page, then answer")
        approvals.answer_request(
            site.store,
            version.ref,
            alias,
            "approve" if answer == "approve" else "reject",
            who=alias_gate.user,
            reason=sent.get("reason", ""),
            shown=approvals.ShownToApprover(verdict),
        )
        return version_link(version.ref, "promote") + query_string(alias=alias) + "#approval"

    try:
        return _act_once(request, site, sent, act)
    except LimbeckError as error:
        return _promotion_page(request, site, name, number, alias, error)


# --- shared


def _alias_and_version(site: Site, name: str, number: int, alias: str) -> tuple[AliasGate, Version]:
    with not_found_as_404():
        return gate.read_alias_gate(site, name, alias), site.store.get(f"{name}/{number}")


def _obstacles(session: Session | None, alias_gate: AliasGate) -> list[str]:
    """Why the form is disabled, whatever the verdict."""
    obstacles = ["you are not logged in"] if session is None else []
    if alias_gate.problem:
        obstacles.append(alias_gate.problem)
    return obstacles


def _act_once(request: Request, site: Site, form_fields: dict[str, str], action: Callable[[], str]) -> Response:
    """Run `action` and redirect to the address that it returns. The same form sent again only redirects."""
    _field(form_fields, "form_id")
    form = "&".join([request.url.path, *(f"{name}={value}" for name, value in sorted(form_fields.items()))])
    return RedirectResponse(site.guard.once_per_form.run(form, action), 303)


def _alias_page(
    request: Request,
    template: str,
    alias_gate: AliasGate,
    current_crumb: str,
    error: LimbeckError | None = None,
    **values: Any,
) -> Response:
    """Render a page of one alias, with `error` on top. Raises errors that are about more than this form."""
    if isinstance(error, NotLoggedIn | Unreachable):
        raise error
    status = 200
    if error is not None:
        status = 400 if isinstance(error, BadInput) else 409
    past_aliases = {entry.alias for entry in alias_gate.ledger.entries}
    aliases = sorted({PRODUCTION, alias_gate.alias, *alias_gate.ledger.aliases, *past_aliases})
    crumbs = [("Models", "/"), (alias_gate.name, model_link(alias_gate.name)), (current_crumb, None)]
    shared = {"alias_gate": alias_gate, "aliases": aliases, "crumbs": crumbs, "form_id": secrets.token_urlsafe(9)}
    if error is not None:
        shared |= {"flash": str(error), "flash_kind": "problem"}
    return render_page(request, template, status=status, **shared | values)


def _history(name: str, entry: LedgerEntry | None) -> str:
    return model_link(name, "history") + query_string(entry=entry.sequence if entry else None)


def _field(form_fields: dict[str, str], name: str) -> str:
    """A field that must be there; it may be empty."""
    try:
        return form_fields[name]
    except KeyError:
        raise BadInput(f"the form has no field {name!r}", fix="reload the page") from None
