"""The pages for reading in a real browser: the plot is zoomed and moved about, choices go into the address."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from tests.web.conftest import Site

if TYPE_CHECKING:
    from playwright.sync_api import Page


def versions(tab: Page) -> set[str]:
    """The numbers of the versions that the plot shows."""
    labels = tab.eval_on_selector_all(".plot g[data-row]", "all => all.map(each => each.getAttribute('aria-label'))")
    return {label.partition(",")[0].rpartition("/")[2] for label in labels}


def rows(tab: Page) -> list[str]:
    refs = tab.eval_on_selector_all("tbody tr:not([hidden])", "all => all.map(each => each.cells[0].dataset.value)")
    return [ref.rpartition("/")[2] for ref in refs]


def test_choices_go_into_the_address_and_come_back(tab: Page, site: Site) -> None:
    tab.goto("/models/still")
    assert versions(tab) == {"3", "4", "5"}
    tab.get_by_label("precision").select_option("int4")
    tab.locator("select[name=cost]").select_option("p50_ms")
    tab.get_by_role("button", name="cost ratio").click()
    assert tab.url.endswith("/models/still?precision=int4&cost=p50_ms&sort=cost_ratio")
    assert versions(tab) == {"5"}
    tab.goto(tab.url)
    assert rows(tab) == ["5"]
    assert tab.locator("th[aria-sort]").get_attribute("data-key") == "cost_ratio"
    tab.get_by_role("button", name="Show all").click()
    assert set(rows(tab)) == {"1", "2", "3", "4", "5"}
    assert "precision" not in tab.url


def test_the_plot_is_zoomed(tab: Page, site: Site) -> None:
    tab.goto("/models/still")
    tab.get_by_role("button", name="Zoom in").click()
    tab.get_by_role("button", name="Zoom in").click()
    tab.get_by_role("button", name="Zoom in").click()
    assert "zoom=0," in tab.url
    some = versions(tab)
    assert some < {"3", "4", "5"}
    tab.goto(tab.url)  # a link shows the same
    assert versions(tab) == some
    tab.get_by_role("button", name="all", exact=True).click()
    assert versions(tab) == {"3", "4", "5"}
    assert "zoom" not in tab.url
    # A drag over a part, around the cheapest.
    mark = tab.locator('g[aria-label^="still/5"] .mark').bounding_box()
    assert mark is not None
    tab.mouse.move(mark["x"] - 40, mark["y"] - 40)
    tab.mouse.down()
    tab.mouse.move(mark["x"] + 40, mark["y"] + 40, steps=4)
    tab.mouse.up()
    assert versions(tab) == {"5"}
    tab.mouse.dblclick(mark["x"] + 200, mark["y"] - 60)
    assert versions(tab) == {"3", "4", "5"}
    # The wheel scrolls the page, unless Ctrl is held or the plot was clicked.
    tab.mouse.move(mark["x"] + mark["width"] / 2, mark["y"] + mark["height"] / 2)
    tab.keyboard.down("Control")
    for _ in range(5):
        tab.mouse.wheel(0, -600)
    tab.keyboard.up("Control")
    tab.wait_for_url("**zoom=*")
    assert versions(tab) == {"5"}


def test_the_plot_is_read_by_keyboard(tab: Page, site: Site) -> None:
    tab.goto("/models/still")
    tab.locator('.plot g[tabindex="0"]').focus()
    seen = set()
    for _ in range(3):
        seen.add(tab.locator(".tip b").inner_text())
        tab.keyboard.press("ArrowRight")
    assert seen == {"still/3", "still/4", "still/5"}
    tab.keyboard.press("+")
    assert "zoom=0," in tab.url
    tab.keyboard.press("0")
    assert "zoom" not in tab.url
    there = tab.locator(".tip b").inner_text()
    tab.keyboard.press("Enter")
    tab.wait_for_url(f"**/models/{there}")


def test_two_rows_are_chosen_and_compared(tab: Page, site: Site) -> None:
    tab.goto("/models/still")
    button = tab.get_by_role("button", name="Compare")
    assert button.is_disabled()
    tab.get_by_label("compare still/3").check()
    tab.get_by_label("compare still/4").check()
    assert tab.get_by_label("compare still/5").is_disabled()
    button.click()
    assert re.search(r"/compare\?v=still%2F4&v=still%2F3$", tab.url)
    assert tab.get_by_label("A", exact=True).input_value() == "still/4"
    tab.get_by_role("link", name="The documents where they differ").click()
    assert tab.get_by_text("question 5?").count() == 2


@pytest.mark.parametrize("width", [390, 1280])
def test_no_page_is_wider_than_the_window(tab: Page, site: Site, width: int) -> None:
    tab.set_viewport_size({"width": width, "height": 800})
    for path in ("/", "/models/still", "/models/still/4", "/models/still/4/card", "/compare?a=still/4&b=still/3"):
        tab.goto(path)
        assert tab.evaluate("document.documentElement.scrollWidth") <= width, path


def test_dark_and_light_are_switched_and_kept(tab: Page, site: Site) -> None:
    tab.goto("/")
    background = "getComputedStyle(document.body).backgroundColor"
    light = tab.evaluate(background)
    tab.get_by_role("button", name="Dark or light").click()
    dark = tab.evaluate(background)
    assert dark != light
    tab.goto("/models/still")
    assert tab.evaluate(background) == dark


def test_pages_are_read_without_scripts(tab: Page, site: Site) -> None:
    context = tab.context.browser.new_context(java_script_enabled=False, base_url=site.address)  # type: ignore[union-attr]
    page = context.new_page()
    page.goto("/models/still")
    page.get_by_label("precision").select_option("int8")
    page.get_by_role("button", name="Show", exact=True).click()
    assert page.locator("tbody tr:visible").count() == 1
    page.get_by_role("link", name="still/4", exact=True).click()
    assert page.get_by_role("heading", name="Scores").is_visible()
    context.close()
