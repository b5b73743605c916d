"""Jinja templates into HTML: every value is escaped."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined


@cache
def _environment() -> Environment:
    pages = FileSystemLoader(Path(__file__).with_name("pages"))
    return Environment(loader=pages, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def render(page: str, **values: Any) -> str:
    """The template `web/pages/PAGE` with `values`."""
    return _environment().get_template(page).render(**values)
