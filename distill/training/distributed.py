"""Several processes of one run, started by `torchrun` or `accelerate launch`: the main process leads the workers.

The main process does everything that is done once: text, teacher cache, logging, checkpoints, registration. It sends
the workers (`limbeck.distill.run.worker`) each student to train; they wait as long as it takes.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from limbeck.distill.models.loading import device
from limbeck.registry.core.errors import BadInput
from limbeck.registry.core.machine import keep_freed_memory, physical_cores

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

FSDP_COMMAND = "accelerate launch --use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP"


def world_size() -> int:
    """The number of processes of this run; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Whether this is the main process, or the only one."""
    return rank() == 0


def uses_fsdp() -> bool:
    """Whether the launcher requests FSDP: a student sharded over the processes."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and "LOCAL_RANK" in os.environ


def check() -> None:
    """Raise BadInput if the launcher requests FSDP 1."""
    if uses_fsdp() and os.environ.get("FSDP_VERSION", "1") != "2":
        raise BadInput(
            "the launcher requests FSDP 1, which cannot gather the student to score and save it",
            fix=f"use FSDP 2: {FSDP_COMMAND}",
        )


def set_up() -> None:
    """Configure this process: torch threads, memory allocation and FSDP.

    Without OMP_NUM_THREADS, torch gets one thread for each physical core of this process's share of the machine.
    """
    import torch

    keep_freed_memory()
    # Every process loads whole models, the teacher too, and checkpoints are whole for any number of processes.
    os.environ |= {"FSDP_CPU_RAM_EFFICIENT_LOADING": "false", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
    if "OMP_NUM_THREADS" not in os.environ:
        local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size())))
        torch.set_num_threads(max(1, physical_cores() // local_processes))


def broadcast_to_workers(value: Any) -> None:
    """Send a JSON value from the main process to all workers; does nothing without workers."""
    if world_size() > 1:
        _broadcast_json(value)


def receive_from_main() -> Any:
    """Receive, in a worker, the next value that the main process sends; waits without a time limit."""
    return _broadcast_json(None)


def broadcast_numbers(numbers: list[float]) -> list[float]:
    """The main process's numbers, in every process."""
    import torch
    import torch.distributed as dist

    if world_size() == 1:
        return numbers
    shared = torch.tensor(numbers, dtype=torch.float64)
    dist.broadcast(shared, 0, group=_gloo_group())
    return shared.tolist()


@contextmanager
def lead_workers() -> Iterator[None]:
    """Lead the workers within this context, and send them None to stop at its end.

    After an error in collective work the workers cannot be reached: the launcher ends them when this process ends.
    """
    try:
        yield
    finally:
        if not _in_collective_work:
            broadcast_to_workers(None)


_in_collective_work: list[bool] = []


@contextmanager
def collective_work() -> Iterator[None]:
    """Mark work that all processes do together, such as the training of a student."""
    _in_collective_work.append(True)
    yield
    _in_collective_work.pop()  # not after an error: the workers are still in it


def _broadcast_json(value: Any) -> Any:
    """The main process's value, in every process."""
    import torch
    import torch.distributed as dist

    text = json.dumps(value).encode()
    size = torch.tensor([len(text)])
    dist.broadcast(size, 0, group=_gloo_group())
    data = (
        torch.frombuffer(bytearray(text), dtype=torch.uint8) if is_main() else torch.empty(int(size), dtype=torch.uint8)
    )
    dist.broadcast(data, 0, group=_gloo_group())
    return json.loads(bytes(data.tolist()))


@functools.cache
def _gloo_group() -> ProcessGroup:
    """A group of all processes without a practical timeout: a teacher's pass can take days."""
    import torch.distributed as dist
    from accelerate import PartialState

    PartialState(cpu=device() == "cpu")  # joins the processes for every kind of launcher
    return dist.new_group(backend="gloo", timeout=timedelta(days=365))
