"""Rendering: nothing in a Markdown text becomes unsafe HTML."""

from __future__ import annotations

from limbeck.web.render import markdown
from tests.web.strict_page import HOSTILE, StrictPage


def test_html_and_unsafe_links_in_markdown_are_escaped() -> None:
    text = f"---\nlicence: x\n---\n# A\n{HOSTILE}\n\n[a](javascript:alert(1)) ![b](http://elsewhere/x.png)\n"
    head, body = markdown(text)
    assert head == "licence: x"
    page = StrictPage(body)
    assert {tag for tag, _ in page.tags} <= {"h1", "p", "a"}
    assert [link for link in page.links() if not link.startswith("http")] == []
