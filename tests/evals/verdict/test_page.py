"""The page of a verdict, in every format."""

from __future__ import annotations

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from limbeck.evals.verdict.decide import decide_verdict
from limbeck.evals.verdict.records import VerdictReport
from limbeck.registry.mlflow.store import Store
from tests.evals.verdict.conftest import DOCUMENTS, TRAINING_COST, AddScored, add_teacher, answers

HOSTILE_RECIPE = "<b>x</b>|*a* [c](http://d) `e` _f_ \x1b[31m"


class Page(HTMLParser):
    """The text of a page, its tags, and the tags that text could have injected; fails if a tag is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = ""
        self.open: list[str] = []
        self.injectable: list[str] = []
        self.count: dict[str, int] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        self.injectable += [tag] if tag in ("b", "i", "a", "script", "link", "img", "iframe") else []
        if tag not in ("meta", "path"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag != "path":
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_all_formats_have_the_same_content(
    store: Store, add_scored: AddScored, limbeck: Callable[..., Any], limbeck_home: Path, tmp_path: Path
) -> None:
    tasks = ["qa", "1. <i>|*"]
    add_teacher(add_scored, tasks)
    add_scored({task: answers(DOCUMENTS) for task in tasks}, 0.5, recipe=HOSTILE_RECIPE, training_cost=TRAINING_COST)
    found = json.loads(limbeck("verdict", "m", "--format", "json").out)
    report = VerdictReport.model_validate(found)
    assert (report.answer, report.candidate) == ("yes", "m/2")
    assert report == decide_verdict(store, "m").model_copy(update={"created": report.created})
    for form in ("table", "markdown"):
        done = limbeck("verdict", "m", "--format", form)
        assert done.code == 0
        assert "m: is the giant a waste here? Yes." in done.out.lstrip().splitlines()[0]
        assert "50.0% [49.5%, 50.5%]" in " ".join(done.out.replace("\u00a0", " ").split())
        assert "\x1b[31m" not in done.out
    written = limbeck("verdict", "m", "--format", "html")
    assert (written.code, written.out) == (0, "home/reports/m-verdict.html\n")
    page = Page((limbeck_home / "reports" / "m-verdict.html").read_text())
    # Names are shown as text and never become markup.
    assert page.injectable == []
    assert page.text.count("<b>x</b>|*a* [c](http://d) `e` _f_ ") == 4  # answer, heading, table, caveat
    assert "1. <i>|*" in page.text
    assert page.open == []
    assert page.count["svg"] == 2
    assert page.count["li"] == len(report.not_measured)
    for form in ("markdown", "html", "json"):
        limbeck("verdict", "m", "--format", form, "--output", tmp_path / f"out.{form}")
        assert "m/2" in (tmp_path / f"out.{form}").read_text()
    assert limbeck("verdict", "m", "--output", tmp_path / "x").code == 2
    refused = limbeck("verdict", "m", "--format", "html", "--output", tmp_path / "out.json" / "x")
    assert (refused.code, "cannot be written" in refused.err) == (2, True)


def test_options_of_the_command_reach_the_verdict(
    store: Store, add_scored: AddScored, limbeck: Callable[..., Any]
) -> None:
    add_teacher(add_scored, ["qa", "more"])
    add_scored({"qa": answers(DOCUMENTS, 30), "more": answers(DOCUMENTS)}, 0.5, training_cost=TRAINING_COST)
    margins = ("--margin", 0.02, "--margin", "qa=0.05")
    options = (*margins, "--tokens-per-day", 1e6, "--usd-per-hour", 3, "--against", "m/1")
    found = VerdictReport.model_validate_json(limbeck("verdict", "m", *options, "--format", "json").out)
    assert (found.margins, found.default_margins) == ({"qa": 0.05, "more": 0.02}, False)
    [best] = found.candidates
    assert best.payback
    assert best.payback.tokens_per_day == 1e6
    assert best.cost
    assert best.cost.usd_per_hour == 3
    one = VerdictReport.model_validate_json(limbeck("verdict", "m", "--task", "more", "--format", "json").out)
    assert one.margins == {"more": 0.01}
    assert limbeck("verdict", "m", "--margin", "no").code == 2
    assert limbeck("verdict", "m", "--tokens-per-day", 0).code == 2
