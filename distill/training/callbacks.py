"""The callback that monitors a run: progress, curves, held-out scores, timed checkpoints, and reasons to stop."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from limbeck.distill.data.blocks import Blocks
from limbeck.distill.losses.distiller import Distiller, Losses
from limbeck.distill.models import heldout
from limbeck.distill.recipe.schema import Budget, Training
from limbeck.distill.training import budget as budgets
from limbeck.distill.training import distributed, health
from limbeck.distill.training.budget import Evaluation
from limbeck.distill.training.fsdp import UnshardedStudent
from limbeck.registry.core.errors import Refused

EVALUATED = ("heldout_sample_bits_per_byte", "heldout_sample_agreement")
CURVES = ("loss", "agreement", "grad_norm", "learning_rate", "tokens_per_s", "usd", *EVALUATED)


class Progress(NamedTuple):
    """The state of a run after a step.

    Attributes:
        step: optimizer steps done. steps: the expected number of all steps, lower if a budget will end the run.
        tokens_per_s: without the time of evaluations.
        loss: the last logged loss, in nats; None before the first.
        agreement: the share of targets with the same most likely token in student and teacher, at the last log.
        heldout_bits_per_byte: of the last evaluation; None before the first.
        seconds_left: None before there is a rate.
    """

    step: int
    steps: int
    tokens_per_s: float
    loss: float | None = None
    agreement: float | None = None
    heldout_bits_per_byte: float | None = None
    seconds_left: float | None = None


class Cooling(NamedTuple):
    """The learning rate falls to 0 between two steps, because more training is not worth its price."""

    begin: int
    end: int
    gain: float  # held-out bits per byte per dollar at `begin`


class Listeners(NamedTuple):
    """Functions that receive the progress after each step, and the values of curves at a step."""

    on_progress: Callable[[Progress], None]
    on_log: Callable[[dict[str, float], int], None]


class HeldoutSample(NamedTuple):
    """Held-out blocks, and the teacher's most likely next token at each position (n, T); None if unknown."""

    blocks: Blocks
    likeliest: np.ndarray | None


