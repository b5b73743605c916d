"""The pictures of docs/: `python -m tests.web.screenshots`, over a registry that the quickstart made (LIMBECK_HOME)."""

from __future__ import annotations

import os
import re
import subprocess
import sys

from playwright.sync_api import Page, sync_playwright

from limbeck.registry.mlflow.store import Store
from tests import ROOT
from tests.web.conftest import CHROMIUM, FLAGS, TOKEN

NAME = "stdlib-coder"
WIDTH, LARGEST = 1280, 200_000  # pixels, bytes


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
                _take(tab, _passing(tab), "promote.png", "section:has(> #promote)")
                browser.close()
        finally:
            server.terminate()


def _passing(tab: Page) -> str:
    """The page of the cheapest version that passes and is not in production yet."""
    tab.goto(f"/models/{NAME}/promote")
    rows = tab.get_by_role("row").filter(has=tab.locator("td.pass")).filter(has_not_text=re.compile("now production"))
    return rows.first.get_by_role("link").get_attribute("href") or ""


def _take(tab: Page, path: str, name: str, last: str) -> None:
    """A picture of a page from its top to the end of the element `last`."""
    tab.goto(path)
    tab.wait_for_load_state("networkidle")
    box = tab.locator(last).first.bounding_box()
    assert box is not None
    file = ROOT / "docs" / name
    tab.screenshot(path=file, full_page=True, clip=dict(x=0, y=0, width=WIDTH, height=box["y"] + box["height"] + 12))
    print(f"{file.relative_to(ROOT)}: {file.stat().st_size:,} bytes")
    if file.stat().st_size > LARGEST:
        sys.exit(f"more than {LARGEST:,} bytes")


if __name__ == "__main__":
    main()
