"""The pages that change something, through real clicks and keys in a real browser."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from limbeck.registry.gate import approvals
from limbeck.registry.gate.promotion import promote
from limbeck.registry.ledger import log
from limbeck.registry.records import LedgerEntry
from tests.registry.conftest import POLICY
from tests.web.conftest import TIMEOUT_MS, TOKEN, Site, log_in
from tests.web.readability import low_contrast_texts, overflow_pixels

pytest.importorskip("playwright.sync_api")
from playwright.sync_api import expect

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
FOCUSED_TEXT = "() => document.activeElement.labels?.[0]?.innerText ?? document.activeElement.innerText ?? ''"
FOCUSED_OUTLINE = "() => getComputedStyle(document.activeElement).outlineStyle"


def entries(site: Site, alias: str) -> list[LedgerEntry]:
    return [entry for entry in log.read_entries(site.store, "still") if entry.alias == alias]


def test_promote_and_roll_back(tab: Page, site: Site) -> None:
    main = tab.locator("main")
    log_in(tab)
    tab.goto("/models/still/promote")
    tab.get_by_role("link", name="still/5").click()  # the cheapest, which fails
    button = tab.get_by_role("button", name="Promote still/5")
    expect(button).to_be_disabled()
    expect(tab.locator(".why").first).to_contain_text("the verdict is fail")
    expect(main).to_contain_text("retention 0.5000 [0.4000, 0.6000], at least 0.8000 is required")
    button.click(force=True)
    assert entries(site, "production") == []

    tab.goto("/models/still/3/promote")
    tab.get_by_label("Reason").first.fill("the first")
    tab.get_by_role("button", name="Promote still/3").click()
    expect(tab.get_by_text("still@production is now still/3 (before: not set)")).to_be_visible()
    assert TOKEN not in tab.url

    tab.get_by_role("link", name="Promote another version").click()
    tab.get_by_role("link", name="still/4").click()
    changes = tab.locator("section", has=tab.get_by_role("heading", name="What it replaces"))
    expect(changes).to_contain_text("$ per 1M tokens 2 1", use_inner_text=True)
    hostile = "<img src=x onerror=alert(1)>"
    tab.on("dialog", lambda dialog: pytest.fail(f"a reason ran as a script: {dialog.message}"))
    tab.get_by_label("Reason").first.fill(hostile)
    tab.evaluate(REMEMBER_BUSY)
    tab.get_by_role("button", name="Promote still/4").dblclick()
    expect(tab.get_by_text("still@production is now still/4 (before: still/3)")).to_be_visible()
    assert "Promoting: verifying files" in tab.evaluate("sessionStorage.busy")
    expect(tab.locator("table")).to_contain_text(hostile)
    assert [entry.to_version for entry in entries(site, "production")] == [3, 4]

    tab.get_by_role("link", name="Roll back").click()
    expect(main).to_contain_text("production is still/4 now; after the rollback, still/3", use_inner_text=True)
    expect(main).to_contain_text("Verdict at that time: pass", use_inner_text=True)
    tab.get_by_role("button", name="Roll back").click()  # the browser asks for the reason first
    expect(tab).to_have_url(re.compile(r"/models/still/rollback\b"))
    tab.get_by_label("Reason").fill("slower here")
    tab.get_by_role("button", name="Roll back to still/3").click()
    expect(tab.get_by_text("still@production is now still/3 (before: still/4)")).to_be_visible()
    assert [entry.action for entry in entries(site, "production")] == ["promote", "promote", "rollback"]
    expect(main).to_contain_text("the chain of hashes and the aliases agree")

    tab.go_back()  # to the form that was sent: it shows the current state
    expect(tab.get_by_role("button", name="Remove production")).to_be_visible()
    tab.get_by_role("button", name="Log out").click()
    expect(tab.get_by_role("link", name="Log in")).to_be_visible()


def tab_to(tab: Page, text: str) -> None:
    """Press Tab, at most 40 times, until the element with this text has the focus and a visible outline."""
    for _ in range(40):
        tab.keyboard.press("Tab")
        if text in (tab.evaluate(FOCUSED_TEXT) or ""):
            assert tab.evaluate(FOCUSED_OUTLINE) not in ("none", ""), text
            return
    pytest.fail(f"the Tab key does not reach {text!r}")


def test_promote_by_keyboard_only(tab: Page, site: Site) -> None:
    tab.goto("/models/still/4/promote?alias=typed")
    tab_to(tab, "Skip to content")
    tab.keyboard.press("Enter")
    expect(tab).to_have_url(re.compile("#main$"))
    tab_to(tab, "log in")
    tab.keyboard.press("Enter")
    expect(tab.locator("#token")).to_be_focused()
    tab.keyboard.type(TOKEN)
    tab.keyboard.press("Enter")
    expect(tab.get_by_role("button", name="Log out")).to_be_visible()  # and back on the promotion page
    tab.wait_for_load_state()
    tab_to(tab, "Reason")
    tab.keyboard.type("without a mouse")
    tab_to(tab, "Promote still/4")
    tab.keyboard.press("Enter")
    expect(tab.get_by_text("still@typed is now still/4")).to_be_visible()
    assert [entry.reason for entry in entries(site, "typed")] == ["without a mouse"]


def test_request_and_reject(tab: Page, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIMBECK_USER", "dan")
    log_in(tab)
    tab.goto("/models/still/3/promote?alias=asked")
    tab.get_by_label("Reason for the request").fill("it is the most exact")
    tab.get_by_role("button", name="Request approval").click()
    expect(tab.get_by_text("Your answer would not count")).to_be_visible()
    monkeypatch.setenv("LIMBECK_USER", "bob")
    tab.get_by_role("link", name="Requests").click()
    tab.get_by_role("row", name="it is the most exact").get_by_role("link").click()
    tab.get_by_label("required to reject").fill("not before Monday")
    tab.get_by_role("button", name="Reject").click()
    expect(tab.get_by_text("rejected by bob")).to_be_visible()
    (answer,) = approvals.request_and_answers(site.store, site.still.variants["fp32"], "asked")[1]
    assert (answer.who, answer.answer, answer.reason) == ("bob", "reject", "not before Monday")


@pytest.fixture(scope="module")
def alias_with_history(site: Site) -> None:
    """An alias `seen` with two promotions, and a request."""
    for number in (3, 4):
        promote(site.store, f"still/{number}", "seen", POLICY, reason="a reason of some length, to be shown")
    approvals.request_approval(site.store, "still/3", "seen", who="dan", reason="a request of some length, to be shown")


@pytest.mark.usefixtures("alias_with_history")
@pytest.mark.parametrize(("scheme", "logged_in"), [("light", False), ("dark", True)])
def test_pages_are_readable_at_phone_width(browser: Browser, site: Site, scheme: str, logged_in: bool) -> None:
    context = browser.new_context(
        base_url=site.address, viewport={"width": 360, "height": 740}, color_scheme=scheme, has_touch=True
    )
    context.set_default_timeout(TIMEOUT_MS)
    tab = context.new_page()
    if logged_in:
        log_in(tab)
    for path in PAGES:
        tab.goto(path)
        assert (overflow_pixels(tab), low_contrast_texts(tab)) == (0, []), path
    context.close()
