"""Runs batches of rows through a transformers model."""

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

LOGITS_PER_CHUNK = 2**19  # fits in a core's cache


class TorchForward:
    """The `batches.Forward` of a transformers model: its own forward, with the masks and caches that sharing needs."""

    def __init__(self, model: PreTrainedModel, max_length: int) -> None:
        self.model = model
        self.max_length = max_length
        self.vocab_size = int(model.config.get_text_config().vocab_size)
        self.work = TokenCounter()
        self._probe = SharingProbe(lambda: self)
        self._has_recurrent_state = has_recurrent_state(model)
        self._gathers_before_head = self._can_gather()

    def max_shared_tokens(self, tokens: int) -> int:
        """See `batches.Forward.max_shared_tokens`."""
        return 0 if self._has_recurrent_state else self._probe.max_shared_tokens(tokens)

    def run(self, batch: Batch, trunk: Any = None, keep_trunk: bool = False) -> tuple[np.ndarray, np.ndarray, Any]:
        """See `batches.Forward.run`. A trunk is each layer's (keys, values), of shape (1, heads, tokens, width).

        Chains need no mask: padding is on the right, and attention is causal.
        """
        import torch

        device = self.model.device
        arguments: dict[str, Any] = {"use_cache": False}
        cache = None
        if batch.mask is not None:
            arguments["attention_mask"] = additive_mask(batch).to(device)
            arguments["position_ids"] = torch.from_numpy(batch.depth).to(device)
        if trunk is not None or keep_trunk:
            cache = _cache(trunk, len(batch.tokens))
            arguments |= {"use_cache": True, "cache": cache}
        if trunk is not None and batch.mask is None:
            positions = torch.arange(batch.start, batch.start + batch.tokens.shape[1], device=device)
            arguments["position_ids"] = positions.expand(len(batch.tokens), -1)
        with torch.inference_mode():
            tokens = torch.from_numpy(batch.tokens).to(device)
            positions, rows, targets = (
                torch.from_numpy(array).to(device)
                for array in (batch.logit_positions, batch.logit_rows, batch.target_tokens)
            )
            logprobs, likeliest = target_logprobs(self._logits(tokens, positions, arguments), rows, targets)
            kept = _keys_and_values(cache) if cache is not None and keep_trunk else None
            return logprobs.cpu().numpy(), likeliest.cpu().numpy(), kept

    def _logits(self, tokens: torch.Tensor, positions: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
        """(M, V) logits at (M,) `positions` in the flattened (B, T) `tokens`."""
        if not self._gathers_before_head:
            return self.model(input_ids=tokens, **arguments).logits.flatten(0, 1)[positions]
        with _gather_before_head(self.model.get_output_embeddings(), positions):
            return self.model(input_ids=tokens, **arguments).logits[0]

    def _can_gather(self) -> bool:
        """Whether gathering hidden states before the head gives the logits gathered after it."""
        import torch

        head = self.model.get_output_embeddings()
        if head is None:
            return False
        tokens = torch.arange(1, 7).remainder(self.vocab_size).reshape(2, 3).to(self.model.device)
        positions = torch.tensor([1, 5], device=self.model.device)
        with torch.inference_mode():
            after = self.model(input_ids=tokens, use_cache=False).logits.flatten(0, 1)[positions]
            try:
                with _gather_before_head(head, positions):
                    before = self.model(input_ids=tokens, use_cache=False).logits
            except (RuntimeError, IndexError):  # the model uses the full shape after its head
                return False
        return before.shape == (1, *after.shape) and bool(torch.allclose(before[0], after, rtol=1e-4, atol=1e-4))


def target_logprobs(
    logits: torch.Tensor, logit_rows: torch.Tensor, target_tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of target tokens.

    Args:
        logits: (M, V).
        logit_rows: (N,) int64, indices of rows of `logits`.
        target_tokens: (N,) int64.

    Returns:
        (N,) float32 log-probabilities; (N,) bool, whether each is the likeliest token, the first of equal ones.
    """
    import torch

    size = max(1, LOGITS_PER_CHUNK // logits.shape[1])
    logprobs = torch.empty(len(logit_rows), device=logits.device)
    likeliest = torch.zeros(len(logit_rows), dtype=torch.bool, device=logits.device)
    order = logit_rows.argsort()
    borders = torch.searchsorted(
        logit_rows[order], torch.arange(0, len(logits) + size, size, device=logit_rows.device)
    ).tolist()
    for number, chunk in enumerate(logits.split(size)):
        chosen = order[borders[number] : borders[number + 1]]
        rows, tokens = logit_rows[chosen] - number * size, target_tokens[chosen]
        chunk = chunk.float()
        top = chunk.amax(-1)
        target_logits = chunk[rows, tokens]
        logprobs[chosen] = target_logits - (top + (chunk - top[:, None]).exp_().sum(-1).log())[rows]
        # argmax is slower than amax: only for rows in which the target may be the likeliest.
        hits = (target_logits == top[rows]).nonzero()[:, 0]
        if len(hits):
            likeliest[chosen[hits]] = chunk[rows[hits]].argmax(-1) == tokens[hits]
    return logprobs, likeliest


def additive_mask(batch: Batch) -> torch.Tensor:
    """(B, 1, T, start + T) float32: 0 where a token attends, the smallest float32 elsewhere."""
    import torch

    assert batch.mask is not None
    count, width, _ = batch.mask.shape
    mask = torch.zeros(count, 1, width, batch.start + width)
    mask[..., batch.start :].masked_fill_(~torch.from_numpy(batch.mask)[:, None], torch.finfo(torch.float32).min)
    return mask


def has_recurrent_state(model: PreTrainedModel) -> bool:
    """Whether a layer keeps a recurrent state: it holds all tokens so far, so that texts cannot share a part of it."""
    from transformers import DynamicCache
    from transformers.cache_utils import LinearAttentionCacheLayerMixin

    layers = DynamicCache(config=model.config).layers
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)


def _cache(trunk: Any, count: int) -> DynamicCache:
    """A cache with the trunk for each of `count` rows."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    cache = DynamicCache()
    for number, (keys, values) in enumerate(trunk or ()):
        cache.update(keys, values, number)
    for layer in cache.layers:
        if isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None:
            # Views: adding keys of the rows copies them.
            layer.keys, layer.values = (part.expand(count, -1, -1, -1) for part in (layer.keys, layer.values))
    return cache


def _keys_and_values(cache: DynamicCache) -> list[tuple[Any, Any]]:
    """Each layer's keys and values, (1, heads, tokens, width)."""
    from transformers.cache_utils import DynamicLayer

    return [(layer.keys, layer.values) for layer in cache.layers if isinstance(layer, DynamicLayer)]


@contextmanager
def _gather_before_head(head: torch.nn.Module, positions: torch.Tensor) -> Iterator[None]:
    """Give the model's head only the (1, M, H) hidden states at `positions`; what follows the head is unchanged."""
    hook = head.register_forward_pre_hook(lambda _, args: (args[0].flatten(0, 1)[positions][None], *args[1:]))
    try:
        yield
    finally:
        hook.remove()
