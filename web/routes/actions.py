"""The pages that change something: promote, roll back, ask, approve, reject; each through the gate of the commands.

A GET shows what the gate says and changes nothing. A POST carries what was shown, and is refused where that is not
so any more.
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
    """The versions that may be promoted, each with the gate's verdict."""
    with not_found_as_404():
        alias_gate = gate.read_alias_gate(site, name, alias)
    candidates, not_judged_count = gate.cheapest_candidates(site, alias_gate) if alias_gate.policy else ([], 0)
    return _alias_page(
        request, "choose.html", alias_gate, "promote", candidates=candidates, not_judged_count=not_judged_count
    )


@router.get("/models/{name}/{number}/promote")
def show_promotion(request: Request, name: str, number: int, site: SiteDependency, alias: str = PRODUCTION) -> Response:
    """What the gate says of a version, what it would replace, who asked and who approved."""
    return _promotion_page(request, site, name, number, alias)


@router.post("/models/{name}/{number}/promote")
def promote(request: Request, name: str, number: int, site: SiteDependency, sent: SentForm) -> Response:
    """Promote it, if the gate still says what the page showed."""
    alias, reason, override = _field(sent, "alias"), sent.get("reason", ""), "override" in sent

    def act() -> str:
        alias_gate, version = _alias_and_version(site, name, number, alias)
        if override and sent.get("confirm", "").strip() != version.ref:
            raise BadInput(f"to go over the verdict, type {version.ref} in the form")
        if alias_gate.last_entry_hash != _field(sent, "last_entry_hash"):
            raise Refused(f"{name}@{alias} was moved meanwhile", fix="look again at what is replaced, then promote")
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
    asked = gate.approval_state(site, alias_gate, version)
    present = f"{name}/{alias_gate.current_version}" if alias_gate.current_version is not None else None
    why = list(_obstacles(request.state.session, alias_gate))
    if alias_gate.current_version == number:
        why.append(f"{alias} is {version.ref} already")
    may_override = (
        bool(verdict and verdict.outcome != "pass" and not why) and gate.override_obstacle(site, alias_gate) is None
    )
    if alias_gate.policy is None and not alias_gate.problem:
        why.append("no policy judges this alias")
    if verdict and verdict.outcome != "pass":
        why.append(f"the verdict is {verdict.outcome}")
    return _alias_page(
        request,
        "promote.html",
        alias_gate,
        "promote",
        error,
        version=version,
        verdict=verdict,
        asked=asked,
        answer_obstacle=gate.answer_obstacle(alias_gate, asked),
        present=present,
        changes=_changes(site, version, present) if present and alias_gate.current_version != number else None,
        why=why,
        may_override=may_override,
        reason=reason,
    )


def _changes(site: Site, version: Version, present: str) -> dict[str, Any] | None:
    """What would be another: tasks with the difference, costs with the ratio; None where the present one is gone."""
    try:
        found: Diff = diff_versions(site.store, version.ref, present)
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
    """Where a rollback leads, and what the verdict on that was."""
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
    back = gate.rollback_target_with_entry(alias_gate)
    target, entry = back or (None, None)
    why = list(_obstacles(request.state.session, alias_gate))
    if back is None:
        why.append(f"nothing was promoted to {alias} that could be rolled back")
    version = None
    if target is not None:
        try:
            version = site.store.get(f"{name}/{target}")
        except BadInput as gone:
            why.append(str(gone))
    verdict = gate.verdict_of_entry(site, version, entry) if version else None
    return _alias_page(
        request,
        "rollback.html",
        alias_gate,
        "roll back",
        error,
        back=back is not None,
        version=version,
        entry=entry,
        verdict=verdict,
        why=why,
        reason=reason,
    )


# --- requests


@router.get("/requests")
def list_requests(request: Request, site: SiteDependency) -> Response:
    """What is asked for and was neither carried out nor rejected, of all models."""
    return render_page(request, "requests.html", requests=approvals.open_requests(site.store))


