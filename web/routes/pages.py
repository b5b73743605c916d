"""The pages for reading: open to whoever reaches the address; they change nothing.

Each answers `?format=json` with the same data. Plain functions: FastAPI runs them in threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse

from limbeck.evals.leaderboard import page as leaderboard_page
from limbeck.evals.leaderboard.diff import diff_versions
from limbeck.evals.leaderboard.page import View
from limbeck.registry.catalog.lineage import lineage_trees
from limbeck.registry.catalog.model_card import model_card as model_card
from limbeck.registry.core.errors import BadInput
from limbeck.registry.records import USD, Version
from limbeck.web import leaderboards
from limbeck.web.render import markdown, model_link, render_page
from limbeck.web.site import Site, current_site
from limbeck.web.views import differences, overview
from limbeck.web.views import search as searching
from limbeck.web.views import version as version_page
from limbeck.web.views.plots import draw_lineage_if_small
from limbeck.web.views.version_data import VersionData

router = APIRouter()
SiteDependency = Annotated[Site, Depends(current_site)]
PageNumber = Annotated[int, Query(alias="page", ge=1)]
VersionNumber = Annotated[int, Path(ge=1, lt=10**9)]


class PageNotFound(BadInput):
    """An address of a model, version or alias that is not there."""


def wants_json(request: Request) -> bool:
    """Whether a page is asked for as JSON: `?format=json`."""
    return request.query_params.get("format") == "json"


@contextmanager
def not_found_as_404() -> Iterator[None]:
    """What cannot be found within the block answers 404."""
    try:
        yield
    except BadInput as error:
        raise PageNotFound(error.message, fix=error.fix) from error


@router.get("/")
def index(request: Request, site: SiteDependency) -> Response:
    """All registered models."""
    found = overview.models(site)
    if wants_json(request):
        return JSONResponse([model.to_json() for model in found])
    return render_page(request, "index.html", models=found)


@router.get("/versions")
def search(request: Request, site: SiteDependency, q: str = "", sort: str = "", place: PageNumber = 1) -> Response:
    """The versions of all models that a line asks for."""
    return _versions(request, site, None, q, sort, place)


@router.get("/models/{name}/versions")
def versions(
    request: Request, site: SiteDependency, name: str, q: str = "", sort: str = "", place: PageNumber = 1
) -> Response:
    """The versions of a model that a line asks for; all where there is none."""
    return _versions(request, site, name, q, sort, place)


def _versions(request: Request, site: Site, name: str | None, q: str, sort: str, page_number: int) -> Response:
    if name:
        with not_found_as_404():
            found = searching.search_page(site.store, name, q, sort, page_number)
    else:
        found = searching.search_page(site.store, None, q, sort, page_number)
    if wants_json(request):
        shown = [hit._asdict() | {"version": hit.version and hit.version.model_dump(mode="json")} for hit in found.hits]
        return JSONResponse(shown)
    where = crumbs(name, "versions") if name else [("Models", "/"), ("Search", None)]
    metrics = sorted({metric for hit in found.hits for metric in hit.metrics})
    return render_page(request, "versions.html", name=name, found=found, q=q, sort=sort, metrics=metrics, crumbs=where)


@router.get("/models/{name}")
def leaderboard(
    request: Request,
    site: SiteDependency,
    name: str,
    task: str = "",
    cost: str = USD,
    kind: str = "",
    recipe: str = "",
    precision: str = "",
    sort: str = "",
    reverse: bool = False,
    place: PageNumber = 1,
) -> Response:
    """Cost against quality of a model's versions; each choice is in the address."""
    with not_found_as_404():
        every = site.leaderboards.rows(name)
    view = View(task, cost, kind, recipe, precision, sort, reverse)
    found = leaderboards.leaderboard_page(name, every, view, place)
    if wants_json(request):
        return JSONResponse([row.model_dump(mode="json") for row in found.rows if view.shows(row)])
    return render_page(
        request, "model.html", name=name, board=found, address=leaderboards.page_address, crumbs=crumbs(name)
    )


