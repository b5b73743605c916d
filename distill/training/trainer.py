"""One training run: transformers' Trainer on a student with its objective, and its checkpoints."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils.constants import FSDP_MODEL_NAME
from safetensors.torch import load_model, save_model
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint
from transformers.utils import SAFE_WEIGHTS_NAME

from limbeck.distill.cache.teacher_cache import TeacherCache
from limbeck.distill.data.blocks import Blocks
from limbeck.distill.losses.distiller import Distiller
from limbeck.distill.models import heldout
from limbeck.distill.models.loading import device
from limbeck.distill.models.precision import uses_bf16
from limbeck.distill.recipe.schema import Budget, Objective, OnPolicy, Training
from limbeck.distill.training import budget, distributed, fsdp
from limbeck.distill.training.callbacks import HeldoutSample, Listeners, Progress, TrainingMonitor
from limbeck.distill.training.fsdp import UnshardedStudent
from limbeck.distill.training.muon import MuonAdamW
from limbeck.distill.training.on_policy import StudentWriter
from limbeck.registry.core.errors import BadInput

UNFINISHED = "unfinished"  # the folder in which a checkpoint is written before it takes its name
CONTROL_FLAGS = ("should_log", "should_evaluate", "should_save", "should_epoch_stop", "should_training_stop")

TeacherSignal = TeacherCache | PreTrainedModel | None


class Job(NamedTuple):
    """Everything that a training run needs.

    Attributes:
        student: trained in place.
        teacher: a filled TeacherCache over `train`, a model that runs online, or None for labels alone.
        folder: of checkpoints; the caller removes it when the student is saved elsewhere.
        vocab_size: of the tokenizer.
        paid_usd: dollars already paid to an endpoint for this student; the budget counts them.
        likeliest: the teacher's most likely next tokens (n, T) on `sample_blocks(heldout)`, to measure agreement;
            None: unknown, or computed here from a teacher that runs online.
    """

    student: PreTrainedModel
    train: Blocks
    heldout: Blocks
    objective: Objective
    training: Training
    teacher: TeacherSignal
    folder: Path
    seed: int
    vocab_size: int
    budget: Budget = Budget()
    on_policy: OnPolicy | None = None
    paid_usd: float = 0.0
    likeliest: np.ndarray | None = None


class TrainingResult(NamedTuple):
    """A finished run, over all its parts if it was stopped and resumed.

    Work after the last checkpoint of a stopped part is lost, and its time is not counted.

    Attributes:
        tokens: tokens read.
        seconds: of training, without evaluations.
        stop_reason: why it ended before its last step; None if it did not.
        eval_seconds: of evaluations.
    """

    tokens: int
    seconds: float
    stop_reason: str | None = None
    eval_seconds: float = 0.0


class DistillTrainer(Trainer):
    """transformers' Trainer on a Distiller; its data set is the numbers of the blocks.

    Args:
        monitor: receives every batch and its losses.
        unsharded: the student that can write text.
        writer: replaces some batches with text of the student; None: on-policy distillation is off.
    """

    def __init__(
        self,
        *,
        training: Training,
        monitor: TrainingMonitor,
        unsharded: UnshardedStudent,
        writer: StudentWriter | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(callbacks=[monitor], **kwargs)
        self.training: Training = training
        self.unsharded = unsharded
        self.monitor = monitor
        self.writer = writer
        # The loss is a sum over targets, divided by the targets of the whole step, over all processes.
        self.model_accepts_loss_kwargs = True
        self._saving = False

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if distributed.uses_fsdp():
            fsdp.turn_on(self.accelerator, self.args.bf16)
            self.is_fsdp_enabled = True

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], torch.Tensor]:
        """The batches of one optimizer step, and its targets over all processes."""
        batches = list(itertools.islice(epoch_iterator, num_batches))
        if self.writer is not None:
            processes, rank, step = self.args.world_size, self.args.process_index, self.state.global_step
            with self.unsharded.gathered_student(), self.accelerator.autocast():
                for place, batch in enumerate(batches):
                    on_device: Any = self._prepare_input(batch)
                    batches[place] = self.writer(on_device, step, place * processes + rank)
        targets = sum(((batch["labels"][:, 1:] != -100).sum() for batch in batches), start=torch.tensor(0))
        return batches, self.accelerator.gather(targets.to(device)).sum()

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        with self.accelerator.autocast():  # accelerate runs a sharded student without autocast
            losses = model(inputs, num_items_in_batch)
        self.monitor.record_batch(inputs, losses)
        return losses.loss * self.args.world_size  # gradients are averaged over processes; the loss is one's share

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

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self._synchronize_control()
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self._synchronize_control()

    def _synchronize_control(self) -> None:
        """Log, save and stop when the main process does: the clocks and measurements of processes differ."""
        if self.args.world_size > 1:
            flags = [float(getattr(self.control, name)) for name in CONTROL_FLAGS]
            for name, flag in zip(CONTROL_FLAGS, distributed.broadcast_numbers(flags), strict=True):
                setattr(self.control, name, bool(flag))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint in a temporary folder and rename it, so that no run resumes from an incomplete one."""
        self._saving = True
        super()._save_checkpoint(model, trial)
        self._saving = False
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            folder = Path(str(self.args.output_dir))
            [written] = (folder / UNFINISHED).iterdir()
            before = list(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"))
            os.replace(written, folder / written.name)
            for older in before:
                shutil.rmtree(older)

    def _get_output_dir(self, trial: Any) -> str:
        return str(Path(str(self.args.output_dir)) / UNFINISHED) if self._saving else str(self.args.output_dir)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # The Trainer's own code fails on tied weights. FSDP and DeepSpeed write checkpoints of their own.
        if state_dict is None:
            folder = Path(output_dir or str(self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            save_model(self.accelerator.unwrap_model(self.model), str(folder / SAFE_WEIGHTS_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            unwrapped = self.accelerator.unwrap_model(model or self.model)
            load_model(unwrapped, str(Path(resume_from_checkpoint) / SAFE_WEIGHTS_NAME))


def train(
    job: Job,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    on_log: Callable[[dict[str, float], int], None] = lambda logs, step: None,
) -> TrainingResult:
    """Train `job.student` in place; resumes from the last checkpoint in `job.folder` if there is one.

    Two students with the same seed see the blocks in the same order.

    Raises:
        KeyboardInterrupt: after Ctrl-C, when the checkpoint is written.
        Refused: training diverged.
        BadInput: the budget, `[training]` or the launcher cannot be used.
    """
    teacher = job.teacher if isinstance(job.teacher, PreTrainedModel) else None
    if teacher is not None:
        torch.nn.Module.to(teacher, device()).eval()
    on_policy = job.on_policy if job.objective.uses_teacher else None
    batch_size = job.training.per_device_train_batch_size * job.training.gradient_accumulation_steps
    tokens_per_step = batch_size * distributed.world_size() * job.train.ids.shape[1]
    steps = budget.planned_steps(job.training, len(job.train.ids), distributed.world_size())
    training, cap_reason = budget.cap_steps_by_tokens(job.training, job.budget, steps, tokens_per_step)
    [bf16] = distributed.broadcast_numbers([uses_bf16(training.bf16, job.student.config)])
    training = training.model_copy(update={"bf16": bool(bf16)})
    arguments = _arguments(training, job.folder, job.seed)
    sample, likeliest = heldout.sample_blocks(job.heldout), job.likeliest
    if teacher is not None and likeliest is None and job.objective.divergence != "chunks":
        likeliest = heldout.likeliest_tokens(teacher, sample, job.vocab_size)
    unsharded = UnshardedStudent(job.student)
    listeners, heldout_sample = Listeners(on_progress, on_log), HeldoutSample(sample, likeliest)
    monitor = TrainingMonitor(training, tokens_per_step, job.budget, unsharded, listeners, heldout_sample, job.paid_usd)
    trainer = DistillTrainer(
        training=training,
        monitor=monitor,
        unsharded=unsharded,
        model=Distiller(unsharded.trained, job.objective, teacher, job.vocab_size),
        args=arguments,
        writer=StudentWriter(job.student, on_policy, job.seed) if on_policy else None,
        train_dataset=range(len(job.train.ids)),
        data_collator=lambda numbers: _collate(job, numbers),
    )
    trainer.remove_callback(PrinterCallback)
    if trainer.is_deepspeed_enabled and trainer.accelerator.state.deepspeed_plugin.zero_stage == 3:
        raise BadInput(
            "DeepSpeed's stage 3 shards the student over the processes, so it cannot be scored and saved",
            fix=f"use DeepSpeed's stage 1 or 2, or shard with FSDP: {distributed.FSDP_COMMAND}",
        )
    with monitor.stop_on_interrupt():
        trainer.train(resume_from_checkpoint=_last_checkpoint(job.folder))
    if monitor.interrupted.is_set():
        raise KeyboardInterrupt
    unsharded.gather_weights()
    job.student.eval()
    seconds = monitor.seconds() - monitor.eval_seconds
    tokens = trainer.state.global_step * tokens_per_step
    return TrainingResult(tokens, seconds, monitor.stop_reason or cap_reason, monitor.eval_seconds)


def _collate(job: Job, numbers: list[int]) -> dict[str, Any]:
    """The batch of some blocks, with the teacher's stored outputs if there are any."""
    indices = np.array(numbers)
    batch: dict[str, Any] = dict(job.train.batch(indices))
    if isinstance(job.teacher, TeacherCache) and job.objective.uses_teacher:
        batch["teacher"] = job.teacher.load_batch(indices)
    return batch


def _arguments(training: Training, folder: Path, seed: int) -> TrainingArguments:
    # transformers writes this variable and reads it again for every later training in this process.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if training.bf16 else "no"
    try:
        arguments = TrainingArguments(
            output_dir=str(folder),
            **training.model_dump(exclude={"save_minutes", "optim", "eval_steps"}),
            optim="adamw_torch_fused",
            activation_checkpointing_kwargs={"use_reentrant": False},
            use_cpu=device() == "cpu",
            seed=seed,
            data_seed=seed,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_nan_inf_filter=False,  # the monitor stops a run before such a loss is logged
            remove_unused_columns=False,
            dataloader_pin_memory=device() == "cuda",
            log_level="error",
        )
    except ValueError as error:
        raise BadInput(f"transformers refuses [training]: {error}") from error
    arguments._n_gpu = min(1, arguments.n_gpu)  # one GPU per process: torchrun starts a process for each
    return arguments


def _last_checkpoint(folder: Path) -> str | None:
    """The last checkpoint, or None; removes an incomplete one that a kill left."""
    if distributed.is_main():
        shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if last and (Path(last) / f"{FSDP_MODEL_NAME}.bin").exists() != distributed.uses_fsdp():
        was_sharded = "did not" if distributed.uses_fsdp() else "did"
        raise BadInput(
            f"{last} was written by processes that {was_sharded} shard the student",
            fix="resume with the same launcher, or start over: --restart",
        )
    return last
