"""The pages for reading; they change nothing. Each also answers `?format=json` with the same data.

The routes are plain functions, not coroutines, so that FastAPI runs them in threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse

from limbeck.evals.leaderboard.diff import diff_versions
from limbeck.evals.leaderboard.page import SCRIPT, STYLE, View
from limbeck.registry.catalog.lineage import lineage_trees
from limbeck.registry.catalog.model_card import model_card
from limbeck.registry.core.errors import BadInput
from limbeck.registry.records import USD, Version
from limbeck.web import leaderboards
from limbeck.web.render import markdown, model_link, render_page
from limbeck.web.site import Site, current_site
from limbeck.web.views import differences, overview
from limbeck.web.views.plots import draw_lineage_if_small
from limbeck.web.views.search import search_page
from limbeck.web.views.version import version_page_values
from limbeck.web.views.version_data import VersionData

router = APIRouter()
SiteDependency = Annotated[Site, Depends(current_site)]
PageNumber = Annotated[int, Query(alias="page", ge=1)]
VersionNumber = Annotated[int, Path(ge=1, lt=10**9)]


class PageNotFound(BadInput):
    """The model, version or alias of an address does not exist."""


def wants_json(request: Request) -> bool:
    """Whether the request asks for JSON: `?format=json`."""
    return request.query_params.get("format") == "json"


@contextmanager
def not_found_as_404() -> Iterator[None]:
    """Turn a BadInput of the block into a 404."""
    try:
        yield
    except BadInput as error:
        raise PageNotFound(error.message, fix=error.fix) from error


@router.get("/")
def index(request: Request, site: SiteDependency) -> Response:
    """All registered models."""
    models = overview.models(site)
    if wants_json(request):
        return JSONResponse([model.to_json() for model in models])
    return render_page(request, "index.html", models=models)


@router.get("/versions")
def search(
    request: Request, site: SiteDependency, q: str = "", sort: str = "", page_number: PageNumber = 1
) -> Response:
    """Search the versions of all models."""
    return _versions(request, site, None, q, sort, page_number)


@router.get("/models/{name}/versions")
def versions(
    request: Request, site: SiteDependency, name: str, q: str = "", sort: str = "", page_number: PageNumber = 1
) -> Response:
    """Search the versions of a model; all versions without `q`."""
    return _versions(request, site, name, q, sort, page_number)


def _versions(request: Request, site: Site, name: str | None, q: str, sort: str, page_number: int) -> Response:
    if name:
        with not_found_as_404():
            results = search_page(site.store, name, q, sort, page_number)
    else:
        results = search_page(site.store, None, q, sort, page_number)
    if wants_json(request):
        hits = [
            hit._asdict() | {"version": hit.version and hit.version.model_dump(mode="json")} for hit in results.hits
        ]
        return JSONResponse(hits)
    path = crumbs(name, "versions") if name else [("Models", "/"), ("Search", None)]
    metrics = sorted({metric for hit in results.hits for metric in hit.metrics})
    return render_page(
        request, "versions.html", name=name, results=results, q=q, sort=sort, metrics=metrics, crumbs=path
    )


def view_of_query(
    task: str = "",
    cost: str = USD,
    kind: str = "",
    recipe: str = "",
    precision: str = "",
    sort: str = "",
    reverse: bool = False,
) -> View:
    """FastAPI dependency: the view of a leaderboard that the address describes."""
    return View(task, cost, kind, recipe, precision, sort, reverse)


@router.get("/models/{name}")
def leaderboard(
    request: Request,
    site: SiteDependency,
    name: str,
    view: Annotated[View, Depends(view_of_query)],
    page_number: PageNumber = 1,
) -> Response:
    """The leaderboard of a model: cost against quality of its versions. All choices are in the address."""
    with not_found_as_404():
        rows = site.leaderboards.rows(name)
    board = leaderboards.leaderboard_page(name, rows, view, page_number)
    if wants_json(request):
        return JSONResponse([row.model_dump(mode="json") for row in board.rows if view.shows(row)])
    return render_page(
        request, "model.html", name=name, board=board, address=leaderboards.page_address, crumbs=crumbs(name)
    )


@router.get("/models/{name}/lineage")
def lineage_page(request: Request, site: SiteDependency, name: str) -> Response:
    """The lineage trees of all versions of a model."""
    with not_found_as_404():
        trees = lineage_trees(site.store, name)
    if wants_json(request):
        return JSONResponse([tree.json() for tree in trees])
    return render_page(
        request,
        "lineage.html",
        name=name,
        trees=trees,
        graph=draw_lineage_if_small(trees),
        crumbs=crumbs(name, "lineage"),
    )


@router.get("/models/{name}/{number}")
def version(
    request: Request,
    site: SiteDependency,
    name: str,
    number: VersionNumber,
    curve: Annotated[list[str] | None, Query()] = None,
) -> Response:
    """The page of a version. `curve` names the metrics to plot, by default the most important ones."""
    data = VersionData(site.store, version_or_404(site, name, number))
    if wants_json(request):
        return JSONResponse(data.to_json())
    values = version_page_values(site, data, curve)
    return render_page(request, "version.html", crumbs=crumbs(name, str(number)), **values)


@router.get("/models/{name}/{number}/card")
def card(request: Request, site: SiteDependency, name: str, number: VersionNumber) -> Response:
    """The model card; its Markdown with `?format=md`."""
    version = version_or_404(site, name, number)
    text = model_card(site.store, version)
    if request.query_params.get("format") == "md":
        return PlainTextResponse(text, media_type="text/markdown; charset=utf-8")
    if wants_json(request):
        return JSONResponse({"version": version.ref, "card": text})
    head, body = markdown(text)
    return render_page(
        request, "card.html", version=version, head=head, body=body, crumbs=crumbs(name, str(number), "card")
    )


@router.get("/models/{name}/{number}/flips")
def flips(
    request: Request,
    site: SiteDependency,
    name: str,
    number: VersionNumber,
    against: str = "",
    task: str = "",
    page_number: PageNumber = 1,
) -> Response:
    """The documents where two versions score differently, the largest difference first.

    Args:
        against: the other one: NAME/VERSION or NAME@ALIAS; by default the teacher.
    """
    version = version_or_404(site, name, number)
    page = differences.flips_page(site.store, version, against, task, page_number)
    if wants_json(request):
        return JSONResponse([flip.model_dump(mode="json") for flip in page.flips])
    path = crumbs(name, str(number), "differences")
    return render_page(request, "flips.html", version=version, page=page, task=task, crumbs=path)


@router.get("/compare")
def compare(
    request: Request, site: SiteDependency, a: str = "", b: str = "", v: Annotated[list[str] | None, Query()] = None
) -> Response:
    """Two versions side by side.

    Args:
        a, b: NAME/VERSION or NAME@ALIAS; differences are a - b.
        v: the same two, as sent by the form of the leaderboard.
    """
    a, b = (ref.strip() for ref in [*(v or []), a, b, ""][:2])
    path = [("Models", "/"), ("Compare", None)]
    if not (a and b):
        return render_page(request, "compare.html", a=a, b=b, comparison=None, crumbs=path)
    with not_found_as_404():
        comparison = diff_versions(site.store, a, b)
    if wants_json(request):
        return JSONResponse(comparison.model_dump(mode="json"))
    values = differences.comparison_values(site.store, comparison)
    return render_page(request, "compare.html", a=a, b=b, comparison=comparison, crumbs=path, **values)


def version_or_404(site: Site, name: str, number: int) -> Version:
    """The version NAME/NUMBER. Raises PageNotFound."""
    with not_found_as_404():
        return site.store.get(f"{name}/{number}")


def crumbs(*path: str) -> list[tuple[str, str | None]]:
    """The (text, link) pairs from the list of models to a page: name, version number, ...; the last has no link."""
    steps = [("Models", "/"), *((text, model_link(*path[: depth + 1])) for depth, text in enumerate(path))]
    return [*steps[:-1], (steps[-1][0], None)]


@router.get("/static/page.{kind}")
def leaderboard_asset(kind: Literal["css", "js"]) -> Response:
    """The style and script of the leaderboard, shared with `limbeck leaderboard --html`."""
    return FileResponse(STYLE if kind == "css" else SCRIPT)
