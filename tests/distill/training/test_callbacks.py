"""What a run tells while it goes, and that it stops where it went wrong, with the step and the cause."""

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
from limbeck.distill.models import heldout, loading
from limbeck.distill.recipe.schema import Objective, Training
from limbeck.distill.training import health
from limbeck.distill.training.callbacks import Progress
from limbeck.distill.training.trainer import Job, TrainingResult, train
from limbeck.registry.core.errors import Refused
from limbeck.registry.mlflow.store import Store
from tests.distill.conftest import DISTILLED, lines_of_text

LABELS = Objective(labels=1.0)
FORWARD = Objective(divergence="forward_kl")


class Told(NamedTuple):
    """A run, what it logged by curve and step, and its progress."""

    trained: TrainingResult
    curves: dict[str, dict[int, float]]
    progress: list[Progress]


@pytest.fixture(scope="module")
def text(tiny_llama: Path) -> tuple[Blocks, Blocks]:
    """Blocks to train on and held-out ones."""
    tokenizer = loading.load_tokenizer(tiny_llama)
    documents = [Document(str(seed), lines_of_text(20, seed)) for seed in range(24)]
    return make_blocks(documents[6:], tokenizer, 32), make_blocks(documents[:6], tokenizer, 32)


@pytest.fixture
def run(tmp_path: Path, tiny_llama: Path, text: tuple[Blocks, Blocks]) -> Callable[..., Told]:
    """Train a tiny Llama of random weights; `student` goes on from another, `**training` goes in [training]."""

    def go(
        objective: Objective = LABELS,
        student: PreTrainedModel | None = None,
        teacher: PreTrainedModel | None = None,
        folder: str = "run",
        on_progress: Callable[[Progress], None] = lambda now: None,
        **changes: Any,
    ) -> Told:
        settings = {"max_steps": 8, "per_device_train_batch_size": 4, "logging_steps": 2, "bf16": False}
        student = student or AutoModelForCausalLM.from_pretrained(tiny_llama)
        curves: dict[str, dict[int, float]] = {}
        progress: list[Progress] = []

        def on_log(values: dict[str, float], step: int) -> None:
            for name, value in values.items():
                assert step not in curves.setdefault(name, {}), "told twice"
                curves[name][step] = value

        def listen(now: Progress) -> None:
            progress.append(now)
            on_progress(now)

        extra = {name: changes.pop(name) for name in ("budget", "paid", "likeliest") if name in changes}
        training = Training(**(settings | changes))
        job = Job(student, *text, objective, training, teacher, tmp_path / folder, seed=0, vocab_size=300, **extra)
        return Told(train(job, listen, on_log), curves, progress)

    return go


def test_the_curves_of_a_run(run: Callable[..., Told], tiny_llama: Path, text: tuple[Blocks, Blocks]) -> None:
    student = AutoModelForCausalLM.from_pretrained(tiny_llama)
    teacher = AutoModelForCausalLM.from_pretrained(tiny_llama)
    told = run(FORWARD, student, teacher, eval_steps=4, learning_rate=1e-9)
    assert list(told.curves["heldout_sample_bits_per_byte"]) == [4, 8]
    for curve in ("loss", "agreement", "learning_rate", "tokens_per_s", "grad_norm"):
        assert list(told.curves[curve]) == [2, 4, 6, 8]
    # The student is its teacher; two tokens may be equally likely.
    assert min(told.curves["agreement"][8], told.curves["heldout_sample_agreement"][8]) > 0.98
    last = told.progress[-1]
    assert (last.step, last.steps, last.seconds_left) == (8, 8, 0)
    assert [now.seconds_left is not None for now in told.progress] == [True] * 8
    assert last.heldout_bits_per_byte == told.curves["heldout_sample_bits_per_byte"][8]
    assert last.agreement == told.curves["agreement"][6]  # a step is told of before it is logged
    assert last.tokens_per_s > 0
    assert told.trained.eval_seconds > 0


def test_agreement_is_the_share_of_equal_likeliest_tokens(
    run: Callable[..., Told], tiny_llama: Path, tiny_qwen2: Path, text: tuple[Blocks, Blocks]
) -> None:
    student = AutoModelForCausalLM.from_pretrained(tiny_llama)
    teacher = AutoModelForCausalLM.from_pretrained(tiny_qwen2)
    told = run(FORWARD, student, teacher, max_steps=2, learning_rate=1e-9)
    sample = heldout.sample_blocks(text[1])
    assert 1 < len(sample.ids) <= heldout.SAMPLE_BLOCKS
    equal = nats = count = 0.0
    for index in range(len(sample.ids)):  # block by block, by hand
        batch = sample.batch(np.array([index]))
        labels = batch.pop("labels")[0, 1:]
        with torch.no_grad():
            own, other = (model(**batch).logits[0, :-1].double() for model in (student, teacher))
        rows = labels != -100
        equal += float((own.argmax(-1) == other.argmax(-1))[rows].sum())
        nats += float(F.cross_entropy(own[rows], labels[rows], reduction="sum"))
        count += float(rows.sum())
    [score] = [told.curves["heldout_sample_agreement"][2]]
    assert score == pytest.approx(equal / count, abs=0.01)  # two tokens may be equally likely
    assert 0 < told.curves["agreement"][2] < 1
    tokens_per_byte = text[1].text_tokens / text[1].text_bytes
    wanted = nats / count / math.log(2) * tokens_per_byte
    assert told.curves["heldout_sample_bits_per_byte"][2] == pytest.approx(wanted, rel=1e-3)


