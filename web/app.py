"""The application: pages rendered on the server from the registry; nothing is fetched from elsewhere."""

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
from limbeck.web.routes import actions, history, login
from limbeck.web.routes import pages as reading
from limbeck.web.security import Guard, GuardMiddleware, NotLoggedIn
from limbeck.web.site import Site, public_address

STATUS: dict[type[Exception], int] = {
    reading.PageNotFound: 404,
    NotLoggedIn: 403,
    Unreachable: 503,
    Refused: 409,
    BadInput: 400,
}
TITLES = {
    400: "This cannot be shown",
    403: "Not logged in",
    404: "Not here",
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
    """The pages over a store.

    Args:
        store: where the versions are; its tracking server may come and go.
        policy: judges for aliases that no policy protects.
        token: what changing anything needs; without one nothing can be changed.
        mlflow_ui: where MLflow's own pages are; the tracking server's address where that is http(s).
        hosts: names that the pages are reached by, see `limbeck.web.security.Guard`.
        private: reading needs the token too.
    """
    app = FastAPI(title="Limbeck", docs_url=None, redoc_url=None, openapi_url=None)
    ui = public_address(mlflow_ui or store.tracking_uri)
    guard = Guard(token, hosts=hosts, private=private)
    app.state.site = Site(store, guard, policy, ui)
    for pages in (login, history, actions, reading):
        app.include_router(pages.router)
    app.mount("/static", StaticFiles(directory=Path(__file__).with_name("static")), name="static")

    app.add_middleware(GuardMiddleware, guard=guard)
    app.add_exception_handler(LimbeckError, _error_response)
    app.add_exception_handler(HTTPException, _error_response)
    app.add_exception_handler(RequestValidationError, _error_response)
    return app


def _error_response(request: Request, error: Exception) -> Response:
    """What went wrong as a page in plain words, or as JSON where that was asked for."""
    if isinstance(error, HTTPException):
        status, message, fix = error.status_code, str(error.detail), None
        if status == 404 and message == "Not Found":
            message = f"there is no page at {request.url.path}"
    elif isinstance(error, RequestValidationError):
        wrong = error.errors()[0]
        field, why = wrong["loc"][-1], wrong["msg"]
        status, message, fix = 404 if wrong["loc"][0] == "path" else 400, f"{field}: {why}", None
    else:
        assert isinstance(error, LimbeckError)
        status = next((code for kind, code in STATUS.items() if isinstance(error, kind)), 500)
        message, fix = error.message, error.fix
    if reading.wants_json(request):
        return JSONResponse({"error": message, "fix": fix}, status)
    title = TITLES.get(status, "This did not work")
    return render_page(request, "error.html", status=status, title=title, message=message, fix=fix)