@router.get("/models/{name}/lineage")
def lineage_page(request: Request, site: SiteDependency, name: str) -> Response:
    """The trees of all versions of a model."""
    with not_found_as_404():
        found = lineage_trees(site.store, name)
    if wants_json(request):
        return JSONResponse([tree.json() for tree in found])
    return render_page(
        request,
        "lineage.html",
        name=name,
        trees=found,
        graph=draw_lineage_if_small(found),
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
    """All that is known of a version.

    Args:
        curve: the metrics whose curves are shown; some that matter most where none is named.
    """
    about = VersionData(site.store, version_or_404(site, name, number))
    if wants_json(request):
        return JSONResponse(about.to_json())
    return render_page(
        request,
        "version.html",
        crumbs=crumbs(name, str(number)),
        **version_page.version_page_values(site, about, curve),
    )


@router.get("/models/{name}/{number}/card")
def card(request: Request, site: SiteDependency, name: str, number: VersionNumber) -> Response:
    """The model card; as it is with `?format=md`."""
    found = version_or_404(site, name, number)
    text = model_card(site.store, found)
    if request.query_params.get("format") == "md":
        return PlainTextResponse(text, media_type="text/markdown; charset=utf-8")
    if wants_json(request):
        return JSONResponse({"version": found.ref, "card": text})
    head, body = markdown(text)
    return render_page(
        request, "card.html", version=found, head=head, body=body, crumbs=crumbs(name, str(number), "card")
    )


@router.get("/models/{name}/{number}/flips")
def flips(
    request: Request,
    site: SiteDependency,
    name: str,
    number: VersionNumber,
    against: str = "",
    task: str = "",
    place: PageNumber = 1,
) -> Response:
    """The documents on which a version and another one differ, the largest difference first.

    Args:
        against: NAME/VERSION or NAME@ALIAS; the teacher where it is not named.
    """
    found = version_or_404(site, name, number)
    differing = differences.flips_page(site.store, found, against, task, place)
    if wants_json(request):
        return JSONResponse([flip.model_dump(mode="json") for flip in differing.flips])
    where = crumbs(name, str(number), "where it differs")
    return render_page(request, "flips.html", version=found, differing=differing, task=task, crumbs=where)


@router.get("/compare")
def compare(
    request: Request, site: SiteDependency, a: str = "", b: str = "", v: Annotated[list[str] | None, Query()] = None
) -> Response:
    """Two versions side by side.

    Args:
        a, b: NAME/VERSION or NAME@ALIAS; differences are a - b.
        v: the two, as the leaderboard's form gives them.
    """
    a, b = (each.strip() for each in [*(v or []), a, b, ""][:2])
    where = [("Models", "/"), ("Compare", None)]
    if not (a and b):
        return render_page(request, "compare.html", a=a, b=b, found=None, crumbs=where)
    with not_found_as_404():
        found = diff_versions(site.store, a, b)
    if wants_json(request):
        return JSONResponse(found.model_dump(mode="json"))
    return render_page(
        request, "compare.html", a=a, b=b, found=found, **differences.comparison_values(site.store, found), crumbs=where
    )


def version_or_404(site: Site, name: str, number: int) -> Version:
    """The version NAME/NUMBER. Raises NotHere."""
    with not_found_as_404():
        return site.store.get(f"{name}/{number}")


def crumbs(*path: str) -> list[tuple[str, str | None]]:
    """From all models down to a page: a model's name, a version's number, and the like; the last is here."""
    steps = [("Models", "/"), *((words, model_link(*path[: place + 1])) for place, words in enumerate(path))]
    return [*steps[:-1], (steps[-1][0], None)]


@router.get("/static/page.{kind}")
def leaderboard_asset(kind: Literal["css", "js"]) -> Response:
    """The look and the plot of the leaderboard, which as one file has them too."""
    return FileResponse(leaderboard_page.STYLE if kind == "css" else leaderboard_page.SCRIPT)
