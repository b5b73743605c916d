"""One training run: transformers' Trainer over a student with its objective, and its checkpoints."""

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
from limbeck.distill.training.callbacks import Progress, Watch
from limbeck.distill.training.fsdp import UnshardedStudent
from limbeck.distill.training.muon import MuonAdamW
from limbeck.distill.training.on_policy import StudentWriter
from limbeck.registry.core.errors import BadInput

UNFINISHED = "unfinished"  # the folder that a checkpoint is written in
FLAGS = ("should_log", "should_evaluate", "should_save", "should_epoch_stop", "should_training_stop")

TeacherSignal = TeacherCache | PreTrainedModel | None


class Job(NamedTuple):
    """All that a training run needs.

    Attributes:
        student: trained in place.
        teacher: a filled TeacherCache over `train`, or a model that runs online.
        folder: checkpoints; removed by the caller when the student is safe elsewhere.
        vocab_size: of the tokenizer.
        paid: dollars already paid to an endpoint for this student; the budget counts them.
        likeliest: the teacher's likeliest next tokens at `heldout.sample(heldout)`, to see how far the student
            agrees; a teacher that runs online is asked for them.
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
    """A finished run: tokens seen, and seconds, over all its parts where it was stopped and resumed; why it
    ended before its last step, where it did; and the seconds of its evaluations, which are counted apart.

    What a part did after its last checkpoint was lost, and its time is not counted.
    """

    tokens: int
    seconds: float
    stop_reason: str | None = None
    eval_seconds: float = 0.0


class DistillTrainer(Trainer):
    """transformers' Trainer over a Distiller; its data are the numbers of blocks.

    Args:
        watch: told of every batch and its losses.
        whole: the student that can write.
        writer: gives back a batch, or one that the student wrote in its place.
    """

    def __init__(
        self,
        *,
        training: Training,
        watch: Watch,
        unsharded: UnshardedStudent,
        writer: StudentWriter | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(callbacks=[watch], **kwargs)
        self.training: Training = training
        self.unsharded = unsharded
        self.watch = watch
        self.writer = writer
        # The loss is a sum over targets, divided by those of a whole step, over all processes.
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
            others, mine, step = self.args.world_size, self.args.process_index, self.state.global_step
            with self.unsharded.gathered_student(), self.accelerator.autocast():
                for place, batch in enumerate(batches):
                    moved: Any = self._prepare_input(batch)
                    batches[place] = self.writer(moved, step, place * others + mine)
        targets = sum(((batch["labels"][:, 1:] != -100).sum() for batch in batches), start=torch.tensor(0))
        return batches, self.accelerator.gather(targets.to(device)).sum()

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        with self.accelerator.autocast():  # accelerate has a sharded student run without
            losses = model(inputs, num_items_in_batch)
        self.watch.record_batch(inputs, losses)
        return losses.loss * self.args.world_size  # processes average their gradients, and the loss is a share

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
        self._agree()
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self._agree()

    def _agree(self) -> None:
        """All processes log, save and stop where the first does: their clocks and what they measure differ."""
        if self.args.world_size > 1:
            flags = [float(getattr(self.control, name)) for name in FLAGS]
            for name, flag in zip(FLAGS, distributed.broadcast_numbers(flags), strict=True):
                setattr(self.control, name, bool(flag))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Written beside its place and put there when it is whole: what a kill cut short is never gone on from."""
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
        # The Trainer's own way stops at weights that are tied. FSDP and DeepSpeed keep checkpoints of their own.
        if state_dict is None:
            folder = Path(output_dir or str(self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            save_model(self.accelerator.unwrap_model(self.model), str(folder / SAFE_WEIGHTS_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            whole = self.accelerator.unwrap_model(model or self.model)
            load_model(whole, str(Path(resume_from_checkpoint) / SAFE_WEIGHTS_NAME))


def train(
    job: Job,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    on_log: Callable[[dict[str, float], int], None] = lambda logs, step: None,
) -> TrainingResult:
    """Train `job.student` in place, from the last checkpoint below `job.folder` where a run was stopped.

    Two students with one seed see the blocks in one order. Raises KeyboardInterrupt after Ctrl-C, when the
    checkpoint is written.
    """

    def collate(numbers: list[int]) -> dict[str, Any]:
        indices = np.array(numbers)
        batch: dict[str, Any] = dict(job.train.batch(indices))
        if isinstance(job.teacher, TeacherCache) and job.objective.uses_teacher:
            batch["teacher"] = job.teacher.load_batch(indices)
        return batch

    teacher = job.teacher if isinstance(job.teacher, PreTrainedModel) else None
    if teacher is not None:
        torch.nn.Module.to(teacher, device()).eval()
    on_policy = job.on_policy if job.objective.uses_teacher else None
    whole_batch = job.training.per_device_train_batch_size * job.training.gradient_accumulation_steps
    tokens_per_step = whole_batch * distributed.world_size() * job.train.ids.shape[1]
    steps = budget.planned_steps(job.training, len(job.train.ids), distributed.world_size())
    training, fewer = budget.cap_steps_by_tokens(job.training, job.budget, steps, tokens_per_step)
    [bf16] = distributed.broadcast_numbers([uses_bf16(training.bf16, job.student.config)])
    training = training.model_copy(update={"bf16": bool(bf16)})
    arguments = _arguments(training, job.folder, job.seed)
    sample, likeliest = heldout.sample(job.heldout), job.likeliest
    if teacher is not None and likeliest is None and job.objective.divergence != "chunks":
        likeliest = heldout.likeliest(teacher, sample, job.vocab_size)
    whole = UnshardedStudent(job.student)
    watch = Watch(training, tokens_per_step, on_progress, on_log, job.budget, whole, job.paid_usd, sample, likeliest)
    trainer = DistillTrainer(
        training=training,
        watch=watch,
        unsharded=whole,
        model=Distiller(whole.trained, job.objective, teacher, job.vocab_size),
        args=arguments,
        writer=StudentWriter(job.student, on_policy, job.seed) if on_policy else None,
        train_dataset=range(len(job.train.ids)),
        data_collator=collate,
    )
    trainer.remove_callback(PrinterCallback)
    if trainer.is_deepspeed_enabled and trainer.accelerator.state.deepspeed_plugin.zero_stage == 3:
        raise BadInput(
            "DeepSpeed's stage 3 shards the student over the processes, and such a student cannot be scored and saved",
            fix=f"take DeepSpeed's stage 1 or 2, or shard by FSDP: {distributed.FSDP_COMMAND}",
        )
    with watch.stop_on_interrupt():
        trainer.train(resume_from_checkpoint=_last_checkpoint(job.folder))
    if watch.interrupted.is_set():
        raise KeyboardInterrupt
    whole.gather_weights()
    job.student.eval()
    seconds = watch.seconds() - watch.eval_seconds
    tokens = trainer.state.global_step * tokens_per_step
    return TrainingResult(tokens, seconds, watch.stop_reason or fewer, watch.eval_seconds)


def _arguments(training: Training, folder: Path, seed: int) -> TrainingArguments:
    # transformers leaves bf16 here for whatever is trained later in this process.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if training.bf16 else "no"
    try:
        arguments = TrainingArguments(
            output_dir=str(folder),
            **training.model_dump(exclude={"save_minutes", "optim", "eval_steps"}),
            optim="adamw_torch_fused",
            gradient_checkpointing_kwargs={"use_reentrant": False},
            use_cpu=device() == "cpu",
            seed=seed,
            data_seed=seed,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_nan_inf_filter=False,  # the watch stops a run before such a loss is logged
            remove_unused_columns=False,
            dataloader_pin_memory=device() == "cuda",
            log_level="error",
        )
    except ValueError as error:
        raise BadInput(f"[training] is not what transformers takes: {error}") from error
    arguments._n_gpu = min(1, arguments.n_gpu)  # one GPU a process: torchrun starts a process for each
    return arguments


def _last_checkpoint(folder: Path) -> str | None:
    """The last checkpoint, where there is one; what a kill left of another that was being written is removed."""
    if distributed.is_main():
        shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if last and (Path(last) / f"{FSDP_MODEL_NAME}.bin").exists() != distributed.uses_fsdp():
        raise BadInput(
            f"{last} was written by processes that {'do not' if distributed.uses_fsdp() else 'do'} shard the student",
            fix="go on with the launcher that it was begun with, or begin anew: --restart",
        )
    return last
