"""Batches of rows through a transformers model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from limbeck.evals.engines.batches import Batch, TokenCounter
from limbeck.evals.engines.probe import SharingProbe

if TYPE_CHECKING:
    import torch
    from transformers import DynamicCache, PreTrainedModel

LOGITS_PER_CHUNK = 2**19  # logits at a time: what a core's cache holds


class TorchForward:
    """A `rows.Forward`: the model's own forward, with what it needs to share prefixes."""

    def __init__(self, model: PreTrainedModel, max_length: int) -> None:
        self.model = model
        self.max_length = max_length
        self.vocab_size = int(model.config.get_text_config().vocab_size)
        self.work = TokenCounter()
        self.max_shared_tokens = SharingProbe(lambda: self).max_shared_tokens
        self._gathers_before_head = self._can_gather()

    def run(self, batch: Batch, trunk: Any = None, keep_trunk: bool = False) -> tuple[np.ndarray, np.ndarray, Any]:
        """See `rows.Forward.run`. A trunk is each layer's keys and values, (1, heads, tokens, width).

        Chains go without mask: what stands on the right of a token cannot change what it gives.
        """
        import torch

        device = self.model.device
        given: dict[str, Any] = {"use_cache": False}
        if batch.mask is not None:
            given["attention_mask"] = additive_mask(batch).to(device)
            given["position_ids"] = torch.from_numpy(batch.depth).to(device)
        if trunk is not None or keep_trunk:
            given |= {"use_cache": True, "past_key_values": (cache := _cache(trunk, len(batch.tokens)))}
        if trunk is not None and batch.mask is None:
            places = torch.arange(batch.start, batch.start + batch.tokens.shape[1], device=device)
            given["position_ids"] = places.expand(len(batch.tokens), -1)
        with torch.inference_mode():
            tokens = torch.from_numpy(batch.tokens).to(device)
            flat, node, token = (
                torch.from_numpy(array).to(device)
                for array in (batch.logit_positions, batch.logit_rows, batch.target_tokens)
            )
            logprobs, likeliest = target_logprobs(self._logits(tokens, flat, given), node, token)
            kept = [(layer.keys, layer.values) for layer in cache.layers] if keep_trunk else None
            return logprobs.cpu().numpy(), likeliest.cpu().numpy(), kept

    def _logits(self, tokens: torch.Tensor, flat: torch.Tensor, given: dict[str, Any]) -> torch.Tensor:
        """(M, V) logits after the tokens at `flat`."""
        if not self._gathers_before_head:
            return self.model(input_ids=tokens, **given).logits.flatten(0, 1)[flat]
        with _gather_before_head(self.model.get_output_embeddings(), flat):
            return self.model(input_ids=tokens, **given).logits[0]

    def _can_gather(self) -> bool:
        """Whether logits of hidden states picked before the head are those picked after it."""
        import torch

        head = self.model.get_output_embeddings()
        if head is None:
            return False
        tokens = torch.arange(1, 7).remainder(self.vocab_size).reshape(2, 3).to(self.model.device)
        flat = torch.tensor([1, 5], device=self.model.device)
        with torch.inference_mode():
            whole = self.model(input_ids=tokens, use_cache=False).logits.flatten(0, 1)[flat]
            try:
                with _gather_before_head(head, flat):
                    picked = self.model(input_ids=tokens, use_cache=False).logits
            except (RuntimeError, IndexError):  # a model that does more with the whole shape
                return False
        return picked.shape == (1, *whole.shape) and bool(torch.allclose(picked[0], whole, rtol=1e-4, atol=1e-4))


def target_logprobs(
    logits: torch.Tensor, logit_rows: torch.Tensor, target_tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(N,) float32 log-probabilities of `target_tokens` in the rows `logit_rows` of (M, V) logits, and whether each
    is the likeliest."""
    import torch

    size = max(1, LOGITS_PER_CHUNK // logits.shape[1])
    logprobs = torch.empty(len(logit_rows), device=logits.device)
    likeliest = torch.zeros(len(logit_rows), dtype=torch.bool, device=logits.device)
    order = logit_rows.argsort()
    borders = torch.searchsorted(
        logit_rows[order], torch.arange(0, len(logits) + size, size, device=logit_rows.device)
    ).tolist()
    for number, piece in enumerate(logits.split(size)):
        chosen = order[borders[number] : borders[number + 1]]
        rows, tokens = logit_rows[chosen] - number * size, target_tokens[chosen]
        piece = piece.float()
        top = piece.amax(-1)
        given = piece[rows, tokens]
        logprobs[chosen] = given - (top + (piece - top[:, None]).exp_().sum(-1).log())[rows]
        # The place of the greatest takes longer than the greatest: only where it may be this token's.
        if len(hits := (given == top[rows]).nonzero()[:, 0]):
            likeliest[chosen[hits]] = piece[rows[hits]].argmax(-1) == tokens[hits]
    return logprobs, likeliest


def additive_mask(batch: Batch) -> torch.Tensor:
    """(B, 1, T, start + T) float32: 0 where a token attends, the least number elsewhere."""
    import torch

    assert batch.mask is not None
    count, width, _ = batch.mask.shape
    mask = torch.zeros(count, 1, width, batch.start + width)
    mask[..., batch.start :].masked_fill_(~torch.from_numpy(batch.mask)[:, None], torch.finfo(torch.float32).min)
    return mask


def _cache(trunk: Any, count: int) -> DynamicCache:
    """A cache that holds the trunk for each of `count` rows."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for number, (keys, values) in enumerate(trunk or ()):
        cache.update(keys, values, number)
    for layer in cache.layers:  # views: what the rows add makes a copy of its own
        if layer.keys is not None and layer.values is not None:
            layer.keys, layer.values = (part.expand(count, -1, -1, -1) for part in (layer.keys, layer.values))
    return cache


@contextmanager
def _gather_before_head(head: torch.nn.Module, flat: torch.Tensor) -> Iterator[None]:
    """The model's head sees the (1, M, H) hidden states at `flat`; what follows it stays the model's own."""
    hook = head.register_forward_pre_hook(lambda _, args: (args[0].flatten(0, 1)[flat][None], *args[1:]))
    try:
        yield
    finally:
        hook.remove()
