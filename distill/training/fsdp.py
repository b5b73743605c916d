"""Shards a student over the processes of a run: torch's fully_shard (FSDP2), as accelerate sets it up.

Each process trains a share of every weight, and holds a whole layer only while that layer runs. A copy of the student
is sharded. The student itself takes the copy's weights whenever it has to generate, be scored or be saved.
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
    """Make an accelerator shard the student, also over CPU processes, which accelerate alone does not do.

    Args:
        bf16: whether the student's matrix products are in bfloat16.
    """
    if accelerator.distributed_type == DistributedType.MULTI_CPU:
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    # The reduction of gradients, the losses and the teacher's outputs stay in float32.
    accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )


class UnshardedStudent:
    """A student that each process can run alone, beside the sharded copy that is trained.

    Args:
        student: receives the trained weights.

    Attributes:
        trained: the model to train: a copy if the launcher shards, else the student itself.
    """

    def __init__(self, student: PreTrainedModel) -> None:
        self.student = student
        self.trained = copy.deepcopy(student) if distributed.uses_fsdp() else student

    @torch.no_grad()
    def gather_weights(self) -> None:
        """Copy the trained weights into the student. All processes must call it together."""
        if self.trained is self.student:
            return
        torch.nn.Module.to(self.student, device())
        own = self.student.state_dict()
        for name, part in self.trained.state_dict().items():  # one whole tensor at a time
            own[name].copy_(part.full_tensor() if isinstance(part, DTensor) else part)

    @contextmanager
    def gathered_student(self) -> Iterator[PreTrainedModel]:
        """Yield the student with the trained weights, on the device. All processes must call it together."""
        self.gather_weights()
        yield self.student
        if self.trained is not self.student:
            torch.nn.Module.to(self.student, "cpu")
