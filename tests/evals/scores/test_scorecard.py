"""Scorecards of real models on real tasks: what is known is not done again, what is finished is not lost."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import pytest

from limbeck.evals.cost.measure import paired_cost_ratio
from limbeck.evals.cost.prices import Prices
from limbeck.evals.cost.runner import TimingPlan
from limbeck.evals.scores import scorecard
from limbeck.evals.scores.scorecard import EvalOptions, evaluate
from limbeck.evals.stats.retention import compare_with_teacher
from limbeck.evals.tasks.task_set import TaskSet
from limbeck.registry.catalog.model_ref import ResolvedModel, load_registered_version, resolve_model
from limbeck.registry.core.errors import BadInput
from limbeck.registry.mlflow.store import Store
from limbeck.registry.records import NewVersion
from tests.conftest import make_model

NAMES = ["text_bits_per_byte", "text_next_line"]
NO_COST = EvalOptions(cost=False)


@pytest.fixture(scope="module")
def tasks(text_tasks: Path) -> TaskSet:
    return TaskSet.load(NAMES, [text_tasks])


@pytest.fixture(scope="module")
def other_llama(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A model with other weights than tiny_llama."""
    return make_model(tmp_path_factory.mktemp("other"), tokenizer_folder, "llama", seed=1)


@pytest.fixture
def models(store: Store, tiny_llama: Path, onnx_llama: Path, other_llama: Path) -> list[ResolvedModel]:
    """A registered teacher, its ONNX export, and a student."""
    teacher = store.register(NewVersion(name="m", kind="teacher"), tiny_llama)
    onnx = store.register(
        NewVersion(name="m", kind="onnx", engine="onnxruntime", parent=teacher.ref, params=1000), onnx_llama
    )
    student = store.register(NewVersion(name="m", kind="student", teacher=teacher.ref, recipe="other"), other_llama)
    return [load_registered_version(version, store) for version in (teacher, onnx, student)]


