"""Computes logits and loss in chunks of tokens, so that the logits of a whole batch never exist at once.

At a vocabulary of 128k, logits and their gradient take most of the memory of training a small student. The forward
pass computes each chunk's logits, its loss and its gradient together. It keeps only the gradients by the hidden
states and by the head's weight; the backward pass scales them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from limbeck.distill.losses import divergences
from limbeck.distill.recipe.schema import Objective

LOGITS_CHUNK_BYTES = 2**26  # float32 logits of one chunk


class LazyLogits(NamedTuple):
    """Logits (N, V) that are not computed yet.

    Attributes:
        hidden: (N, d) hidden states before the head; if `weight` is None, the logits themselves.
        weight: (W, d) of the head.
        bias: (W,) of the head.
        vocab_size: V <= W: entries beyond it are dropped; None drops none.
    """

    hidden: torch.Tensor
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    vocab_size: int | None = None

    @property
    def width(self) -> int:
        """V."""
        whole = len(self.weight) if self.weight is not None else self.hidden.shape[-1]
        return min(whole, self.vocab_size or whole)

    def detached(self) -> LazyLogits:
        """A copy without gradients, in the dtype of autocast's matrix products if autocast is on."""
        if self.weight is None:
            return self._replace(hidden=self.hidden.detach())
        device = self.hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.weight.dtype
        hidden, weight = self.hidden.detach().to(dtype), self.weight.detach().to(dtype)
        return LazyLogits(hidden, weight, None if self.bias is None else self.bias.detach().to(dtype), self.vocab_size)

    def compute_rows(self, rows: slice) -> torch.Tensor:
        """The logits of these rows (n, V)."""
        if self.weight is None:
            return self.hidden[rows, : self.vocab_size]
        bias = None if self.bias is None else self.bias[: self.vocab_size]
        return F.linear(self.hidden[rows], self.weight[: self.vocab_size], bias)


class BatchOutput(NamedTuple):
    """A model's output for a batch.

    Attributes:
        logits: at the requested positions.
        states: hidden states (B, T, d) after the embeddings and after each layer; None if not requested.
    """

    logits: LazyLogits
    states: tuple[torch.Tensor, ...] | None


class SplitModel(NamedTuple):
    """A model, and its head if the head can run apart from the layers below it.

    Attributes:
        head: None if the logits are more than a plain linear layer over the last hidden state.
    """

    model: PreTrainedModel
    head: torch.nn.Linear | None

    @classmethod
    def from_model(cls, model: PreTrainedModel) -> SplitModel:
        """Find out by a short run whether the head can run apart.

        It cannot if the model scales or caps its logits, or if the head is wrapped. Such a model computes its own
        logits, which costs memory and nothing else.
        """
        return cls(model, _plain_head(model))

    def run(self, inputs: Mapping[str, Any], rows: torch.Tensor, states: bool = False) -> BatchOutput:
        """Run the model over a batch.

        Args:
            inputs: of the model.
            rows: (B, T - 1) bool, true at the N positions whose logits are needed; the last token has none.
            states: return hidden states too.
        """
        arguments = {**inputs, "use_cache": False, **({"output_hidden_states": True} if states else {})}
        # A sharded weight is whole only while its own FSDP unit runs, and only the outermost unit runs here.
        if self.head is None or isinstance(self.head.weight, DTensor) or self.head.weight.ndim != 2:
            out = self.model(**arguments)
            return BatchOutput(LazyLogits(out.logits[:, :-1][rows]), out.hidden_states if states else None)
        out = _without_head(self.model)(**arguments)
        hidden = out.last_hidden_state[:, :-1][rows]
        return BatchOutput(LazyLogits(hidden, self.head.weight, self.head.bias), out.hidden_states if states else None)


def _without_head(model: Any) -> torch.nn.Module:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # peft wraps the model
    return inner.base_model


@torch.no_grad()
def _plain_head(model: PreTrainedModel) -> torch.nn.Linear | None:
    """The head if the model's logits are exactly the head applied to its last hidden state, else None."""
    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear or _without_head(model) is model:
        return None
    head_calls: list[tuple[torch.Tensor, torch.Tensor]] = []
    ids = torch.arange(1, 9, device=head.weight.device)[None] % head.weight.shape[0]
    training = model.training
    hook = head.register_forward_hook(lambda _, inputs, output: head_calls.append((inputs[0], output)))
    try:
        model.eval()
        logits = model(input_ids=ids, use_cache=False).logits
        hidden = _without_head(model)(input_ids=ids, use_cache=False).last_hidden_state
    finally:
        hook.remove()
        model.train(training)
    if len(head_calls) != 1 or head_calls[0][0].shape != hidden.shape:
        return None
    head_input, head_output = head_calls[0]
    # Compared to the last bit: a cap hardly changes the small logits of a fresh model.
    if not torch.equal(head_output.float(), logits.float()):
        return None
    is_last_state = torch.allclose(head_input, hidden, rtol=1e-3, atol=1e-3 * float(hidden.abs().max()))
    return head if is_last_state else None


