"""Make the screenshots of docs/: `python -m tests.web.screenshots`, over the quickstart's registry (LIMBECK_HOME)."""

from __future__ import annotations

import os
import re
import subprocess
import sys

from playwright.sync_api import Page, expect, sync_playwright

from limbeck.registry.mlflow.store import Store
from tests import ROOT
from tests.web.conftest import CHROMIUM, FLAGS, TOKEN

NAME = "stdlib-coder"
WIDTH, MAX_BYTES = 1280, 200_000  # width in pixels; size of a file


def main() -> None:
    """Start `limbeck ui`, log in, and take docs/leaderboard.png and docs/promote.png."""
    if NAME not in Store().model_names():
        sys.exit(f"{NAME} is not registered here: run `limbeck quickstart` first, or set LIMBECK_HOME")
    command = [sys.executable, "-m", "limbeck", "ui", "--port", "0", "--policy", str(ROOT / "quickstart/policy.toml")]
    environment = os.environ | {"LIMBECK_UI_TOKEN": TOKEN, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as server:
        try:
            assert server.stderr is not None
            address = server.stderr.readline().strip().rstrip("/")
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
                tab = browser.new_page(base_url=address, viewport={"width": WIDTH, "height": 900}, color_scheme="light")
                tab.goto("/login")
                tab.get_by_label("Token").fill(TOKEN)
                tab.get_by_role("button", name="Log in").click()
                tab.get_by_role("button", name="Log out").wait_for()
                _take(tab, f"/models/{NAME}", "leaderboard.png", ".board .plot")
                _take(tab, _page_of_passing_version(tab), "promote.png", "section:has(> #promote)")
                browser.close()
        finally:
            server.terminate()


def _page_of_passing_version(tab: Page) -> str:
    """The promotion page of the cheapest version that passes and is not in production."""
    tab.goto(f"/models/{NAME}/promote")
    rows = tab.get_by_role("row").filter(has=tab.locator("td.pass")).filter(has_not_text=re.compile("now production"))
    return rows.first.get_by_role("link").get_attribute("href") or ""


def _take(tab: Page, path: str, name: str, last: str) -> None:
    """Take a screenshot of a page, from its top to the end of the element `last`."""
    tab.goto(path)
    expect(tab.locator(last).first).to_be_visible()
    box = tab.locator(last).first.bounding_box()
    assert box is not None
    file = ROOT / "docs" / name
    tab.screenshot(path=file, full_page=True, clip=dict(x=0, y=0, width=WIDTH, height=box["y"] + box["height"] + 12))
    print(f"{file.relative_to(ROOT)}: {file.stat().st_size:,} bytes")
    if file.stat().st_size > MAX_BYTES:
        sys.exit(f"more than {MAX_BYTES:,} bytes")


if __name__ == "__main__":
    main()