def test_labels_alone_tell_of_no_agreement(run: Callable[..., Told]) -> None:
    told = run()
    assert "agreement" not in told.curves
    assert "heldout_sample_agreement" not in told.curves
    assert len(told.curves["heldout_sample_bits_per_byte"]) == 8  # a tenth of the run is less than a step


def test_being_watched_changes_nothing(run: Callable[..., Told], tiny_llama: Path) -> None:
    weights = []
    for folder, every in (("often", 1), ("never", 100)):
        student = AutoModelForCausalLM.from_pretrained(tiny_llama, attention_dropout=0.2)
        told = run(student=student, folder=folder, eval_steps=every)
        assert ("heldout_sample_bits_per_byte" in told.curves) == (folder == "often")
        weights.append(student.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


class Killed(BaseException):
    """As a kill: nobody catches it."""


def test_a_resumed_run_tells_its_whole_curve(run: Callable[..., Told], tiny_llama: Path) -> None:
    def kill(now: Progress) -> None:
        if now.step == 5:  # the checkpoint is of step 4: a loss is told of every 2
            raise Killed

    with pytest.raises(Killed):
        run(on_progress=kill, save_minutes=1e-9, folder="parts")
    resumed, whole = run(folder="parts"), run(folder="whole")
    assert resumed.progress[0].step == 5
    assert resumed.curves["loss"] == whole.curves["loss"]
    assert resumed.curves["heldout_sample_bits_per_byte"] == whole.curves["heldout_sample_bits_per_byte"]
    assert resumed.trained.tokens == whole.trained.tokens


def spoil(module: torch.nn.Module, after: int, factor: float) -> None:
    """From its forward pass number `after` on in training, the module's output is multiplied."""
    passes = 0

    def hook(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
        nonlocal passes
        passes += module.training
        return output * factor if passes > after else output

    module.register_forward_hook(hook)


def test_values_that_are_no_numbers_are_traced_to_their_layer(
    run: Callable[..., Told], tiny_llama: Path, tmp_path: Path
) -> None:
    student = AutoModelForCausalLM.from_pretrained(tiny_llama)
    spoil(student.model.layers[1].mlp, 4, math.nan)
    with pytest.raises(Refused) as refused:
        run(student=student, save_minutes=1e-9)
    message = str(refused.value)
    assert "diverged at step 5" in message
    assert "come out of student.model.layers.1.mlp;" in message
    assert "checkpoint-4" in message
    assert "learning_rate than 0.002" in message
    assert (tmp_path / "run" / "checkpoint-4").is_dir()
    assert all(parameter.isfinite().all() for parameter in student.parameters())  # stopped before they were spoiled


def test_a_gradient_that_is_no_number_is_named(run: Callable[..., Told], tiny_llama: Path) -> None:
    student = AutoModelForCausalLM.from_pretrained(tiny_llama)
    weight = student.model.layers[0].mlp.up_proj.weight
    weight.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor(3), math.inf))
    with pytest.raises(Refused, match=r"step 1: .*gradient of student\.model\.layers\.0\.mlp\.up_proj\.weight"):
        run(student=student)
    assert weight.isfinite().all()


def test_weights_that_are_no_numbers_are_named(run: Callable[..., Told], tiny_llama: Path) -> None:
    student = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        student.model.norm.weight[2] = math.nan
    with pytest.raises(Refused, match=r"step 1: the weights student\.model\.norm\.weight are not finite"):
        run(student=student)


def test_a_loss_that_rises_and_stays_stops_the_run(run: Callable[..., Told], tiny_llama: Path) -> None:
    student = AutoModelForCausalLM.from_pretrained(tiny_llama)
    spoil(student.model.norm, 30, -30.0)
    with pytest.raises(Refused, match=r"diverged at step \d+: the loss rose from .* and stayed there for 20 steps"):
        run(student=student, max_steps=70, logging_steps=4, eval_steps=1000, learning_rate=1e-4)


FALLING = [8 * 0.9**n for n in range(40)]


@pytest.mark.parametrize(
    ("losses", "rises"),
    [
        (FALLING, False),
        (FALLING + [50.0] * 2, False),  # a bad batch or two
        (FALLING + [9.0] * 30, True),
        ([0.5, 0.45] * 20 + [0.9, 1.3] * 20, False),  # less than a nat
        ([0.5, 0.45] * 20 + [1.9, 2.3] * 20, True),
        ([3.0], False),
    ],
)
def test_what_counts_as_a_rise(losses: list[float], rises: bool) -> None:
    assert (health.describe_loss_rise(losses, logging_steps=1) is not None) == rises


def test_a_run_that_diverges_registers_nothing(
    store: Store, limbeck: Callable[..., Any], write_recipe: Callable[..., Path], tiny_llama: Path, limbeck_home: Path
) -> None:
    recipe = write_recipe(tiny_llama, objectives=DISTILLED, extra="learning_rate = 1e30\nwarmup_ratio = 0.0\n")
    result = limbeck("distill", recipe)
    assert result.code == 1
    assert "training diverged at step 2: " in result.err
    assert "nothing was registered" in result.err
    assert "lower training.learning_rate" in result.err
    assert "Traceback" not in result.err
    assert [version.kind for version in store.versions()] == ["teacher"]
