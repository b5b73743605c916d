"""The ranking of a real registry, as a table, JSON and CSV; its page has tests of its own."""

from __future__ import annotations

import csv
import io
import json
import random
import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from limbeck.evals.leaderboard.page import render_page
from limbeck.evals.leaderboard.ranking import pareto_flags
from limbeck.evals.leaderboard.rows import leaderboard_rows
from limbeck.evals.scores.comparability import group_comparable
from limbeck.registry.core.errors import BadInput
from limbeck.registry.mlflow.store import Store
from limbeck.registry.records import Estimate, LeaderboardRow, Verdict, Version
from tests.evals.leaderboard_helpers import make_card


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
        assert pareto_flags(points) == expected
    assert pareto_flags([(1, 1), (1, 1), (None, 2), (0.5, None)]) == [True, True, False, False]


def test_rows_of_a_registry(store: Store, add: Callable[..., Version]) -> None:
    teacher = add((1.0, 2.0, {}), kind="teacher", engine="torch")
    cheap = add((0.8, 0.1, {}), precision="int8", parent="m/1", recipe="small")
    beaten = add((0.75, 0.2, {}), teacher="m/1")
    new = add()
    store.findings.add_verdict(cheap, verdict_on(cheap, "fail", 1))
    store.findings.add_verdict(cheap, verdict_on(cheap, "pass", 2))
    store.client.set_registered_model_alias("m", "production", str(cheap.version))
    found = leaderboard_rows(store, "m")
    assert [row.version for row in found] == [teacher.ref, cheap.ref, beaten.ref, new.ref]
    assert [row.pareto for row in found] == [True, True, False, False]
    row = found[1].model_dump()
    cost = row.pop("cost")
    assert isinstance(cost["params"], int)
    assert cost.keys() == {
        "flops_per_token",
        "params",
        "disk_bytes",
        "peak_rss_bytes",
        "peak_device_bytes",
        "prefill_tokens_per_s",
        "decode_tokens_per_s",
        "p50_ms",
        "p95_ms",
        "usd_per_million_tokens",
    }
    assert row.pop("retention") == pytest.approx({"value": 0.8, "low": 0.75, "high": 0.85})
    single = {"metric": "acc", "value": 0.5, "stderr": 0.01, "higher_is_better": True}
    assert row.pop("task_retention")["single"] == pytest.approx({"value": 0.7, "low": 0.75, "high": 0.85})
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
        "intervals": {},
        "machine": "a test",
        "setting": 0,
        "differs": None,
        "control": None,
        "against_controls": (),
        "licences": dict.fromkeys(("model", "teacher", "data", "code", "base_model")),
        "licence_allows_distillation": None,
    }
    assert found[2].parent == "m/1"
    assert (found[3].retention, found[3].cost, found[3].quality, found[3].verdict) == (None, None, {}, None)
    # One task alone.
    alone = leaderboard_rows(store, "m", "single")
    assert [round(row.retention["value"], 2) for row in alone if row.retention] == [0.9, 0.7, 0.65]
    assert alone[0].quality.keys() == {"single"}


LATER = datetime(2026, 3, 1, tzinfo=UTC)


def kept_by(found: list[LeaderboardRow]) -> dict[str, float | None]:
    return {row.version: row.retention and round(row.retention["value"], 2) for row in found}


def test_a_version_counts_with_its_newest_scorecard_of_the_largest_setting(
    store: Store, add: Callable[..., Version], capsys: pytest.CaptureFixture[str]
) -> None:
    add((1.0, 2.0, {}))
    add((0.5, 1.0, {}), (0.7, 1.0, {"created": LATER}))
    others = {"created": LATER, "tasks_digest": "others", "tasks": {"other": make_card("", 1, 1).tasks["single"]}}
    # One of other tasks, and one against no teacher: neither is the one to rank by.
    add((0.6, 1.0, {}), (0.9, 1.0, others), (None, 1.0, {"created": LATER}))
    assert kept_by(leaderboard_rows(store, "m")) == {"m/1": 1.0, "m/2": 0.7, "m/3": 0.6}
    assert capsys.readouterr().err == "also scored (show with --task): other (1 version)\n"
    assert kept_by(leaderboard_rows(store, "m", "single")) == {"m/1": 0.9, "m/2": 0.6, "m/3": 0.5}


