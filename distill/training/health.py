"""When a run went wrong: numbers that are no longer finite, a loss that rises and stays, and where it began."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from limbeck.distill.losses.distiller import Distiller

RISE = 1.0  # nats that a loss may rise above its best, or half of what it had come down by, if that is more


def finite(model: torch.nn.Module, loss: torch.Tensor) -> torch.Tensor:
    """Whether the loss and the norm of all gradients are finite: a bool tensor on the device, nothing waited for."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    if not gradients:  # DeepSpeed keeps them elsewhere
        return loss.isfinite()
    norm = torch.nn.utils.get_total_norm(gradients)
    return loss.isfinite() & (norm.full_tensor() if isinstance(norm, DTensor) else norm).isfinite()


def describe_loss_rise(losses: Sequence[float], logging_steps: int) -> str | None:
    """Whether the loss rose far above its best and stayed there, in words; None where it did not.

    Medians over the last 20 steps (and 5 losses at least) are compared, so that one bad batch stops nothing.

    Args:
        losses: all that were logged, means over `logging_steps`.
    """
    window = max(5, math.ceil(20 / logging_steps))
    if len(losses) < 2 * window:
        return None
    medians = [statistics.median(losses[end - window : end]) for end in range(window, len(losses) + 1)]
    best, now = min(medians), medians[-1]
    if now <= best + max(RISE, (medians[0] - best) / 2):
        return None
    return f"the loss rose from {best:.3f} to {now:.3f} and stayed there for {window * logging_steps} steps"


def cause(distiller: Distiller, batches: Sequence[Mapping[str, Any]], bf16: bool) -> str:
    """Where the first number that is not finite comes from: the batches of the step are run once more.

    Args:
        batches: as the step saw them, and its gradients are lost.
        bf16: whether the step ran under autocast.
    """
    for name, parameter in distiller.named_parameters():
        if not parameter.isfinite().all():
            return f"the weights {name} are not finite"
    for batch in batches:
        for name, array in batch.get("teacher", {}).items():
            if array.is_floating_point() and not array.isfinite().all():
                return f"what the teacher said ({name}) is not finite"
        distiller.zero_grad(set_to_none=True)
        if found := _first_in_forward(distiller, batch, bf16):
            return found
        for name, parameter in distiller.named_parameters():
            if parameter.grad is not None and not parameter.grad.isfinite().all():
                return f"the loss is finite and the gradient of {name} is not"
    return "each gradient is finite and their norm is not, or another process's are not"


def _first_in_forward(distiller: Distiller, batch: Mapping[str, Any], bf16: bool) -> str | None:
    """The first module whose output is not finite, or the loss itself; gradients are left behind."""
    found: list[str] = []

    def look(name: str) -> Any:
        def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if torch.is_tensor(first) and not first.isfinite().all():
                found.append(name)

        return hook

    hooks = [module.register_forward_hook(look(name)) for name, module in distiller.named_modules() if name]
    try:
        device = batch["labels"].device.type
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss = distiller(batch, 1).loss
        if found:
            return f"the first values that are not finite come out of {found[0]}"
        if not loss.isfinite():
            return f"all layers give finite values and the loss is {float(loss)}"
        loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
    return None
