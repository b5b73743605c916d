"""Scorecards of real models on real tasks: stored results are reused, and an interruption loses none."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import pytest

from limbeck.evals.cost.measure import describe_machine, measure_costs, paired_cost_ratio
from limbeck.evals.cost.prices import Prices
from limbeck.evals.cost.runner import TimingPlan
from limbeck.evals.scores import scorecard
from limbeck.evals.scores.scorecard import EvalOptions, evaluate
from limbeck.evals.stats.retention import compare_with_teacher
from limbeck.evals.tasks.task_set import TaskSet
from limbeck.registry.catalog.model_ref import ResolvedModel, load_registered_version, resolve_model
from limbeck.registry.core.errors import BadInput
from limbeck.registry.mlflow.store import Store
from limbeck.registry.records import Cost, NewVersion
from tests.conftest import make_model
from tests.evals.timed_costs import timed_cost

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
def onnx_models(
    store: Store, onnx_llama: Path, other_llama: Path, tiny_gpt2: Path, onnx: Callable[[Path], Path]
) -> list[ResolvedModel]:
    """A registered teacher and two students, all ONNX, which load fast."""
    folders = [onnx_llama, onnx(other_llama), onnx(tiny_gpt2)]
    versions = [store.register(NewVersion(name="m", kind="onnx", engine="onnxruntime"), folder) for folder in folders]
    return [load_registered_version(version, store) for version in versions]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls that score and measure, such as "score m/1" and "measure m/1 m/2". Scores are real, costs made up."""
    calls: list[str] = []
    score = scorecard.score_model

    def score_model(model: ResolvedModel, *args: Any, **options: Any) -> Any:
        calls.append(f"score {model.label}")
        return score(model, *args, **options)

    def made_up_costs(models: list[ResolvedModel], **options: Any) -> list[Cost]:
        calls.append(f"measure {' '.join(model.label for model in models)}")
        run = uuid.uuid4().hex
        return [timed_cost(1 / n, run=run, machine=describe_machine(model)) for n, model in enumerate(models, 1)]

    monkeypatch.setattr(scorecard, "score_model", score_model)
    monkeypatch.setattr(scorecard, "measure_costs", made_up_costs)
    return calls


def price(usd_per_hour: float) -> Prices:
    """One price for any machine."""
    return Prices.load(usd_per_hour=usd_per_hour)


def test_students_are_scored_relative_to_their_teacher(
    models: list[ResolvedModel], tasks: TaskSet, store: Store, calls: list[str]
) -> None:
    teacher, onnx, student = models
    cards = evaluate([onnx, teacher], tasks, store, against=teacher, options=EvalOptions(prices=price(0.2)))
    assert [card.model for card in cards] == ["m/1", "m/2"]
    assert calls == ["score m/1", "score m/2", "measure m/1 m/2"]
    own, exported = (card.relative for card in cards)
    assert own
    assert exported
    assert own.retention is None  # random weights are worse than a compressor
    assert (own.cost_ratio, own.speedup) == (1.0, 1.0)
    assert exported.teacher == "m/1"
    assert exported.teacher_digest == teacher.digest
    assert exported.difference["text_bits_per_byte"].value == pytest.approx(0, abs=1e-4)  # fp32 ONNX is PyTorch
    onnx_cost, teacher_cost = cards[1].cost, cards[0].cost
    assert onnx_cost
    assert teacher_cost
    assert onnx_cost.run == teacher_cost.run
    assert exported.teacher_cost == teacher_cost
    assert exported.cost_ratio_interval == paired_cost_ratio(onnx_cost, teacher_cost)
    assert exported.cost_ratio == exported.cost_ratio_interval.value
    assert exported.speedup_interval
    assert exported.speedup == exported.speedup_interval.value == pytest.approx(1 / exported.cost_ratio)
    assert exported.speedup_interval.low * exported.cost_ratio_interval.high == pytest.approx(1)
    assert onnx_cost.price
    assert "0.2 USD/h (--usd-per-hour)" in onnx_cost.price
    assert all(card.seconds and card.seconds > 0 for card in cards)
    assert cards[1].tasks.keys() == set(NAMES)
    for model, card in zip((teacher, onnx), cards, strict=True):
        assert model.version
        assert store.findings.scorecards(model.version) == [card]
        documents = parquet.read_table(store.findings.documents(model.version, card)).to_pandas()
        rows = documents[documents["task"] == "text_bits_per_byte"]
        assert np.average(rows["value"], weights=rows["weight"]) == pytest.approx(
            card.tasks["text_bits_per_byte"].value
        )

    # Again with another student: only that one is scored.
    calls.clear()
    again = evaluate([onnx, student], tasks, store, against=teacher, options=EvalOptions(cost=False, prices=price(0.2)))
    assert calls == ["score m/3"]
    assert again[:2] == cards
    assert again[2].cost is None

    # The student's comparison equals the statistics of the two sets of documents.
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
    (_, repriced) = evaluate([onnx], tasks, store, against=teacher, options=EvalOptions(prices=price(0.4)))
    assert calls == []
    assert repriced.cost
    assert repriced.cost.usd_per_million_tokens == pytest.approx(2 * onnx_cost.usd_per_million_tokens)
    assert repriced.relative
    assert repriced.relative.cost_ratio == pytest.approx(exported.cost_ratio)
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
    # Other tasks, or force, need new scores.
    few = TaskSet.load(NAMES[:1], [tasks_folder(tasks)], limit=5)
    evaluate([student], few, store, options=NO_COST)
    evaluate([student], tasks, store, options=EvalOptions(cost=False, force=True))
    assert calls == ["score m/3", "score m/3"]


