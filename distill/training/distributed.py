"""Several processes of one run, as `torchrun` and `accelerate launch` start them: the first leads, the others follow.

The first does all that is done once: text, capture, logging, checkpoints, registration. What is to be trained it
tells the others (`follow.py`), which wait as long as it takes.
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
    """The processes of this run; 1 where no launcher started it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's number among them, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Whether this is the process that leads, or the only one."""
    return rank() == 0


def uses_fsdp() -> bool:
    """Whether the launcher asks that the student be sharded over the processes (FSDP)."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and "LOCAL_RANK" in os.environ


def check() -> None:
    """Raises BadInput where the launcher asks for FSDP in its first version."""
    if uses_fsdp() and os.environ.get("FSDP_VERSION", "1") != "2":
        raise BadInput(
            "the launcher asks for FSDP 1, from which the student cannot be gathered to be scored and saved",
            fix=f"use FSDP 2: {FSDP_COMMAND}",
        )


def set_up() -> None:
    """One torch thread for each physical core that is this process's share, where OMP_NUM_THREADS does not say
    otherwise; and memory that is kept."""
    import torch

    keep_freed_memory()
    # Of FSDP: models are whole in every process, a teacher too; and so are checkpoints, for any number of processes.
    os.environ |= {"FSDP_CPU_RAM_EFFICIENT_LOADING": "false", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
    if "OMP_NUM_THREADS" not in os.environ:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size())))
        torch.set_num_threads(max(1, physical_cores() // here))


def broadcast_to_workers(value: Any) -> None:
    """Tell the other processes a value that JSON holds; nothing where there is only one. Of the first process."""
    if world_size() > 1:
        _pass_on(value)


def receive_from_main() -> Any:
    """What the first process tells next, however long it takes. Of the others."""
    return _pass_on(None)


def broadcast_numbers(numbers: list[float]) -> list[float]:
    """The first process's numbers, in every process."""
    import torch
    import torch.distributed as dist

    if world_size() == 1:
        return numbers
    shared = torch.tensor(numbers, dtype=torch.float64)
    dist.broadcast(shared, 0, group=_gloo_group())
    return shared.tolist()


@contextmanager
def lead_workers() -> Iterator[None]:
    """Within, the first process tells the others what to do; at the end it lets them go.

    After an error amid a training they cannot be reached: the launcher ends them when this process ends.
    """
    try:
        yield
    finally:
        if not _in_collective_work:
            broadcast_to_workers(None)


_in_collective_work: list[bool] = []


@contextmanager
def collective_work() -> Iterator[None]:
    """Within, all processes are at the same work."""
    _in_collective_work.append(True)
    yield
    _in_collective_work.pop()  # after an error it stays


def _pass_on(value: Any) -> Any:
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
    """A group of all processes whose waiting is not cut short: a teacher's pass can take days."""
    import torch.distributed as dist
    from accelerate import PartialState

    PartialState(cpu=device() == "cpu")  # it knows the launchers' ways
    return dist.new_group(backend="gloo", timeout=timedelta(days=365))
