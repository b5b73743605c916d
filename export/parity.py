"""An ONNX artifact held against the PyTorch model it was made from, token by token."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from export.passages import PASSAGES
from export.runtime import Runtime
from export.sampling import log_softmax
from registry.digest import folder_digest, read_manifest
from registry.errors import BadInput, Refused
from registry.records import Parity

MAX_LOGPROB_DIFF = 1e-3  # the most an fp32 graph may differ from PyTorch, in nats
BATCH = 4  # texts at once: unequal lengths, so padding is part of what is checked
SMALL = 20_000_000  # parameters; below, threads wait for each other longer than they work
PROMPTS = 4  # texts whose beginnings are completed greedily


def compare(
    torch_folder: Path,
    onnx_folder: Path,
    texts: Sequence[str] = PASSAGES,
    *,
    documents: int = 12,
    tokens: int = 128,
    new_tokens: int = 24,
    trust_remote_code: bool = False,
) -> Parity:
    """Compare log-probabilities and greedy text of the two on held-out text.

    The artifact completes its prompts as one padded batch, PyTorch one by one, so a graph that handles
    padding or its cache wrongly is found too.

    Args:
        texts: held-out documents; the first `documents` that have two tokens or more are used.
        tokens: the most taken from each, from its beginning.
        new_tokens: generated for each of four prompts of different lengths.

    Raises:
        Refused: the two tokenize a text differently. BadInput: no text is left to compare on.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    trust: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(torch_folder, **trust)
    # Eager attention: torch's own leaves out what it has no place for, such as Gemma 2's soft cap of the scores.
    model = AutoModelForCausalLM.from_pretrained(
        torch_folder, dtype=torch.float32, use_safetensors=True, attn_implementation="eager", **trust
    ).eval()
    # Greedy means greedy, whatever penalties the checkpoint's own generation settings hold.
    model.generation_config = GenerationConfig(
        eos_token_id=model.generation_config.eos_token_id, pad_token_id=0, do_sample=False
    )
    small = model.num_parameters() < SMALL
    runtime = Runtime.load(onnx_folder, threads=1 if small else None)
    rows = _token_rows(tokenizer, runtime, texts, documents, min(tokens, runtime.max_length))
    sums = _Sums()
    with torch.inference_mode(), _threads(1 if small else None):
        for start in range(0, len(rows), BATCH):
            batch = rows[start : start + BATCH]
            input_ids, mask = _pad_right(batch)
            ours = runtime.logits(input_ids, mask)
            theirs = model(torch.from_numpy(input_ids), attention_mask=torch.from_numpy(mask)).logits.numpy()
            for row, a, b in zip(batch, theirs, ours, strict=True):
                sums.add(row, a[: len(row)], b[: len(row)])
        prompts = _prompts(rows, runtime.max_length)
        expected = []
        for prompt in prompts:
            ids = torch.tensor([prompt])
            room = min(new_tokens, runtime.max_length - len(prompt))
            expected.append(model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=room)[0])
    completions = runtime.generate(prompts, max_new_tokens=new_tokens)
    identical = all(
        prompt + completion.token_ids == reference.tolist()
        for prompt, completion, reference in zip(prompts, completions, expected, strict=True)
    )
    precision = str(read_manifest(onnx_folder).get("precision", "fp32"))
    size = sum(_bytes(runtime, row) for row in rows)
    return Parity(
        reference=folder_digest(torch_folder),
        precision=precision,
        tokens=sums.tokens,
        max_logprob_diff=sums.max_diff,
        mean_kl=sums.kl / sums.tokens,
        top1_agreement=sums.agreed / sums.tokens,
        bits_per_byte_reference=sums.nats_reference / math.log(2) / size,
        bits_per_byte=sums.nats / math.log(2) / size,
        greedy_identical=identical,
        passed=precision != "fp32" or (sums.max_diff <= MAX_LOGPROB_DIFF and identical),
    )


@dataclass
class _Sums:
    """Running totals over tokens."""

    tokens: int = 0
    max_diff: float = 0.0
    kl: float = 0.0
    agreed: int = 0
    nats_reference: float = 0.0
    nats: float = 0.0

    def add(self, row: list[int], reference: np.ndarray, logits: np.ndarray) -> None:
        """Take one text: its T token ids, and (T, V) logits of both."""
        p, q = log_softmax(reference.astype(np.float64)), log_softmax(logits.astype(np.float64))
        self.tokens += len(row)
        # NaN compares as false with everything: without nan_to_num a broken graph would pass.
        self.max_diff = max(self.max_diff, float(np.nan_to_num(np.abs(p - q), nan=np.inf).max()))
        self.kl += float((np.exp(p) * (p - q)).sum())
        self.agreed += int((p.argmax(axis=1) == q.argmax(axis=1)).sum())
        steps = np.arange(len(row) - 1)
        self.nats_reference -= float(p[steps, row[1:]].sum())
        self.nats -= float(q[steps, row[1:]].sum())


def _token_rows(tokenizer: Any, runtime: Runtime, texts: Sequence[str], documents: int, tokens: int) -> list[list[int]]:
    """Token ids of the beginnings of the texts, by the checkpoint's tokenizer."""
    rows: list[list[int]] = []
    for text in texts:
        text = text[: 16 * tokens]  # enough for `tokens` tokens of any text; a whole book takes long
        ids = tokenizer(text).input_ids
        if ids != runtime.encode(text):
            raise Refused(
                f"the artifact's tokenizer.json splits a text differently than the checkpoint's tokenizer: "
                f"{text[:60]!r}",
                fix="save the checkpoint's tokenizer anew with transformers, then export again",
            )
        if len(ids) >= 2:
            rows.append(ids[:tokens])
        if len(rows) == documents:
            break
    if not rows:
        raise BadInput("no text to compare on: every document has fewer than two tokens")
    return rows


def _prompts(rows: list[list[int]], max_length: int) -> list[list[int]]:
    """Beginnings of the first rows, each shorter than the one before."""
    longest = min(48, max_length // 2)
    return [row[: max(1, longest >> step)] for step, row in enumerate(rows[:PROMPTS])]


def _pad_right(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and mask, each (B, T) int64."""
    width = max(map(len, rows))
    mask = np.array([[1] * len(row) + [0] * (width - len(row)) for row in rows], np.int64)
    return np.array([row + [0] * (width - len(row)) for row in rows], np.int64), mask


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    """PyTorch on so many threads within the block; None leaves it as it is."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _bytes(runtime: Runtime, row: list[int]) -> int:
    """UTF-8 length of what is predicted: the text of all tokens but the first."""
    decode = runtime.tokenizer.decode
    return len(decode(row, skip_special_tokens=False).encode()) - len(
        decode(row[:1], skip_special_tokens=False).encode()
    )
