"""A student sharded over the processes of a run: torch's fully_shard (FSDP2), as accelerate sets it up.

Each process trains a share of every weight, and holds a layer whole only while that layer runs. What is sharded is a
copy of the student; the student itself takes the copy's weights whenever it has to run by itself or to be saved.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from limbeck.distill.models.loading import device
from limbeck.distill.training import distributed


def turn_on(accelerator: Accelerator, bf16: bool) -> None:
    """Have an accelerator shard, with the student's products in bfloat16 or not.

    By itself accelerate shards over GPUs and their like alone, and would let CPU processes each hold the student.
    """
    if accelerator.distributed_type == DistributedType.MULTI_CPU:
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    # Gradients are added up, and losses and what a teacher said stay, in float32.
    accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )


class UnshardedStudent:
    """The student that each process can run by itself, beside the one that is trained.

    Args:
        student: what comes of the training; where no launcher shards, it is also what is trained.
    """

    def __init__(self, student: PreTrainedModel) -> None:
        self.student = student
        self.trained = copy.deepcopy(student) if distributed.uses_fsdp() else student

    @torch.no_grad()
    def gather_weights(self) -> None:
        """Bring the student up to date; of all processes at once."""
        if self.trained is self.student:
            return
        torch.nn.Module.to(self.student, device())
        own = self.student.state_dict()
        for name, part in self.trained.state_dict().items():  # one whole tensor at a time
            own[name].copy_(part.full_tensor() if isinstance(part, DTensor) else part)

    @contextmanager
    def gathered_student(self) -> Iterator[PreTrainedModel]:
        """Within, the student is up to date and in the device's memory; of all processes at once."""
        self.gather_weights()
        yield self.student
        if self.trained is not self.student:
            torch.nn.Module.to(self.student, "cpu")