@pytest.fixture
def quick(
    store: Store, onnx_llama: Path, other_llama: Path, tiny_gpt2: Path, onnx: Callable[[Path], Path]
) -> list[ResolvedModel]:
    """A registered teacher and two students, all ONNX: their processes are loaded in a moment."""
    folders = [onnx_llama, onnx(other_llama), onnx(tiny_gpt2)]
    versions = [store.register(NewVersion(name="m", kind="onnx", engine="onnxruntime"), folder) for folder in folders]
    return [load_registered_version(version, store) for version in versions]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was run: "score m/1" and "measure m/1 m/2", in order."""
    seen: list[str] = []
    score, measure = scorecard.score_model, scorecard.measure_costs
    plan = TimingPlan(prompt_tokens=16, new_tokens=8, rounds=6, batches=(1,), threads=1)

    def scoring(model: ResolvedModel, *args: Any, **more: Any) -> Any:
        seen.append(f"score {model.label}")
        return score(model, *args, **more)

    def measuring(models: list[ResolvedModel], **more: Any) -> Any:
        seen.append(f"measure {' '.join(model.label for model in models)}")
        return measure(models, plan, **more)

    monkeypatch.setattr(scorecard, "score_model", scoring)
    monkeypatch.setattr(scorecard, "measure_costs", measuring)
    return seen


def price(usd_per_hour: float) -> Prices:
    """One price for any machine."""
    return Prices.load(usd_per_hour=usd_per_hour)


def test_teacher_and_students(models: list[ResolvedModel], tasks: TaskSet, store: Store, calls: list[str]) -> None:
    teacher, onnx, student = models
    cards = evaluate([onnx, teacher], tasks, store, against=teacher, options=EvalOptions(prices=price(0.2)))
    assert [card.model for card in cards] == ["m/1", "m/2"]
    assert calls == ["score m/1", "score m/2", "measure m/1 m/2"]
    own, exported = (card.relative for card in cards)
    assert own
    assert exported
    assert own.retention
    assert (own.retention.value, own.retention.low, own.cost_ratio, own.speedup) == (1.0, 1.0, 1.0, 1.0)
    assert exported.teacher == "m/1"
    assert exported.teacher_digest == teacher.digest
    assert exported.difference["text_bits_per_byte"].value == pytest.approx(0, abs=1e-4)  # fp32 ONNX is PyTorch
    a, b = cards[1].cost, cards[0].cost
    assert a
    assert b
    assert a.run == b.run
    assert exported.teacher_cost == b
    assert exported.cost_ratio_interval == paired_cost_ratio(a, b)
    assert exported.cost_ratio == exported.cost_ratio_interval.value
    assert exported.speedup_interval
    assert exported.speedup == exported.speedup_interval.value == pytest.approx(1 / exported.cost_ratio)
    assert exported.speedup_interval.low * exported.cost_ratio_interval.high == pytest.approx(1)
    assert a.price
    assert "0.2 USD/h (--usd-per-hour)" in a.price
    assert all(card.seconds and card.seconds > 0 for card in cards)
    assert cards[1].tasks.keys() == set(NAMES)
    for model, card in zip((teacher, onnx), cards, strict=True):
        assert model.version
        assert store.findings.scorecards(model.version) == [card]
        kept = parquet.read_table(store.findings.documents(model.version, card)).to_pandas()
        mine = kept[kept["task"] == "text_bits_per_byte"]
        assert np.average(mine["value"], weights=mine["weight"]) == pytest.approx(
            card.tasks["text_bits_per_byte"].value
        )

    # Again, with a student more: only the student is run.
    calls.clear()
    again = evaluate([onnx, student], tasks, store, against=teacher, options=EvalOptions(cost=False, prices=price(0.2)))
    assert calls == ["score m/3"]
    assert again[:2] == cards
    assert again[2].cost is None

    # The student's relative part is what the statistics say of the two sets of documents.
    assert student.version
    assert teacher.version
    tables = (
        parquet.read_table(store.findings.documents(m.version, c))
        for m, c in ((student, again[2]), (teacher, cards[0]))
    )
    expected = compare_with_teacher(*tables, cards[0].tasks)
    assert again[2].relative
    assert again[2].relative.difference == expected.difference
    assert again[2].relative.retention == expected.retention

    # Another price: neither scored nor measured.
    calls.clear()
    (_, dear) = evaluate([onnx], tasks, store, against=teacher, options=EvalOptions(prices=price(0.4)))
    assert calls == []
    assert dear.cost
    assert dear.cost.usd_per_million_tokens == pytest.approx(2 * a.usd_per_million_tokens)
    assert dear.relative
    assert dear.relative.cost_ratio == pytest.approx(exported.cost_ratio)
    assert onnx.version
    assert [card.cost and card.cost.usd_per_hour for card in store.findings.scorecards(onnx.version)] == [0.2, 0.4]


def test_a_teacher_named_later_needs_no_forward_run(
    models: list[ResolvedModel], tasks: TaskSet, store: Store, calls: list[str]
) -> None:
    teacher, _, student = models
    bare = evaluate([teacher, student], tasks, store, options=NO_COST)
    assert [card.relative for card in bare] == [None, None]
    calls.clear()
    cards = evaluate([student], tasks, store, against=teacher, options=NO_COST)
    assert calls == []
    assert cards[1].relative
    assert cards[1].tasks == bare[1].tasks
    # Other tasks are other scores.
    few = TaskSet.load(NAMES[:1], [tasks_folder(tasks)], limit=5)
    evaluate([student], few, store, options=NO_COST)
    evaluate([student], tasks, store, options=EvalOptions(cost=False, force=True))
    assert calls == ["score m/3", "score m/3"]


def tasks_folder(tasks: TaskSet) -> Path:
    """Where the data of the tasks lie."""
    config = tasks.tasks[NAMES[0]].config
    return Path(config.dataset_kwargs["data_files"]["test"]).parent


def test_a_ratio_is_of_costs_measured_in_one_run(
    quick: list[ResolvedModel], tasks: TaskSet, store: Store, calls: list[str]
) -> None:
    teacher, one, other = quick
    alone = evaluate([one], tasks, store)
    first = evaluate([], tasks, store, against=teacher)
    assert calls == ["score m/2", "measure m/2", "score m/1", "measure m/1"]

    # Both costs are known, not of one run.
    calls.clear()
    (_, card) = evaluate([one], tasks, store, against=teacher, options=NO_COST)
    assert calls == []
    assert card.cost == alone[0].cost
    assert card.relative
    assert (card.relative.cost_ratio, card.relative.speedup, card.relative.teacher_cost) == (None, None, None)

    # So both are timed again; the teacher's own scorecard stays as it is.
    (own, card) = evaluate([one], tasks, store, against=teacher)
    assert calls == ["measure m/1 m/2"]
    assert own == first[0]
    assert card.cost != alone[0].cost
    assert card.relative
    assert card.relative.cost_ratio

    # A candidate more: the first one's ratio stays that of its own run.
    calls.clear()
    (own, again, new) = evaluate([one, other], tasks, store, against=teacher)
    assert calls == ["score m/3", "measure m/1 m/3"]
    assert (own, again) == (first[0], card)
    assert new.cost
    assert new.relative
    assert new.relative.teacher_cost
    assert new.cost.run == new.relative.teacher_cost.run != card.relative.teacher_cost.run
    calls.clear()
    assert evaluate([one, other], tasks, store, against=teacher) == [own, again, new]
    assert calls == []


def test_where_memory_holds_two_models_at_once(
    quick: list[ResolvedModel], tasks: TaskSet, store: Store, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teacher is timed beside each candidate; what a run found is kept before the next one begins."""
    teacher, one, other = quick
    monkeypatch.setattr("limbeck.evals.cost.measure.available_memory", lambda: 0)
    measuring = scorecard.measure_costs

    def killed(given: list[ResolvedModel], **more: Any) -> Any:
        if other in given:
            raise KeyboardInterrupt
        return measuring(given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(scorecard, "measure_costs", killed)
        with pytest.raises(KeyboardInterrupt):
            evaluate([one, other], tasks, store, against=teacher)
    assert one.version
    assert [card.cost is not None for card in store.findings.scorecards(one.version)] == [True]
    calls.clear()
    cards = evaluate([one, other], tasks, store, against=teacher)
    assert calls == ["measure m/1 m/3"]
    assert all(card.relative and card.relative.cost_ratio for card in cards)


def test_a_kill_loses_nothing_finished(
    models: list[ResolvedModel],
    tasks: TaskSet,
    store: Store,
    calls: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, onnx, student = models
    scoring = scorecard.score_model

    def killed(model: ResolvedModel, *args: Any, **more: Any) -> Any:
        if model == student:
            raise KeyboardInterrupt
        return scoring(model, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(scorecard, "score_model", killed)
        with pytest.raises(KeyboardInterrupt):
            evaluate([onnx, student], tasks, store, options=NO_COST)
    assert onnx.version
    assert len(store.findings.scorecards(onnx.version)) == 1
    calls.clear()
    cards = evaluate([onnx, student], tasks, store, options=NO_COST)
    assert calls == ["score m/3"]
    assert [card.model for card in cards] == ["m/2", "m/3"]


def test_a_folder_is_scored_once_and_a_damaged_score_again(
    limbeck_home: Path, onnx_llama: Path, tasks: TaskSet, calls: list[str]
) -> None:
    model = resolve_model(str(onnx_llama))
    first = evaluate([model], tasks, options=NO_COST)
    assert evaluate([model], tasks, options=NO_COST) == first
    assert len(calls) == 1
    (documents,) = limbeck_home.rglob("documents.parquet")
    documents.write_bytes(documents.read_bytes()[:-10])
    again = evaluate([model], tasks, options=NO_COST)
    assert len(calls) == 2
    assert again[0].tasks == first[0].tasks


def test_scores_that_are_no_numbers_are_refused(
    limbeck_home: Path, tiny_llama: Path, tmp_path: Path, tasks: TaskSet
) -> None:
    from safetensors.numpy import load_file, save_file

    folder = tmp_path / "nan"
    shutil.copytree(tiny_llama, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][:] = np.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadInput, match=r"task text_bits_per_byte, document \d+: .*gives NaN"):
        evaluate([resolve_model(str(folder))], tasks, options=NO_COST)
    assert not list(limbeck_home.rglob("scorecard.json"))


# --- the commands


@pytest.fixture
def evaluated(limbeck: Callable[..., Any], text_tasks: Path) -> Callable[..., Any]:
    """Run `limbeck eval ... --tasks ... --include-path ... --no-cost`."""

    def run(*args: object) -> Any:
        return limbeck("eval", *args, "--tasks", ",".join(NAMES), "--include-path", text_tasks, "--no-cost")

    return run


def test_eval_of_a_name_is_of_all_its_versions(models: list[ResolvedModel], evaluated: Callable[..., Any]) -> None:
    import json

    done = evaluated("m", "--against", "m/1", "--format", "json")
    assert done.code == 0
    cards = json.loads(done.out)
    assert [card["model"] for card in cards] == ["m/1", "m/2", "m/3"]
    assert cards[2]["relative"]["teacher"] == "m/1"
    assert cards[2]["tasks"]["text_next_line"]["metric"] == "acc"
    table = evaluated("m", "--against", "m/1")
    assert "m/3" in table.out
    assert "bits per" in table.out
    assert max(map(len, table.out.splitlines())) <= 140


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["LLAMA", "--usd-per-hour", "-1"], "a price of -1 dollars an hour"),
        (["EMPTY"], "is not a model"),
        (["LLAMA", "--against", "EMPTY"], "is not a model"),
        (["LLAMA", "--limit", "0"], "limit"),
    ],
)
def test_bad_input(
    args: list[str],
    message: str,
    tiny_llama: Path,
    limbeck_home: Path,
    tmp_path: Path,
    evaluated: Callable[..., Any],
) -> None:
    (tmp_path / "empty").mkdir()
    places = {"LLAMA": str(tiny_llama), "EMPTY": str(tmp_path / "empty")}
    done = evaluated(*(places.get(arg, arg) for arg in args))
    assert done.code == 2
    assert message in done.err
    assert "Traceback" not in done.err
    assert done.out == ""


def test_tasks_are_made_and_named(
    limbeck: Callable[..., Any], limbeck_home: Path, corpus: Path, tmp_path: Path
) -> None:
    done = limbeck("tasks", corpus, "--name", "mine", "--output", tmp_path / "t", "--kind", "next_line")
    assert (done.code, done.out) == (0, "mine_next_line\n")
    assert list((tmp_path / "t").rglob("*.yaml"))
    done = limbeck("tasks", corpus, "--name", "mine", "--output", tmp_path / "t", "--kind", "next_lime")
    assert done.code == 2
    assert "did you mean next_line" in done.err
