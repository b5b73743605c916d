"""What a recipe will take, told before it takes it: memory, disk, seconds.

Memory is reckoned from shapes; seconds are measured on a few steps where these take no longer than a moment, else
reckoned from the floating-point operations and what a matrix product does here.
"""

from __future__ import annotations

import functools
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from limbeck.distill.cache.teacher_cache import TeacherCache
from limbeck.distill.context import Setting
from limbeck.distill.losses.chunked_head import LOGITS_CHUNK_BYTES
from limbeck.distill.models import loading
from limbeck.distill.models.precision import uses_bf16
from limbeck.distill.recipe.cache_form import Form
from limbeck.distill.recipe.grid import Plan
from limbeck.distill.recipe.schema import Budget, Objective
from limbeck.distill.students import initialise
from limbeck.distill.teacher.signal import local_pass
from limbeck.distill.training import budget, distributed
from limbeck.distill.training.trainer import Job, train
from limbeck.registry.core.home import home

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FLOAT = 4  # bytes of a float32
TEXT_CHUNK_BYTES = 4  # a token, of what is stored for limbeck.distill.teacher.text_chunks
MAX_MEASURED_SECONDS = 2.0  # seconds that a step may take to be measured
MAX_MEASURED_PARAMETERS = 10**9  # parameters of a teacher that is loaded to be measured
STEPS = 4  # that are measured; the first one is not counted
SHARE_OF_PEAK = 0.4  # of a matrix product's speed that training reaches


class Memory(NamedTuple):
    """Bytes that a student's training needs.

    Attributes:
        certain: weights, gradients and the optimizer's state; the teacher's weights where it runs online.
        activations: what the backward pass needs of the forward pass, about; and the chunk of logits.
    """

    certain: int
    activations: int

    @property
    def total(self) -> int:
        return self.certain + self.activations


class Seconds(NamedTuple):
    """Seconds a token, and whether they were measured."""

    per_token: float
    measured: bool


def memory(setting: Setting, plan: Plan, teacher: int) -> Memory:
    """What training needs at once.

    Args:
        teacher: its parameters where it runs online beside the student, else 0.
    """
    spec, training = setting.recipe.students[plan.student], setting.recipe.training_of(plan.student)
    model = initialise.meta_model(setting, plan.student)
    every = model.num_parameters()
    trained = every
    if spec.lora:
        trained = initialise.add_lora(model, spec.lora, plan.seed).num_parameters(only_trainable=True)
    states = 1 if training.optim == "muon" else 2  # momentum; and the second moments
    certain = FLOAT * (every + trained * (1 + states) + teacher)
    config = model.config.get_text_config()
    tokens = training.per_device_train_batch_size * setting.recipe.data.max_length
    inner = _activations(config)
    layers = config.num_hidden_layers
    kept = layers * config.hidden_size + inner if training.gradient_checkpointing else layers * inner
    return Memory(certain, FLOAT * tokens * kept + 3 * LOGITS_CHUNK_BYTES)


def _activations(config: PretrainedConfig) -> int:
    """About how many numbers a layer keeps of a token for the backward pass."""
    wide = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * config.hidden_size
    return int(12 * config.hidden_size + 5 * wide)


def disk(setting: Setting, plans: list[Plan]) -> int:
    """Bytes that checkpoints and registered students take; two checkpoints lie side by side while one is written."""
    sizes = {name: initialise.count_student_parameters(setting, name) for name in {plan.student for plan in plans}}
    checkpoint = max((3 * FLOAT * size for size in sizes.values()), default=0)
    width = {"float32": 4, "float16": 2, "bfloat16": 2}
    kept = sum(width[setting.recipe.students[plan.student].dtype] * sizes[plan.student] for plan in plans)
    return 2 * checkpoint + kept


def stored_bytes(form: Form | None) -> int:
    """Bytes a token that a form takes, about; None is that of chunks of text."""
    if form is None:
        return TEXT_CHUNK_BYTES
    if form.kind == "topk":
        return form.size * ((2 if form.vocab_size <= 2**16 else 4) + 2)
    return form.size * form.entry_bytes + 3


def tokens(setting: Setting, plan: Plan) -> int:
    """How many tokens a student will see at most."""
    training = setting.recipe.training_of(plan.student)
    length = setting.recipe.data.max_length
    step = (
        training.per_device_train_batch_size * training.gradient_accumulation_steps * distributed.world_size() * length
    )
    asked = budget.planned_steps(training, len(setting.train.ids), distributed.world_size()) * step
    return min(asked, setting.recipe.budget.max_tokens or asked)


def training_seconds(setting: Setting, plan: Plan) -> Seconds:
    """Of a student that learns from labels or from stored words."""
    training = setting.recipe.training_of(plan.student)
    step = training.per_device_train_batch_size * setting.recipe.data.max_length
    reckoned = 6 * initialise.count_student_parameters(setting, plan.student) / (SHARE_OF_PEAK * flops())
    if (
        reckoned * step > MAX_MEASURED_SECONDS
        or len(setting.train.ids) == 0
        or setting.recipe.students[plan.student].prune
    ):
        return Seconds(reckoned, measured=False)
    return Seconds(_measured_step(setting, plan) / step, measured=True)


def _measured_step(setting: Setting, plan: Plan) -> float:
    """Seconds of an optimizer step on one batch."""
    asked = {"max_steps": STEPS, "gradient_accumulation_steps": 1, "torch_compile": False}
    quiet = {"logging_steps": 10**6, "eval_steps": 10**6, "save_minutes": 1e6}
    at: list[float] = []
    with TemporaryDirectory(dir=home(), prefix="check-") as folder:
        job = Job(
            student=initialise.initialise_student(setting, plan),
            train=setting.train,
            heldout=setting.heldout,
            objective=Objective(labels=1.0),
            training=setting.recipe.training_of(plan.student).model_copy(update=asked | quiet),
            teacher=None,
            folder=Path(folder),
            seed=plan.seed,
            vocab_size=setting.vocab_size,
            budget=Budget(),
        )
        train(job, on_progress=lambda progress: at.append(time.monotonic()))
    return float(np.median(np.diff(at)))


def teacher_seconds(setting: Setting, caches: list[TeacherCache], parameters: int) -> Seconds:
    """Of a pass of a local teacher, with what is stored of it."""
    reckoned = 2 * parameters / (SHARE_OF_PEAK * flops())
    count = min(4, len(setting.train.ids))
    size = count * setting.recipe.data.max_length
    if count == 0 or reckoned * size > MAX_MEASURED_SECONDS or parameters > MAX_MEASURED_PARAMETERS:
        return Seconds(reckoned, measured=False)
    model = setting.teacher_model()
    run = local_pass(model, setting.train, setting.vocab_size, uses_bf16(setting.recipe.training.bf16, model.config))
    run(np.arange(count), caches)
    began = time.monotonic()
    run(np.arange(count), caches)
    return Seconds((time.monotonic() - began) / size, measured=True)


@functools.cache
def flops() -> float:
    """Floating-point operations a second of a float32 matrix product here."""
    import torch

    size = 1024
    a, b = (torch.randn(size, size, device=loading.device()) for _ in range(2))
    best = float("inf")
    for _ in range(4):
        began = time.monotonic()
        float((a @ b)[0, 0])  # waits for it
        best = min(best, time.monotonic() - began)
    return 2 * size**3 / best