def loss(
    student: LazyLogits,
    labels: torch.Tensor,
    objective: Objective,
    teacher: LazyLogits | divergences.StoredDistribution | None,
    counts_agreement: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`divergences.loss` computed in chunks of tokens: its sum over tokens, in nats.

    Args:
        labels: (N,) int64.
        teacher: its logits or a stored form (N, ...); None for labels alone.
        counts_agreement: count agreement, which takes another pass over the logits.

    Returns:
        The loss, a scalar; and the number of tokens at which student and teacher have the same most likely token,
        an int64 scalar, 0 if it is not counted.
    """
    agreed = torch.zeros((), dtype=torch.int64, device=labels.device)
    if objective.divergence is None and not counts_agreement:
        teacher = None
    if isinstance(teacher, LazyLogits):
        teacher = teacher.detached()

    def chunk_loss(logits: torch.Tensor, rows: slice) -> torch.Tensor:
        teacher_rows = _teacher_rows(teacher, rows)
        if counts_agreement and teacher_rows is not None:
            agreed.add_((logits.detach().argmax(-1) == divergences.likeliest(teacher_rows)).sum())
        return divergences.loss(logits, labels[rows], objective, teacher_rows)

    return sum_over_chunks(student, chunk_loss), agreed


def _teacher_rows(
    teacher: LazyLogits | divergences.StoredDistribution | None, rows: slice
) -> divergences.TeacherDistribution | None:
    if isinstance(teacher, LazyLogits):
        return teacher.compute_rows(rows)
    return None if teacher is None else type(teacher)(*(part[rows] for part in teacher))


@torch.compiler.disable
def sum_over_chunks(student: LazyLogits, chunk_function: Callable[[torch.Tensor, slice], torch.Tensor]) -> torch.Tensor:
    """Sum `chunk_function(logits, rows)` over chunks: logits (n, V) of one chunk, and its rows among the N."""
    if not torch.is_grad_enabled():
        student = student.detached()
    return _InChunks.apply(student.hidden, student.weight, student.bias, chunk_function)


class _InChunks(torch.autograd.Function):
    """The sum of a function of each chunk's logits, with its gradients by hidden states, weight and bias."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        chunk_function: Callable[[torch.Tensor, slice], torch.Tensor],
    ) -> torch.Tensor:
        student = LazyLogits(hidden, weight, bias)
        chunk = max(1, LOGITS_CHUNK_BYTES // 4 // student.width)
        student = student.detached()
        # Sums over chunks need at least float32.
        gradients = [
            torch.zeros_like(part, dtype=torch.promote_types(part.dtype, torch.float32))
            if part is not None and part.requires_grad
            else None
            for part in (hidden, weight, bias)
        ]
        learns = any(ctx.needs_input_grad)
        total = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), chunk):
                rows = slice(start, start + chunk)
                logits = student.compute_rows(rows).requires_grad_(learns)
                with torch.set_grad_enabled(learns):
                    part = chunk_function(logits, rows)
                total += part.detach()
                if learns:
                    [logits_gradient] = torch.autograd.grad(part, logits)
                    _add_gradients(gradients, student, rows, logits_gradient)
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # In place to save memory: autograd raises if the gradient is requested again.
        return (*(None if part is None else part.mul_(scale) for part in ctx.saved_tensors), None)


def _add_gradients(
    gradients: list[torch.Tensor | None], student: LazyLogits, rows: slice, logits_gradient: torch.Tensor
) -> None:
    """Add a chunk's share to the gradients by hidden states (N, d), weight (V, d) and bias (V,), in place.

    Args:
        logits_gradient: (n, V), by the chunk's logits.
    """
    hidden, weight, bias = gradients
    if hidden is not None:
        hidden[rows] = logits_gradient if student.weight is None else logits_gradient @ student.weight
    if weight is not None:
        if logits_gradient.dtype == weight.dtype:
            weight.addmm_(logits_gradient.T, student.hidden[rows])
        else:
            weight += logits_gradient.T @ student.hidden[rows]
    if bias is not None:
        bias += logits_gradient.sum(0)
