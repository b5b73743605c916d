"""Times models in turn: each is loaded in a process of its own, and one of them works at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from tempfile import TemporaryFile
from typing import Any, NamedTuple, Self

from limbeck.registry.catalog.model_ref import ResolvedModel
from limbeck.registry.core.errors import LimbeckError
from limbeck.registry.core.machine import one_cpu_per_core, physical_cores

MIN_ROUNDS = 6  # the smallest number of rounds whose extremes are a 95% interval of the median


@dataclass(frozen=True, kw_only=True)
class TimingPlan:
    """What is timed, for each model of one run. The defaults are those of the protocol.

    Attributes:
        prompt_tokens, new_tokens: the lengths of a request.
        batches: batch sizes, 1 first, ascending.
        rounds: of batch 1; larger batches get at most MIN_ROUNDS.
        seconds: for each model and batch size; once they have passed, MIN_ROUNDS rounds are enough.
        threads: of each model; one for each physical core by default.
    """

    prompt_tokens: int = 64
    new_tokens: int = 64
    batches: Sequence[int] = (1, 8)
    rounds: int = 10
    seconds: float = 3.0
    threads: int = field(default_factory=physical_cores)

    def rounds_of_batch(self, batch: int) -> int:
        """The most rounds of one batch size."""
        return self.rounds if batch == 1 else min(self.rounds, MIN_ROUNDS)


class BatchTimings(NamedTuple):
    """What was measured of one model at one batch size.

    Attributes:
        request_s, prefill_s: seconds, round by round.
        peaks: peaks so far, in the fields of `BatchCost`: `peak_rss_bytes`, `peak_device_bytes`.
    """

    request_s: list[float]
    prefill_s: list[float]
    peaks: dict[str, Any]


class ModelTimings(NamedTuple):
    """What was measured of one model in one run; `params` is None if its engine does not know them."""

    params: int | None
    device: str
    loads: dict[int, BatchTimings]  # by batch size


class _Worker:
    """One model in a process of its own (`limbeck.evals.cost.worker`)."""

    def __init__(self, model: ResolvedModel, run_setting: dict[str, Any]) -> None:
        self.label = model.label
        # A file: a full pipe would block the process. `__exit__` closes it.
        self._stderr = TemporaryFile("w+", errors="replace")  # noqa: SIM115
        setting = {"folder": str(model.path), "engine": model.engine, **run_setting}
        environment = os.environ | {
            "OMP_NUM_THREADS": str(setting["threads"]),
            # Threads that spin while they wait are 20 times slower if another process uses one of the cores.
            "OMP_WAIT_POLICY": "PASSIVE",
            "TOKENIZERS_PARALLELISM": "false",
        }
        # -P: do not import a folder `limbeck` in the current directory.
        command = [sys.executable, "-P", "-m", "limbeck.evals.cost.worker", json.dumps(setting)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=self._stderr, text=True, env=environment
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()  # the process has nothing to save
        self._process.communicate()
        self._stderr.close()

    def time_batch(self, batch: int, new_tokens: int) -> dict[str, Any]:
        """Run one batch in the process, and return its answer."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"batch": batch, "new_tokens": new_tokens}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the process died; `read_answer` reports its own error
        return self.read_answer()

    def read_answer(self) -> dict[str, Any]:
        """The next answer of the process. Raises LimbeckError, with its last error line, if it died."""
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            answer: dict[str, Any] = json.loads(line)
            return answer
        code = self._process.wait()
        self._stderr.seek(0)
        lines = self._stderr.read().strip().splitlines() or ["it ended without a message"]
        reason = f"its process was killed by signal {-code}" if code < 0 else lines[-1]
        raise LimbeckError(
            f"the cost of {self.label} could not be measured: {reason}",
            fix="a model must fit in memory; --no-cost measures its quality alone",
        )


def time_in_turn(
    models: Sequence[ResolvedModel],
    plan: TimingPlan,
    *,
    trust_remote_code: bool,
    on_round: Callable[[int, int], None] = lambda done, total: None,
) -> list[ModelTimings]:
    """Start a process for each model and time them in turn, by the protocol of `limbeck.evals.cost.measure`.

    Args:
        on_round: called after each round with the number of rounds done and of all rounds.

    Raises:
        LimbeckError: a process died; with its last error line.
    """
    cpus = one_cpu_per_core()
    setting = {
        "prompt_tokens": plan.prompt_tokens,
        "threads": plan.threads,
        "cpus": cpus[: plan.threads] if plan.threads <= len(cpus) else None,
        "trust_remote_code": trust_remote_code,
    }
    total = sum(map(plan.rounds_of_batch, plan.batches))
    done = 0  # rounds of the batch sizes before
    with ExitStack() as stack:
        workers = [stack.enter_context(_Worker(model, setting)) for model in models]
        timings = [ModelTimings(**worker.read_answer(), loads={}) for worker in workers]
        for batch in plan.batches:
            rounds = []
            for answers in _rounds(workers, batch, plan):
                rounds.append(answers)
                on_round(done + len(rounds), total)
            done += plan.rounds_of_batch(batch)
            for model, answers in zip(timings, zip(*rounds, strict=True), strict=True):
                model.loads[batch] = _batch_timings(answers)
    return timings


def _rounds(workers: Sequence[_Worker], batch: int, plan: TimingPlan) -> Iterator[list[dict[str, Any]]]:
    """Rounds of one batch size, each with one answer for each worker."""
    end = time.monotonic() + plan.seconds * len(workers)
    for number in range(plan.rounds_of_batch(batch)):
        if number >= MIN_ROUNDS and time.monotonic() > end:
            return
        yield [worker.time_batch(batch, plan.new_tokens) for worker in workers]


def _batch_timings(answers: Sequence[dict[str, Any]]) -> BatchTimings:
    """One model's answers at one batch size, round by round."""
    seconds = ("request_s", "prefill_s")
    times = {name: [answer[name] for answer in answers] for name in seconds}
    return BatchTimings(**times, peaks={name: value for name, value in answers[-1].items() if name not in seconds})
