"""One training run: transformers' Trainer with Limbeck's objective, checkpoints by time, curves for MLflow."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint

from distill import objectives
from distill.cache import TeacherCache
from distill.models import device, has_bf16
from distill.optimizer import MuonAdamW
from distill.recipe import Objective, Training
from registry.errors import BadInput

Teacher = TeacherCache | PreTrainedModel | None
CURVES = ("loss", "grad_norm", "learning_rate", "tokens_per_s")


class Progress(NamedTuple):
    """What a run tells while it goes: optimizer steps, all of them, tokens per second, the last loss in nats."""

    step: int
    steps: int
    tokens_per_s: float
    loss: float | None


class Trained(NamedTuple):
    """A finished run: tokens seen, and seconds, over all its parts where it was stopped and resumed.

    What a part did after its last checkpoint was lost, and its time is not counted.
    """

    tokens: int
    seconds: float


class DistillTrainer(Trainer):
    """transformers' Trainer whose loss is the recipe's objective; rows are indices into the blocks."""

    def __init__(
        self, *, objective: Objective, teacher: Teacher, vocab_size: int, training: Training, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.objective: Objective = objective
        self.teacher = teacher
        self.vocab_size = vocab_size
        self.training: Training = training
        # The objective returns a mean: the Trainer must divide it by the accumulation steps itself.
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        ids = inputs["input_ids"]
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        return objectives.loss(logits, ids[:, 1:].flatten(), self.objective, self._teacher_says(inputs))

    def _teacher_says(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor | objectives.TopK | None:
        if self.objective.divergence is None or self.teacher is None:
            return None
        if "teacher_ids" in inputs:
            return objectives.TopK(
                inputs["teacher_ids"][:, :-1].flatten(0, 1), inputs["teacher_logprobs"][:, :-1].flatten(0, 1)
            )
        assert isinstance(self.teacher, PreTrainedModel)
        with torch.no_grad():
            logits = self.teacher(input_ids=inputs["input_ids"], use_cache=False).logits
            return logits[:, :-1, : self.vocab_size].flatten(0, 1)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        if self.training.optim != "muon":
            return super().create_optimizer()
        if self.optimizer is None:
            assert isinstance(self.model, torch.nn.Module)
            self.optimizer = MuonAdamW(
                self.model,
                self.args.learning_rate,
                self.args.weight_decay,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
            )
        return self.optimizer


class _Watch(TrainerCallback):
    """Checkpoints every so many minutes, reports progress, passes what is logged on."""

    def __init__(
        self,
        training: Training,
        tokens_per_step: int,
        on_progress: Callable[[Progress], None],
        on_log: Callable[[dict[str, float], int], None],
    ) -> None:
        self.training = training
        self.tokens_per_step = tokens_per_step
        self.tell_progress = on_progress
        self.tell_log = on_log
        self.loss: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.began = self.saved = self.logged = time.monotonic()
        self.first = self.logged_step = state.global_step
        self.before = max((entry["seconds"] for entry in state.log_history if "seconds" in entry), default=0.0)
        for entry in state.log_history:  # a resumed run tells its whole curve again
            self._tell(entry)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now = time.monotonic()
        rate = (state.global_step - self.first) * self.tokens_per_step / max(now - self.began, 1e-9)
        self.tell_progress(Progress(state.global_step, state.max_steps, rate, self.loss))
        if now - self.saved >= 60 * self.training.save_minutes and state.global_step < state.max_steps:
            self.saved = now
            # In the Trainer's own history, so that the checkpoint carries it.
            state.log_history.append({"step": state.global_step, "seconds": self.before + now - self.began})
            control.should_save = True

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        entry = state.log_history[-1]
        if "loss" not in entry:  # the Trainer's summary at the end
            return
        now, steps = time.monotonic(), state.global_step - self.logged_step
        # Kept in the Trainer's own history, so that a checkpoint carries it.
        entry["tokens_per_s"] = steps * self.tokens_per_step / max(now - self.logged, 1e-9)
        self.logged, self.logged_step, self.loss = now, state.global_step, entry["loss"]
        self._tell(entry)

    def _tell(self, entry: dict[str, float]) -> None:
        kept = {key: float(entry[key]) for key in CURVES if key in entry}
        if kept:
            self.tell_log(kept, int(entry["step"]))


def train(
    model: PreTrainedModel,
    blocks: np.ndarray,
    objective: Objective,
    training: Training,
    teacher: Teacher,
    folder: Path,
    seed: int,
    vocab_size: int,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    on_log: Callable[[dict[str, float], int], None] = lambda logs, step: None,
) -> Trained:
    """Train `model` in place, from the last checkpoint below `folder` where a run was stopped.

    Args:
        blocks: token ids (N, T) int32; two students with one seed see them in one order.
        teacher: a filled TeacherCache over the same blocks, or a model that runs online.
        folder: checkpoints; removed by the caller when the student is safe elsewhere.
        vocab_size: of the tokenizer; a teacher's logits beyond it are padding and are left out.
    """

    def collate(rows: list[dict[str, int]]) -> dict[str, torch.Tensor]:
        indices = np.array([row["index"] for row in rows])
        batch = {"input_ids": torch.from_numpy(blocks[indices]).long()}
        if isinstance(teacher, TeacherCache) and objective.divergence:
            ids, logprobs = teacher.rows(indices)
            batch |= {"teacher_ids": torch.from_numpy(ids), "teacher_logprobs": torch.from_numpy(logprobs)}
        return batch

    if isinstance(teacher, PreTrainedModel):
        teacher = cast(torch.nn.Module, teacher).to(device()).eval()  # type: ignore[assignment]
    arguments = _arguments(training, folder, seed)
    batch = arguments.train_batch_size * arguments.gradient_accumulation_steps
    watch = _Watch(training, batch * blocks.shape[1], on_progress, on_log)
    trainer = DistillTrainer(
        objective=objective,
        teacher=teacher,
        vocab_size=vocab_size,
        training=training,
        model=model,
        args=arguments,
        train_dataset=[{"index": index} for index in range(len(blocks))],
        data_collator=collate,
        callbacks=[watch],
    )
    trainer.remove_callback(PrinterCallback)
    began = time.monotonic()
    trainer.train(resume_from_checkpoint=_last_checkpoint(folder))
    model.eval()
    seconds = watch.before + time.monotonic() - began
    return Trained(trainer.state.global_step * watch.tokens_per_step, seconds)


def _arguments(training: Training, folder: Path, seed: int) -> TrainingArguments:
    try:
        return TrainingArguments(
            output_dir=str(folder),
            **training.model_dump(exclude={"bf16", "save_minutes", "optim"}),
            bf16=has_bf16() if training.bf16 is None else training.bf16,
            use_cpu=device() == "cpu",
            seed=seed,
            data_seed=seed,
            save_strategy="no",
            save_total_limit=1,
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=device() == "cuda",
            log_level="error",
        )
    except ValueError as error:
        raise BadInput(f"[training] is not what transformers takes: {error}") from error


def _last_checkpoint(folder: Path) -> str | None:
    """The last checkpoint that was written to its end; one that a kill cut short is removed."""
    while folder.is_dir() and (last := get_last_checkpoint(str(folder))):
        try:
            # The Trainer writes its state last of all.
            json.loads((Path(last) / "trainer_state.json").read_bytes())
            return last
        except (OSError, ValueError):
            shutil.rmtree(last)
    return None
