"""No request runs twice, no model sees the answers of another, and damaged answers are computed again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance

from limbeck.evals.engines import lazy
from limbeck.evals.engines.engine import TorchEngine
from limbeck.evals.engines.lazy import LazyEngine
from limbeck.evals.engines.lm_eval_model import LimbeckLM
from limbeck.evals.engines.score_cache import ScoreCache, request_key
from limbeck.evals.scores.harness import Scores, score_model
from limbeck.evals.tasks.task_set import TaskSet
from limbeck.registry.catalog.model_ref import ResolvedModel, resolve_model
from limbeck.registry.core.errors import BadInput
from tests import ROOT
from tests.conftest import make_model

NAMES = ["text_bits_per_byte", "text_next_line"]


@pytest.fixture(autouse=True)
def home(limbeck_home: Path) -> Path:
    return limbeck_home


@pytest.fixture
def model(tmp_path: Path, tiny_llama: Path) -> ResolvedModel:
    """A copy of the model, so that the test can delete its weights."""
    shutil.copytree(tiny_llama, tmp_path / "model")
    return resolve_model(str(tmp_path / "model"))


@pytest.fixture
def pair_counts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pairs the engine scored, call by call."""
    counts: list[int] = []
    scores = TorchEngine.scores

    def counted(self: TorchEngine, pairs: Sequence[Any], batch_tokens: int) -> Iterator[Any]:
        counts.append(len(pairs))
        return scores(self, pairs, batch_tokens)

    monkeypatch.setattr(TorchEngine, "scores", counted)
    return counts


def load(folder: Path) -> TaskSet:
    return TaskSet.load(NAMES, [folder], limit=6)


def cache_file(home: Path, model: ResolvedModel) -> Path:
    return home / "scores" / f"{model.digest}.sqlite"


def answers(scores: Scores) -> list[Any]:
    return scores.documents.to_pylist()


def numbers(scores: Scores) -> list[float]:
    rows = answers(scores)
    return [number for row in rows for number in (row["value"], *(row["choice_logprobs"] or []))]


def test_scoring_again_needs_no_weights(text_tasks: Path, model: ResolvedModel) -> None:
    tasks = load(text_tasks)
    first = score_model(model, tasks)
    (model.path / "model.safetensors").unlink()
    seen: list[tuple[int, int]] = []
    again = score_model(model, load(text_tasks), on_progress=lambda done, total: seen.append((done, total)))
    assert answers(again) == answers(first)  # to the last digit
    assert again.tasks == first.tasks
    assert seen[-1] == (tasks.requests, tasks.requests)
    with pytest.raises(BadInput, match="cannot be loaded"):
        score_model(model, tasks, force=True)


def test_a_higher_limit_runs_only_the_new_documents(
    text_tasks: Path, model: ResolvedModel, pair_counts: list[int]
) -> None:
    score_model(model, TaskSet.load(["text_next_line"], [text_tasks], limit=3))
    assert pair_counts == [12]  # four choices each
    more = score_model(model, TaskSet.load(["text_next_line"], [text_tasks], limit=8))
    assert pair_counts == [12, 20]
    fresh = score_model(model, TaskSet.load(["text_next_line"], [text_tasks], limit=8), force=True)
    assert pair_counts == [12, 20, 32]
    assert numbers(more) == pytest.approx(numbers(fresh), abs=1e-4)


