"""Models timed in turn: a process for each, all loaded at once, one at work at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from tempfile import TemporaryFile
from typing import Any, NamedTuple, Self

from limbeck.registry.catalog.model_ref import ResolvedModel
from limbeck.registry.core.errors import LimbeckError
from limbeck.registry.core.machine import one_cpu_per_core

MIN_ROUNDS = 6  # rounds: the fewest whose extremes are a 95% interval of the median


class BatchTimings(NamedTuple):
    """What the rounds of one batch size showed of one model: seconds, round by round; the peak memory so far."""

    request_s: list[float]
    prefill_s: list[float]
    peak_rss_bytes: int
    peak_device_bytes: int | None


class ModelTimings(NamedTuple):
    """What one run showed of one model."""

    params: int | None
    device: str
    loads: dict[int, BatchTimings]  # by batch size


class _Worker:
    """One model in a process of its own (`limbeck.evals.cost.worker`)."""

    def __init__(self, model: ResolvedModel, setting: dict[str, Any]) -> None:
        self.label = model.label
        # A file, since a full pipe would stop it; closed by `__exit__`.
        self._stderr = TemporaryFile("w+", errors="replace")  # noqa: SIM115
        about = {"folder": str(model.path), "engine": model.engine, **setting}
        environment = os.environ | {
            "OMP_NUM_THREADS": str(setting["threads"]),
            # Threads that spin while they wait are 20 times slower where another process has one of the cores.
            "OMP_WAIT_POLICY": "PASSIVE",
            "TOKENIZERS_PARALLELISM": "false",
        }
        # -P: a folder `evals` where the user stands is not ours.
        command = [sys.executable, "-P", "-m", "limbeck.evals.cost.worker", json.dumps(about)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=self._stderr, text=True, env=environment
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()  # it has nothing to save
        self._process.communicate()
        self._stderr.close()

    def time_batch(self, batch: int, new_tokens: int) -> dict[str, Any]:
        """Have it run one batch; its answer."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"batch": batch, "new_tokens": new_tokens}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # its last words are better than this
        return self.read_answer()

    def read_answer(self) -> dict[str, Any]:
        """The next line it prints. Raises LimbeckError, with its last words, where it died."""
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            found: dict[str, Any] = json.loads(line)
            return found
        code = self._process.wait()
        self._stderr.seek(0)
        lines = self._stderr.read().strip().splitlines() or ["it said nothing"]
        raise LimbeckError(
            f"the cost of {self.label} could not be measured: "
            + (f"it was killed by signal {-code}" if code < 0 else lines[-1]),
            fix="a model must fit in memory; --no-cost scores its quality alone",
        )


def time_in_turn(
    models: Sequence[ResolvedModel],
    *,
    batches: Sequence[int],
    prompt_tokens: int,
    new_tokens: int,
    rounds: int,
    seconds: float,
    threads: int,
    trust_remote_code: bool,
    on_round: Callable[[int, int], None] = lambda done, total: None,
) -> list[ModelTimings]:
    """Start a process for each model and time them in turn, by the protocol of `limbeck.evals.cost.measure`.

    Args:
        rounds: of batch 1; larger batches get `FEWEST`.
        seconds: for each model; once they have passed, `FEWEST` rounds of batch 1 are enough.
        on_round: told how many rounds of all are done.

    Raises:
        LimbeckError: a process died; with its last words.
    """
    cpus = one_cpu_per_core()
    setting = {
        "prompt_tokens": prompt_tokens,
        "threads": threads,
        "cpus": cpus[:threads] if threads <= len(cpus) else None,
        "trust_remote_code": trust_remote_code,
    }
    with ExitStack() as stack:
        workers = [stack.enter_context(_Worker(model, setting)) for model in models]
        seen = [ModelTimings(**worker.read_answer(), loads={}) for worker in workers]
        planned = [rounds if batch == 1 else min(rounds, MIN_ROUNDS) for batch in batches]
        for place, (batch, most) in enumerate(zip(batches, planned, strict=True)):
            answers: list[list[dict[str, Any]]] = [[] for _ in workers]
            end = time.monotonic() + seconds * len(workers)
            for number in range(most):
                if number >= MIN_ROUNDS and time.monotonic() > end:
                    break
                for worker, own in zip(workers, answers, strict=True):
                    own.append(worker.time_batch(batch, new_tokens))
                on_round(sum(planned[:place]) + number + 1, sum(planned))
            for each, own in zip(seen, answers, strict=True):
                peaks = (own[-1]["peak_rss_bytes"], own[-1]["peak_device_bytes"])
                each.loads[batch] = BatchTimings([a["request_s"] for a in own], [a["prefill_s"] for a in own], *peaks)
    return seen
