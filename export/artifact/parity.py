"""An ONNX artifact held against the PyTorch model it was made from, token by token."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.export.quantize.sample_texts import SAMPLE_TEXTS
from limbeck.export.runtime.batch import Batch
from limbeck.export.runtime.runtime import Runtime
from limbeck.export.runtime.sampling import log_softmax
from limbeck.export.runtime.session import NUMPY_TYPES, empty_past_shape, positions_from_mask
from limbeck.registry.core.digest import folder_digest, read_manifest
from limbeck.registry.core.errors import BadInput, Refused
from limbeck.registry.records import Parity

MAX_LOGPROB_DIFF = 1e-3  # the most an fp32 graph may differ from PyTorch, and from itself, in nats
SMALL_MODEL_PARAMETERS = 20_000_000  # parameters; below, threads wait for each other longer than they work
# KL of a text alone from the same text in a batch, padded or cached, at most so many times the precision's own mean KL.
KL_LIMIT_FACTORS = {"int8": 4.0}
DEFAULT_KL_LIMIT_FACTOR, MIN_KL_LIMIT = 1.0, 1e-5
STEPS = 8  # of a batch padded on the left, with the cache
PROMPTS = 4  # texts whose beginnings are completed greedily, and run alone, together and with the cache


def measure_parity(
    torch_folder: Path,
    onnx_folder: Path,
    texts: Sequence[str] = SAMPLE_TEXTS,
    *,
    max_documents: int = 12,
    max_tokens: int = 128,
    new_tokens: int = 24,
    trust_remote_code: bool = False,
) -> Parity:
    """Compare log-probabilities and greedy text of the two on held-out text, and the artifact with itself.

    Each text runs alone in both. The artifact completes its prompts as one batch, PyTorch one by one. Then the
    artifact's own numbers for texts of unequal length are compared: alone and in a batch padded on the right, alone and
    in one padded on the left whose last tokens come one by one with the graph's cache (as transformers' `generate` runs
    a batch), and at once and token by token with the caches of the runtime's own batch.

    What an fp32 graph must hold and what any other must hold is said in `faults`.

    Args:
        texts: held-out documents; the first `max_documents` that have two tokens or more are used.
        max_tokens: the most taken from each, from its beginning.
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
    small = model.num_parameters() < SMALL_MODEL_PARAMETERS
    runtime = Runtime.load(onnx_folder, threads=1 if small else None)
    rows = _token_rows(tokenizer, runtime, texts, max_documents, min(max_tokens, runtime.max_length))
    sums = _Totals()
    with torch.inference_mode(), _threads(1 if small else None):
        for row in rows:
            theirs = model(torch.tensor([row])).logits[0].numpy()
            sums.add(row, theirs, runtime.logits(*_pad([row]))[0])
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
    size = sum(_bytes(runtime, row) for row in rows)
    parity = Parity(
        reference=folder_digest(torch_folder),
        precision=str(read_manifest(onnx_folder).get("precision", "fp32")),
        tokens=sums.tokens,
        max_logprob_diff=sums.max_diff,
        mean_kl=float(np.mean(sums.kl)),
        p99_kl=float(np.quantile(sums.kl, 0.99)),
        max_kl=float(np.max(sums.kl)),
        top1_agreement=sums.top1_matches / sums.tokens,
        bits_per_byte_reference=sums.nats_reference / math.log(2) / size,
        bits_per_byte=sums.nats / math.log(2) / size,
        greedy_identical=identical,
        **_invariance(runtime, _rows_of_unequal_length(rows)),
        passed=False,
    )
    return parity.model_copy(update={"passed": not parity_failures(parity)})


