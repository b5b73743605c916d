"""Python processes forked from one that has already imported torch and transformers.

Starting Python and importing these packages takes most of the time of a short run.
"""

from __future__ import annotations

import gc
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import DupFd
from typing import IO, Any

PRELOADED = [
    "limbeck.cli",
    "limbeck.distill.run.distill",
    "limbeck.distill.run.worker",
    "limbeck.export.artifact.complete",
    "limbeck.registry.mlflow.store",
    "mlflow.store.tracking.sqlalchemy_store",
    "transformers.models.llama.modeling_llama",
]


def start_forked(function: Callable[..., object], *args: object) -> BaseProcess:
    """Call a function of a module in a new process."""
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_without_garbage_of_modules, args=(function, args))
    process.start()
    return process


def _without_garbage_of_modules(function: Callable[..., object], args: Sequence[object]) -> None:
    gc.freeze()  # see `pytest_collection_finish` in tests/conftest.py
    function(*args)


class ForkedPython:
    """As `subprocess.Popen(command, text=True, ...)`, of `python -P -m MODULE ARGS`."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        stdin: int | None = None,
        stdout: int | None = None,
        stderr: IO[str] | None = None,
        text: bool = True,
        env: dict[str, str] | None = None,
    ) -> None:
        assert list(command[:3]) == [sys.executable, "-P", "-m"]
        assert text
        pipes = {number: os.pipe() for number, end in ((0, stdin), (1, stdout)) if end == subprocess.PIPE}
        ends = [pipes[0][0] if 0 in pipes else 0, pipes[1][1] if 1 in pipes else 1, stderr.fileno() if stderr else 2]
        environment = dict(os.environ if env is None else env)
        self._process = start_forked(_run_module, list(command[3:]), environment, os.getcwd(), list(map(_Passed, ends)))
        for number, pipe in pipes.items():
            os.close(pipe[number])
        self.stdin = open(pipes[0][1], "w") if 0 in pipes else None  # noqa: SIM115
        self.stdout = open(pipes[1][0]) if 1 in pipes else None  # noqa: SIM115

    def wait(self) -> int:
        self._process.join()
        assert self._process.exitcode is not None
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def communicate(self) -> None:
        """Close the pipes and wait for the end of the process."""
        for file in (self.stdin, self.stdout):
            if file:
                file.close()
        self.wait()


class _Passed:
    """An open file, which the new process has too."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> tuple[Any, ...]:
        return _detach, (DupFd(self.number),)


def _detach(passed: Any) -> int:
    return int(passed.detach())


def _run_module(words: list[str], environment: dict[str, str], folder: str, ends: list[int]) -> None:
    for number, end in enumerate(ends):
        os.dup2(end, number)
        os.close(end)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115  # multiprocessing has replaced it
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    module, *sys.argv[1:] = words
    runpy.run_module(module, run_name="__main__", alter_sys=True)
