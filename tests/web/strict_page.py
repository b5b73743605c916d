"""Parse a page and check that its tags are closed; a hostile text that must never become markup."""

from __future__ import annotations

from html.parser import HTMLParser

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp; javascript:alert(3)"
VOID = {"meta", "link", "input", "br", "img", "hr"}
SVG = {"path", "rect", "circle", "line"}


class StrictPage(HTMLParser):
    """The tags and text of a page; fails if a tag is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.shown_text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID | SVG:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in SVG:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.shown_text += data

    def links(self) -> list[str]:
        return [str(attrs["href"]) for tag, attrs in self.tags if tag == "a"]