def parity_failures(parity: Parity) -> list[str]:
    """What an artifact does that it must not, in words; none where it holds.

    fp32: log-probabilities within `MAX_LOGPROB_DIFF` of PyTorch's, and those of a text alone, in a batch, padded and
    cached as near to each other; the same greedy text.

    Any other precision is reported, not limited, but for what is broken outright: numbers that are none, or a batch,
    padding or a cache that changes more than the precision itself does. Dynamic int8 quantises the activations of a
    whole batch with one scale, so what else is in it moves a text about as far as quantising did: 0.8 to 2.2 times the
    mean KL from PyTorch, measured on a trained model and on random ones of four families; 4 is the limit. Most products
    of other precisions take each token by itself: up to 0.3 times (a static int8 graph whose head is dynamic); 1 is the
    limit.
    In the trained model a mask, a position or a cache that was wrong moved it by 4.6 times (4 bits) and more.
    """
    found = []
    if not math.isfinite(parity.max_logprob_diff):
        found.append("log-probabilities that are no numbers")
    exact = parity.precision == "fp32"
    if exact and parity.max_logprob_diff > MAX_LOGPROB_DIFF:
        found.append(
            f"largest difference in log-probability {parity.max_logprob_diff:.3g}{_format_limit(MAX_LOGPROB_DIFF)}"
        )
    if exact and not parity.greedy_identical:
        found.append("greedy text differs")
    limit = max(MIN_KL_LIMIT, KL_LIMIT_FACTORS.get(parity.precision, DEFAULT_KL_LIMIT_FACTOR) * parity.mean_kl)
    for how, difference, kl in (
        ("in a batch", parity.batch_diff, parity.batch_kl),
        ("padded on the left", parity.left_padding_diff, parity.left_padding_kl),
        ("token by token with the cache", parity.cache_diff, parity.cache_kl),
    ):
        if difference is None or kl is None:
            continue  # a record from before this was measured
        if not math.isfinite(difference) or (exact and difference > MAX_LOGPROB_DIFF):
            words = f"by {difference:.3g} in log-probability{_format_limit(MAX_LOGPROB_DIFF)}"
        elif not exact and kl > limit:
            words = f"by {kl:.3g} nats of KL{_format_limit(limit)}"
        else:
            continue
        found.append(f"a text {how} differs from the same text alone {words}")
    return found


def _format_limit(limit: float) -> str:
    return f" (at most {limit:.3g})"


@dataclass
class _Totals:
    """Running totals over tokens."""

    tokens: int = 0
    max_diff: float = 0.0
    kl: list[float] = field(default_factory=list)  # of each token, in nats
    top1_matches: int = 0
    nats_reference: float = 0.0
    nats: float = 0.0

    def add(self, row: list[int], reference: np.ndarray, logits: np.ndarray) -> None:
        """Take one text: its T token ids, and (T, V) logits of both."""
        p, q = log_softmax(reference.astype(np.float64)), log_softmax(logits.astype(np.float64))
        self.tokens += len(row)
        self.compare(p, q)
        self.top1_matches += int((p.argmax(axis=1) == q.argmax(axis=1)).sum())
        steps = np.arange(len(row) - 1)
        self.nats_reference -= float(p[steps, row[1:]].sum())
        self.nats -= float(q[steps, row[1:]].sum())

    def compare(self, p: np.ndarray, q: np.ndarray) -> None:
        """Take (T, V) log-probabilities of both."""
        # NaN compares as false with everything: without nan_to_num a broken graph would pass.
        self.max_diff = max(self.max_diff, float(np.nan_to_num(np.abs(p - q), nan=np.inf).max()))
        self.kl += (np.exp(p) * (p - q)).sum(axis=1).tolist()


def _token_rows(
    tokenizer: Any, runtime: Runtime, texts: Sequence[str], max_documents: int, max_tokens: int
) -> list[list[int]]:
    """Token ids of the beginnings of the texts, by the checkpoint's tokenizer."""
    rows: list[list[int]] = []
    for text in texts:
        text = text[: 16 * max_tokens]  # enough for `tokens` tokens of any text; a whole book takes long
        ids = tokenizer(text).input_ids
        if ids != runtime.encode(text):
            raise Refused(
                f"the artifact's tokenizer.json splits a text differently than the checkpoint's tokenizer: "
                f"{text[:60]!r}",
                fix="save the checkpoint's tokenizer anew with transformers, then export again",
            )
        if len(ids) >= 2:
            rows.append(ids[:max_tokens])
        if len(rows) == max_documents:
            break
    if not rows:
        raise BadInput("no text to compare on: every document has fewer than two tokens")
    return rows


