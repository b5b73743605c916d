"""The leaderboard's page in a real browser: plot, filters, order, and tooltips by keys."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from limbeck.evals.leaderboard.page import render_page
from limbeck.evals.leaderboard.rows import leaderboard_rows
from limbeck.registry.mlflow.store import Store
from limbeck.registry.records import Estimate, Version
from tests.evals.leaderboard.test_page import HOSTILE_RECIPE
from tests.web.conftest import CHROMIUM, FLAGS, TIMEOUT_MS

pytest.importorskip("playwright.sync_api")
from playwright.sync_api import expect, sync_playwright

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

SPREAD = Estimate(value=1.0, low=0.5, high=1.5)  # of dollars
Point = tuple[float, float, str]  # x, y, classes


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A headless Chromium; the test is skipped if none is installed."""
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    expect.set_options(timeout=TIMEOUT_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def show(browser: Browser, tmp_path: Path) -> Iterator[Callable[[str], Page]]:
    """A function that opens a page's HTML in a tab 1000 pixels wide. An error in its console fails the test."""
    context = browser.new_context(viewport={"width": 1000, "height": 900})
    context.set_default_timeout(TIMEOUT_MS)
    problems: list[str] = []

    def run(text: str) -> Page:
        file = tmp_path / "page.html"
        file.write_text(text)
        tab = context.new_page()
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        tab.goto(file.as_uri())
        expect(tab.locator("form.controls")).to_be_visible()  # the script ran to its end
        return tab

    yield run
    context.close()
    assert problems == []


def board(tab: Page, number: int = 0) -> Locator:
    """The plot and table of one setting."""
    return tab.locator("section.board").nth(number)


def expect_points(board: Locator, *versions: str) -> None:
    """Wait until the plot shows exactly these versions."""
    points = board.locator(".plot g[data-row]")
    for version in versions:
        expect(board.locator(f'.plot g[data-row][aria-label^="{version},"]')).to_have_count(1)
    expect(points).to_have_count(len(versions))


def expect_rows(board: Locator, *versions: str) -> None:
    """Wait until the table shows exactly these versions, in this order."""
    names = [re.compile(rf"^\s*{version}\b") for version in versions]
    expect(board.locator("tbody tr:visible td:first-child")).to_have_text(names)


def point_positions(board: Locator) -> dict[str, Point]:
    """Version -> where its point is, and its classes. Call `expect_points` first."""
    read = "groups => groups.map(g => [g.ariaLabel, g.getAttribute('transform'), g.getAttribute('class')])"
    found = {}
    for label, transform, classes in board.locator(".plot g[data-row]").evaluate_all(read):
        x, y = re.findall(r"[\d.]+", transform)
        found[label.partition(",")[0]] = (float(x), float(y), classes)
    return found


def expect_no_nan(tab: Page) -> None:
    """Check that no coordinate or text of the page is NaN."""
    assert "NaN" not in tab.content().partition('<script type="application/json"')[0]


@pytest.mark.parametrize("cost", ["usd_per_million_tokens", "decode_tokens_per_s"])
def test_the_plot_is_to_scale(
    store: Store, add_version: Callable[..., Version], show: Callable[[str], Page], cost: str
) -> None:
    for retention, usd in ((1.0, 1.0), (0.8, 0.1), (0.9, 0.01), (0.9, 0.01), (0.7, 0.02)):
        fields = {"decode_tokens_per_s": 10 / usd, "intervals": {"usd_per_million_tokens": SPREAD} if usd == 1 else {}}
        add_version((retention, usd, {"cost_fields": fields}), recipe=HOSTILE_RECIPE)
    add_version()
    rows = leaderboard_rows(store, "m", cost=cost)
    tab = show(render_page("m", rows, cost=cost))
    expect_points(board(tab), "m/1", "m/2", "m/3", "m/4", "m/5")
    points = point_positions(board(tab))
    expensive, middle, cheap = points["m/1"], points["m/2"], points["m/3"]
    in_dollars = cost == "usd_per_million_tokens"
    assert expensive[0] - middle[0] == pytest.approx(middle[0] - cheap[0], abs=0.2)  # each a factor of ten
    assert (expensive[0] > cheap[0]) == in_dollars
    assert middle[1] - cheap[1] == pytest.approx(cheap[1] - expensive[1], abs=0.2)  # each ten points of retention
    best = {row.version for row in rows if row.pareto}
    assert {version for version, point in points.items() if "best" in point[2]} == best == {"m/1", "m/3", "m/4"}
    line = re.fullmatch(r"M([\d.]+) .*H(\d+)", str(tab.locator("path.frontier").get_attribute("d")))
    assert line is not None
    assert float(line[1]) == cheap[0]
    assert (float(line[2]) > expensive[0]) == in_dollars  # it continues to the expensive side
    bars = tab.locator(".plot path.bar").evaluate_all("bars => bars.map(bar => bar.getAttribute('d'))")
    assert sum(bar.count("M") == 6 for bar in bars) == in_dollars  # a cross if the cost has an interval
    assert "alert" in tab.content()
    assert "<script>alert" not in tab.content()
    expect_no_nan(tab)


def test_filters_and_choices_change_plot_and_table(
    store: Store, add_version: Callable[..., Version], show: Callable[[str], Page]
) -> None:
    add_six_versions(add_version)
    tab = show(render_page("m", leaderboard_rows(store, "m")))
    recipe, cost, task = (tab.locator(f"select[name={name}]") for name in ("recipe", "cost", "task"))
    recipe.select_option("small")
    expect_rows(board(tab), "m/3", "m/2", "m/5")
    expect_rows(board(tab, 1), "m/6")
    expect_points(board(tab), "m/2", "m/3")
    expect_points(board(tab, 1), "m/6")
    expect(tab.locator("output[name=count]")).to_have_text("4 of 6 versions")
    recipe.select_option("")
    expect(tab.locator("tbody tr:visible")).to_have_count(6)
    cost.select_option("p50_ms")
    expect(board(tab).locator('.plot g[aria-label^="m/2,"]')).to_have_class(re.compile("beaten"))  # a slow version
    task.select_option("single")
    expect(board(tab).locator("td[data-retention]").first).to_have_text(re.compile(r"^90\.0%"))


def test_a_click_on_a_title_sorts_the_table(
    store: Store, add_version: Callable[..., Version], show: Callable[[str], Page]
) -> None:
    add_six_versions(add_version)
    tab = show(render_page("m", leaderboard_rows(store, "m")))
    by_dollars = board(tab).locator("th[data-key=usd_per_million_tokens] button")
    by_dollars.click()
    expect_rows(board(tab), "m/2", "m/3", "m/1", "m/4", "m/5")  # cheapest first, unmeasured last
    by_dollars.click()
    expect_rows(board(tab), "m/4", "m/1", "m/3", "m/2", "m/5")


def add_six_versions(add_version: Callable[..., Version]) -> None:
    """A teacher; versions of the recipes small and large, one without scores; and one of another harness."""
    add_version((1.0, 3.0, {}), kind="teacher", engine="torch")
    add_version((0.6, 1.0, {"cost_fields": {"p50_ms": 90.0}}), recipe="small", precision="int8-weight")
    add_version((0.8, 2.0, {}), recipe="small")
    add_version((0.7, 10.0, {}), recipe="large")
    add_version(recipe="small")
    add_version((0.9, 0.5, {"harness": "lm-eval 1"}), recipe="small")


def test_arrow_keys_go_from_point_to_point_and_show_their_tooltips(
    store: Store, add_version: Callable[..., Version], show: Callable[[str], Page]
) -> None:
    add_version((1.0, 3.0, {}), kind="teacher", engine="torch")
    add_version((0.8, 1.0, {"cost_fields": {"intervals": {"usd_per_million_tokens": SPREAD}}}), recipe="a<b")
    tab = show(render_page("m", leaderboard_rows(store, "m")))
    tooltip = board(tab).locator(".tip")
    board(tab).locator('.plot g[tabindex="0"]').focus()
    expect(tooltip.locator("b")).to_have_text("m/2")
    for text in ("a<b fp32", "80.0% [75.0%, 85.0%]", "1 [0.5, 1.5]"):
        expect(tooltip).to_contain_text(text)
    tab.keyboard.press("ArrowRight")
    expect(tooltip.locator("b")).to_have_text("m/1")


def test_one_point_and_no_point_can_be_drawn(
    store: Store, add_version: Callable[..., Version], show: Callable[[str], Page]
) -> None:
    add_version((1.0, 2.0, {}), kind="teacher", engine="torch")
    rows = leaderboard_rows(store, "m")
    tab = show(render_page("m", rows))
    expect_points(board(tab), "m/1")
    expect_no_nan(tab)
    tab = show(render_page("m", [row.model_copy(update={"cost": None}) for row in rows]))
    expect(tab.locator("p.empty:visible")).to_contain_text("No shown version has both")
    expect_points(board(tab))
