"""The pages for reading: open to whoever reaches the address; they change nothing.

Each answers `?format=json` with the same data. Plain functions: FastAPI runs them in threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import FileResponse, JSONResponse

import evals
from evals.page import View
from evals.ranking import USD
from registry.errors import BadInput
from web import boards
from web.render import model_link, page
from web.site import Site, site_of

router = APIRouter()
OfSite = Annotated[Site, Depends(site_of)]


class NotHere(BadInput):
    """An address of a model, version or alias that is not there."""


def wants_json(request: Request) -> bool:
    """Whether a page is asked for as JSON: `?format=json`."""
    return request.query_params.get("format") == "json"


@contextmanager
def looking() -> Iterator[None]:
    """What cannot be found within the block answers 404."""
    try:
        yield
    except BadInput as error:
        raise NotHere(error.message, fix=error.fix) from error


@router.get("/")
def index(request: Request, site: OfSite) -> Response:
    """All registered models."""
    return page(request, "index.html", names=site.store.names())


@router.get("/models/{name}")
def leaderboard(
    request: Request,
    site: OfSite,
    name: str,
    task: str = "",
    cost: str = USD,
    kind: str = "",
    recipe: str = "",
    precision: str = "",
    sort: str = "",
    reverse: bool = False,
    number: Annotated[int, Query(alias="page", ge=1)] = 1,
) -> Response:
    """Cost against quality of a model's versions; each choice is in the address."""
    with looking():
        every = site.boards.rows(name)
    view = View(task, cost, kind, recipe, precision, sort, reverse)
    found = boards.board(name, every, view, number)
    if wants_json(request):
        return JSONResponse([row.model_dump(mode="json") for row in found.rows if view.shows(row)])
    return page(request, "model.html", name=name, board=found, address=boards.address, crumbs=crumbs(name))


def crumbs(*path: str) -> list[tuple[str, str | None]]:
    """From all models down to a page: a model's name, a version's number, and the like; the last is here."""
    steps = [("Models", "/"), *((words, model_link(*path[: place + 1])) for place, words in enumerate(path))]
    return [*steps[:-1], (steps[-1][0], None)]


@router.get("/static/page.{kind}")
def shared(kind: Literal["css", "js"]) -> Response:
    """The look and the plot of the leaderboard, which as one file has them too."""
    return FileResponse(Path(evals.__file__).with_name(f"page.{kind}"))