def tasks_folder(tasks: TaskSet) -> Path:
    """The folder of the tasks' data."""
    config = tasks.tasks[NAMES[0]].config
    return Path(config.dataset_kwargs["data_files"]["test"]).parent


def test_a_cost_ratio_needs_costs_of_one_run(
    onnx_models: list[ResolvedModel], tasks: TaskSet, store: Store, calls: list[str]
) -> None:
    teacher, one, other = onnx_models
    alone = evaluate([one], tasks, store)
    first = evaluate([], tasks, store, against=teacher)
    assert calls == ["score m/2", "measure m/2", "score m/1", "measure m/1"]

    # Both costs are known, but not from one run.
    calls.clear()
    (_, card) = evaluate([one], tasks, store, against=teacher, options=NO_COST)
    assert calls == []
    assert card.cost == alone[0].cost
    assert card.relative
    assert (card.relative.cost_ratio, card.relative.speedup, card.relative.teacher_cost) == (None, None, None)

    # Both are measured again; the teacher's own scorecard does not change.
    (own, card) = evaluate([one], tasks, store, against=teacher)
    assert calls == ["measure m/1 m/2"]
    assert own == first[0]
    assert card.cost != alone[0].cost
    assert card.relative
    assert card.relative.cost_ratio

    # With another candidate, the first one keeps the ratio of its own run.
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


def test_costs_are_really_measured_in_one_run_with_the_teacher(
    onnx_models: list[ResolvedModel], tasks: TaskSet, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    brief = TimingPlan(prompt_tokens=16, new_tokens=8, rounds=6, batches=(1,), threads=1)
    monkeypatch.setattr(scorecard, "measure_costs", partial(measure_costs, plan=brief))
    teacher, student, _ = onnx_models
    cards = evaluate([student], tasks, store, against=teacher)
    own, relative = cards[1].cost, cards[1].relative
    assert own
    assert relative
    assert relative.teacher_cost
    assert own.run == relative.teacher_cost.run
    assert own.machine == describe_machine(student)
    assert relative.cost_ratio == paired_cost_ratio(own, relative.teacher_cost).value
    # A cost that was measured on this machine is not measured again.
    monkeypatch.setattr(scorecard, "measure_costs", None)
    assert evaluate([student], tasks, store, against=teacher) == cards


def test_if_memory_holds_only_two_models_each_run_is_stored_at_once(
    onnx_models: list[ResolvedModel], tasks: TaskSet, store: Store, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teacher is measured with each candidate; a run's costs are stored before the next run begins."""
    teacher, one, other = onnx_models
    monkeypatch.setattr("limbeck.evals.cost.measure.available_memory", lambda: 0)
    measure = scorecard.measure_costs

    def interrupted(models: list[ResolvedModel], **options: Any) -> Any:
        if other in models:
            raise KeyboardInterrupt
        return measure(models, **options)

    with monkeypatch.context() as patch:
        patch.setattr(scorecard, "measure_costs", interrupted)
        with pytest.raises(KeyboardInterrupt):
            evaluate([one, other], tasks, store, against=teacher)
    assert one.version
    assert [card.cost is not None for card in store.findings.scorecards(one.version)] == [True]
    calls.clear()
    cards = evaluate([one, other], tasks, store, against=teacher)
    assert calls == ["measure m/1 m/3"]
    assert all(card.relative and card.relative.cost_ratio for card in cards)


def test_an_interruption_keeps_complete_scorecards(
    models: list[ResolvedModel],
    tasks: TaskSet,
    store: Store,
    calls: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, onnx, student = models
    score = scorecard.score_model

    def interrupted(model: ResolvedModel, *args: Any, **options: Any) -> Any:
        if model == student:
            raise KeyboardInterrupt
        return score(model, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(scorecard, "score_model", interrupted)
        with pytest.raises(KeyboardInterrupt):
            evaluate([onnx, student], tasks, store, options=NO_COST)
    assert onnx.version
    assert len(store.findings.scorecards(onnx.version)) == 1
    calls.clear()
    cards = evaluate([onnx, student], tasks, store, options=NO_COST)
    assert calls == ["score m/3"]
    assert [card.model for card in cards] == ["m/2", "m/3"]


def test_a_folder_is_scored_again_only_if_its_scorecard_is_damaged(
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


def test_scores_of_nan_are_refused_and_not_stored(
    limbeck_home: Path, tiny_llama: Path, tmp_path: Path, tasks: TaskSet
) -> None:
    from safetensors.numpy import load_file, save_file

    folder = tmp_path / "nan"
    shutil.copytree(tiny_llama, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][:] = 3e38  # finite, but the logits overflow
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadInput, match=r"task text_bits_per_byte, document \d+: .*gives NaN"):
        evaluate([resolve_model(str(folder))], tasks, options=NO_COST)
    assert not list(limbeck_home.rglob("scorecard.json"))
