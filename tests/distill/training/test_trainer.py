"""A run that is killed at any moment ends with the same weights, and accumulation and precision do what they say."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from limbeck.distill.data.blocks import Blocks, layout_digest, position_ids
from limbeck.distill.models import precision
from limbeck.distill.recipe.schema import Layers, Objective, OnPolicy, Training
from limbeck.distill.training.trainer import Job, train
from limbeck.registry.core.home import home

VOCABULARY, LENGTH = 300, 24
KL = Objective(divergence="forward_kl", labels=0.3)
STEPS = 5


def blocks_of(rows: int) -> Blocks:
    """Random tokens in blocks of two documents, with a different number of targets in each block."""
    chance = np.random.default_rng(0)
    ids = chance.integers(1, VOCABULARY, (rows, LENGTH), dtype=np.int32)
    segments = 1 + (np.arange(LENGTH) >= chance.integers(1, LENGTH, (rows, 1))).astype(np.uint16)
    targets = (position_ids(segments) > 0) & (np.arange(LENGTH) < chance.integers(4, LENGTH, (rows, 1)))
    return Blocks(ids, segments, targets, int(targets.sum()), int(targets.sum()), layout_digest(ids, segments, targets))


def make_job(
    folder: Path, student: Path, teacher: Path, objective: Objective, *, on_policy: bool, **training: Any
) -> Job:
    """A run that saves a checkpoint at every step."""
    common = dict(max_steps=STEPS, per_device_train_batch_size=2, logging_steps=1, bf16=False, save_minutes=1e-9)
    blocks = blocks_of(12)
    return Job(
        AutoModelForCausalLM.from_pretrained(student),
        blocks,
        blocks,
        objective,
        Training(**(common | training)),
        AutoModelForCausalLM.from_pretrained(teacher) if objective.uses_teacher else None,
        folder,
        seed=1,
        vocab_size=VOCABULARY,
        on_policy=OnPolicy(lmbda=0.5, max_new_tokens=4) if on_policy else None,
    )


def weights(model: PreTrainedModel) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def run_until_killed(run: Callable[[], object]) -> None:
    """Call `run` in a forked process, and check that the process ends by SIGKILL."""
    child = os.fork()
    if child == 0:
        try:
            run()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(step: int) -> Callable[[Any], None]:
    """Die at the end of a step, before its checkpoint is written."""
    return lambda now: die() if now.step == step else None


@pytest.mark.parametrize(
    ("student", "objective", "on_policy", "training"),
    [
        pytest.param("tiny_llama", KL, False, {}, marks=pytest.mark.slow),
        pytest.param(
            "tiny_gpt2",  # has dropout
            Objective(labels=1.0),
            False,
            {"optim": "muon", "gradient_accumulation_steps": 2},
            marks=pytest.mark.slow,
        ),
        ("tiny_llama", KL, True, {"optim": "muon", "gradient_accumulation_steps": 2}),
        pytest.param(
            "tiny_qwen2",
            KL.model_copy(update={"layers": Layers(loss="mse")}),
            False,
            {"activation_checkpointing": True},
            marks=pytest.mark.slow,
        ),
    ],
)
@pytest.mark.usefixtures("limbeck_home")
def test_a_run_killed_at_any_moment_ends_with_the_same_weights(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    tiny_neox: Path,
    student: str,
    objective: Objective,
    on_policy: bool,
    training: dict[str, Any],
) -> None:
    def job(folder: str) -> Job:
        students = request.getfixturevalue(student)
        return make_job(tmp_path / folder, students, tiny_neox, objective, on_policy=on_policy, **training)

    whole = job("whole")
    train(whole)

    def while_writing_weights() -> None:
        monkey.setattr(
            "limbeck.distill.training.trainer.save_model", lambda model, path: (Path(path).write_bytes(b"part"), die())
        )
        train(job("killed"))

    def before_renaming_the_checkpoint() -> None:
        monkey.setattr("limbeck.distill.training.trainer.os.replace", die)
        train(job("killed"))

    def before_removing_the_previous_checkpoint() -> None:
        monkey.setattr(
            "limbeck.distill.training.trainer.shutil.rmtree",
            lambda path, **_: die() if "checkpoint-" in str(path) else None,
        )
        train(job("killed"))

    monkey = pytest.MonkeyPatch()  # used only in the forked processes
    checkpoints = []
    for moment in (
        lambda: train(job("killed"), die_at(1)),
        lambda: train(job("killed"), die_at(2)),
        while_writing_weights,
        before_renaming_the_checkpoint,
        before_removing_the_previous_checkpoint,
        lambda: train(job("killed"), die_at(5)),
    ):
        run_until_killed(moment)
        checkpoints.append(sorted(path.name for path in (tmp_path / "killed").glob("checkpoint-*")))
    assert checkpoints == [
        [],
        ["checkpoint-1"],
        ["checkpoint-1"],
        ["checkpoint-1"],
        ["checkpoint-1", "checkpoint-2"],
        ["checkpoint-4"],
    ]
    rest, steps = job("killed"), []
    train(rest, lambda now: steps.append(now.step))
    assert steps == [5]
    assert torch.equal(weights(rest.student), weights(whole.student))  # bit by bit
    assert not (tmp_path / "killed" / "unfinished").exists()


def test_accumulated_batches_equal_one_large_batch(tmp_path: Path, limbeck_home: Path, tiny_llama: Path) -> None:
    made, curves = [], []
    for size, accumulated in ((4, 1), (2, 2), (1, 4)):
        job = make_job(
            tmp_path / str(size), tiny_llama, tiny_llama, KL, on_policy=False, save_minutes=9.0, max_steps=3,
            per_device_train_batch_size=size, gradient_accumulation_steps=accumulated,
        )  # fmt: skip
        losses: list[float] = []
        train(job, on_log=lambda logs, step, losses=losses: losses.append(logs["loss"]) if "loss" in logs else None)
        made.append(weights(job.student))
        curves.append(losses)
    # The loss is a mean over all targets of a step, and its batches have different numbers of targets.
    for other, curve in zip(made[1:], curves[1:], strict=True):
        assert curve == pytest.approx(curves[0], abs=2e-4)
        torch.testing.assert_close(other, made[0], atol=2e-5, rtol=1e-3)


def test_a_run_in_bfloat16_does_not_change_the_next_run_in_float32(
    tmp_path: Path, limbeck_home: Path, tiny_llama: Path
) -> None:
    made = []
    for name, bf16 in [("first", False), ("between", True), ("again", False)]:
        job = make_job(tmp_path / name, tiny_llama, tiny_llama, KL, on_policy=False, max_steps=2, bf16=bf16)
        train(job)
        made.append(weights(job.student))
    assert torch.equal(made[0], made[2])
    assert not torch.equal(made[0], made[1])


@pytest.mark.parametrize(("fp32", "bf16", "chosen"), [(1.0, 0.5, True), (1.0, 0.95, False), (1.0, 2.0, False)])
def test_bfloat16_is_used_if_it_was_measured_to_be_faster(
    limbeck_home: Path, fp32: float, bf16: float, chosen: bool
) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU reports whether it has bfloat16")
    config = LlamaConfig(hidden_size=32, intermediate_size=64, num_attention_heads=4)
    precision.uses_bf16(None, config)
    [measured] = json.loads((home() / "precision.json").read_text()).items()
    assert set(measured[1]) == {"fp32_s", "bf16_s"}
    (home() / "precision.json").write_text(json.dumps({measured[0]: {"fp32_s": fp32, "bf16_s": bf16}}))
    assert precision.uses_bf16(None, config) is chosen
    assert precision.uses_bf16(not chosen, config) is not chosen  # the recipe decides first
    precision.uses_bf16(None, LlamaConfig(hidden_size=48, intermediate_size=64, num_attention_heads=4))
    assert len(json.loads((home() / "precision.json").read_text())) == 2
