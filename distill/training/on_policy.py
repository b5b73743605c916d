"""On-policy distillation: the student writes a share of its batches itself, and the teacher grades what it wrote."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel

from limbeck.distill.recipe.schema import OnPolicy

Batch = dict[str, Any]


class StudentWriter:
    """Replaces batches of text by what the student writes (GKD, Agarwal et al., arXiv 2306.13649).

    What is written depends on the student, the seed, the step and the batch's number within it, and on nothing that
    was drawn before: a run that goes on writes the same, and so do several processes that share the batches of one.

    Args:
        student: writes by sampling, in evaluation mode, until its EOS.
        wanted: the recipe's `[on_policy]`.
    """

    def __init__(self, student: PreTrainedModel, settings: OnPolicy, seed: int) -> None:
        self.student = student
        self.settings = settings
        self.seed = seed

    def __call__(self, batch: Batch, step: int, number: int) -> Batch:
        """`batch`, or with probability lmbda one that the student wrote after this one's prompts."""
        drawn = hashlib.sha256(f"{self.seed} {step} {number}".encode()).digest()
        share, seed = (int.from_bytes(part, "big") for part in (drawn[:4], drawn[4:12]))
        if share >= self.settings.lmbda * 2**32:
            return batch
        return self._write(batch, seed % 2**63)

    @torch.no_grad()
    def _write(self, batch: Batch, seed: int) -> Batch:
        """Rows of a prompt and what the student wrote after it (n, T'), of which only the latter is to be predicted."""
        length = batch["input_ids"].shape[1]
        new = min(self.settings.max_new_tokens, length // 2)
        found = prompts(batch, self.settings.prompt_tokens or length // 2, length - new)
        ids, mask = _pad_left(found, batch["input_ids"].device)
        ends = _ends(self.student)
        training = self.student.training
        self.student.eval()
        asked = GenerationConfig(
            do_sample=True,
            temperature=self.settings.temperature,
            top_k=0,
            max_new_tokens=new,
            eos_token_id=ends or None,
            pad_token_id=ends[0] if ends else 0,
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            whole: Any = self.student.generate(  # type: ignore[operator]
                input_ids=ids, attention_mask=mask, generation_config=asked, use_model_defaults=False
            )
        self.student.train(training)
        return _rows(found, whole[:, ids.shape[1] :], ends)


def prompts(batch: Batch, tokens: int, at_most: int) -> list[torch.Tensor]:
    """Of each row (T,) of a batch, the prompt of the document that it has most targets of: 1 to `at_most` ids.

    That is what comes before the document's first target where it was given as a prompt, else its first `tokens`
    tokens, or its first half where it is too short for those. Of a longer prompt the last `at_most` tokens stay.
    """
    ids, targets = batch["input_ids"], (batch["labels"] != -100).cpu().numpy()
    places = batch["position_ids"].cpu().numpy() if "position_ids" in batch else np.arange(ids.shape[1])[None]
    found = []
    for row, wanted, place in zip(ids, targets, np.broadcast_to(places, ids.shape), strict=True):
        begins = np.flatnonzero(place == place.min())
        counts = np.add.reduceat(wanted, begins, dtype=int)
        begin = begins[counts.argmax()]
        end = next((int(other) for other in begins if other > begin), len(row))
        first = int(wanted[begin:end].argmax())  # 1 of plain text: all but the token that starts it is a target
        if first <= 1:
            first = max(1, min(tokens, (end - int(begin)) // 2))
        found.append(row[begin : begin + first][-at_most:])
    return found


def _pad_left(found: list[torch.Tensor], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts side by side, padded on the left, and where they are: (n, L) int64 each."""
    longest = max(map(len, found))
    ids = torch.zeros((len(found), longest), dtype=torch.int64, device=device)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(found):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


def _rows(found: list[torch.Tensor], written: torch.Tensor, ends: list[int]) -> Batch:
    """Prompts (n) with what was written (n, m) up to its end token, padded on the right."""
    stops = torch.isin(written, torch.tensor(ends, dtype=written.dtype, device=written.device))
    lengths = torch.where(stops.any(1), stops.int().argmax(1) + 1, written.shape[1]).tolist()
    longest = max(len(prompt) + length for prompt, length in zip(found, lengths, strict=True))
    ids = torch.zeros((len(found), longest), dtype=torch.int64, device=written.device)
    labels = torch.full_like(ids, -100)
    for row, (prompt, length) in enumerate(zip(found, lengths, strict=True)):
        ids[row, : len(prompt)] = prompt
        ids[row, len(prompt) : len(prompt) + length] = written[row, :length]
        labels[row, len(prompt) : len(prompt) + length] = written[row, :length]
    return {"input_ids": ids, "labels": labels, "written": True}


def _ends(student: PreTrainedModel) -> list[int]:
    """The tokens that end what the student writes."""
    given = getattr(student.generation_config, "eos_token_id", None)
    return [] if given is None else [given] if isinstance(given, int) else list(given)
