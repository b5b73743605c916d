"""The pages that change something, through real clicks and keys in a real browser."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from limbeck.registry.gate import approvals
from limbeck.registry.gate.promotion import promote
from limbeck.registry.ledger import log
from limbeck.registry.records import LedgerEntry
from tests.registry.conftest import POLICY
from tests.web.conftest import TOKEN, Site, log_in
from tests.web.legible import faint, wider

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

PAGES = (
    "/login",
    "/models/still/promote",
    "/models/still/4/promote?alias=seen",
    "/models/still/5/promote?alias=seen",
    "/models/still/rollback?alias=seen",
    "/models/still/history",
    "/requests",
    "/models/still/99/promote",
)

REMEMBER_BUSY = """() => {
  const busy = document.querySelector(".busy");
  new MutationObserver(() => { sessionStorage.busy = busy.textContent; }).observe(busy, { childList: true });
}"""
FOCUSED = "() => document.activeElement.labels?.[0]?.innerText ?? document.activeElement.innerText ?? ''"


def entries(site: Site, alias: str) -> list[LedgerEntry]:
    return [entry for entry in log.read_entries(site.store, "still") if entry.alias == alias]


def test_promote_and_roll_back(tab: Page, site: Site) -> None:
    log_in(tab)
    tab.goto("/models/still/promote")
    tab.get_by_role("link", name="still/5").click()  # the cheapest, which fails
    button = tab.get_by_role("button", name="Promote still/5")
    assert button.is_disabled()
    assert "the verdict is fail" in (tab.locator(".why").first.text_content() or "")
    assert "retention 0.5000 [0.4000, 0.6000], at least 0.8000 is required" in tab.inner_text("main")
    button.click(force=True)
    assert entries(site, "production") == []

    tab.goto("/models/still/3/promote")
    tab.get_by_label("Reason").first.fill("the first")
    tab.get_by_role("button", name="Promote still/3").click()
    tab.get_by_text("still@production is now still/3 (it was nothing)").wait_for()
    assert TOKEN not in tab.url

    tab.get_by_role("link", name="Promote another").click()
    tab.get_by_role("link", name="still/4").click()
    changes = tab.locator("section", has=tab.get_by_role("heading", name="What it replaces"))
    assert "$ per 1M tokens\t2\t1" in changes.inner_text()
    hostile = "<img src=x onerror=alert(1)>"
    tab.on("dialog", lambda dialog: pytest.fail(f"a reason was run: {dialog.message}"))
    tab.get_by_label("Reason").first.fill(hostile)
    tab.evaluate(REMEMBER_BUSY)
    tab.get_by_role("button", name="Promote still/4").dblclick()
    tab.get_by_text("still@production is now still/4 (it was still/3)").wait_for()
    assert "Promoting: verifying files" in tab.evaluate("sessionStorage.busy")  # it said that it was at work
    assert hostile in tab.inner_text("table")
    assert [entry.to_version for entry in entries(site, "production")] == [3, 4]

    tab.get_by_role("link", name="Roll back").click()
    assert "production is still/4 now; it would be still/3 again" in tab.inner_text("main")
    assert "The verdict then: pass" in tab.inner_text("main")
    tab.get_by_role("button", name="Roll back").click()  # the browser asks for the reason first
    assert tab.url.startswith(f"{site.address}/models/still/rollback")
    tab.get_by_label("Reason").fill("slower here")
    tab.get_by_role("button", name="Roll back to still/3").click()
    tab.get_by_text("still@production is now still/3 (it was still/4)").wait_for()
    assert [entry.action for entry in entries(site, "production")] == ["promote", "promote", "rollback"]
    assert "each in its place" in tab.inner_text("main")

    tab.go_back()  # to the form that was sent: it tells what is so now
    tab.get_by_role("button", name="Take production away").wait_for()
    tab.get_by_role("button", name="Log out").click()
    tab.get_by_role("link", name="Log in").wait_for()


def test_keys_alone(tab: Page, site: Site) -> None:
    def to(words: str) -> None:
        """Tab to what says `words`, at most 40 times; it has to show that it has the focus."""
        for _ in range(40):
            tab.keyboard.press("Tab")
            said = tab.evaluate(
                "() => document.activeElement.labels?.[0]?.innerText ?? document.activeElement.innerText"
            )
            if words in (said or ""):
                ring = "() => getComputedStyle(document.activeElement).outlineStyle"
                assert tab.evaluate(ring) not in ("none", ""), words
                return
        pytest.fail(f"the Tab key does not lead to {words!r}")

    tab.goto("/models/still/4/promote?alias=typed")
    to("Skip to the content")
    tab.keyboard.press("Enter")
    to("log in")
    tab.keyboard.press("Enter")
    tab.locator("#token:focus").wait_for()
    tab.keyboard.type(TOKEN)
    tab.keyboard.press("Enter")
    tab.get_by_role("button", name="Log out").wait_for()  # and back where it led from
    to("Reason")
    tab.keyboard.type("without a mouse")
    to("Promote still/4")
    tab.keyboard.press("Enter")
    tab.get_by_text("still@typed is now still/4").wait_for()
    assert [entry.reason for entry in entries(site, "typed")] == ["without a mouse"]


def test_ask_and_answer(tab: Page, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIMBECK_USER", "dan")
    log_in(tab)
    tab.goto("/models/still/3/promote?alias=asked")
    tab.get_by_label("Why it should be").fill("it is the most exact")
    tab.get_by_role("button", name="Ask for it").click()
    tab.get_by_text("An answer of yours would not count").wait_for()
    monkeypatch.setenv("LIMBECK_USER", "bob")
    tab.get_by_role("link", name="Requests").click()
    tab.get_by_role("row", name="it is the most exact").get_by_role("link").click()
    tab.get_by_label("a rejection needs one").fill("not before Monday")
    tab.get_by_role("button", name="Reject").click()
    tab.get_by_text("rejected by bob").wait_for()
    (answer,) = approvals.request_and_answers(site.store, site.still.variants["fp32"], "asked")[1]
    assert (answer.who, answer.answer, answer.reason) == ("bob", "reject", "not before Monday")


@pytest.fixture(scope="module")
def seen(site: Site) -> None:
    """An alias with a past, and a request."""
    for number in (3, 4):
        promote(site.store, f"still/{number}", "seen", POLICY, reason="a reason of some length, to be shown")
    approvals.request_approval(site.store, "still/3", "seen", who="dan", reason="a request of some length, to be shown")


@pytest.mark.usefixtures("seen")
@pytest.mark.parametrize(("scheme", "member"), [("light", False), ("dark", True)])
def test_at_phone_width_in_light_and_dark(browser: Browser, site: Site, scheme: str, member: bool) -> None:
    context = browser.new_context(
        base_url=site.address, viewport={"width": 360, "height": 740}, color_scheme=scheme, has_touch=True
    )
    tab = context.new_page()
    if member:
        log_in(tab)
    for path in PAGES:
        tab.goto(path)
        assert (wider(tab), faint(tab)) == (0, []), path
    context.close()
