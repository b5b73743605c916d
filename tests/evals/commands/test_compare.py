"""`limbeck compare`: over real models' scores, and what it prints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from limbeck.evals.scores.scorecard import EvalOptions, evaluate
from limbeck.evals.tasks.task_set import TaskSet
from limbeck.registry.catalog.model_ref import load_registered_version
from limbeck.registry.mlflow.store import Store
from limbeck.registry.records import ComparedModels, NewVersion, Version
from tests.conftest import make_model

NAMES = ["text_bits_per_byte", "text_next_line"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> list[Path]:
    """Two models with different weights."""
    return [make_model(tmp_path_factory.mktemp(f"m{seed}"), tokenizer_folder, "llama", seed=seed) for seed in (0, 1)]


def register(store: Store, checkpoints: list[Path]) -> list[Version]:
    """Register a teacher m/1 and a student m/2."""
    teacher = store.register(NewVersion(name="m", kind="teacher"), checkpoints[0])
    return [teacher, store.register(NewVersion(name="m", kind="student", teacher=teacher.ref), checkpoints[1])]


@pytest.fixture(scope="module")
def scored_home(
    tmp_path_factory: pytest.TempPathFactory, empty_database: Path, checkpoints: list[Path], text_tasks: Path
) -> Path:
    """A state folder with m/1 and m/2, scored on NAMES. Tests that use it only read."""
    home = tmp_path_factory.mktemp("scored")
    shutil.copy(empty_database, home / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIMBECK_HOME", str(home))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        store = Store()
        models = [load_registered_version(version, store) for version in register(store, checkpoints)]
        evaluate(models, TaskSet.load(NAMES, [text_tasks]), store, options=EvalOptions(cost=False))
    return home


@pytest.fixture
def scored(scored_home: Path, limbeck_home: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The store of `scored_home`."""
    monkeypatch.setenv("LIMBECK_HOME", str(scored_home))
    return Store()


def compare(limbeck: Callable[..., Any], *args: object) -> ComparedModels:
    """What `limbeck compare` reports as JSON."""
    done = limbeck("compare", *args, "--format", "json")
    assert done.code == 0, done.err
    return ComparedModels.model_validate_json(done.out)


def test_two_versions_are_compared_by_document(limbeck: Callable[..., Any], scored: Store) -> None:
    versions = [scored.get("m/1"), scored.get("m/2")]
    found = compare(limbeck, "m/2", "m/1", "--margin", "bits_per_byte=2", "--show-flips", "2")
    assert (found.candidate, found.reference) == ("m/2", "m/1")
    assert found.candidate_digest == versions[1].digest
    assert [row.task for row in found.tasks] == NAMES
    assert found.over_all == ()  # no metric of two tasks
    (ours,), (theirs,) = (scored.findings.scorecards(version) for version in reversed(versions))
    for row in found.tasks:
        assert row.candidate == pytest.approx(ours.tasks[row.task].value)
        assert row.reference == pytest.approx(theirs.tasks[row.task].value)
        assert row.difference.value == pytest.approx(row.candidate - row.reference)
    bits, line = found.tasks
    assert (bits.noninferiority.margin, line.noninferiority.margin) == (2, 0.01)
    assert bits.answers.kl is None
    assert line.answers.kl is not None
    assert line.answers.kl > 0
    assert line.answers.right_to_wrong is not None
    assert line.answers.wrong_to_right is not None
    changed = line.answers.wrong_to_right - line.answers.right_to_wrong
    assert changed / line.documents == pytest.approx(line.difference.value)
    # Models of random weights only guess, so retention is undefined.
    assert line.retention is None
    assert "retention is undefined: m/1's acc" in str(line.no_retention)
    assert len(found.flips) == 4
    flip = found.flips[-1]
    assert flip.task == "text_next_line"
    assert {flip.candidate_value, flip.reference_value} == {0.0, 1.0}
    right = flip.candidate_response if flip.candidate_value else flip.reference_response
    assert right == flip.target

    # The other way round, differences change sign.
    swapped = compare(limbeck, "m/1", "m/2")
    assert swapped.tasks[1].difference.value == pytest.approx(-line.difference.value)
    assert swapped.tasks[1].answers.right_to_wrong == line.answers.wrong_to_right


