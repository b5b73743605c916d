"""From hidden states to the loss in chunks of tokens: the logits of a whole batch are never there at once.

At a vocabulary of 128k, logits and their gradient are most of the memory of training a small student. Here a chunk's
logits, its loss and its gradient by the logits are worked out together in the forward pass, and only gradients by the
hidden states and the head's weight are kept for the backward pass, which scales them.
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

LOGITS_CHUNK_BYTES = 2**26  # of float32 logits at a time


class LazyLogits(NamedTuple):
    """Logits (N, V) that are not worked out yet.

    Attributes:
        hidden: (N, d) hidden states before the head; where `weight` is None, the logits themselves.
        weight: (W, d) of the head.
        bias: (W,) of the head.
        vocab_size: V <= W: entries beyond it are left out; None leaves out none.
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
        """Without gradients, and in the type that autocast multiplies matrices in here."""
        if self.weight is None:
            return self._replace(hidden=self.hidden.detach())
        kind = self.hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.weight.dtype
        hidden, weight = self.hidden.detach().to(dtype), self.weight.detach().to(dtype)
        return LazyLogits(hidden, weight, None if self.bias is None else self.bias.detach().to(dtype), self.vocab_size)

    def compute_rows(self, rows: slice) -> torch.Tensor:
        """The logits of some rows (n, V)."""
        if self.weight is None:
            return self.hidden[rows, : self.vocab_size]
        bias = None if self.bias is None else self.bias[: self.vocab_size]
        return F.linear(self.hidden[rows], self.weight[: self.vocab_size], bias)


class BatchOutput(NamedTuple):
    """What a model made of a batch: logits at the positions asked for, and all hidden states (B, T, d) if wanted,
    those of the embeddings first."""

    logits: LazyLogits
    states: tuple[torch.Tensor, ...] | None


class Body(NamedTuple):
    """A model, and its head where that is a plain linear layer over what the body below it gives."""

    model: PreTrainedModel
    head: torch.nn.Linear | None

    @classmethod
    def from_model(cls, model: PreTrainedModel) -> Body:
        """Finds out by a small run what the model does beyond body and head: scaled or capped logits, say. Such a
        model, or one whose head is wrapped, gives its own logits, which costs memory only."""
        return cls(model, _plain_head(model))

    def run(self, inputs: Mapping[str, Any], rows: torch.Tensor, states: bool = False) -> BatchOutput:
        """Run over `inputs`; logits at the places of `rows` (B, T - 1) bool, N of them; the last token gives none."""
        given = {**inputs, "use_cache": False, **({"output_hidden_states": True} if states else {})}
        # Sharded, a weight is whole only while its own unit runs; of FSDP's units the outermost runs now.
        if self.head is None or isinstance(self.head.weight, DTensor) or self.head.weight.ndim != 2:
            out = self.model(**given)
            return BatchOutput(LazyLogits(out.logits[:, :-1][rows]), out.hidden_states if states else None)
        out = _without_head(self.model)(**given)
        hidden = out.last_hidden_state[:, :-1][rows]
        return BatchOutput(LazyLogits(hidden, self.head.weight, self.head.bias), out.hidden_states if states else None)


def _without_head(model: Any) -> torch.nn.Module:
    """The model without its head."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # within peft's wrapper
    return inner.base_model


@torch.no_grad()
def _plain_head(model: PreTrainedModel) -> torch.nn.Linear | None:
    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear or _without_head(model) is model:
        return None
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    ids = torch.arange(1, 9, device=head.weight.device)[None] % head.weight.shape[0]
    training, hook = model.training, head.register_forward_hook(lambda _, given, made: seen.append((given[0], made)))
    try:
        model.eval()
        logits = model(input_ids=ids, use_cache=False).logits
        hidden = _without_head(model)(input_ids=ids, use_cache=False).last_hidden_state
    finally:
        hook.remove()
        model.train(training)
    if len(seen) != 1 or seen[0][0].shape != hidden.shape:
        return None
    given, made = seen[0]
    # To the last bit: a cap hardly shows in the small logits of a fresh model.
    same = torch.equal(made.float(), logits.float())
    return head if same and torch.allclose(given, hidden, rtol=1e-3, atol=1e-3 * float(hidden.abs().max())) else None


def loss(
    student: LazyLogits,
    labels: torch.Tensor,
    objective: Objective,
    teacher: LazyLogits | divergences.StoredDistribution | None,
    counts_agreement: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`objectives.loss` of logits that are never there at once: its sum over tokens, in nats.

    Args:
        labels: (N,) int64.
        teacher: its logits or a stored form (N, ...).
        counts_agreement: count agreement, which takes another pass over the logits.

    Returns:
        The loss, a scalar; and on how many tokens both find the same one likeliest, 0 if that is not measured.
    """
    agreed = torch.zeros((), dtype=torch.int64, device=labels.device)
    if objective.divergence is None and not counts_agreement:
        teacher = None
    said_by = teacher.detached() if isinstance(teacher, LazyLogits) else teacher

    def of_chunk(logits: torch.Tensor, rows: slice) -> torch.Tensor:
        said: divergences.TeacherDistribution | None = None
        if isinstance(said_by, LazyLogits):
            said = said_by.compute_rows(rows)
        elif said_by is not None:
            said = type(said_by)(*(part[rows] for part in said_by))
        if counts_agreement and said is not None:
            agreed.add_((logits.detach().argmax(-1) == divergences.likeliest(said)).sum())
        return divergences.loss(logits, labels[rows], objective, said)

    return sum_over_chunks(student, of_chunk), agreed


@torch.compiler.disable
def sum_over_chunks(student: LazyLogits, chunk_function: Callable[[torch.Tensor, slice], torch.Tensor]) -> torch.Tensor:
    """The sum over chunks of a function of a chunk's logits (n, V) and of which rows they are."""
    if not torch.is_grad_enabled():
        student = student.detached()
    return _InChunks.apply(student.hidden, student.weight, student.bias, chunk_function)


class _InChunks(torch.autograd.Function):
    """The sum of a function of logits, chunk by chunk, with its gradients by hidden states, weight and bias."""

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
        # Sums over chunks are kept in float32 at least.
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
                    [by_logits] = torch.autograd.grad(part, logits)
                    _add_gradients(gradients, student, rows, by_logits)
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # In place: autograd refuses to hand out what was changed, should the gradient be asked for again.
        return (*(None if part is None else part.mul_(scale) for part in ctx.saved_tensors), None)


def _add_gradients(
    gradients: list[torch.Tensor | None], student: LazyLogits, rows: slice, by_logits: torch.Tensor
) -> None:
    """Put in what a chunk's gradient by its logits (n, V) gives for hidden states (N, d), weight (V, d), bias (V)."""
    by_hidden, by_weight, by_bias = gradients
    if by_hidden is not None:
        by_hidden[rows] = by_logits if student.weight is None else by_logits @ student.weight
    if by_weight is not None:
        if by_logits.dtype == by_weight.dtype:
            by_weight.addmm_(by_logits.T, student.hidden[rows])
        else:
            by_weight += by_logits.T @ student.hidden[rows]
    if by_bias is not None:
        by_bias += by_logits.sum(0)
