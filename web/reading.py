"""The pages for reading: open to whoever reaches the address; they change nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import FileResponse

import evals
from registry.errors import BadInput
from web.render import page
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


@router.get("/static/page.{kind}")
def shared(kind: Literal["css", "js"]) -> Response:
    """The look and the plot of the leaderboard, which as one file has them too."""
    return FileResponse(Path(evals.__file__).with_name(f"page.{kind}"))
