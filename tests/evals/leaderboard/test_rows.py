"""The rows of a leaderboard: their content, settings, order and filters; and the command's formats."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from limbeck.evals.leaderboard.page import render_page
from limbeck.evals.leaderboard.rows import leaderboard_rows
from limbeck.registry.core.errors import BadInput
from limbeck.registry.mlflow.store import Store
from limbeck.registry.records import Estimate, LeaderboardRow, Verdict, Version
from tests.evals.leaderboard_helpers import CHANGES, TASKS, changes_of_card


def verdict_on(version: Version, outcome: Any, day: int) -> Verdict:
    """A verdict of that day in January."""
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


def test_a_row_has_everything_known_of_a_version(store: Store, add_version: Callable[..., Version]) -> None:
    teacher = add_version((1.0, 2.0, {}), kind="teacher", engine="torch")
    cheap = add_version((0.8, 0.1, {}), precision="int8-weight", parent="m/1", recipe="small")
    worse = add_version((0.75, 0.2, {}), teacher="m/1")
    unscored = add_version()
    store.findings.add_verdict(cheap, verdict_on(cheap, "fail", 1))
    store.findings.add_verdict(cheap, verdict_on(cheap, "pass", 2))
    store.client.set_registered_model_alias("m", "production", str(cheap.version))
    found = leaderboard_rows(store, "m")
    assert [row.version for row in found] == [teacher.ref, cheap.ref, worse.ref, unscored.ref]
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
        "acceptance_length",
        "speculative_speedup",
    }
    assert row.pop("retention") == pytest.approx({"value": 0.8, "low": 0.75, "high": 0.85})
    single = {"metric": "acc", "value": 0.5, "stderr": 0.01, "higher_is_better": True}
    assert row.pop("task_retention")["single"] == pytest.approx({"value": 0.7, "low": 0.75, "high": 0.85})
    assert row == {
        "version": cheap.ref,
        "kind": "onnx",
        "parent": "m/1",
        "recipe": "small",
        "precision": "int8-weight",
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
    # Ranked by one task.
    by_task = leaderboard_rows(store, "m", "single")
    assert [round(row.retention["value"], 2) for row in by_task if row.retention] == [0.9, 0.7, 0.65]
    assert by_task[0].quality.keys() == {"single"}


LATER = datetime(2026, 3, 1, tzinfo=UTC)


def retentions(rows: list[LeaderboardRow]) -> dict[str, float | None]:
    """Version -> its retention, to two digits."""
    return {row.version: row.retention and round(row.retention["value"], 2) for row in rows}


def test_a_version_is_ranked_by_its_newest_scorecard_of_the_largest_setting(
    store: Store, add_version: Callable[..., Version], capsys: pytest.CaptureFixture[str]
) -> None:
    add_version((1.0, 2.0, {}))
    add_version((0.5, 1.0, {}), (0.7, 1.0, {"created": LATER}))
    others = {"created": LATER, "tasks_digest": "others", "tasks": {"other": TASKS["single"]}}
    # Two newer cards do not count: one of other tasks, one without a teacher.
    add_version((0.6, 1.0, {}), (0.9, 1.0, others), (None, 1.0, {"created": LATER}))
    assert retentions(leaderboard_rows(store, "m")) == {"m/1": 1.0, "m/2": 0.7, "m/3": 0.6}
    assert capsys.readouterr().err == "also scored (show with --task): other (1 version)\n"
    assert retentions(leaderboard_rows(store, "m", "single")) == {"m/1": 0.9, "m/2": 0.6, "m/3": 0.5}


@pytest.mark.parametrize("changed", ["tasks", "machine"])
def test_versions_measured_differently_are_ranked_apart(
    store: Store, add_version: Callable[..., Version], limbeck: Callable[..., Any], changed: str
) -> None:
    changes, reason = CHANGES[changed]
    for retention in (1.0, 0.7):
        add_version((retention, retention, changes_of_card({})))
    add_version((0.9, 0.01, changes_of_card(changes)), recipe="lonely")  # would be the best in one ranking
    add_version()
    written = limbeck("leaderboard", "m", "--format", "json")
    found = [LeaderboardRow.model_validate(row) for row in json.loads(written.out)]
    assert [row.version for row in found] == ["m/1", "m/2", "m/3", "m/4"]
    assert [row.setting for row in found] == [0, 0, 1, None]
    assert [row.pareto for row in found] == [True, True, True, False]  # each within its setting
    assert found[0].differs is None
    assert found[2].differs is not None
    assert reason in found[2].differs
    assert written.err == f"ranked apart: m/3: {found[2].differs}\n"
    tables = limbeck("leaderboard", "m").out.split("┏")[1:]
    assert [("lonely" in table) for table in tables] == [False, True]
    page = render_page("m", found)
    assert page.count('<section class="board">') == 2
    assert "<h2>Ranked apart" in page


def test_a_card_without_cost_or_teacher_is_ranked_with_those_that_have_them(
    store: Store, add_version: Callable[..., Version], capsys: pytest.CaptureFixture[str]
) -> None:
    add_version((1.0, 1.0, {}))
    for _ in range(3):
        add_version((0.8, 1.0, {"cost": None}))
    add_version((None, 1.0, {}))
    found = leaderboard_rows(store, "m")
    assert [row.setting for row in found] == [0] * 5
    assert [row.pareto for row in found] == [True, False, False, False, False]
    assert capsys.readouterr().err == ""


def test_options_sort_and_filter_the_rows(
    store: Store, add_version: Callable[..., Version], limbeck: Callable[..., Any]
) -> None:
    def order(*options: str) -> list[int]:
        out = limbeck("leaderboard", "m", "--format", "json", *options).out
        return [int(row["version"].rpartition("/")[2]) for row in json.loads(out)]

    def times(p50_ms: float, decode_tokens_per_s: float) -> dict[str, Any]:
        return {"cost_fields": {"p50_ms": p50_ms, "decode_tokens_per_s": decode_tokens_per_s}}

    better = TASKS | {"single": TASKS["single"].model_copy(update={"value": 0.9})}
    worse = TASKS | {"single": TASKS["single"].model_copy(update={"value": 0.2})}
    add_version((1.0, 3.0, times(9.0, 1.0)), kind="teacher", engine="torch")
    add_version((0.6, 1.0, times(5.0, 3.0) | {"tasks": better}), recipe="small", precision="int8-weight")
    add_version((0.8, 2.0, times(7.0, 2.0) | {"tasks": worse}), recipe="small")
    add_version((0.8, 1.5, times(8.0, 9.0)), recipe="large", kind="student", engine="torch")
    add_version(recipe="large")
    assert order() == [1, 4, 3, 2, 5]  # of two equally good ones the cheaper first; unscored ones last
    assert order("--sort", "usd_per_million_tokens") == [2, 4, 3, 1, 5]
    assert order("--sort", "p50_ms") == [2, 3, 4, 1, 5]
    assert order("--sort", "decode_tokens_per_s") == [4, 2, 3, 1, 5]  # more is better
    assert order("--sort", "cost_ratio") == order("--sort", "speedup") == [2, 4, 3, 1, 5]
    assert order("--sort", "single") == [2, 4, 1, 3, 5]
    assert order("--sort", "version") == [1, 2, 3, 4, 5]
    assert order("--sort", "recipe")[:1] == [4]
    assert order("--recipe", "small") == [3, 2]
    assert order("--recipe", "small", "--recipe", "large", "--kind", "onnx") == [3, 2, 5]
    assert order("--precision", "int8-weight") == [2]
    assert order("--pareto") == [1, 4, 2]
    assert order("--pareto", "--cost", "p50_ms") == [1, 3, 2]
    assert order("--pareto", "--cost", "decode_tokens_per_s") == [1, 4]
    assert order("--pareto", "--recipe", "small") == [3, 2]  # the frontier of the shown rows
    assert "decode" in limbeck("leaderboard", "m", "--cost", "decode_tokens_per_s").out
    lines = list(
        csv.DictReader(io.StringIO(limbeck("leaderboard", "m", "--precision", "int8-weight", "--format", "csv").out))
    )
    assert [line["version"] for line in lines] == ["m/2"]


def test_unknown_keys_and_values_are_refused(
    store: Store, add_version: Callable[..., Version], limbeck: Callable[..., Any]
) -> None:
    add_version((1.0, 2.0, {}), kind="student", precision="int8-weight", recipe="small")
    add_version((1.0, 2.0, {}))
    for option, value, message in (
        ("--sort", "p50_m", "--sort 'p50_m' is unknown\n  did you mean p50_ms?"),
        ("--sort", "singel", "did you mean single?"),
        ("--cost", "usd_per_million_token", "did you mean usd_per_million_tokens?"),
        ("--cost", "verdict", "choose one of: acceptance_length, "),
        ("--recipe", "smal", "--recipe 'smal' is unknown\n  did you mean small?"),
        ("--precision", "x", "choose one of: fp32, int8-weight"),
        ("--kind", "students", "did you mean student?"),
        ("--task", "singel", "did you mean single?"),
    ):
        done = limbeck("leaderboard", "m", option, value)
        assert (done.code, done.out) == (2, ""), (option, value)
        assert message in done.err


def test_licences_that_forbid_distillation_are_marked(
    store: Store, add_version: Callable[..., Version], limbeck: Callable[..., Any]
) -> None:
    add_version((1.0, 2.0, {}), kind="teacher", licence="openai")
    add_version(
        (0.9, 1.0, {}), parent="m/1", teacher_licence="openai", data_licence="MIT", licence_allows_distillation=False
    )
    add_version((0.8, 0.5, {}), parent="m/1", teacher_licence="mit", licence_allows_distillation=True)
    table = limbeck("leaderboard", "m").out
    assert re.findall(r"(?m)^│ (\d\S*) ", table) == ["1", "2!", "3"]
    assert "! a licence of what it learnt from forbids learning from it" in table
    assert "? it is unknown whether" not in table
    row = json.loads(limbeck("leaderboard", "m", "--format", "json").out)[1]
    assert (row["licences"]["teacher"], row["licences"]["data"]) == ("openai", "MIT")
    assert row["licence_allows_distillation"] is False
    add_version((0.7, 0.4, {}), parent="m/1")
    assert "\n? it is unknown whether" in limbeck("leaderboard", "m").out


def test_a_row_has_the_intervals_of_its_cost(store: Store, add_version: Callable[..., Version]) -> None:
    spread = Estimate(value=2.0, low=1.5, high=2.5)
    add_version((1.0, 2.0, {"cost_fields": {"intervals": {"usd_per_million_tokens": spread}}}))
    assert leaderboard_rows(store, "m")[0].intervals == {"usd_per_million_tokens": {"low": 1.5, "high": 2.5}}


def test_unknown_models_and_tasks_are_refused(store: Store, add_version: Callable[..., Version]) -> None:
    add_version((1.0, 2.0, {}))
    with pytest.raises(BadInput, match="did you mean m"):
        leaderboard_rows(store, "mm")
    with pytest.raises(BadInput, match="did you mean single"):
        leaderboard_rows(store, "m", "singel")


def test_all_formats_have_the_same_content(
    store: Store, add_version: Callable[..., Version], limbeck: Callable[..., Any], limbeck_home: Path, tmp_path: Path
) -> None:
    add_version((1.0, 2.0, {}), kind="teacher", engine="torch")
    add_version((0.8, 0.1, {}), precision="int8-weight", recipe="small")
    add_version()
    as_json = limbeck("leaderboard", "m", "--format", "json")
    found = json.loads(as_json.out)
    assert [LeaderboardRow.model_validate(row) for row in found] == leaderboard_rows(store, "m")
    table = limbeck("leaderboard", "m").out
    assert "0.800 [0.750, 0.850]" in table
    assert "small int8-weight" in table
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
