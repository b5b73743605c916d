"""The pages for reading in a real browser: zoom and keys of the plot, filters and their address, themes."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from tests.web.conftest import TIMEOUT_MS, Site
from tests.web.readability import overflow_pixels

pytest.importorskip("playwright.sync_api")
from playwright.sync_api import expect

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page


def expect_points(tab: Page, *versions: int) -> None:
    """Wait until the plot shows exactly these versions of `still`."""
    points = tab.locator(".plot g[data-row]")
    for version in versions:
        expect(points.and_(tab.locator(f'[aria-label^="still/{version},"]'))).to_have_count(1)
    expect(points).to_have_count(len(versions))


def expect_rows(tab: Page, *versions: int) -> None:
    """Wait until the table shows exactly these versions of `still`, in any order."""
    rows = table_rows(tab)
    expect(rows).to_have_count(len(versions))
    for version in versions:
        expect(rows.filter(has=tab.locator(f'td[data-value="still/{version}"]'))).to_have_count(1)


def table_rows(tab: Page) -> Locator:
    """The visible rows of the table."""
    return tab.locator("tbody tr:visible")


def test_filters_go_into_the_address_and_come_back(tab: Page, site: Site) -> None:
    tab.goto("/models/still")
    expect_points(tab, 3, 4, 5)
    tab.get_by_label("precision").select_option("int4")
    tab.locator("select[name=cost]").select_option("p50_ms")
    tab.get_by_role("button", name="cost ratio").click()
    expect(tab).to_have_url(f"{site.address}/models/still?precision=int4&cost=p50_ms&sort=cost_ratio")
    expect_points(tab, 5)
    tab.goto(tab.url)
    expect_rows(tab, 5)
    expect(tab.locator("th[aria-sort]")).to_have_attribute("data-key", "cost_ratio")
    tab.get_by_role("button", name="Show all").click()
    expect_rows(tab, 1, 2, 3, 4, 5)
    expect(tab).not_to_have_url(re.compile("precision"))


def test_the_plot_zooms_by_buttons_drag_and_wheel(tab: Page, site: Site) -> None:
    zoomed = re.compile("zoom=0,")
    tab.goto("/models/still")
    expect_points(tab, 3, 4, 5)
    for _ in range(3):
        tab.get_by_role("button", name="Zoom in").click()
    expect(tab).to_have_url(zoomed)
    points = tab.locator(".plot g[data-row]")
    expect(points).not_to_have_count(3)
    count = points.count()
    tab.goto(tab.url)  # the address keeps the zoom
    expect(points).to_have_count(count)
    tab.get_by_role("button", name="all", exact=True).click()
    expect_points(tab, 3, 4, 5)
    expect(tab).not_to_have_url(re.compile("zoom"))
    # Drag over the part around the cheapest version.
    mark = tab.locator('g[aria-label^="still/5"] .mark').bounding_box()
    assert mark is not None
    tab.mouse.move(mark["x"] - 40, mark["y"] - 40)
    tab.mouse.down()
    tab.mouse.move(mark["x"] + 40, mark["y"] + 40, steps=4)
    tab.mouse.up()
    expect_points(tab, 5)
    tab.mouse.dblclick(mark["x"] + 200, mark["y"] - 60)
    expect_points(tab, 3, 4, 5)
    expect(tab).not_to_have_url(re.compile("zoom"))
    # The wheel scrolls the page, unless Ctrl is held or the plot was clicked.
    tab.mouse.move(mark["x"] + mark["width"] / 2, mark["y"] + mark["height"] / 2)
    tab.keyboard.down("Control")
    for _ in range(5):
        tab.mouse.wheel(0, -600)
    tab.keyboard.up("Control")
    expect(tab).to_have_url(zoomed)
    expect_points(tab, 5)


def test_the_plot_works_by_keyboard(tab: Page, site: Site) -> None:
    tab.goto("/models/still")
    expect_points(tab, 3, 4, 5)
    tab.locator('.plot g[tabindex="0"]').focus()
    tip = tab.locator(".tip b")
    expect(tip).to_be_visible()
    shown = [tip.inner_text()]
    for _ in range(2):
        tab.keyboard.press("ArrowRight")
        expect(tip).not_to_have_text(shown[-1])
        shown.append(tip.inner_text())
    assert set(shown) == {"still/3", "still/4", "still/5"}
    tab.keyboard.press("+")
    expect(tab).to_have_url(re.compile("zoom=0,"))
    tab.keyboard.press("0")
    expect(tab).not_to_have_url(re.compile("zoom"))
    expect(tip).to_be_visible()
    version = tip.inner_text()
    tab.keyboard.press("Enter")
    expect(tab).to_have_url(f"{site.address}/models/{version}")


def test_two_rows_are_selected_and_compared(tab: Page, site: Site) -> None:
    tab.goto("/models/still")
    button = tab.get_by_role("button", name="Compare")
    expect(button).to_be_disabled()
    tab.get_by_label("compare still/3").check()
    tab.get_by_label("compare still/4").check()
    expect(tab.get_by_label("compare still/5")).to_be_disabled()
    button.click()
    expect(tab).to_have_url(f"{site.address}/compare?v=still%2F4&v=still%2F3")
    expect(tab.get_by_label("A", exact=True)).to_have_value("still/4")
    tab.get_by_role("link", name="Documents where they differ").click()
    expect(tab.get_by_text("question 5?")).to_have_count(2)


@pytest.mark.parametrize("width", [390, 1280])
def test_no_page_is_wider_than_the_window(tab: Page, site: Site, width: int) -> None:
    tab.set_viewport_size({"width": width, "height": 800})
    for path in ("/", "/models/still", "/models/still/4", "/models/still/4/card", "/compare?a=still/4&b=still/3"):
        tab.goto(path)
        assert overflow_pixels(tab) == 0, path


def test_the_theme_is_switched_and_kept(tab: Page, site: Site) -> None:
    tab.goto("/")
    body = tab.locator("body")
    background = "body => getComputedStyle(body).backgroundColor"
    light = body.evaluate(background)
    tab.get_by_role("button", name="Dark or light theme").click()
    expect(body).not_to_have_css("background-color", light)
    dark = body.evaluate(background)
    tab.goto("/models/still")
    expect(body).to_have_css("background-color", dark)


def test_pages_work_without_scripts(tab: Page, site: Site) -> None:
    context = tab.context.browser.new_context(java_script_enabled=False, base_url=site.address)  # type: ignore[union-attr]
    context.set_default_timeout(TIMEOUT_MS)
    page = context.new_page()
    page.goto("/models/still")
    page.get_by_label("precision").select_option("int8-weight")
    page.get_by_role("button", name="Show", exact=True).click()
    expect(table_rows(page)).to_have_count(1)
    page.get_by_role("link", name="still/4", exact=True).click()
    expect(page.get_by_role("heading", name="Scores")).to_be_visible()
    context.close()