HERE = "a processor, 2 cores, Linux; torch 1"
CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "tasks": ({"tasks_digest": "others", "tasks": {"other": None}}, "scored on other"),
    "task version": ({"tasks_digest": "others", "tasks": {"single": {"task_hash": "new"}}}, "another version"),
    "limit": (
        {"tasks_digest": "others", "tasks": {"single": {"task_hash": "new", "documents": 5}}},
        "5 documents of single, not 9",
    ),
    "prompts": ({"prompts_digest": "q", "tasks": {"single": {"prompt_hash": "q"}}}, "other prompts of single"),
    "harness": ({"harness": "lm-eval 1"}, "scored with lm-eval 1, not lm-eval 0"),
    "teacher": ({"teacher": "f" * 64}, "against other files of m/1 as the teacher"),
    "machine": (
        {"cost_fields": {"machine": "b processor, 4 cores, Linux; torch 1"}},
        "cost measured on b processor, 4 cores, Linux, not on a processor, 2 cores, Linux",
    ),
    "threads": ({"cost_fields": {"threads": 2}}, "cost measured with 2 threads, not with 1 thread"),
    "request": ({"cost_fields": {"new_tokens": 8}}, "for 64 tokens in and 8 out"),
    "price": ({"cost_fields": {"usd_per_hour": 3.0}}, "at $3 an hour, not at $1 an hour"),
    "protocol": ({"cost_fields": {"protocol": 9}}, "by protocol 9, not by protocol 2"),
}


def changed_card(changes: dict[str, Any]) -> dict[str, Any]:
    """Changes for `make_card`, with whole results of tasks; costs are measured HERE."""
    base = make_card("", 1.0, 1.0).tasks
    changes = {**changes, "cost_fields": {"machine": HERE} | changes.get("cost_fields", {})}
    if tasks := changes.get("tasks"):
        changes["tasks"] = {n: base["single"].model_copy(update=update or {}) for n, update in tasks.items()}
        changes["tasks"] |= {n: base[n] for n in ("group", "sub") if "single" in tasks}
    return changes


@pytest.mark.parametrize("changed", CHANGES)
def test_what_was_measured_otherwise_is_ranked_apart(
    store: Store, add: Callable[..., Version], limbeck: Callable[..., Any], changed: str
) -> None:
    changes, words = CHANGES[changed]
    for retention in (1.0, 0.7):
        add((retention, retention, changed_card({})))
    add((0.9, 0.01, changed_card(changes)), recipe="lonely")  # would be the best of both
    add()
    written = limbeck("leaderboard", "m", "--format", "json")
    found = [LeaderboardRow.model_validate(row) for row in json.loads(written.out)]
    assert [row.version for row in found] == ["m/1", "m/2", "m/3", "m/4"]
    assert [row.setting for row in found] == [0, 0, 1, None]
    assert [row.pareto for row in found] == [True, True, True, False]  # each against its like
    assert found[0].differs is None
    assert found[2].differs is not None
    assert words in found[2].differs
    assert written.err == f"ranked apart: m/3: {found[2].differs}\n"
    tables = limbeck("leaderboard", "m").out.split("┏")[1:]
    assert [("lonely" in table) for table in tables] == [False, True]
    page = render_page("m", found)
    assert page.count('<section class="board">') == 2
    assert "<h2>Ranked apart" in page


