"""Forecasts what a recipe will take: memory, disk space and seconds.

Memory is estimated from shapes. Seconds are measured on a few steps if a step takes a moment, else estimated from the
number of floating-point operations and the measured speed of a matrix product.
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
from limbeck.distill.teacher.local import local_pass
from limbeck.distill.training import budget, distributed
from limbeck.distill.training.trainer import Job, train
from limbeck.registry.core.home import home

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FLOAT = 4  # bytes of a float32
TEXT_CHUNK_BYTES = 4  # per token, in the cache of limbeck.distill.teacher.text_chunks
MAX_MEASURED_SECONDS = 2.0  # the estimate of a step that is still measured
MAX_MEASURED_PARAMETERS = 10**9  # of a teacher that is still loaded and measured
MEASURED_STEPS = 4  # the first of them is not counted
SHARE_OF_PEAK = 0.4  # of a matrix product's speed, reached in training


class Memory(NamedTuple):
    """Bytes that a student's training needs.

    Attributes:
        certain: weights, gradients and optimizer state; the teacher's weights if it runs online.
        activations: an estimate of what the forward pass stores for the backward pass, with one chunk of logits.
    """

    certain: int
    activations: int

    @property
    def total(self) -> int:
        return self.certain + self.activations


class Speed(NamedTuple):
    """Seconds per token, and whether they were measured or estimated."""

    seconds_per_token: float
    measured: bool


def memory(setting: Setting, plan: Plan, teacher_parameters: int) -> Memory:
    """The memory that a student's training needs.

    Args:
        teacher_parameters: of a teacher that runs online beside the student, else 0.
    """
    spec, training = setting.recipe.students[plan.student], setting.recipe.training_of(plan.student)
    model = initialise.meta_model(setting, plan.student)
    parameters = model.num_parameters()
    trained = parameters
    if spec.lora:
        trained = initialise.add_lora(model, spec.lora, plan.seed).num_parameters(only_trainable=True)
    states = 1 if training.optim == "muon" else 2  # momentum; AdamW also has second moments
    certain = FLOAT * (parameters + trained * (1 + states) + teacher_parameters)
    config = model.config.get_text_config()
    tokens = training.per_device_train_batch_size * setting.recipe.data.max_length
    per_layer = _activations_per_layer(config)
    layers = config.num_hidden_layers
    per_token = layers * config.hidden_size + per_layer if training.activation_checkpointing else layers * per_layer
    return Memory(certain, FLOAT * tokens * per_token + 3 * LOGITS_CHUNK_BYTES)


def _activations_per_layer(config: PretrainedConfig) -> int:
    """About how many numbers a layer stores per token for the backward pass."""
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * config.hidden_size
    return int(12 * config.hidden_size + 5 * inner)


def disk(setting: Setting, plans: list[Plan]) -> int:
    """Bytes of checkpoints and registered students; two checkpoints exist while one is written."""
    sizes = {name: initialise.count_student_parameters(setting, name) for name in {plan.student for plan in plans}}
    checkpoint = max((3 * FLOAT * size for size in sizes.values()), default=0)
    bytes_of_dtype = {"float32": 4, "float16": 2, "bfloat16": 2}
    students = sum(bytes_of_dtype[setting.recipe.students[plan.student].dtype] * sizes[plan.student] for plan in plans)
    return 2 * checkpoint + students


def stored_bytes(form: Form | None) -> int:
    """About how many bytes per token a cache of this form takes; None is a cache of text chunks."""
    if form is None:
        return TEXT_CHUNK_BYTES
    if form.kind == "topk":
        return form.size * ((2 if form.vocab_size <= 2**16 else 4) + 2)
    return form.size * form.entry_bytes + 3


def tokens(setting: Setting, plan: Plan) -> int:
    """The most tokens that a student will read."""
    training = setting.recipe.training_of(plan.student)
    length = setting.recipe.data.max_length
    tokens_per_step = (
        training.per_device_train_batch_size * training.gradient_accumulation_steps * distributed.world_size() * length
    )
    planned = budget.planned_steps(training, len(setting.train.ids), distributed.world_size()) * tokens_per_step
    return min(planned, setting.recipe.budget.max_tokens or planned)


def training_speed(setting: Setting, plan: Plan) -> Speed:
    """The training speed of a student that learns from labels or from a teacher cache."""
    training = setting.recipe.training_of(plan.student)
    tokens_per_batch = training.per_device_train_batch_size * setting.recipe.data.max_length
    estimate = 6 * initialise.count_student_parameters(setting, plan.student) / (SHARE_OF_PEAK * flops())
    if (
        estimate * tokens_per_batch > MAX_MEASURED_SECONDS
        or len(setting.train.ids) == 0
        or setting.recipe.students[plan.student].prune
    ):
        return Speed(estimate, measured=False)
    return Speed(_measured_step(setting, plan) / tokens_per_batch, measured=True)


def _measured_step(setting: Setting, plan: Plan) -> float:
    """Seconds of an optimizer step on one batch."""
    steps = {"max_steps": MEASURED_STEPS, "gradient_accumulation_steps": 1, "torch_compile": False}
    quiet = {"logging_steps": 10**6, "eval_steps": 10**6, "save_minutes": 1e6}
    times: list[float] = []
    with TemporaryDirectory(dir=home(), prefix="check-") as folder:
        job = Job(
            student=initialise.initialise_student(setting, plan),
            train=setting.train,
            heldout=setting.heldout,
            objective=Objective(labels=1.0),
            training=setting.recipe.training_of(plan.student).model_copy(update=steps | quiet),
            teacher=None,
            folder=Path(folder),
            seed=plan.seed,
            vocab_size=setting.vocab_size,
            budget=Budget(),
        )
        train(job, on_progress=lambda progress: times.append(time.monotonic()))
    return float(np.median(np.diff(times)))


def teacher_speed(setting: Setting, caches: list[TeacherCache], parameters: int) -> Speed:
    """The speed of a local teacher's pass, with the encoding for the caches."""
    estimate = 2 * parameters / (SHARE_OF_PEAK * flops())
    count = min(4, len(setting.train.ids))
    size = count * setting.recipe.data.max_length
    if count == 0 or estimate * size > MAX_MEASURED_SECONDS or parameters > MAX_MEASURED_PARAMETERS:
        return Speed(estimate, measured=False)
    model = setting.teacher_model()
    run = local_pass(model, setting.train, setting.vocab_size, uses_bf16(setting.recipe.training.bf16, model.config))
    run(np.arange(count), caches)
    began = time.monotonic()
    run(np.arange(count), caches)
    return Speed((time.monotonic() - began) / size, measured=True)


@functools.cache
def flops() -> float:
    """Floating-point operations per second of a float32 matrix product on this machine."""
    import torch

    size = 1024
    a, b = (torch.randn(size, size, device=loading.device()) for _ in range(2))
    best = float("inf")
    for _ in range(4):
        began = time.monotonic()
        float((a @ b)[0, 0])  # waits for the device
        best = min(best, time.monotonic() - began)
    return 2 * size**3 / best