@router.post("/models/{name}/{number}/request")
def request_promotion(request: Request, name: str, number: int, site: SiteDependency, sent: SentForm) -> Response:
    """Ask that an alias may point at a version."""
    alias, reason = _field(sent, "alias"), sent.get("reason", "")

    def act() -> str:
        alias_gate, version = _alias_and_version(site, name, number, alias)
        approvals.request_approval(site.store, version.ref, alias, who=alias_gate.user, reason=reason)
        return version_link(version.ref, "promote") + query_string(alias=alias) + "#asked"

    try:
        return _act_once(request, site, sent, act)
    except LimbeckError as error:
        return _promotion_page(request, site, name, number, alias, error)


@router.post("/models/{name}/{number}/answer")
def answer_request(request: Request, name: str, number: int, site: SiteDependency, sent: SentForm) -> Response:
    """Approve or reject the request that the page showed, with the verdict that it showed."""
    alias = _field(sent, "alias")

    def act() -> str:
        alias_gate, version = _alias_and_version(site, name, number, alias)
        said = _field(sent, "answer")
        if said not in ("approve", "reject"):
            raise BadInput(f"an answer is approve or reject, not {said!r}")
        asked = gate.approval_state(site, alias_gate, version)
        candidate = gate.judge_candidate(site, alias_gate, version)
        verdict = candidate.verdict if candidate else None
        if asked.request is None or asked.request.digest() != sent.get("request"):
            raise Refused("another request is open now than the one that was shown", fix="look again, then answer")
        if (verdict.content_digest if verdict else "") != _field(sent, "verdict_digest"):
            raise Refused("the verdict is another one now than the one that was shown", fix="look again, then answer")
        approvals.answer_request(
            site.store,
            version.ref,
            alias,
            "approve" if said == "approve" else "reject",
            who=alias_gate.user,
            reason=sent.get("reason", ""),
            shown=approvals.ShownToApprover(verdict),
        )
        return version_link(version.ref, "promote") + query_string(alias=alias) + "#asked"

    try:
        return _act_once(request, site, sent, act)
    except LimbeckError as error:
        return _promotion_page(request, site, name, number, alias, error)


# --- what they share


def _alias_and_version(site: Site, name: str, number: int, alias: str) -> tuple[AliasGate, Version]:
    with not_found_as_404():
        return gate.read_alias_gate(site, name, alias), site.store.get(f"{name}/{number}")


def _obstacles(session: Session | None, alias_gate: AliasGate) -> list[str]:
    """Why nothing can be pressed, whatever the verdict."""
    return (["you are not logged in"] if session is None else []) + ([alias_gate.problem] if alias_gate.problem else [])


def _act_once(request: Request, site: Site, form_fields: dict[str, str], action: Callable[[], str]) -> Response:
    """Go where `action` says; the same form sent again goes there too, and nothing is done twice."""
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
    """A page of one alias; with an error, that is said on top."""
    if isinstance(error, NotLoggedIn | Unreachable):
        raise error
    status = 200 if error is None else 400 if isinstance(error, BadInput) else 409
    aliases = sorted(
        {
            PRODUCTION,
            alias_gate.alias,
            *alias_gate.ledger.aliases,
            *(entry.alias for entry in alias_gate.ledger.entries),
        }
    )
    crumbs = [("Models", "/"), (alias_gate.name, model_link(alias_gate.name)), (current_crumb, None)]
    shared = {"alias_gate": alias_gate, "aliases": aliases, "crumbs": crumbs, "form_id": secrets.token_urlsafe(9)}
    if error is not None:
        shared |= {"flash": str(error), "flash_kind": "problem"}
    return render_page(request, template, status=status, **shared | values)


def _history(name: str, entry: LedgerEntry | None) -> str:
    return model_link(name, "history") + query_string(entry=entry.sequence if entry else None)


def _field(form_fields: dict[str, str], name: str) -> str:
    """A field that every form of these pages has; it may be empty."""
    try:
        return form_fields[name]
    except KeyError:
        raise BadInput(f"the form has no field {name!r}", fix="load the page again") from None
