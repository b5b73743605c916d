"""Detects a run that diverged: values that are not finite, a loss that rises and stays high, and where it began."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from limbeck.distill.losses.distiller import Distiller

MIN_RISE = 1.0  # nats above its best that count as a rise; or half of what the loss fell by, if that is more


def is_finite(model: torch.nn.Module, loss: torch.Tensor) -> torch.Tensor:
    """Whether the loss and the norm of all gradients are finite: a bool tensor on the device, without a sync."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    if not gradients:  # DeepSpeed stores gradients elsewhere
        return loss.isfinite()
    norm = torch.nn.utils.get_total_norm(gradients)
    return loss.isfinite() & (norm.full_tensor() if isinstance(norm, DTensor) else norm).isfinite()


def describe_loss_rise(losses: Sequence[float], logging_steps: int) -> str | None:
    """Say how the loss rose far above its best and stayed there; None if it did not.

    Compares medians over 20 steps, and at least 5 losses, so that one bad batch does not stop a run.

    Args:
        losses: all logged losses, each a mean over `logging_steps`.
    """
    window = max(5, math.ceil(20 / logging_steps))
    if len(losses) < 2 * window:
        return None
    medians = [statistics.median(losses[end - window : end]) for end in range(window, len(losses) + 1)]
    best, now = min(medians), medians[-1]
    if now <= best + max(MIN_RISE, (medians[0] - best) / 2):
        return None
    return f"the loss rose from {best:.3f} to {now:.3f} and stayed there for {window * logging_steps} steps"


def find_cause(distiller: Distiller, batches: Sequence[Mapping[str, Any]], bf16: bool) -> str:
    """Say where the first value that is not finite comes from: runs the step's batches again, dropping its gradients.

    Args:
        batches: all batches of the step.
        bf16: whether the step ran under autocast.
    """
    for name, parameter in distiller.named_parameters():
        if not parameter.isfinite().all():
            return f"the weights {name} are not finite"
    for batch in batches:
        for name, array in batch.get("teacher", {}).items():
            if array.is_floating_point() and not array.isfinite().all():
                return f"the stored teacher output {name} is not finite"
        distiller.zero_grad(set_to_none=True)
        if description := _first_in_forward(distiller, batch, bf16):
            return description
        for name, parameter in distiller.named_parameters():
            if parameter.grad is not None and not parameter.grad.isfinite().all():
                return f"the loss is finite, but the gradient of {name} is not"
    return "each gradient is finite, but their norm is not, or those of another process are not"


def _first_in_forward(distiller: Distiller, batch: Mapping[str, Any], bf16: bool) -> str | None:
    """Name the first module whose output is not finite, or the loss; None if all are. Leaves gradients behind."""
    names: list[str] = []

    def record_if_not_finite(name: str) -> Any:
        def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if torch.is_tensor(first) and not first.isfinite().all():
                names.append(name)

        return hook

    hooks = [
        module.register_forward_hook(record_if_not_finite(name)) for name, module in distiller.named_modules() if name
    ]
    try:
        device = batch["labels"].device.type
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss = distiller(batch, 1).loss
        if names:
            return f"the first values that are not finite come out of {names[0]}"
        if not loss.isfinite():
            return f"the output of every layer is finite, but the loss is {float(loss)}"
        loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
    return None