def test_a_card_without_a_cost_or_a_teacher_stands_with_those_that_have_them(
    store: Store, add: Callable[..., Version], capsys: pytest.CaptureFixture[str]
) -> None:
    add((1.0, 1.0, {}))
    for _ in range(3):
        add((0.8, 1.0, {"cost": None}))
    add((None, 1.0, {}))
    found = leaderboard_rows(store, "m")
    assert [row.setting for row in found] == [0] * 5
    assert [row.pareto for row in found] == [True, False, False, False, False]
    assert capsys.readouterr().err == ""


def test_groups_do_not_depend_on_order() -> None:
    """Every version is in one group, with others that fit it, and none could be in a larger one."""
    dice = random.Random(1)
    for _ in range(100):
        cards = {}
        for number in range(dice.randint(1, 8)):
            cards[number] = [
                make_card(
                    "a", dice.choice([1.0, 0.5, None]), 1.0, harness=dice.choice("ab"), tasks_digest=dice.choice("xy")
                )
                for _ in range(dice.randint(0, 3))
            ]
        groups = group_comparable(cards)
        placed = [number for alike in groups for number in alike]
        assert sorted(placed) == [number for number, several in cards.items() if several]
        assert [len(alike) for alike in groups] == sorted((len(alike) for alike in groups), reverse=True)
        for alike in groups:
            assert len({(card.harness, card.tasks_digest) for card in alike.values()}) == 1
        largest = max(
            (
                sum(any((c.harness, c.tasks_digest) == key for c in of) for of in cards.values())
                for key in (("a", "x"), ("a", "y"), ("b", "x"), ("b", "y"))
            ),
            default=0,
        )
        assert len(groups[0] if groups else []) == largest


def test_sorting_and_filtering(store: Store, add: Callable[..., Version], limbeck: Callable[..., Any]) -> None:
    def order(*options: str) -> list[int]:
        out = limbeck("leaderboard", "m", "--format", "json", *options).out
        return [int(row["version"].rpartition("/")[2]) for row in json.loads(out)]

    def fields(**values: Any) -> dict[str, Any]:
        return {"cost_fields": values}

    better = make_card("", 1, 1).tasks
    better["single"] = better["single"].model_copy(update={"value": 0.9})
    fewer = make_card("", 1, 1).tasks
    fewer["single"] = fewer["single"].model_copy(update={"value": 0.2})
    add((1.0, 3.0, fields(p50_ms=9.0, decode_tokens_per_s=1.0)), kind="teacher", engine="torch")
    add((0.6, 1.0, fields(p50_ms=5.0, decode_tokens_per_s=3.0) | {"tasks": better}), recipe="small", precision="int8")
    add((0.8, 2.0, fields(p50_ms=7.0, decode_tokens_per_s=2.0) | {"tasks": fewer}), recipe="small")
    add((0.8, 1.5, fields(p50_ms=8.0, decode_tokens_per_s=9.0)), recipe="large", kind="student", engine="torch")
    add(recipe="large")
    assert order() == [1, 4, 3, 2, 5]  # the cheaper of two that are as good; unscored ones last
    assert order("--sort", "usd_per_million_tokens") == [2, 4, 3, 1, 5]
    assert order("--sort", "p50_ms") == [2, 3, 4, 1, 5]
    assert order("--sort", "decode_tokens_per_s") == [4, 2, 3, 1, 5]  # more is better
    assert order("--sort", "cost_ratio") == order("--sort", "speedup") == [2, 4, 3, 1, 5]
    assert order("--sort", "single") == [2, 4, 1, 3, 5]
    assert order("--sort", "version") == [1, 2, 3, 4, 5]
    assert order("--sort", "recipe")[:1] == [4]
    assert order("--recipe", "small") == [3, 2]
    assert order("--recipe", "small", "--recipe", "large", "--kind", "onnx") == [3, 2, 5]
    assert order("--precision", "int8") == [2]
    assert order("--pareto") == [1, 4, 2]
    assert order("--pareto", "--cost", "p50_ms") == [1, 3, 2]
    assert order("--pareto", "--cost", "decode_tokens_per_s") == [1, 4]
    assert order("--pareto", "--recipe", "small") == [3, 2]  # of what is shown
    assert "decode" in limbeck("leaderboard", "m", "--cost", "decode_tokens_per_s").out
    lines = list(csv.DictReader(io.StringIO(limbeck("leaderboard", "m", "--precision", "int8", "--format", "csv").out)))
    assert [line["version"] for line in lines] == ["m/2"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--sort", "p50_m"], "--sort 'p50_m' is unknown\n  did you mean p50_ms?"),
        (["--sort", "singel"], "did you mean single?"),
        (["--cost", "usd_per_million_token"], "did you mean usd_per_million_tokens?"),
        (["--cost", "verdict"], "choose one of: decode_tokens_per_s, "),
        (["--recipe", "smal"], "--recipe 'smal' is unknown\n  did you mean small?"),
        (["--precision", "x"], "choose one of: fp32, int8"),
        (["--kind", "students"], "did you mean student?"),
        (["--task", "singel"], "did you mean single?"),
    ],
)
def test_what_cannot_be_sorted_or_filtered_by(
    store: Store, add: Callable[..., Version], limbeck: Callable[..., Any], options: list[str], words: str
) -> None:
    add((1.0, 2.0, {}), kind="student", precision="int8", recipe="small")
    add((1.0, 2.0, {}))
    told = limbeck("leaderboard", "m", *options)
    assert (told.code, told.out) == (2, "")
    assert words in told.err


