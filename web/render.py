"""Render Jinja templates into HTML, with every value escaped."""

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
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= FILTERS
    environment.globals |= {"model_link": model_link, "version_link": version_link, "query": query_string}
    return environment


def render(template: str, /, **values: Any) -> str:
    """Render the template `web/templates/TEMPLATE` with `values`."""
    return _environment().get_template(template).render(**values)


def render_page(request: Request, template: str, /, *, status: int = 200, **values: Any) -> HTMLResponse:
    """Render the answer to a request.

    Args:
        request: needed for the theme, the session and the current path.
        template: a template that extends base.html.
        status: the HTTP status.
        values: variables of the template. Those of base.html: `crumbs`, the (text, link) pairs of the path to this
            page; `flash`, a message on top of the page; `flash_kind`, "done" or "problem".
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
    """The path of a model's leaderboard, or of its page `rest`."""
    return "/".join(["/models", *(quote(str(part), safe="") for part in (name, *rest))])


def version_link(ref: str, *rest: str) -> str:
    """The path of the page of NAME/VERSION, or of its page `rest`."""
    name, _, version = ref.rpartition("/")
    return model_link(name, version, *rest)


def query_string(**values: Any) -> str:
    """`?a=1&b=2` of the values that are not None or empty; "" if there are none."""
    fields = {name: value for name, value in values.items() if value not in (None, "", ())}
    return f"?{urlencode(fields, doseq=True)}" if fields else ""


def markdown(text: str) -> tuple[str, Markup]:
    """Split Markdown into its YAML head and its body as HTML. HTML in the body is escaped, images are not rendered."""
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
