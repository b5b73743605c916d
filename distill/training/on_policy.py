"""On-policy distillation: the student writes a share of its batches, and the teacher grades that text."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel

from limbeck.distill.models.sampling import generation_settings
from limbeck.distill.recipe.schema import OnPolicy

Batch = dict[str, Any]


class StudentWriter:
    """Replaces batches with text that the student writes (GKD, Agarwal et al., arXiv 2306.13649).

    The text depends only on the student, the seed, the step and the number of the batch in the step. So a resumed run
    writes the same text, and so do several processes that share the batches of one.

    Args:
        student: samples in evaluation mode until its EOS token.
        settings: the recipe's `[on_policy]`.
    """

    def __init__(self, student: PreTrainedModel, settings: OnPolicy, seed: int) -> None:
        self.student = student
        self.settings = settings
        self.seed = seed

    def __call__(self, batch: Batch, step: int, number: int) -> Batch:
        """Return `batch` or, with probability lmbda, a batch that the student writes from the prompts of `batch`."""
        draw = hashlib.sha256(f"{self.seed} {step} {number}".encode()).digest()
        share, seed = (int.from_bytes(part, "big") for part in (draw[:4], draw[4:12]))
        if share >= self.settings.lmbda * 2**32:
            return batch
        return self._write(batch, seed % 2**63)

    @torch.no_grad()
    def _write(self, batch: Batch, seed: int) -> Batch:
        """Rows (n, T') of a prompt and what the student wrote after it; only the latter has labels."""
        length = batch["input_ids"].shape[1]
        max_new_tokens = min(self.settings.max_new_tokens, length // 2)
        prompts = extract_prompts(batch, self.settings.prompt_tokens or length // 2, length - max_new_tokens)
        ids, mask = _pad_left(prompts, batch["input_ids"].device)
        end_ids = _end_ids(self.student)
        training = self.student.training
        self.student.eval()
        config = GenerationConfig(
            do_sample=True,
            temperature=self.settings.temperature,
            top_k=0,
            max_new_tokens=max_new_tokens,
            eos_token_id=end_ids or None,
            pad_token_id=end_ids[0] if end_ids else 0,
        )
        with torch.random.fork_rng(), generation_settings(self.student, config):
            torch.manual_seed(seed)
            whole: Any = self.student.generate(input_ids=ids, attention_mask=mask)  # type: ignore[operator]
        self.student.train(training)
        return _make_batch(prompts, whole[:, ids.shape[1] :], end_ids)


def extract_prompts(batch: Batch, tokens: int, max_tokens: int) -> list[torch.Tensor]:
    """The prompt of each row (T,) of a batch, from the document with the most targets: 1 to `max_tokens` ids.

    The prompt is what comes before the document's first target. Plain text has no prompt: then it is the first
    `tokens` tokens, or the first half of a shorter document. A longer prompt is cut to its last `max_tokens` tokens.
    """
    ids, targets = batch["input_ids"], (batch["labels"] != -100).cpu().numpy()
    places = batch["position_ids"].cpu().numpy() if "position_ids" in batch else np.arange(ids.shape[1])[None]
    prompts = []
    for row, is_target, position in zip(ids, targets, np.broadcast_to(places, ids.shape), strict=True):
        begins = np.flatnonzero(position == position.min())
        counts = np.add.reduceat(is_target, begins, dtype=int)
        begin = begins[counts.argmax()]
        end = next((int(other) for other in begins if other > begin), len(row))
        first = int(is_target[begin:end].argmax())  # 1 in plain text: all tokens but the start token are targets
        if first <= 1:
            first = max(1, min(tokens, (end - int(begin)) // 2))
        prompts.append(row[begin : begin + first][-max_tokens:])
    return prompts


def _pad_left(prompts: list[torch.Tensor], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts padded on the left, and their attention mask: (n, L) int64 each."""
    longest = max(map(len, prompts))
    ids = torch.zeros((len(prompts), longest), dtype=torch.int64, device=device)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


def _make_batch(prompts: list[torch.Tensor], written: torch.Tensor, end_ids: list[int]) -> Batch:
    """Join n prompts with the written tokens (n, m) up to the end token, padded on the right."""
    stops = torch.isin(written, torch.tensor(end_ids, dtype=written.dtype, device=written.device))
    lengths = torch.where(stops.any(1), stops.int().argmax(1) + 1, written.shape[1]).tolist()
    longest = max(len(prompt) + length for prompt, length in zip(prompts, lengths, strict=True))
    ids = torch.zeros((len(prompts), longest), dtype=torch.int64, device=written.device)
    labels = torch.full_like(ids, -100)
    for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        ids[row, : len(prompt)] = prompt
        ids[row, len(prompt) : len(prompt) + length] = written[row, :length]
        labels[row, len(prompt) : len(prompt) + length] = written[row, :length]
    return {"input_ids": ids, "labels": labels, "written": True}


def _end_ids(student: PreTrainedModel) -> list[int]:
    """The tokens that end the student's text."""
    eos = getattr(student.generation_config, "eos_token_id", None)
    if eos is None:
        return []
    return [eos] if isinstance(eos, int) else list(eos)
