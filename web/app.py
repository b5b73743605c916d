"""The web application: server-rendered pages over the registry; a page loads nothing from other sites."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from limbeck.registry.core.errors import BadInput, LimbeckError, Refused, Unreachable
from limbeck.registry.mlflow.store import Store
from limbeck.registry.policy.schema import Policy
from limbeck.web.render import render_page
from limbeck.web.routes import actions, history, login, pages
from limbeck.web.security import Guard, GuardMiddleware, NotLoggedIn
from limbeck.web.site import Site, public_address

STATUS: dict[type[Exception], int] = {
    pages.PageNotFound: 404,
    NotLoggedIn: 403,
    Unreachable: 503,
    Refused: 409,
    BadInput: 400,
}
TITLES = {
    400: "Bad request",
    403: "Not logged in",
    404: "Not found",
    409: "Refused",
    503: "The tracking server does not answer",
}


def create_app(
    store: Store,
    *,
    policy: Policy | None = None,
    token: str | None = None,
    mlflow_ui: str | None = None,
    hosts: Iterable[str] = (),
    private: bool = False,
) -> FastAPI:
    """Make the application over a store.

    Args:
        store: the registry; its tracking server may be unreachable for a while.
        policy: the policy of aliases that no policy protects; None: they cannot be promoted here.
        token: needed for every change; None: nothing can be changed.
        mlflow_ui: address of MLflow's own pages; None: the tracking server, if its address is http(s).
        hosts: host names of the pages, see `limbeck.web.security.Guard`.
        private: reading needs the token too.
    """
    app = FastAPI(title="Limbeck", docs_url=None, redoc_url=None, openapi_url=None)
    ui = public_address(mlflow_ui or store.tracking_uri)
    guard = Guard(token, hosts=hosts, private=private)
    app.state.site = Site(store, guard, policy, ui)
    for routes in (login, history, actions, pages):
        app.include_router(routes.router)
    app.mount("/static", StaticFiles(directory=Path(__file__).with_name("static")), name="static")

    app.add_middleware(GuardMiddleware, guard=guard)
    app.add_exception_handler(LimbeckError, _error_response)
    app.add_exception_handler(HTTPException, _error_response)
    app.add_exception_handler(RequestValidationError, _error_response)
    return app


def _error_response(request: Request, error: Exception) -> Response:
    """The error as a page, or as JSON with `?format=json`."""
    if isinstance(error, HTTPException):
        status, message, fix = error.status_code, str(error.detail), None
        if status == 404 and message == "Not Found":
            message = f"there is no page at {request.url.path}"
    elif isinstance(error, RequestValidationError):
        first = error.errors()[0]
        status = 404 if first["loc"][0] == "path" else 400
        message, fix = f"{first['loc'][-1]}: {first['msg']}", None
    else:
        assert isinstance(error, LimbeckError)
        status = next((code for kind, code in STATUS.items() if isinstance(error, kind)), 500)
        message, fix = error.message, error.fix
    if pages.wants_json(request):
        return JSONResponse({"error": message, "fix": fix}, status)
    title = TITLES.get(status, "Internal error")
    return render_page(request, "error.html", status=status, title=title, message=message, fix=fix)
