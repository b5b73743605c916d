"""Log in with the token, and log out."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import RedirectResponse

from limbeck.registry.core.errors import Refused
from limbeck.registry.mlflow.identity import current_user
from limbeck.web.render import render_page
from limbeck.web.security import SESSION_S, NotLoggedIn, read_form, require_session_form, safe_local_path
from limbeck.web.site import Site, current_site

router = APIRouter()
SiteDependency = Annotated[Site, Depends(current_site)]


@router.get("/login")
def form(request: Request, site: SiteDependency, next: str = "/") -> Response:
    """The login form."""
    return _form(request, site, safe_local_path(next))


@router.post("/login")
def log_in(request: Request, site: SiteDependency, sent: Annotated[dict[str, str], Depends(read_form)]) -> Response:
    """Start a session for the token and go back to the page that led here."""
    next_path = safe_local_path(sent.get("next"))
    try:
        cookie = site.guard.log_in(sent.get("token", ""), request.client.host if request.client else "")
    except Refused as refused:
        return _form(request, site, next_path, str(refused), 429 if refused.fix else 403)
    answer = RedirectResponse(next_path, 303)
    answer.set_cookie(
        site.guard.cookie,
        cookie,
        max_age=SESSION_S,
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",
    )
    return answer


@router.post("/logout")
def log_out(
    request: Request, site: SiteDependency, sent: Annotated[dict[str, str], Depends(require_session_form)]
) -> Response:
    """End the session, on the server too."""
    if request.state.session is None:
        raise NotLoggedIn("you are not logged in")
    site.guard.log_out(request.state.session)
    answer = RedirectResponse("/", 303)
    answer.delete_cookie(site.guard.cookie)
    return answer


def _form(request: Request, site: Site, next_path: str, problem: str | None = None, status: int = 200) -> Response:
    return render_page(
        request,
        "login.html",
        status=status,
        crumbs=[("Models", "/"), ("Log in", None)],
        has_token=site.guard.token is not None,
        private=site.guard.private,
        next=next_path,
        problem=problem,
        user=current_user(site.store.tracking_uri),
    )