def _prompts(rows: list[list[int]], max_length: int) -> list[list[int]]:
    """Beginnings of the first rows, each shorter than the one before."""
    longest = min(48, max_length // 2)
    return [row[: max(1, longest >> step)] for step, row in enumerate(rows[:PROMPTS])]


def _rows_of_unequal_length(rows: list[list[int]]) -> list[list[int]]:
    """Beginnings of the first rows, of unequal length."""
    return [row[: max(2, len(row) * (PROMPTS - step) // PROMPTS)] for step, row in enumerate(rows[:PROMPTS])]


def _pad(rows: list[list[int]], left: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and mask, each (B, T) int64."""
    width = max(map(len, rows))
    real = [[1] * len(row) for row in rows]

    def padded(row: list[int]) -> list[int]:
        more = [0] * (width - len(row))
        return more + row if left else row + more

    return np.array([padded(row) for row in rows], np.int64), np.array([padded(row) for row in real], np.int64)


def _invariance(runtime: Runtime, rows: list[list[int]]) -> dict[str, float]:
    """How far texts alone are from the same texts otherwise: fields of `Parity`."""
    alone = [log_softmax(runtime.logits(*_pad([row]))[0].astype(np.float64)) for row in rows]
    together = runtime.logits(*_pad(rows))
    found: dict[str, float] = {}
    for name, others in (
        ("batch", ((row, 0, together[row, : len(ids)]) for row, ids in enumerate(rows))),
        ("left_padding", _padded_left(runtime, rows)),
        ("cache", _token_by_token(runtime, rows)),
    ):
        sums = _Totals()
        for row, start, logits in others:
            sums.compare(alone[row][start : start + len(logits)], log_softmax(logits.astype(np.float64)))
        found |= {f"{name}_diff": sums.max_diff, f"{name}_kl": float(np.mean(sums.kl))}
    return found


def _padded_left(runtime: Runtime, rows: list[list[int]]) -> Iterator[tuple[int, int, np.ndarray]]:
    """(row, token, (1, V) logits after it) of rows padded on the left, the last tokens one by one with a cache.

    By the graph alone, as runtimes other than ours run it: its outputs are the next run's inputs.
    """
    session = runtime.onnx_session
    tokens, mask = _pad(rows, left=True)
    place = positions_from_mask(mask)
    width = tokens.shape[1]
    takes = session.get_inputs()
    cache = [item for item in takes if item.name.startswith("past_key_values.")]
    past = [np.zeros(empty_past_shape(item, len(rows)), NUMPY_TYPES[item.type]) for item in cache]
    outputs = ["logits", *(item.name.replace("past_key_values.", "present.", 1) for item in cache)]
    first = width - min(STEPS, min(map(len, rows)) - 1)
    for start, end in pairwise([0, *range(first, width + 1)]):
        feeds = {
            "input_ids": tokens[:, start:end],
            "attention_mask": mask[:, :end],
            "position_ids": place[:, start:end],
            **{item.name: value for item, value in zip(cache, past, strict=True)},
        }
        logits, *past = session.run(outputs, {item.name: feeds[item.name] for item in takes})
        for row in range(len(rows)):
            for column in range(start, end):
                if mask[row, column]:
                    yield row, int(place[row, column]), logits[row, column - start, None]


def _token_by_token(runtime: Runtime, rows: list[list[int]]) -> Iterator[tuple[int, int, np.ndarray]]:
    """(row, token, (1, V) logits after it): the first half of each row is read at once, then all go on together."""
    batch = Batch(runtime)
    slots = [batch.add_prompt(row[: len(row) // 2], len(row) - len(row) // 2) for row in rows]
    for row, slot in enumerate(slots):
        logits = None
        while logits is None:
            [logits] = batch.prefill([slot], len(rows[row]))
        yield row, len(rows[row]) // 2 - 1, logits[None]
    for step in range(max(len(row) - len(row) // 2 for row in rows)):
        going = [row for row, ids in enumerate(rows) if len(ids) // 2 + step < len(ids)]
        tokens = [rows[row][len(rows[row]) // 2 + step] for row in going]
        for row, logits in zip(going, batch.step([slots[row] for row in going], tokens), strict=True):
            yield row, len(rows[row]) // 2 + step, logits[None].copy()
    for slot in slots:
        batch.remove_slot(slot)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """PyTorch on so many threads within the block; None leaves it as it is."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
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
