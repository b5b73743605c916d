"""The leaderboard's page: what is in it, and what a real browser makes of it where there is one."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from limbeck.evals.leaderboard.page import render_page
from limbeck.evals.leaderboard.rows import leaderboard_rows
from limbeck.registry.mlflow.store import Store
from limbeck.registry.records import Estimate, Version


class Page(HTMLParser):
    """What a page fetches, its scripts, its marks, and whether its tags close."""

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


EVIL = "</script><script>alert('x')</script>&"


def test_the_page_stands_alone_and_escapes(store: Store, add: Callable[..., Version]) -> None:
    add((1.0, 2.0, {}), kind="teacher", engine="torch")
    add((0.8, 0.1, {}), recipe=EVIL, precision="int8")
    add((0.7, 0.3, {}), kind="student", engine="torch", recipe="plain")
    add()
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
    assert "url(" not in text.replace("url(#", "")  # but for parts of the page itself
    Page(render_page("m", []))


@pytest.fixture
def browse(tmp_path: Path) -> Callable[..., str]:
    """What Chromium makes of a page: its document after its script, and then `clicks`, ran."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium is installed")

    def run(text: str, clicks: str = "") -> str:
        if clicks:  # the page's own policy lets no other script run
            text = re.sub("script-src 'sha256-[^']*'", "script-src 'unsafe-inline'", text)
            text = text.replace("</body>", f"<script>{clicks}</script></body>")
        file = tmp_path / "page.html"
        file.write_text(text)
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
        command = [browser, *flags, f"--user-data-dir={tmp_path / 'chromium'}", "--window-size=1000,900", "--dump-dom"]
        done = subprocess.run([*command, file.as_uri()], capture_output=True, text=True, timeout=60, check=True)
        return done.stdout

    return run


Place = tuple[float, float, str]  # x, y, classes


def points(document: str, board: int = 0) -> dict[str, Place]:
    """Version -> where it is drawn, in the plot of a board."""
    svg = document.split('<section class="board">')[board + 1].split("</svg>")[0]
    mark = re.compile(r'<g class="([^"]*)" transform="translate\(([\d.]+) ([\d.]+)\)"[^>]*aria-label="([^,]*),')
    return {version: (float(x), float(y), classes) for classes, x, y, version in mark.findall(svg)}


def visible(document: str) -> list[str]:
    """The versions that the table shows, in its order."""
    lines = re.findall(r'<tr class="[^"]*" data-row="\d+"( hidden="")?><td data-value="([^"]*)"', document)
    return [version for hidden, version in lines if not hidden]


@pytest.mark.parametrize("cost", ["usd_per_million_tokens", "decode_tokens_per_s"])
def test_a_browser_draws_the_plot_to_scale(
    store: Store, add: Callable[..., Version], browse: Callable[..., str], cost: str
) -> None:
    spread = Estimate(value=1.0, low=0.5, high=1.5)
    for retention, usd in ((1.0, 1.0), (0.8, 0.1), (0.9, 0.01), (0.9, 0.01), (0.7, 0.02)):
        fields = {"decode_tokens_per_s": 10 / usd, "intervals": {"usd_per_million_tokens": spread} if usd == 1 else {}}
        add((retention, usd, {"cost_fields": fields}), recipe=EVIL)
    add()
    found = leaderboard_rows(store, "m", cost=cost)
    document = browse(render_page("m", found, cost=cost))
    places = points(document)
    assert places.keys() == {"m/1", "m/2", "m/3", "m/4", "m/5"}
    dear, middle, cheap = places["m/1"], places["m/2"], places["m/3"]
    assert dear[0] - middle[0] == pytest.approx(middle[0] - cheap[0], abs=0.2)  # a factor of ten each
    assert (dear[0] > cheap[0]) == (cost == "usd_per_million_tokens")
    assert middle[1] - cheap[1] == pytest.approx(cheap[1] - dear[1], abs=0.2)  # ten points each
    best = {row.version for row in found if row.pareto}
    assert {version for version, place in places.items() if "best" in place[2]} == best == {"m/1", "m/3", "m/4"}
    line = re.search(r'class="frontier" d="M([\d.]+) [^"]*H(\d+)"', document)
    assert line is not None
    assert float(line[1]) == cheap[0]
    assert (float(line[2]) > dear[0]) == (cost == "usd_per_million_tokens")  # beyond the dearest, to its side
    bars = re.findall(r'<path class="bar" d="([^"]*)"', document)
    assert sum(bar.count("M") == 6 for bar in bars) == (cost == "usd_per_million_tokens")  # a cross, where measured
    assert "alert" in document
    assert "<script>alert" not in document
    assert "NaN" not in document.partition('<script type="application/json"')[0]


