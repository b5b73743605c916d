"""Curves and progress of a run, also of a resumed one."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from limbeck.distill.data.blocks import Blocks, make_blocks
from limbeck.distill.data.document import Document
from limbeck.distill.models import heldout
from limbeck.distill.recipe.schema import Objective, Training
from limbeck.distill.training.callbacks import Progress
from limbeck.distill.training.trainer import Job, TrainingResult, train
from limbeck.registry.checkpoints.load import load_tokenizer
from tests.distill.conftest import lines_of_text

LABELS = Objective(labels=1.0)
FORWARD = Objective(divergence="forward_kl")


class RecordedRun(NamedTuple):
    """The result of a run, its curves by name and step, and its progress."""

    result: TrainingResult
    curves: dict[str, dict[int, float]]
    progress: list[Progress]


@pytest.fixture(scope="module")
def text(tiny_llama: Path) -> tuple[Blocks, Blocks]:
    """Blocks to train on and held-out ones."""
    tokenizer = load_tokenizer(tiny_llama)
    documents = [Document(str(seed), lines_of_text(20, seed)) for seed in range(24)]
    return make_blocks(documents[6:], tokenizer, 32), make_blocks(documents[:6], tokenizer, 32)


@pytest.fixture
def run(tmp_path: Path, tiny_llama: Path, text: tuple[Blocks, Blocks]) -> Callable[..., RecordedRun]:
    """Train a tiny Llama or `student`; further keywords are keys of [training] or fields of Job."""

    def go(
        objective: Objective = LABELS,
        student: PreTrainedModel | None = None,
        teacher: PreTrainedModel | None = None,
        folder: str = "run",
        on_progress: Callable[[Progress], None] = lambda now: None,
        **changes: Any,
    ) -> RecordedRun:
        settings = {"max_steps": 8, "per_device_train_batch_size": 4, "logging_steps": 2, "bf16": False}
        student = student or AutoModelForCausalLM.from_pretrained(tiny_llama)
        curves: dict[str, dict[int, float]] = {}
        progress: list[Progress] = []

        def on_log(values: dict[str, float], step: int) -> None:
            for name, value in values.items():
                assert step not in curves.setdefault(name, {}), "logged twice"
                curves[name][step] = value

        def record_progress(now: Progress) -> None:
            progress.append(now)
            on_progress(now)

        extra = {name: changes.pop(name) for name in ("budget", "paid_usd", "likeliest") if name in changes}
        training = Training(**(settings | changes))
        job = Job(student, *text, objective, training, teacher, tmp_path / folder, seed=0, vocab_size=300, **extra)
        return RecordedRun(train(job, record_progress, on_log), curves, progress)

    return go


def test_curves_and_progress_of_a_run(
    run: Callable[..., RecordedRun], tiny_llama: Path, text: tuple[Blocks, Blocks]
) -> None:
    student = AutoModelForCausalLM.from_pretrained(tiny_llama)
    teacher = AutoModelForCausalLM.from_pretrained(tiny_llama)
    recorded = run(FORWARD, student, teacher, eval_steps=4, learning_rate=1e-9)
    assert list(recorded.curves["heldout_sample_bits_per_byte"]) == [4, 8]
    for curve in ("loss", "agreement", "learning_rate", "tokens_per_s", "grad_norm"):
        assert list(recorded.curves[curve]) == [2, 4, 6, 8]
    # The student equals its teacher; two tokens may be equally likely.
    assert min(recorded.curves["agreement"][8], recorded.curves["heldout_sample_agreement"][8]) > 0.98
    last = recorded.progress[-1]
    assert (last.step, last.steps, last.seconds_left) == (8, 8, 0)
    assert [now.seconds_left is not None for now in recorded.progress] == [True] * 8
    assert last.heldout_bits_per_byte == recorded.curves["heldout_sample_bits_per_byte"][8]
    assert last.agreement == recorded.curves["agreement"][6]  # progress is reported before the step is logged
    assert last.tokens_per_s > 0
    assert recorded.result.eval_seconds > 0


def test_agreement_is_the_share_of_equal_likeliest_tokens(
    run: Callable[..., RecordedRun], tiny_llama: Path, tiny_qwen2: Path, text: tuple[Blocks, Blocks]
) -> None:
    student = AutoModelForCausalLM.from_pretrained(tiny_llama)
    teacher = AutoModelForCausalLM.from_pretrained(tiny_qwen2)
    recorded = run(FORWARD, student, teacher, max_steps=2, learning_rate=1e-9)
    sample = heldout.sample_blocks(text[1])
    assert 1 < len(sample.ids) <= heldout.SAMPLE_BLOCKS
    equal = nats = count = 0.0
    for index in range(len(sample.ids)):  # one block at a time, by hand
        batch = sample.batch(np.array([index]))
        labels = batch.pop("labels")[0, 1:]
        with torch.no_grad():
            own, other = (model(**batch).logits[0, :-1].double() for model in (student, teacher))
        rows = labels != -100
        equal += float((own.argmax(-1) == other.argmax(-1))[rows].sum())
        nats += float(F.cross_entropy(own[rows], labels[rows], reduction="sum"))
        count += float(rows.sum())
    [score] = [recorded.curves["heldout_sample_agreement"][2]]
    assert score == pytest.approx(equal / count, abs=0.01)  # two tokens may be equally likely
    assert 0 < recorded.curves["agreement"][2] < 1
    tokens_per_byte = text[1].text_tokens / text[1].text_bytes
    wanted = nats / count / math.log(2) * tokens_per_byte
    assert recorded.curves["heldout_sample_bits_per_byte"][2] == pytest.approx(wanted, rel=1e-3)


def test_a_run_on_labels_alone_logs_no_agreement(run: Callable[..., RecordedRun]) -> None:
    recorded = run()
    assert "agreement" not in recorded.curves
    assert "heldout_sample_agreement" not in recorded.curves
    assert len(recorded.curves["heldout_sample_bits_per_byte"]) == 8  # a tenth of the run is less than one step


def test_evaluations_do_not_change_the_student(run: Callable[..., RecordedRun], tiny_llama: Path) -> None:
    weights = []
    for folder, every in (("often", 1), ("never", 100)):
        student = AutoModelForCausalLM.from_pretrained(tiny_llama, attention_dropout=0.2)
        recorded = run(student=student, folder=folder, eval_steps=every)
        assert ("heldout_sample_bits_per_byte" in recorded.curves) == (folder == "often")
        weights.append(student.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


class Killed(BaseException):
    """Raised like a kill: nothing catches it."""


def test_a_resumed_run_reports_its_whole_curves(run: Callable[..., RecordedRun], tiny_llama: Path) -> None:
    def kill(now: Progress) -> None:
        if now.step == 5:  # the last checkpoint is that of step 4, and losses are logged every 2 steps
            raise Killed

    with pytest.raises(Killed):
        run(on_progress=kill, save_minutes=1e-9, folder="parts")
    resumed, whole = run(folder="parts"), run(folder="whole")
    assert resumed.progress[0].step == 5
    assert resumed.curves["loss"] == whole.curves["loss"]
    assert resumed.curves["heldout_sample_bits_per_byte"] == whole.curves["heldout_sample_bits_per_byte"]
    assert resumed.result.tokens == whole.result.tokens
