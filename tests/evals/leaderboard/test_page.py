"""The HTML of the leaderboard's page."""

from __future__ import annotations

from collections.abc import Callable
from html.parser import HTMLParser

from limbeck.evals.leaderboard.page import render_page
from limbeck.evals.leaderboard.rows import leaderboard_rows
from limbeck.registry.mlflow.store import Store
from limbeck.registry.records import Version


class Page(HTMLParser):
    """What a page fetches, and how often it has each tag; fails if a tag is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.open: list[str] = []
        self.count: dict[str, int] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        self.fetched += [f"{tag} {name}" for name, _ in attrs if name in ("src", "href", "srcset", "action")]
        self.fetched += [tag] if tag in ("link", "iframe", "img") else []
        if tag not in ("meta", "br", "path", "rect", "circle", "line"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("path", "rect", "circle", "line"):
            assert self.open.pop() == tag


HOSTILE_RECIPE = "</script><script>alert('x')</script>&"


def test_the_page_fetches_nothing_and_escapes_names(store: Store, add_version: Callable[..., Version]) -> None:
    add_version((1.0, 2.0, {}), kind="teacher", engine="torch")
    add_version((0.8, 0.1, {}), recipe=HOSTILE_RECIPE, precision="int8-weight")
    add_version((0.7, 0.3, {}), kind="student", engine="torch", recipe="plain")
    add_version()
    text = render_page("m", leaderboard_rows(store, "m"))
    page = Page(text)
    assert page.fetched == []
    assert page.open == []
    assert page.count["tr"] == 5
    assert page.count["script"] == 2  # the data and the code
    assert "<script>alert" not in text
    assert "default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-" in text
    assert "color-scheme: light dark" in text
    assert "light-dark(" in text
    assert "@import" not in text
    assert "url(" not in text.replace("url(#", "")  # references within the page are allowed
    Page(render_page("m", []))
