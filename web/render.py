"""Jinja templates into HTML: every value is escaped."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from fastapi import Request
from fastapi.responses import HTMLResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup

THEMES = ("light", "dark")


@cache
def _environment() -> Environment:
    pages = FileSystemLoader(Path(__file__).with_name("templates"))
    made = Environment(loader=pages, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made.filters |= FILTERS
    made.globals |= {"model_link": model_link, "version_link": version_link, "query": query_string}
    return made


def render(page: str, /, **values: Any) -> str:
    """The template `web/pages/PAGE` with `values`."""
    return _environment().get_template(page).render(**values)


def render_page(request: Request, template: str, /, *, status: int = 200, **values: Any) -> HTMLResponse:
    """The answer to a request: a template that extends base.html.

    Args:
        template: that extends base.html.
        values: of it. `crumbs`, pairs of words and link, lead here; `flash` is said on top, in the manner
            of `flash_kind`: "done" or "problem".
    """
    theme = request.cookies.get("theme", "")
    shared: dict[str, Any] = {
        "here": request.url.path,
        "theme": theme if theme in THEMES else None,
        "session": request.state.session,
        "crumbs": [],
        "flash": None,
        "flash_kind": "done",
    }
    return HTMLResponse(render(template, **shared | values), status)


def model_link(name: str, *rest: str) -> str:
    """The path of a model's leaderboard, or of the page `rest` of it."""
    return "/".join(["/models", *(quote(str(part), safe="") for part in (name, *rest))])


def version_link(ref: str, *rest: str) -> str:
    """The path of the page of NAME/VERSION."""
    name, _, version = ref.rpartition("/")
    return model_link(name, version, *rest)


def query_string(**values: Any) -> str:
    """`?a=1&b=2`, of what is not None or empty; "" where nothing is left."""
    said = {name: value for name, value in values.items() if value not in (None, "", ())}
    return f"?{urlencode(said, doseq=True)}" if said else ""


def markdown(text: str) -> tuple[str, Markup]:
    """The YAML head of a Markdown text, and the rest as HTML: HTML in it is text, and links lead to http(s) alone."""
    head, body = re.fullmatch(r"(?:---\n(.*?)\n---\n)?(.*)", text, re.DOTALL).groups()  # type: ignore[union-attr]
    render = MarkdownIt("commonmark", {"html": False}).enable("table").disable("image").render
    return head or "", Markup(render(body))


def _format_time(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M}"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}{'' if number == 1 else 's'}"


FILTERS: dict[str, Callable[..., str]] = {
    "when": _format_time,
    "bytes": _bytes,
    "count": _count,
    "percent": lambda share: f"{share:.1%}",
    "digits": lambda number: f"{number:,}" if isinstance(number, int) else f"{number:,.4g}",
}