class TrainingMonitor(TrainerCallback):
    """Reports progress and curves, scores the student on held-out text, saves checkpoints, and stops the run.

    Everything that must survive a kill goes into the Trainer's own history, which every checkpoint contains.

    Args:
        unsharded: the student that can be scored.
        listeners: receive progress and curves.
        sample: scored every `training.eval_steps`.
        paid_usd: dollars already paid to an endpoint for this student.

    Attributes:
        interrupted: set by Ctrl-C: the run stops after the current step, with a checkpoint.
        stop_reason: why the run ended before its last step; None if it did not.
        eval_seconds: of evaluations, over all parts of the run.
    """

    def __init__(
        self,
        training: Training,
        tokens_per_step: int,
        budget: Budget,
        unsharded: UnshardedStudent,
        listeners: Listeners,
        sample: HeldoutSample,
        paid_usd: float = 0.0,
    ) -> None:
        self.training = training
        self.tokens_per_step = tokens_per_step
        self.listeners = listeners
        self.sample = sample
        self.budget = budget
        self.unsharded = unsharded
        self.paid_usd = paid_usd
        self.interrupted = threading.Event()
        self.stop_reason: str | None = None
        self.eval_seconds = 0.0
        self.last_values: dict[str, float] = {}  # the last value of each curve
        self.losses: list[float] = []
        self.evaluations: list[Evaluation] = []
        self.share = 0.0  # used share of the budget's minutes and dollars
        self.cooling: Cooling | None = None
        self._batches: list[Mapping[str, Any]] = []
        self._batch_losses: list[Losses] = []

    def record_batch(self, batch: Mapping[str, Any], losses: Losses) -> None:
        """Record a batch of the current step and its losses; called before the optimizer uses the gradients."""
        self._batches.append(batch)
        self._batch_losses.append(losses._replace(loss=losses.loss.detach()))

    def seconds(self) -> float:
        """Seconds of the run over all its parts, including evaluations."""
        return self.seconds_before + time.monotonic() - self.began

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.first_step = self.logged_step = state.global_step
        self.device, self.bf16, self.folder = args.device, args.bf16, args.output_dir
        model = kwargs["model"]
        self.distiller: Distiller = next(module for module in model.modules() if isinstance(module, Distiller))
        self.nonfinite_flag = torch.zeros((), dtype=torch.int32, device=self.device)
        self.seconds_before = 0.0
        for entry in state.log_history:  # a resumed run reports its whole curves again
            self._restore_entry(entry)
            self._report_entry(entry, state)
        self.eval_before = self.last_log_eval_seconds = self.eval_seconds
        self.began = self.last_save_time = self.last_log_time = time.monotonic()
        self.share = self.share_before = budgets.budget_share_used(self.budget, self._spending())
        self.tenths = int(10 * self._share_done(state) + 1e-9)
        self._follow_budget(kwargs["lr_scheduler"], state.max_steps)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._batches, self._batch_losses = [], []
        # Counting agreement takes a little time: only at the steps that log it.
        self.distiller.counts_agreement = (state.global_step + 1) % args.logging_steps == 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        loss = torch.stack([losses.loss for losses in self._batch_losses]).sum()
        self.nonfinite_flag |= ~health.is_finite(self.distiller, loss)
        if self.device.type == "cpu":  # before the weights change; on a GPU this would wait for the device
            self._check_finite(state.global_step + 1)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.budget.max_minutes or self.budget.max_usd:  # all processes need the same learning rate
            [self.share] = distributed.broadcast_numbers([budgets.budget_share_used(self.budget, self._spending())])

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        step = state.global_step
        if self._evaluation_is_due(state):
            self._evaluate(state)
        self._stop_or_save(state, control)
        if self.device.type != "cpu" and (step % args.logging_steps == 0 or control.should_save):
            self._check_finite(step)
        if state.is_world_process_zero:
            self.listeners.on_progress(self._progress(state))

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        entry = state.log_history[-1]
        if "loss" not in entry:  # the Trainer's summary of the run
            return
        now, steps = time.monotonic(), state.global_step - self.logged_step
        evaluating = self.eval_seconds - self.last_log_eval_seconds
        entry["tokens_per_s"] = steps * self.tokens_per_step / max(now - self.last_log_time - evaluating, 1e-9)
        objective = self.distiller.objective
        if objective.uses_teacher and objective.divergence != "chunks" and self.distiller.counts_agreement:
            targets = sum(int(losses.targets) for losses in self._batch_losses)
            entry["agreement"] = sum(int(losses.agreement_count) for losses in self._batch_losses) / max(targets, 1)
        self.last_log_time, self.logged_step, self.last_log_eval_seconds = now, state.global_step, self.eval_seconds
        self._restore_entry(entry)
        self._report_entry(entry, state)
        if rise := health.describe_loss_rise(self.losses, args.logging_steps):
            raise training_diverged_error(state.global_step, rise, self.training, self.folder)

    def _check_finite(self, step: int) -> None:
        if distributed.world_size() > 1:
            torch.distributed.all_reduce(self.nonfinite_flag, torch.distributed.ReduceOp.MAX)
        if self.nonfinite_flag:
            cause = "a loss or a gradient is not finite"
            if not distributed.uses_fsdp():  # a single process cannot run a sharded student to find the cause
                cause = health.find_cause(self.distiller, self._batches, self.bf16)
            raise training_diverged_error(step, cause, self.training, self.folder)

    def _stop_or_save(self, state: Any, control: Any) -> None:
        step, interrupted = state.global_step, self.interrupted.is_set()
        due = time.monotonic() - self.last_save_time >= 60 * self.training.save_minutes
        if step >= state.max_steps:
            return
        if self.share >= 1:
            self.stop_reason = f"{budgets.describe_reached_limit(self.budget, self._spending())} used at step {step}"
        elif self.cooling and step >= self.cooling.end:
            self.stop_reason = (
                f"budget.stop_when: a gain of {self.cooling.gain:.3g} bits per byte per dollar at step "
                f"{self.cooling.begin}, below {self.budget.stop_when:g}"
            )
        if self.stop_reason:
            control.should_training_stop = control.should_log = True
        if interrupted or (due and not self.stop_reason):
            self.last_save_time = time.monotonic()
            state.log_history.append({"step": step, "seconds": self.seconds(), "eval_seconds": self.eval_seconds})
            control.should_save = True
            control.should_training_stop = control.should_training_stop or interrupted

    def _evaluation_is_due(self, state: Any) -> bool:
        """True every `eval_steps`; without `eval_steps`, after every tenth of the run."""
        if self.training.eval_steps:
            return bool(state.global_step % self.training.eval_steps == 0)
        before, self.tenths = self.tenths, int(10 * self._share_done(state) + 1e-9)
        return self.tenths > before

    def _evaluate(self, state: Any) -> None:
        """Score the student on the held-out sample; begin to cool down if its gain per dollar is too low."""
        began, step = time.monotonic(), state.global_step
        with self.unsharded.gathered_student() as student:
            score = heldout.score(student, self.sample.blocks, self.sample.likeliest, self.bf16)
        self.eval_seconds += time.monotonic() - began
        entry = {"step": step, "heldout_sample_bits_per_byte": score.bits_per_byte}
        if score.agreement is not None:
            entry["heldout_sample_agreement"] = score.agreement
        if self.budget.usd_per_hour or self.paid_usd:
            entry["usd"] = distributed.broadcast_numbers([self._spending().usd])[0]
        state.log_history.append(entry)
        self._restore_entry(entry)
        self._report_entry(entry, state)
        gain = budgets.gain_per_usd(self.evaluations)
        if self.budget.stop_when and not self.cooling and gain is not None and gain < self.budget.stop_when:
            cooling = {"step": step, "cool_until": step + max(1, step // 10), "gain": gain}
            state.log_history.append(cooling)
            self._restore_entry(cooling)

    def _restore_entry(self, entry: Mapping[str, float]) -> None:
        """Take in an entry of the Trainer's history, of this process or of the part before a resume."""
        self.last_values |= {key: float(entry[key]) for key in CURVES if key in entry}
        if "loss" in entry:
            self.losses.append(entry["loss"])
        if "seconds" in entry:
            self.seconds_before, self.eval_seconds = entry["seconds"], entry["eval_seconds"]
        if "usd" in entry and "heldout_sample_bits_per_byte" in entry:
            self.evaluations.append(Evaluation(entry["usd"], entry["heldout_sample_bits_per_byte"]))
        if "cool_until" in entry:
            self.cooling = Cooling(int(entry["step"]), int(entry["cool_until"]), entry["gain"])

    def _follow_budget(self, scheduler: Any, steps: int) -> None:
        """Let the learning rate follow the used share of minutes and dollars when it is ahead of the steps."""
        if not (self.budget.max_minutes or self.budget.max_usd or self.budget.stop_when):
            return

        def with_budget(schedule: Callable[[float], float]) -> Callable[[int], float]:
            def factor(step: int) -> float:
                cooling_factor = 1.0
                if self.cooling:
                    cooling_factor = max(0.0, (self.cooling.end - step) / (self.cooling.end - self.cooling.begin))
                return schedule(max(step, self.share * steps)) * cooling_factor

            return factor

        scheduler.lr_lambdas = [with_budget(schedule) for schedule in scheduler.lr_lambdas]

    def _spending(self) -> budgets.Spending:
        return budgets.spending_of_run(self.budget, self.seconds(), self.paid_usd)

    def _share_done(self, state: Any) -> float:
        """The share of the run that is done, by its steps or by its budget, whichever is further."""
        last_step = min(self.cooling.end, state.max_steps) if self.cooling else state.max_steps
        return max(state.global_step / last_step, self.share)

    def _progress(self, state: Any) -> Progress:
        step, done = state.global_step, self._share_done(state)
        before = max(self.first_step / step * done, self.share_before)
        elapsed = time.monotonic() - self.began
        training = elapsed - (self.eval_seconds - self.eval_before)
        return Progress(
            step,
            max(step, round(step / done)),
            (step - self.first_step) * self.tokens_per_step / max(training, 1e-9),
            self.last_values.get("loss"),
            self.last_values.get("agreement"),
            self.last_values.get("heldout_sample_bits_per_byte"),
            max(0.0, elapsed * (1 - done) / (done - before)) if done > before else None,
        )

    def _report_entry(self, entry: Mapping[str, float], state: Any) -> None:
        values = {key: float(entry[key]) for key in CURVES if key in entry}
        if values and state.is_world_process_zero:
            self.listeners.on_log(values, int(entry["step"]))

    @contextmanager
    def stop_on_interrupt(self) -> Iterator[None]:
        """Within this context, the first Ctrl-C stops the run at the end of its step; the second stops it at once."""
        if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
            yield
            return

        def on_interrupt(number: int, frame: Any) -> None:
            if self.interrupted.is_set():
                raise KeyboardInterrupt
            self.interrupted.set()

        before = signal.signal(signal.SIGINT, on_interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def training_diverged_error(step: int, cause: str, training: Training, folder: str) -> Refused:
    """The error of a run that diverged at a step, with the cause and the last checkpoint."""
    checkpoint = get_last_checkpoint(folder) if Path(folder).is_dir() else None
    return Refused(
        f"training diverged at step {step}: {cause}; nothing was registered"
        + (f"; the checkpoint before it is {checkpoint}" if checkpoint else ""),
        fix=f"set a lower training.learning_rate than {training.learning_rate:g}, a higher training.warmup_steps than "
        f"{training.warmup_steps:g}" + (", or training.bf16 = false" if training.bf16 is not False else ""),
    )
