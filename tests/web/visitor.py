"""A visitor over plain HTTP: reads pages, fills in forms and submits them."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import httpx

from tests.web.conftest import TOKEN, Site


class Page(HTMLParser):
    """The forms, buttons, tags and text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.forms: list[dict[str, str]] = []
        self.buttons: dict[str, bool] = {}  # text -> is enabled
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._button: dict[str, str | None] | None = None
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.tags.append((tag, named))
        if tag == "form":
            self.forms.append({"@": named.get("action") or ""})
        if tag == "input" and self.forms and named.get("name"):
            self.forms[-1][named["name"] or ""] = named.get("value") or ""
        if tag == "button":
            self._button = named

    def handle_endtag(self, tag: str) -> None:
        if tag == "button":
            self._button = None

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._button is not None and data.strip():
            self.buttons[data.strip()] = "disabled" not in self._button

    def form(self, action: str, **filled: str) -> dict[str, str]:
        """The fields of the first form with this action, updated with `filled`."""
        found = next(form for form in self.forms if form["@"] == action)
        return {name: value for name, value in found.items() if name != "@"} | filled


class Visitor:
    """An HTTP client that sends what a browser sends from these pages; logged in if it has a token."""

    def __init__(self, site: Site, *, token: str | None = None) -> None:
        # Do not use the environment's proxy for pages of this machine.
        self.http = httpx.Client(base_url=site.address, headers={"Origin": site.address}, trust_env=False)
        if token is not None:
            assert self.http.post("/login", data={"token": token}).status_code == 303

    def get(self, path: str, status: int = 200) -> Page:
        answer = self.http.get(path)
        assert answer.status_code == status, answer.text
        return Page(answer.text)

    def post(self, path: str, form: dict[str, str], **options: Any) -> httpx.Response:
        return self.http.post(path, data=form, **options)


def logged_in_visitor(site: Site) -> Visitor:
    """A visitor who has logged in."""
    return Visitor(site, token=TOKEN)
