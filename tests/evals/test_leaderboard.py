"""The ranking of a real registry, as a table, JSON, CSV and a page."""

from __future__ import annotations

import csv
import io
import json
import random
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from evals.leaderboard import pareto, rows
from evals.page import render
from evals.plot import draw
from registry.errors import BadInput
from registry.records import Cost, Estimate, LeaderboardRow, Relative, Scorecard, TaskResult, Verdict, Version
from registry.store import Store

TEACHER = "0" * 64


def make_card(artifact: str, retention: float | None, usd: float, **changes: Any) -> Scorecard:
    """A scorecard of a task, and of a group with one sub-task, at `usd` dollars per million tokens."""
    result = TaskResult(
        metric="acc", value=0.5, stderr=0.01, higher_is_better=True, documents=9, task_hash="t", prompt_hash="p"
    )
    cost = Cost(
        params=1000,
        disk_bytes=4000,
        peak_rss_bytes=10_000,
        prefill_tokens_per_s=1e4,
        decode_tokens_per_s=300.0,
        p50_ms=20.0,
        p95_ms=30.0,
        usd_per_million_tokens=usd,
        usd_per_hour=1.0,
        prompt_tokens=64,
        new_tokens=64,
        requests=20,
        threads=1,
        machine="a test",
    )
    kept = Estimate(value=retention or 0, low=(retention or 0) - 0.05, high=(retention or 0) + 0.05)
    relative = Relative(
        teacher="m/1",
        teacher_digest=changes.pop("teacher", TEACHER),
        retention=kept,
        task_retention={"single": kept.model_copy(update={"value": kept.value - 0.1})},
        difference={},
        cost_ratio=usd / 2,
        speedup=2 / usd,
    )
    fields: dict[str, Any] = {
        "artifact": artifact,
        "model": "m/0",
        "tasks": {"single": result, "group": result, "sub": result.model_copy(update={"group": "group"})},
        "tasks_digest": "tasks",
        "prompts_digest": "prompts",
        "harness": "lm-eval 0",
        "created": datetime(2026, 1, 1, tzinfo=UTC),
        "cost": cost,
        "relative": relative if retention is not None else None,
    }
    return Scorecard.model_validate(fields | changes)


@pytest.fixture
def add(store: Store, tmp_path: Path) -> Callable[..., Version]:
    """Register another version of m, with scorecards of (retention, usd, changes)."""
    documents = tmp_path / "documents.parquet"
    parquet.write_table(pa.table({"task": ["single"]}), documents)

    def run(*cards: tuple[float | None, float, dict[str, Any]], **fields: Any) -> Version:
        folder = tmp_path / f"artifact-{len(store.versions('m'))}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"of": folder.name}))
        version = store.register("m", folder, **{"kind": "onnx", "engine": "onnxruntime", **fields})
        for retention, usd, changes in cards:
            store.add_scorecard(version, make_card(version.digest, retention, usd, **changes), documents)
        return version

    return run


def verdict_on(version: Version, outcome: Any, day: int) -> Verdict:
    return Verdict(
        outcome=outcome,
        rules=(),
        model=version.ref,
        artifact=version.digest,
        tasks_digest="tasks",
        prompts_digest="prompts",
        scorecard="",
        policy="",
        created=datetime(2026, 1, day, tzinfo=UTC),
    )


def test_the_frontier_is_what_no_other_beats() -> None:
    dice = random.Random(0)
    for _ in range(200):
        # Few values, so that there are ties.
        points = [(dice.randint(1, 5), dice.randint(1, 5)) for _ in range(dice.randint(1, 9))]
        expected = []
        for cost, quality in points:
            cheaper = any(c < cost and q >= quality for c, q in points)
            better = any(c <= cost and q > quality for c, q in points)
            expected.append(not cheaper and not better)
        assert pareto(points) == expected
    assert pareto([(1, 1), (1, 1), (None, 2), (0.5, None)]) == [True, True, False, False]


