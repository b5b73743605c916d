"""The history of a model: its ledger, with any problems on top."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse

from limbeck.registry.gate import audit
from limbeck.registry.records import LedgerEntry
from limbeck.web.render import model_link, render_page
from limbeck.web.routes.pages import not_found_as_404, wants_json
from limbeck.web.site import Site, current_site

router = APIRouter()


@router.get("/models/{name}/history")
def history(request: Request, name: str, site: Annotated[Site, Depends(current_site)], entry: int = 0) -> Response:
    """The ledger of a model, newest entry first; `entry` is the sequence number of the one just written."""
    with not_found_as_404():
        ledger = audit.audit_ledger(site.store, name)
    problems = ledger.problems()
    if wants_json(request):
        entries = [item.model_dump(mode="json") for item in ledger.entries]
        return JSONResponse({"name": name, "aliases": ledger.aliases, "problems": problems, "entries": entries})
    new_entry = next((item for item in ledger.entries if item.sequence == entry), None)
    aliases = sorted({item.alias for item in ledger.entries})
    return render_page(
        request,
        "history.html",
        crumbs=[("Models", "/"), (name, model_link(name)), ("history", None)],
        flash=describe_entry(new_entry) if new_entry else None,
        ledger=ledger,
        problems=problems,
        unfinished_moves=[ledger.unfinished_move(alias) for alias in aliases],
        new_sequence=entry,
    )


def describe_entry(entry: LedgerEntry) -> str:
    """A sentence about what an entry did."""
    alias = f"{entry.name}@{entry.alias}"
    if entry.action == "protect":
        return f"{alias} is {'now protected by a policy' if entry.policy else 'no longer protected'}"
    if entry.to_version is None:
        return f"{alias} was removed"
    before = f"{entry.name}/{entry.from_version}" if entry.from_version is not None else "not set"
    return f"{alias} is now {entry.name}/{entry.to_version} (before: {before})"
