"""Watching a run: progress, curves, checkpoints by the clock, and the reasons to stop."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from transformers import TrainerCallback

from distill.recipe import Training

CURVES = ("loss", "grad_norm", "learning_rate", "tokens_per_s")


class Progress(NamedTuple):
    """What a run tells while it goes: optimizer steps, all of them, tokens per second, the last loss in nats."""

    step: int
    steps: int
    tokens_per_s: float
    loss: float | None


class Watch(TrainerCallback):
    """Checkpoints every so many minutes and when asked to stop, reports progress, passes what is logged on.

    Attributes:
        interrupted: set by Ctrl-C: the run stops after the step it is in, with a checkpoint.
    """

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
        self.interrupted = threading.Event()

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
        interrupted = self.interrupted.is_set()
        due = now - self.saved >= 60 * self.training.save_minutes
        if (due or interrupted) and state.global_step < state.max_steps:
            self.saved = now
            # In the Trainer's own history, so that the checkpoint carries it.
            state.log_history.append({"step": state.global_step, "seconds": self.before + now - self.began})
            control.should_save = True
            control.should_training_stop = control.should_training_stop or interrupted

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

    @contextmanager
    def stops_gently(self) -> Iterator[None]:
        """Within, the first Ctrl-C asks the run to stop at the end of its step; a second one ends it at once."""
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