def test_rows_of_a_registry(store: Store, add: Callable[..., Version]) -> None:
    teacher = add((1.0, 2.0, {}), kind="teacher", engine="torch")
    cheap = add((0.8, 0.1, {}), precision="int8", parent="m/1", recipe="small")
    beaten = add((0.75, 0.2, {}), teacher="m/1")
    new = add()
    store.add_verdict(cheap, verdict_on(cheap, "fail", 1))
    store.add_verdict(cheap, verdict_on(cheap, "pass", 2))
    store.client.set_registered_model_alias("m", "production", str(cheap.version))
    found = rows(store, "m")
    assert [row.version for row in found] == [teacher.ref, cheap.ref, beaten.ref, new.ref]
    assert [row.pareto for row in found] == [True, True, False, False]
    row = found[1].model_dump()
    cost = row.pop("cost")
    assert isinstance(cost["params"], int)
    assert cost.keys() == {
        "params",
        "disk_bytes",
        "peak_rss_bytes",
        "prefill_tokens_per_s",
        "decode_tokens_per_s",
        "p50_ms",
        "p95_ms",
        "usd_per_million_tokens",
    }
    assert row.pop("retention") == pytest.approx({"value": 0.8, "low": 0.75, "high": 0.85})
    single = {"metric": "acc", "value": 0.5, "stderr": 0.01}
    assert row == {
        "version": cheap.ref,
        "kind": "onnx",
        "parent": "m/1",
        "recipe": "small",
        "precision": "int8",
        "quality": {"single": single, "group": single},  # sub-tasks are in their group
        "cost_ratio": 0.05,
        "speedup": 20.0,
        "pareto": True,
        "verdict": "pass",
        "aliases": ("production",),
    }
    assert found[2].parent == "m/1"
    assert (found[3].retention, found[3].cost, found[3].quality, found[3].verdict) == (None, None, {}, None)
    # One task alone.
    alone = rows(store, "m", "single")
    assert [round(row.retention["value"], 2) for row in alone if row.retention] == [0.9, 0.7, 0.65]
    assert alone[0].quality.keys() == {"single"}


def test_scores_that_cannot_be_compared_are_not_ranked(
    store: Store, add: Callable[..., Version], capsys: pytest.CaptureFixture[str]
) -> None:
    later = datetime(2026, 3, 1, tzinfo=UTC)
    add((1.0, 2.0, {}))
    # The newest of a version counts, unless it is of other tasks than most versions' or against no teacher.
    add((0.5, 1.0, {}), (0.7, 1.0, {"created": later}))
    add((0.6, 1.0, {}), (0.9, 1.0, {"created": later, "tasks_digest": "others"}), (None, 1.0, {"created": later}))
    add((0.9, 1.0, {"tasks_digest": "others", "created": later}))
    add((0.8, 1.0, {"teacher": "f" * 64}))
    found = {row.version: row for row in rows(store, "m")}
    kept = {version: row.retention and round(row.retention["value"], 2) for version, row in found.items()}
    assert kept == {"m/1": 1.0, "m/2": 0.7, "m/3": 0.6, "m/4": None, "m/5": None}
    assert found["m/4"].quality == {}
    assert found["m/5"].quality  # the same tasks: only its retention is of another teacher
    assert "m/4" in capsys.readouterr().err


def test_what_is_not_there(store: Store, add: Callable[..., Version]) -> None:
    add((1.0, 2.0, {}))
    with pytest.raises(BadInput, match="did you mean m"):
        rows(store, "mm")
    with pytest.raises(BadInput, match="did you mean single"):
        rows(store, "m", "singel")