def test_a_browser_sorts_and_filters(store: Store, add: Callable[..., Version], browse: Callable[..., str]) -> None:
    add((1.0, 3.0, {}), kind="teacher", engine="torch")
    add((0.6, 1.0, {"cost_fields": {"p50_ms": 90.0}}), recipe="small", precision="int8")
    add((0.8, 2.0, {}), recipe="small")
    add((0.7, 10.0, {}), recipe="large")
    add(recipe="small")
    add((0.9, 0.5, {"harness": "lm-eval 1"}), recipe="small")
    page = render_page("m", leaderboard_rows(store, "m"))
    choose = "controls.elements.{}.value = '{}'; controls.dispatchEvent(new Event('change'));"
    small = browse(page, choose.format("recipe", "small"))
    assert visible(small) == ["m/3", "m/2", "m/5", "m/6"]
    assert points(small).keys() == {"m/2", "m/3"}
    assert points(small, 1).keys() == {"m/6"}
    assert "4 of 6 versions" in browse(
        page, choose.format("recipe", "small") + "document.title = controls.elements.count.value"
    )
    again = browse(page, choose.format("recipe", "small") + choose.format("recipe", ""))
    assert len(visible(again)) == 6
    by_p50 = choose.format("cost", "p50_ms")
    assert "beaten" in points(browse(page, by_p50))["m/2"][2]  # it is slower than the teacher
    by_task = browse(page, choose.format("task", "single"))
    assert re.search(r'data-retention="">90.0%<small>', by_task)
    click = "document.querySelectorAll('.board th button')[2].click();"
    assert visible(browse(page, click))[:5] == ["m/2", "m/3", "m/1", "m/4", "m/5"]  # cheapest first, unmeasured last
    assert visible(browse(page, click + click))[:5] == ["m/4", "m/1", "m/3", "m/2", "m/5"]


def test_a_browser_tells_of_the_point_that_has_the_focus(
    store: Store, add: Callable[..., Version], browse: Callable[..., str]
) -> None:
    add((1.0, 3.0, {}), kind="teacher", engine="torch")
    add(
        (0.8, 1.0, {"cost_fields": {"intervals": {"usd_per_million_tokens": Estimate(value=1.0, low=0.5, high=1.5)}}}),
        recipe="a<b",
    )
    page = render_page("m", leaderboard_rows(store, "m"))
    focus = "const first = document.querySelector('.plot g[tabindex=\"0\"]'); first.focus();"
    press = "first.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight', bubbles: true}));"
    tip = re.compile(r'<div class="tip"[^>]*>(.*?)</div>')
    first, second = (tip.search(browse(page, clicks)) for clicks in (focus, focus + press))
    assert first is not None
    assert second is not None
    told = [each.group(1) for each in (first, second)]
    assert sorted(each.split("</b>")[0] for each in told) == ["<b>m/1", "<b>m/2"]
    student = next(each for each in told if "m/2" in each)
    assert "a&lt;b fp32" in student
    assert "80.0% [75.0%, 85.0%]" in student
    assert "1 [0.5, 1.5]" in student


def test_one_point_and_none_can_be_drawn(store: Store, add: Callable[..., Version], browse: Callable[..., str]) -> None:
    add((1.0, 2.0, {}), kind="teacher", engine="torch")
    document = browse(render_page("m", leaderboard_rows(store, "m")))
    assert points(document).keys() == {"m/1"}
    assert "NaN" not in document.partition('<script type="application/json"')[0]
    empty = browse(render_page("m", [row.model_copy(update={"cost": None}) for row in leaderboard_rows(store, "m")]))
    assert points(empty) == {}
    assert '<p class="empty">No shown version has both' in empty
