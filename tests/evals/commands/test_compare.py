"""`limbeck compare`: tasks and all of them together, over real models' scores, and what it prints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from limbeck.evals.scores.scorecard import EvalOptions, evaluate
from limbeck.evals.stats.diagnostics import DIAGNOSTIC_COLUMNS
from limbeck.evals.stats.noninferiority import Margins, holm_adjusted_p_values
from limbeck.evals.stats.paired_comparison import compare_to_reference, correct_candidates_by_holm
from limbeck.evals.stats.retention import compare_with_teacher, pair_documents
from limbeck.evals.tasks.task_set import TaskSet
from limbeck.registry.catalog.model_ref import load_registered_version
from limbeck.registry.mlflow.store import Store
from limbeck.registry.records import ComparedModels, NewVersion, Version
from tests.conftest import make_model
from tests.evals.document_tables import documents, result

NAMES = ["text_bits_per_byte", "text_next_line"]


# --- tasks together


@pytest.fixture(scope="module")
def three_tasks() -> tuple[pa.Table, pa.Table, dict[str, Any]]:
    """Candidate, reference and results: two choice tasks that share files, one of them a group of two; and bits."""
    random = np.random.default_rng(0)
    ours, theirs, tasks = [], [], {}
    for name, count, group in (("one", 60, None), ("two_a", 80, "two"), ("two_b", 40, "two"), ("bits", 50, None)):
        files = [f"file{i % 20}.py" for i in range(count)]
        reference = (random.random(count) < 0.8).astype(float)
        candidate = np.where(random.random(count) < 0.15, random.random(count) < 0.5, reference)
        if name == "bits":
            reference, candidate = reference + 1, reference + 1.2 + 0.05 * random.normal(size=count)
        ours.append(documents(name, candidate, files))
        theirs.append(documents(name, reference, files))
        changes: dict[str, Any] = {"chance": 0.5} if name == "one" else {}
        if name == "bits":
            changes = dict(metric="bits_per_byte", higher_is_better=False, chance=8.0)
        tasks[name] = result(theirs[-1], group=group, **changes)
    tasks["two"] = result(pa.concat_tables(theirs[1:3]))
    return pa.concat_tables(ours), pa.concat_tables(theirs), tasks


def test_over_all_is_of_the_tasks_of_one_metric(three_tasks: Any) -> None:
    ours, theirs, tasks = three_tasks
    held = compare_to_reference(
        pair_documents(ours, theirs, DIAGNOSTIC_COLUMNS), tasks, Margins.parse(["0.1", "one=0.2"]), ("m/2", "m/1")
    )
    assert {row.task for row in held.tasks} == {"one", "two", "bits"}
    assert [(row.task, row.metric, set(row.tasks)) for row in held.over_all] == [
        ("macro", "acc", {"one", "two"}),
        ("pooled", "acc", {"one", "two"}),
    ]
    by_name = {row.task: row for row in [*held.tasks, *held.over_all]}
    one, two, macro, pooled = (by_name[name] for name in ("one", "two", "macro", "pooled"))
    assert (one.noninferiority.margin, two.noninferiority.margin, macro.noninferiority.margin) == (0.2, 0.1, 0.1)
    assert macro.difference.value == pytest.approx((one.difference.value + two.difference.value) / 2)
    assert pooled.difference.value == pytest.approx((60 * one.difference.value + 120 * two.difference.value) / 180)
    assert pooled.candidate - pooled.reference == pytest.approx(pooled.difference.value)
    assert (macro.documents, pooled.documents, pooled.clusters) == (180, 180, 20)
    assert one.retention
    assert two.retention
    assert macro.retention
    assert pooled.retention
    assert macro.retention.value == pytest.approx((one.retention.value + two.retention.value) / 2)
    chance = (60 * 0.5 + 120 * 0.25) / 180
    assert pooled.retention.value == pytest.approx((pooled.candidate - chance) / (pooled.reference - chance))
    found = compare_with_teacher(ours, theirs, tasks)
    assert held.retention == found.retention
    assert one.difference == found.difference["one"]
    assert by_name["bits"].better == "m/1"  # fewer bits per byte
    assert by_name["bits"].noninferiority.uncorrected == "fail"


def test_macro_counts_that_tasks_share_files() -> None:
    random = np.random.default_rng(1)
    files = [f"file{i}.py" for i in range(60)]
    shared, zeros = random.normal(size=60), np.zeros(60)

    def stderr(second: np.ndarray) -> float:
        ours = pa.concat_tables([documents("a", shared, files), documents("b", second, files)])
        theirs = pa.concat_tables([documents(name, zeros, files) for name in "ab"])
        tasks = {name: result(documents(name, zeros, files)) for name in "ab"}
        return (
            compare_to_reference(pair_documents(ours, theirs, DIAGNOSTIC_COLUMNS), tasks, Margins(), ("x", "y"))
            .over_all[0]
            .stderr
        )

    alone = shared.std(ddof=1) / np.sqrt(60)
    assert stderr(shared) == pytest.approx(alone)  # the second task adds nothing
    assert stderr(-shared) == pytest.approx(0, abs=1e-12)


def test_holm_is_over_tasks_and_candidates(three_tasks: Any) -> None:
    ours, theirs, tasks = three_tasks
    rows = compare_to_reference(
        pair_documents(ours, theirs, DIAGNOSTIC_COLUMNS), tasks, Margins(0.12), ("m/2", "m/1")
    ).tasks
    same = compare_to_reference(
        pair_documents(theirs, theirs, DIAGNOSTIC_COLUMNS), tasks, Margins(0.12), ("m/3", "m/1")
    ).tasks
    families = correct_candidates_by_holm([rows, same])
    expected = holm_adjusted_p_values([row.noninferiority.p_value for row in [*rows, *same]])
    assert [row.noninferiority.p_holm for of in families for row in of] == expected
    assert [len(of) for of in families] == [3, 3]


def test_a_task_of_one_cluster_is_told_to_say_nothing() -> None:
    table = documents("t", [0.0, 1.0, 1.0], ["one.py"] * 3)
    held = compare_to_reference(
        pair_documents(table, table, DIAGNOSTIC_COLUMNS), {"t": result(table)}, Margins(), ("a", "b")
    )
    assert held.tasks == []
    assert "two groups" in held.unknown_tasks["t"]


# --- the command


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> list[Path]:
    """Two models of other weights than each other."""
    return [make_model(tmp_path_factory.mktemp(f"m{seed}"), tokenizer_folder, "llama", seed=seed) for seed in (0, 1)]


@pytest.fixture
def versions(store: Store, folders: list[Path]) -> list[Version]:
    teacher = store.register(NewVersion(name="m", kind="teacher"), folders[0])
    return [teacher, store.register(NewVersion(name="m", kind="student", teacher=teacher.ref), folders[1])]


@pytest.fixture
def scored(store: Store, versions: list[Version], text_tasks: Path) -> None:
    tasks = TaskSet.load(NAMES, [text_tasks])
    models = [load_registered_version(version, store) for version in versions]
    evaluate(models, tasks, store, options=EvalOptions(cost=False))


def compared(limbeck: Callable[..., Any], *args: object) -> ComparedModels:
    done = limbeck("compare", *args, "--format", "json")
    assert done.code == 0, done.err
    return ComparedModels.model_validate_json(done.out)


@pytest.mark.usefixtures("scored")
def test_two_versions(limbeck: Callable[..., Any], versions: list[Version], store: Store) -> None:
    found = compared(limbeck, "m/2", "m/1", "--margin", "bits_per_byte=2", "--show-flips", "2")
    assert (found.candidate, found.reference) == ("m/2", "m/1")
    assert found.candidate_digest == versions[1].digest
    assert [row.task for row in found.tasks] == NAMES
    assert found.over_all == ()  # no metric of two tasks
    (ours,), (theirs,) = (store.findings.scorecards(version) for version in reversed(versions))
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
    # These models only guess.
    assert line.retention is None
    assert "retention is undefined: m/1's acc" in str(line.no_retention)
    assert len(found.flips) == 4
    flip = found.flips[-1]
    assert flip.task == "text_next_line"
    assert {flip.candidate_value, flip.reference_value} == {0.0, 1.0}
    right = flip.candidate_response if flip.candidate_value else flip.reference_response
    assert right == flip.target

    # The other way round everything is turned.
    turned = compared(limbeck, "m/1", "m/2")
    assert turned.tasks[1].difference.value == pytest.approx(-line.difference.value)
    assert turned.tasks[1].answers.right_to_wrong == line.answers.wrong_to_right


@pytest.mark.usefixtures("scored")
def test_tables(limbeck: Callable[..., Any]) -> None:
    done = limbeck("compare", "m/2", "m/1", "--show-flips")
    assert done.code == 0
    assert max(len(line) for line in done.out.splitlines() if line[:1] in "┃│└┏") <= 120
    for said in ("is m/2 as good as m/1?", "inconclusive", "about ", "retention is undefined"):
        assert said in done.out
    assert "text_next_line 0" in done.out or "text_next_line 1" in done.out
    assert "  target" in done.out


@pytest.mark.usefixtures("scored")
def test_check_says_no_unless_every_task_passes(limbeck: Callable[..., Any]) -> None:
    assert limbeck("compare", "m/2", "m/1").code == 0
    done = limbeck("compare", "m/2", "m/1", "--check", "--format", "json")
    assert done.code == 1
    assert "m/2 is not shown to be as good as m/1 on text" in done.err
    assert json.loads(done.out)["candidate"] == "m/2"
    assert limbeck("compare", "m/2", "m/1", "--check", "--margin", "0.9", "--margin", "bits_per_byte=9").code == 0


@pytest.mark.usefixtures("scored")
def test_tasks_that_are_scored_are_taken_as_they_are(
    limbeck: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from limbeck.evals.scores import compare as compare_module

    monkeypatch.setattr(compare_module, "evaluate", None)  # nothing may be scored
    assert [row.task for row in compared(limbeck, "m/2", "m/1", "--tasks", NAMES[1]).tasks] == NAMES[1:]


def test_what_is_not_scored_yet_is_scored_first(
    limbeck: Callable[..., Any],
    versions: list[Version],
    store: Store,
    folders: list[Path],
    text_tasks: Path,
    tmp_path: Path,
) -> None:
    done = limbeck("compare", "m/2", "m/1")
    assert done.code == 2
    assert "m/2 and m/1 have no common documents: m/2 was scored on nothing" in done.err
    one = ("--tasks", NAMES[1], "--include-path", text_tasks)
    assert [row.task for row in compared(limbeck, "m/2", "m/1", *one).tasks] == NAMES[1:]
    assert all(card.cost is None for card in store.findings.scorecards(versions[0]))
    # Another task for one of them: both know the first still, and a folder is compared as well.
    limbeck("eval", "m/2", "--tasks", NAMES[0], "--include-path", text_tasks, "--no-cost")
    assert [row.task for row in compared(limbeck, "m/2", "m/1").tasks] == NAMES[1:]
    local = compared(limbeck, folders[1], "m/1", *one)
    assert local.candidate == str(folders[1])
    assert local.tasks[0].difference == compared(limbeck, "m/2", "m/1").tasks[0].difference
    # A group without a value of its own is its tasks.
    (tmp_path / "group.yaml").write_text(f"group: both\ntask: [{', '.join(NAMES)}]\n")
    both = ("--tasks", "both", "--include-path", text_tasks, "--include-path", tmp_path)
    assert {row.task for row in compared(limbeck, "m/2", "m/1", *both).tasks} == {*NAMES}
    done = limbeck("compare", "m/2", "m/1", "--tasks", "text_next_lines")
    assert done.code == 2
    assert "unknown task" in done.err  # it is no task of lm-eval's own


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
def test_bad_input(args: list[str], message: str, limbeck: Callable[..., Any]) -> None:
    done = limbeck("compare", *args)
    assert done.code == 2
    assert message in done.err
    assert "Traceback" not in done.err
    assert done.out == ""


def test_documents_that_do_not_pair_are_named(three_tasks: Any) -> None:
    from limbeck.registry.core.errors import BadInput

    ours, theirs, _ = three_tasks
    with pytest.raises(BadInput, match=r"m/2 and m/1 were not scored on .*: documents bits 49 of m/1 alone"):
        pair_documents(ours.slice(0, len(ours) - 1), theirs, DIAGNOSTIC_COLUMNS, ("m/2", "m/1"))
