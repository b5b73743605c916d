"""Runs `limbeck` in new processes that need not import torch and transformers, see tests/forked_python.py."""

from __future__ import annotations

import os
import socket
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

from tests.forked_python import start_forked


class LimbeckProcess(NamedTuple):
    """A started `limbeck` command."""

    process: BaseProcess
    output: Path
    errors: Path

    def wait(self, timeout: float = 280) -> tuple[int, str, str]:
        """Exit code, negative for a signal, standard output and standard error. Kills the process at the timeout."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        assert self.process.exitcode is not None
        return self.process.exitcode, self.output.read_text(), self.errors.read_text()

    def is_running(self) -> bool:
        return self.process.is_alive()

    def send_signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)


def start_limbeck(home: Path, *args: object, **variables: str) -> LimbeckProcess:
    """Start `limbeck` with its state in `home`, and with these environment variables."""
    folder = home.parent / "process-output"
    folder.mkdir(exist_ok=True)
    name = f"{len(list(folder.iterdir())):03}"
    output, errors = folder / f"{name}.out", folder / f"{name}.err"
    output.touch()
    errors.touch()
    environment = {**os.environ, "LIMBECK_HOME": str(home), "CUDA_VISIBLE_DEVICES": "", **variables}
    words = [str(arg) for arg in args]
    process = start_forked(_run_limbeck, words, environment, home.parent, output, errors)
    return LimbeckProcess(process, output, errors)


def start_ranks(home: Path, *args: object, **variables: str) -> list[LimbeckProcess]:
    """Start two processes of one `limbeck` run with the environment variables that torchrun sets, over gloo."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [start_limbeck(home, *args, **shared, RANK=str(rank), LOCAL_RANK=str(rank), **variables) for rank in (0, 1)]


def _run_limbeck(words: list[str], environment: dict[str, str], folder: Path, output: Path, errors: Path) -> None:
    for path, stream in ((output, sys.stdout), (errors, sys.stderr)):
        with open(path, "w") as file:
            os.dup2(file.fileno(), stream.fileno())
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    from limbeck.cli import main

    main(words)