@pytest.mark.usefixtures("scored")
def test_tables_are_narrow_and_show_verdicts_and_flips(limbeck: Callable[..., Any]) -> None:
    done = limbeck("compare", "m/2", "m/1", "--show-flips")
    assert done.code == 0
    assert max(len(line) for line in done.out.splitlines() if line[:1] in "┃│└┏") <= 120
    for text in ("is m/2 as good as m/1?", "inconclusive", "about ", "retention is undefined"):
        assert text in done.out
    assert "text_next_line 0" in done.out or "text_next_line 1" in done.out
    assert "  target" in done.out


@pytest.mark.usefixtures("scored")
def test_check_exits_with_1_unless_every_task_passes(limbeck: Callable[..., Any]) -> None:
    assert limbeck("compare", "m/2", "m/1").code == 0
    done = limbeck("compare", "m/2", "m/1", "--check", "--format", "json")
    assert done.code == 1
    assert "m/2 is not shown to be as good as m/1 on text" in done.err
    assert json.loads(done.out)["candidate"] == "m/2"
    assert limbeck("compare", "m/2", "m/1", "--check", "--margin", "0.9", "--margin", "bits_per_byte=9").code == 0


@pytest.mark.usefixtures("scored")
def test_scored_tasks_are_not_scored_again(limbeck: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("limbeck.evals.scores.compare.evaluate", None)  # nothing may be scored
    assert [row.task for row in compare(limbeck, "m/2", "m/1", "--tasks", NAMES[1]).tasks] == NAMES[1:]


def test_missing_tasks_are_scored_first(
    limbeck: Callable[..., Any], store: Store, checkpoints: list[Path], text_tasks: Path, tmp_path: Path
) -> None:
    versions = register(store, checkpoints)
    done = limbeck("compare", "m/2", "m/1")
    assert done.code == 2
    assert "m/2 and m/1 have no common documents: m/2 was scored on nothing" in done.err
    one = ("--tasks", NAMES[1], "--include-path", text_tasks)
    assert [row.task for row in compare(limbeck, "m/2", "m/1", *one).tasks] == NAMES[1:]
    assert all(card.cost is None for card in store.findings.scorecards(versions[0]))
    # m/2 has newer scores on another task: the newest common task is still the first. A folder works too.
    limbeck("eval", "m/2", "--tasks", NAMES[0], "--include-path", text_tasks, "--no-cost")
    assert [row.task for row in compare(limbeck, "m/2", "m/1").tasks] == NAMES[1:]
    local = compare(limbeck, checkpoints[1], "m/1", *one)
    assert local.candidate == str(checkpoints[1])
    assert local.tasks[0].difference == compare(limbeck, "m/2", "m/1").tasks[0].difference
    # A group without a value of its own is compared by its tasks.
    (tmp_path / "group.yaml").write_text(f"group: both\ntask: [{', '.join(NAMES)}]\n")
    both = ("--tasks", "both", "--include-path", text_tasks, "--include-path", tmp_path)
    assert {row.task for row in compare(limbeck, "m/2", "m/1", *both).tasks} == {*NAMES}
    done = limbeck("compare", "m/2", "m/1", "--tasks", "text_next_lines")
    assert done.code == 2
    assert "unknown task" in done.err


@pytest.mark.usefixtures("scored")
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["m/2", "m/1", "--margin", "text_next_lime=0.1"], "did you mean text_next_line"),
        (["m/2", "m/1", "--margin", "-0.1"], "a margin is a number above 0"),
        (["m/2", "m/9"], "m has no version 9"),
        (["m/2", "m/1", "--show-flips", "0"], "0"),
    ],
)
def test_bad_names_and_margins_are_refused(args: list[str], message: str, limbeck: Callable[..., Any]) -> None:
    done = limbeck("compare", *args)
    assert done.code == 2
    assert message in done.err
    assert "Traceback" not in done.err
    assert done.out == ""