def test_licences_are_told_and_those_that_forbid_are_marked(
    store: Store, add: Callable[..., Version], limbeck: Callable[..., Any]
) -> None:
    add((1.0, 2.0, {}), kind="teacher", licence="openai")
    add((0.9, 1.0, {}), parent="m/1", teacher_licence="openai", data_licence="MIT", licence_allows_distillation=False)
    add((0.8, 0.5, {}), parent="m/1", teacher_licence="mit", licence_allows_distillation=True)
    table = limbeck("leaderboard", "m").out
    assert re.findall(r"(?m)^│ (\d\S*) ", table) == ["1", "2!", "3"]
    assert "! a licence of what it learnt from forbids learning from it" in table
    assert "? it is unknown whether" not in table
    row = json.loads(limbeck("leaderboard", "m", "--format", "json").out)[1]
    assert (row["licences"]["teacher"], row["licences"]["data"]) == ("openai", "MIT")
    assert row["licence_allows_distillation"] is False
    add((0.7, 0.4, {}), parent="m/1")
    assert "\n? it is unknown whether" in limbeck("leaderboard", "m").out


def test_intervals_of_costs(store: Store, add: Callable[..., Version]) -> None:
    spread = Estimate(value=2.0, low=1.5, high=2.5)
    add((1.0, 2.0, {"cost_fields": {"intervals": {"usd_per_million_tokens": spread}}}))
    assert leaderboard_rows(store, "m")[0].intervals == {"usd_per_million_tokens": {"low": 1.5, "high": 2.5}}


def test_what_is_not_there(store: Store, add: Callable[..., Version]) -> None:
    add((1.0, 2.0, {}))
    with pytest.raises(BadInput, match="did you mean m"):
        leaderboard_rows(store, "mm")
    with pytest.raises(BadInput, match="did you mean single"):
        leaderboard_rows(store, "m", "singel")


def test_formats_say_the_same(
    store: Store, add: Callable[..., Version], limbeck: Callable[..., Any], limbeck_home: Path, tmp_path: Path
) -> None:
    add((1.0, 2.0, {}), kind="teacher", engine="torch")
    add((0.8, 0.1, {}), precision="int8", recipe="small")
    add()
    as_json = limbeck("leaderboard", "m", "--format", "json")
    found = json.loads(as_json.out)
    assert [LeaderboardRow.model_validate(row) for row in found] == leaderboard_rows(store, "m")
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