def test_formats_say_the_same(
    store: Store, add: Callable[..., Version], limbeck: Callable[..., Any], limbeck_home: Path, tmp_path: Path
) -> None:
    add((1.0, 2.0, {}), kind="teacher", engine="torch")
    add((0.8, 0.1, {}), precision="int8", recipe="small")
    add()
    as_json = limbeck("leaderboard", "m", "--format", "json")
    found = json.loads(as_json.out)
    assert [LeaderboardRow.model_validate(row) for row in found] == rows(store, "m")
    table = limbeck("leaderboard", "m").out
    assert "0.800 [0.750, 0.850]" in table
    assert "small int8" in table
    assert max(map(len, table.splitlines())) <= 140
    lines = list(csv.DictReader(io.StringIO(limbeck("leaderboard", "m", "--format", "csv").out)))
    assert [line["version"] for line in lines] == [row["version"] for row in found]
    assert float(lines[1]["retention.value"]) == found[1]["retention"]["value"]
    assert lines[1]["quality.single.value"] == "0.5"
    written = limbeck("leaderboard", "m", "--format", "html")
    assert (written.code, written.out) == (0, "home/reports/m.html\n")
    assert "m/2" in (limbeck_home / "reports" / "m.html").read_text()
    for form in ("html", "csv", "json"):
        limbeck("leaderboard", "m", "--format", form, "--output", tmp_path / f"out.{form}")
        assert "m/2" in (tmp_path / f"out.{form}").read_text()
    assert limbeck("leaderboard", "m", "--output", tmp_path / "x").code == 2
    below_a_file = limbeck("leaderboard", "m", "--format", "csv", "--output", tmp_path / "out.csv" / "x.csv")
    assert below_a_file.code == 2
    assert "cannot be written" in below_a_file.err
    unknown = limbeck("leaderboard", "n")
    assert unknown.code == 2
    assert "registered are: m" in unknown.err


class Page(HTMLParser):
    """What a page fetches or runs, its marks, and whether its tags close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.open: list[str] = []
        self.count: dict[str, int] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        self.fetched += [f"{tag} {name}" for name, _ in attrs if name in ("src", "href", "srcset", "data")]
        self.fetched += [tag] if tag in ("script", "link", "iframe", "img") else []
        if tag not in ("meta", "br", "path", "rect", "circle", "line"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("path", "rect", "circle", "line"):
            assert self.open.pop() == tag


def test_the_page_stands_alone_and_escapes(store: Store, add: Callable[..., Version]) -> None:
    add((1.0, 2.0, {}), kind="teacher", engine="torch")
    add((0.8, 0.1, {}), recipe="<script>alert('x')</script>&", precision="int8")
    add((0.7, 0.3, {}), kind="student", engine="torch", recipe="plain")
    add()
    text = render("m", rows(store, "m"))
    page = Page(text)
    assert page.fetched == []
    assert page.open == []
    assert page.count["tr"] == 5
    assert "&lt;script&gt;" in text
    assert "prefers-color-scheme: dark" in text
    assert "@import" not in text
    assert "url(" not in text


def test_the_plot_is_to_scale(store: Store, add: Callable[..., Version]) -> None:
    for retention, usd in ((1.0, 1.0), (0.8, 0.1), (0.9, 0.01)):
        add((retention, usd, {}))
    found = rows(store, "m")
    svg = ElementTree.fromstring(draw(found, 900, 430))
    places = {}
    for mark in svg.iter("g"):
        x, y = mark.attrib["transform"].removeprefix("translate(").removesuffix(")").split()
        title = mark.find("title")
        assert title is not None
        places[str(title.text).split(",")[0]] = float(x), float(y), mark.attrib["class"]
    teacher, beaten, best = places["m/1"], places["m/2"], places["m/3"]
    assert teacher[0] - beaten[0] == pytest.approx(beaten[0] - best[0], abs=0.2)  # a factor of ten each
    assert beaten[1] - best[1] == pytest.approx(best[1] - teacher[1], abs=0.2)  # ten points each
    assert [place[2].split()[1] for place in (teacher, beaten, best)] == ["best", "beaten", "best"]
    assert draw([row.model_copy(update={"cost": None}) for row in found], 900, 430) == ""


def test_one_point_can_be_drawn(store: Store, add: Callable[..., Version]) -> None:
    add((1.0, 2.0, {}), kind="teacher", engine="torch")
    assert "NaN" not in draw(rows(store, "m"), 400, 400)
    Page(render("m", rows(store, "m")))
