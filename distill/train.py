"""One training run: transformers' Trainer over a student with its objective, and its checkpoints."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_model, save_model
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint

from distill.blocks import Blocks
from distill.cache import TeacherCache
from distill.distiller import Distiller
from distill.models import device, has_bf16
from distill.optimizer import MuonAdamW
from distill.recipe import Budget, Objective, OnPolicy, Training
from distill.watch import Progress, Watch
from registry.errors import BadInput

Teacher = TeacherCache | PreTrainedModel | None


class Job(NamedTuple):
    """All that a training run needs.

    Attributes:
        student: trained in place.
        teacher: a filled TeacherCache over `train`, or a model that runs online.
        folder: checkpoints; removed by the caller when the student is safe elsewhere.
        vocab_size: of the tokenizer.
    """

    student: PreTrainedModel
    train: Blocks
    heldout: Blocks
    objective: Objective
    training: Training
    teacher: Teacher
    folder: Path
    seed: int
    vocab_size: int
    budget: Budget = Budget()
    on_policy: OnPolicy | None = None


class Trained(NamedTuple):
    """A finished run: tokens seen, and seconds, over all its parts where it was stopped and resumed; and why it
    ended before its last step, where it did.

    What a part did after its last checkpoint was lost, and its time is not counted.
    """

    tokens: int
    seconds: float
    stopped: str | None = None


class DistillTrainer(Trainer):
    """transformers' Trainer over a Distiller; rows are indices into the blocks."""

    def __init__(self, *, training: Training, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.training: Training = training
        # The loss is a sum over targets; the Trainer counts those of a whole step, over all processes.
        self.model_accepts_loss_kwargs = True

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        if num_items_in_batch is None:
            num_items_in_batch = (inputs["labels"][:, 1:] != -100).sum()
        losses = model(inputs, num_items_in_batch)
        if self.args.average_tokens_across_devices:  # processes average their gradients, and the loss is a share
            return losses.loss * self.accelerator.num_processes
        return losses.loss

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

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # The Trainer's own way stops at weights that are tied.
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_model(self.accelerator.unwrap_model(self.model), str(folder / "model.safetensors"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_model(
            model or self.accelerator.unwrap_model(self.model), str(Path(resume_from_checkpoint) / "model.safetensors")
        )


def train(
    job: Job,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    on_log: Callable[[dict[str, float], int], None] = lambda logs, step: None,
) -> Trained:
    """Train `job.student` in place, from the last checkpoint below `job.folder` where a run was stopped.

    Two students with one seed see the blocks in one order. Raises KeyboardInterrupt after Ctrl-C, when the
    checkpoint is written.
    """

    def collate(rows: list[dict[str, int]]) -> dict[str, Any]:
        indices = np.array([row["index"] for row in rows])
        batch: dict[str, Any] = dict(job.train.batch(indices))
        if isinstance(job.teacher, TeacherCache) and job.objective.uses_teacher:
            batch["teacher"] = job.teacher.rows(indices)
        return batch

    teacher = job.teacher if isinstance(job.teacher, PreTrainedModel) else None
    if teacher is not None:
        torch.nn.Module.to(teacher, device()).eval()
    arguments = _arguments(job.training, job.folder, job.seed)
    batch = arguments.train_batch_size * arguments.gradient_accumulation_steps
    watch = Watch(job.training, batch * job.train.ids.shape[1], on_progress, on_log)
    trainer = DistillTrainer(
        training=job.training,
        model=Distiller(job.student, job.objective, teacher, job.vocab_size),
        args=arguments,
        train_dataset=[{"index": index} for index in range(len(job.train.ids))],
        data_collator=collate,
        callbacks=[watch],
    )
    trainer.remove_callback(PrinterCallback)
    began = time.monotonic()
    with watch.stops_gently():
        trainer.train(resume_from_checkpoint=_last_checkpoint(job.folder))
    if watch.interrupted.is_set():
        raise KeyboardInterrupt
    job.student.eval()
    seconds = watch.before + time.monotonic() - began
    return Trained(trainer.state.global_step * watch.tokens_per_step, seconds)


def _arguments(training: Training, folder: Path, seed: int) -> TrainingArguments:
    try:
        return TrainingArguments(
            output_dir=str(folder),
            **training.model_dump(exclude={"bf16", "save_minutes", "optim", "eval_steps"}),
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