def test_a_second_model_never_sees_the_first_ones_answers(
    text_tasks: Path, model: ResolvedModel, tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = resolve_model(str(make_model(tmp_path / "other", tokenizer_folder, "llama", seed=5)))
    tasks = load(text_tasks)
    first, second = score_model(model, tasks), score_model(other, tasks)
    monkeypatch.setenv("LIMBECK_HOME", str(tmp_path / "alone"))
    assert answers(score_model(other, tasks)) == answers(second)
    assert answers(second) != answers(first)


def test_the_key_covers_the_task_the_harness_and_the_engine(model: ResolvedModel, pair_counts: list[int]) -> None:
    def score(task: str = "t", harness: str = "lm-eval 1", kind: str = "loglikelihood", **changes: Any) -> None:
        engine = LazyEngine(model)
        for name, value in changes.items():
            setattr(engine, name, value)
        with ScoreCache(model.digest) as cache:
            lm = LimbeckLM(engine, cache=cache, harness=harness)
            pair = Instance(kind, {}, ("def add", "(a, b)"), 0, (task, 0, 1))  # type: ignore[arg-type]
            lm.loglikelihood([pair])

    score()
    score()
    assert len(pair_counts) == 1
    for number, change in enumerate(
        [{"task": "u"}, {"harness": "lm-eval 2"}, {"kind": "other"}, {"identity": "torch 9"}, {"max_length": 60}], 2
    ):
        score(**change)
        assert len(pair_counts) == number
    score()
    assert len(pair_counts) == 6


def test_a_run_that_stops_resumes_where_it_was(
    text_tasks: Path, model: ResolvedModel, pair_counts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = TaskSet.load(["text_next_line"], [text_tasks])
    scores = TorchEngine.scores

    def stopped(self: TorchEngine, pairs: Sequence[Any], batch_tokens: int) -> Iterator[Any]:
        for number, result in enumerate(scores(self, pairs, batch_tokens)):
            if number == 50:
                raise KeyboardInterrupt
            yield result

    with monkeypatch.context() as patch:
        patch.setattr(TorchEngine, "scores", stopped)
        with pytest.raises(KeyboardInterrupt):
            score_model(model, tasks)
    first: list[int] = []
    again = score_model(model, tasks, on_progress=lambda done, total: first.append(done))
    assert pair_counts == [tasks.requests, tasks.requests - 50]
    assert answers(again) == answers(score_model(model, tasks))
    assert first[49] == 50


@pytest.mark.parametrize("damage", ["value", "null", "text"])
def test_a_damaged_answer_is_computed_again(
    text_tasks: Path, model: ResolvedModel, home: Path, pair_counts: list[int], damage: str
) -> None:
    tasks = load(text_tasks)
    first = score_model(model, tasks)
    pair_counts.clear()
    database = sqlite3.connect(cache_file(home, model))
    wrong = {"value": b"[-0.5, true]", "null": None, "text": "[-0.5, true]"}[damage]
    with database:
        database.execute("UPDATE answers SET value = ? WHERE key IN (SELECT key FROM answers LIMIT 3)", (wrong,))
    database.close()
    assert numbers(score_model(model, tasks)) == pytest.approx(numbers(first), abs=1e-4)
    assert sum(pair_counts) == 3


@pytest.mark.parametrize("damage", ["header", "middle", "empty"])
def test_a_damaged_file_is_replaced(
    text_tasks: Path, model: ResolvedModel, home: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    tasks = load(text_tasks)
    first = score_model(model, tasks)
    path = cache_file(home, model)
    data = bytearray(path.read_bytes())
    if damage == "header":
        data[:100] = b"x" * 100
    if damage == "middle":
        data[4096:] = b"\xa5" * (len(data) - 4096)
    path.write_bytes(b"" if damage == "empty" else bytes(data))
    for again in (score_model(model, tasks), score_model(model, tasks)):
        assert numbers(again) == pytest.approx(numbers(first), abs=1e-4)
    assert capsys.readouterr().err.count("is damaged") == (damage != "empty")


def test_force_replaces_cached_answers(text_tasks: Path, model: ResolvedModel, home: Path) -> None:
    tasks = load(text_tasks)
    correct = score_model(model, tasks)
    database = sqlite3.connect(cache_file(home, model))
    keys = [key for (key,) in database.execute("SELECT key FROM answers")]
    database.close()
    with ScoreCache(model.digest) as cache:
        for key in keys:
            cache.put(key, [-1.0, False])
    wrong = score_model(model, tasks)
    choices = [row["choice_logprobs"] for row in answers(wrong) if row["choice_logprobs"]]
    assert len(choices) == 6
    assert all(set(each) == {-1.0} for each in choices)  # they come from the cache
    forced, after = score_model(model, tasks, force=True), score_model(model, tasks)
    assert answers(forced) == answers(after)
    assert numbers(forced) == pytest.approx(numbers(correct), abs=1e-4)


def generations(count: int, **settings: Any) -> list[Instance]:
    kwargs = {"until": ["\n"], "max_gen_toks": 6, **settings}
    return [Instance("generate_until", {}, ("def add(a", dict(kwargs)), 0, ("say", n, count)) for n in range(count)]


@pytest.mark.parametrize("engine", ["torch", "onnx"])
def test_generated_texts_are_cached_and_samples_by_their_number(
    tmp_path: Path, tiny_llama: Path, onnx: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    model = resolve_model(str(tiny_llama if engine == "torch" else onnx(tiny_llama)))

    def texts(requests: list[Instance]) -> list[str]:
        with ScoreCache(model.digest) as cache:
            return LimbeckLM(LazyEngine(model), cache=cache).generate_until(requests)

    greedy = texts(generations(2))
    sampled = texts(generations(4, do_sample=True, temperature=1.5))
    assert greedy[0] == greedy[1]
    assert len(set(sampled)) > 1
    cooler = texts(generations(4, do_sample=True, temperature=0.9))

    def fail(*_: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(lazy, "load_engine", fail)
    assert texts(generations(2)) == greedy
    assert texts(generations(4, do_sample=True, temperature=1.5)) == sampled
    assert texts(generations(3, do_sample=True, temperature=0.9)) == cooler[:3]
    for changed in ({"until": ["x"]}, {"max_gen_toks": 7}, {"do_sample": True, "temperature": 1.0}):
        with pytest.raises(AssertionError, match="was loaded"):
            texts(generations(1, **changed))
    with pytest.raises(AssertionError, match="was loaded"):
        texts(generations(5, do_sample=True, temperature=1.5))  # the fifth is new


def test_processes_share_a_file_and_a_killed_one_loses_no_answer(home: Path) -> None:
    program = """
import os, signal, sys
from limbeck.evals.engines.score_cache import ScoreCache, request_key
with ScoreCache("shared") as cache:
    for number in range(300):
        cache.put(request_key(sys.argv[1], number), [number / 7, True])
        if number == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ends = {"a": 1000, "b": 120, "c": 1000}
    running = [
        subprocess.Popen([sys.executable, "-c", program, name, str(end)], env=environment) for name, end in ends.items()
    ]
    assert [process.wait(60) for process in running] == [0, -signal.SIGKILL, 0]
    with ScoreCache("shared") as cache:
        for name, end in ends.items():
            found = [cache.get(request_key(name, number)) for number in range(300)]
            assert found == [[n / 7, True] if n <= end else None for n in range(300)]


def test_a_cache_that_cannot_be_written_is_reported(home: Path, model: ResolvedModel, text_tasks: Path) -> None:
    cache_file(home, model).mkdir(parents=True)
    with pytest.raises(BadInput, match=r"scores cannot be stored in .*\.sqlite: unable to open"):
        score_model(model, load(text_tasks))


def test_numbers_and_texts_come_back_exactly(home: Path) -> None:
    values = [[-0.1 - 0.2, False], [float("-inf"), True], "é\ud800\n", ""]
    with ScoreCache("x") as cache:
        for value in values:
            cache.put(request_key(json.dumps(value)), value)
    with ScoreCache("x") as cache:
        assert [cache.get(request_key(json.dumps(value))) for value in values] == values
        assert cache.get(request_key("other")) is None
