"""The history of a model: its ledger, with what is wrong on top."""

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
    """The alias moves of a model, newest first.

    Args:
        entry: the sequence of the one that was just written.
    """
    with not_found_as_404():
        book = audit.audit_ledger(site.store, name)
    problems = book.problems()
    if wants_json(request):
        told = {"name": name, "aliases": book.aliases, "problems": problems}
        return JSONResponse(told | {"entries": [each.model_dump(mode="json") for each in book.entries]})
    written = next((each for each in book.entries if each.sequence == entry), None)
    return render_page(
        request,
        "history.html",
        crumbs=[("Models", "/"), (name, model_link(name)), ("history", None)],
        flash=describe_entry(written) if written else None,
        book=book,
        problems=problems,
        unfinished_moves=[book.unfinished_move(alias) for alias in sorted({each.alias for each in book.entries})],
        written=entry,
    )


def describe_entry(entry: LedgerEntry) -> str:
    """What an entry did, in a sentence."""
    alias = f"{entry.name}@{entry.alias}"
    if entry.action == "protect":
        return f"{alias} is {'protected by a policy' if entry.policy else 'protected no longer'}"
    if entry.to_version is None:
        return f"{alias} is taken away"
    was = f"{entry.name}/{entry.from_version}" if entry.from_version is not None else "nothing"
    return f"{alias} is now {entry.name}/{entry.to_version} (it was {was})"
