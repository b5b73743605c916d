"""Controls: comparisons with the students of their family, and how the leaderboard shows them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from limbeck.evals.leaderboard.rows import leaderboard_rows
from limbeck.evals.scores.controls import compare_with_controls
from limbeck.registry.mlflow.runs import TRAINING_COST_TAG
from limbeck.registry.mlflow.store import Store
from limbeck.registry.records import NewVersion, TrainingCost, Version
from tests.evals.document_tables import documents
from tests.evals.leaderboard_helpers import make_card

FILES = [f"file{place % 12}.py" for place in range(48)]


@pytest.fixture
def add_scored(store: Store, tmp_path: Path) -> Callable[..., Version]:
    """A function that registers a student with bits per byte around `level`, and its training cost."""

    def run(label: str, level: float, **fields: Any) -> Version:
        folder = tmp_path / f"artifact-{len(store.versions('m'))}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"of": folder.name}))
        with store.runs.start(label) as training:
            training_cost = TrainingCost(training_seconds=70, teacher_seconds=12, tokens=614_400, machine="a test")
            training.set_tags({TRAINING_COST_TAG: training_cost.model_dump_json()})
        given = {"kind": "student", "recipe": label, "family": "f", "run_id": training.id} | fields
        version = store.register(NewVersion(name="m", **given), folder)
        values = [level + 0.02 * ((place * 7) % 5 - 2) + 0.1 * (place % 3) for place in range(48)]
        file = tmp_path / f"{version.version}.parquet"
        parquet.write_table(documents("single", values, FILES), file)
        card = make_card(version.digest, 0.5, 1.0)
        result = card.tasks["single"].model_copy(
            update={"metric": "bits_per_byte", "value": level, "higher_is_better": False, "documents": 48}
        )
        store.findings.add_scorecard(version, card.model_copy(update={"tasks": {"single": result}}), file)
        return version

    return run


def test_a_distilled_student_is_compared_with_the_controls_of_its_family(
    store: Store, add_scored: Callable[..., Version], limbeck: Callable[..., Any]
) -> None:
    add_scored("small-distilled", 2.0)
    add_scored("small-labels", 2.2, control="labels")
    add_scored("small-labels-equal-cost", 1.9, control="labels_equal_cost")
    add_scored("other-labels", 1.0, control="labels", family="g")
    add_scored("other-distilled", 1.0, family="g")
    comparisons = {(each.student, each.kind): each for each in compare_with_controls(store, store.versions("m"))}
    assert comparisons.keys() == {("m/1", "labels"), ("m/1", "labels_equal_cost"), ("m/5", "labels")}
    at_equal_tokens, at_equal_cost, equal = comparisons.values()
    assert (at_equal_tokens.control, at_equal_tokens.outcome) == ("m/2", "better")
    assert at_equal_tokens.tasks["single"].difference.value == pytest.approx(-0.2)
    assert (at_equal_tokens.student_tokens, at_equal_tokens.student_seconds) == (614_400, 82)
    assert (at_equal_cost.control, at_equal_cost.outcome) == ("m/3", "worse")  # distillation can lose
    assert at_equal_cost.tasks["single"].better == "control"
    assert (equal.outcome, equal.tasks["single"].better) == ("not settled", None)

    rows = {row.version: row for row in leaderboard_rows(store, "m")}
    controls = [None, "labels", "labels_equal_cost", "labels", None]
    assert [rows[f"m/{number}"].control for number in range(1, 6)] == controls
    assert [each.outcome for each in rows["m/1"].against_controls] == ["better", "worse"]
    assert rows["m/2"].against_controls == ()
    table = limbeck("leaderboard", "m").out
    assert "small-labels torch, control" in table
    assert "small-distilled torch, control" not in table
    assert "m/1 beats m/2, labels alone at equal tokens: 614,400 tokens and 82 s with the teacher's pass" in table
    assert "m/1 loses to m/3, labels alone at equal cost" in table
    assert "single bits_per_byte -0.2000 [-0.2" in table
    assert "m/5 cannot be distinguished from m/4" in table
    assert "+0.0000 [+0.0000, +0.0000], not settled" in table
    page = limbeck("leaderboard", "m", "--format", "html", "--output", "page.html")
    assert page.code == 0
    assert "m/1 loses to m/3" in Path("page.html").read_text()
    assert "m/2" in limbeck("leaderboard", "m", "--format", "csv").out


def test_controls_that_were_not_scored_are_left_out(
    store: Store, add_scored: Callable[..., Version], tmp_path: Path
) -> None:
    add_scored("small-distilled", 2.0)
    folder = tmp_path / "unscored"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    store.register(NewVersion(name="m", kind="student", family="f", control="labels"), folder)
    assert compare_with_controls(store, store.versions("m")) == []


def test_wins_and_losses_on_different_tasks_are_mixed(store: Store, add_scored: Callable[..., Version]) -> None:
    student, control = add_scored("small", 2.0), add_scored("small-labels", 2.2, control="labels")
    for version, first, second in ((student, 1.0, 2.0), (control, 2.0, 1.0)):
        noise = [0.01 * (place % 5) for place in range(48)]
        tables = [
            documents(name, [level + each for each in noise], FILES) for name, level in (("a", first), ("b", second))
        ]
        file = Path(f"{version.version}-two.parquet")
        parquet.write_table(pa.concat_tables(tables), file)
        card = make_card(version.digest, 0.5, 1.0)
        result = card.tasks["single"]
        store.findings.add_scorecard(version, card.model_copy(update={"tasks": {"a": result, "b": result}}), file)
    [comparison] = compare_with_controls(store, store.versions("m"))
    assert comparison.outcome == "mixed"
    assert {name: each.better for name, each in comparison.tasks.items()} == {"a": "control", "b": "student"}
