"""Parity: compare an ONNX artifact with the PyTorch model it was made from, token by token."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.export.artifact.long_texts import compared_lengths, long_rows
from limbeck.export.artifact.quality import Document, describe_figure, estimate_quality, exceeded_figures
from limbeck.export.quantize.precisions import PRECISIONS
from limbeck.export.quantize.sample_texts import SAMPLE_CONVERSATIONS, SAMPLE_TEXTS, render_conversations
from limbeck.export.runtime.batch import Batch
from limbeck.export.runtime.runtime import Runtime
from limbeck.export.runtime.sampling import log_softmax
from limbeck.export.runtime.session import NUMPY_TYPES, empty_past_shape, positions_from_mask
from limbeck.registry.checkpoints.checked import checked_facts
from limbeck.registry.checkpoints.load import load_model, load_tokenizer
from limbeck.registry.core.digest import folder_digest, read_manifest
from limbeck.registry.core.errors import BadInput, Refused
from limbeck.registry.records import Parity

MAX_LOGPROB_DIFF = 1e-3  # nats: limit of an fp32 graph against PyTorch, and against itself
MIN_KL_LIMIT = 1e-5  # nats: the limit of other precisions is never below it
SMALL_MODEL_PARAMETERS = 20_000_000  # smaller models run on one thread: more would mostly wait for each other
CACHE_STEPS = 8  # last tokens of a left-padded batch, run one by one with the cache
PROMPTS = 4  # texts whose beginnings are completed greedily, and compared alone, in a batch and with the cache


def measure_parity(
    torch_folder: Path,
    onnx_folder: Path,
    texts: Sequence[str] = SAMPLE_TEXTS,
    *,
    max_documents: int = 24,
    max_tokens: int = 128,
    new_tokens: int = 24,
    trust_remote_code: bool = False,
) -> Parity:
    """Compare log-probabilities and greedy text of artifact and PyTorch on held-out text, and the artifact with itself.

    - Each text runs alone in both, and their log-probabilities are compared: so do conversations, if the tokenizer has
      a chat template.
    - Both complete prompts greedily: the artifact as one batch, PyTorch one by one.
    - A text that is longer than each length at which the model changes its numbers runs in both (`long_texts`).
    - The artifact's results for texts of unequal length, each alone, are compared with the same texts in a batch padded
      on the right; in a batch padded on the left whose last tokens run one by one with the graph's cache (as in
      transformers' `generate`); and token by token with the cache of the runtime's own batch.

    `parity_failures` defines what passes. Parity cannot find that the checkpoint was misread, since both sides share
    the misreading; `Parity.reading` says what the loader compared with the files instead.

    Args:
        texts: held-out documents; the first `max_documents` with two tokens or more are used.
        max_tokens: at most this many tokens from the beginning of each.
        new_tokens: generated for each of four prompts of different lengths.

    Raises:
        Refused: artifact and checkpoint tokenize a text differently.
        BadInput: no text has two tokens.
    """
    import torch

    model, tokenizer = _load_reference(torch_folder, trust_remote_code)
    threads = 1 if model.num_parameters() < SMALL_MODEL_PARAMETERS else None
    runtime = Runtime.load(onnx_folder, threads=threads)
    max_tokens = min(max_tokens, runtime.max_length)
    rows = _token_rows(tokenizer, runtime, texts, max_documents, max_tokens)
    conversations = render_conversations(onnx_folder, SAMPLE_CONVERSATIONS)
    chat_rows = [runtime.encode(text, add_special_tokens=False)[:max_tokens] for text in conversations]
    totals = _Totals()
    with torch.inference_mode(), _torch_threads(threads):
        for row in rows + chat_rows:
            reference = model(torch.tensor([row])).logits[0].numpy()
            totals.add(row, reference, runtime.logits(*_pad([row]))[0])
        # The runtime chooses no token from logits that are NaN.
        greedy_identical = math.isfinite(totals.max_diff) and _completes_equally(
            model, runtime, _prompts(rows, runtime.max_length), new_tokens
        )
        long_fields = _compare_long_text(model, runtime, rows)
    size = sum(_predicted_bytes(runtime, row) for row in rows + chat_rows)
    manifest = read_manifest(onnx_folder)
    precision = manifest["precision"]
    parity = Parity(
        reference=folder_digest(torch_folder),
        precision=precision,
        tokens=totals.tokens,
        max_logprob_diff=totals.max_diff,
        mean_kl=float(np.mean(totals.kl)),
        p99_kl=float(np.quantile(totals.kl, 0.99)),
        max_kl=float(np.max(totals.kl)),
        top1_agreement=totals.top1_matches / totals.tokens,
        bits_per_byte_reference=totals.nats_reference / math.log(2) / size,
        bits_per_byte=totals.nats / math.log(2) / size,
        greedy_identical=greedy_identical,
        documents=len(rows) + len(chat_rows),
        conversations=len(chat_rows),
        quality=estimate_quality(totals.documents),
        limits=PRECISIONS[precision].limits,
        max_change=manifest.get("quantization", {}).get("requested", {}).get("max_change"),
        **_invariance(runtime, _rows_of_unequal_length(rows)),
        **long_fields,
        reading=_reading(torch_folder),
        passed=False,
    )
    parity = parity.model_copy(update={"exceeded": tuple(exceeded_figures(parity))})
    return parity.model_copy(update={"passed": not (parity_failures(parity) or quality_failures(parity))})


def parity_failures(parity: Parity) -> list[str]:
    """List what is broken in an artifact; empty if nothing is. Its quality is judged by `quality_failures`.

    fp32: log-probabilities within MAX_LOGPROB_DIFF of PyTorch's, on a long text too; those of a text alone within the
    same limit of those in a batch, padded and cached; and the same greedy text.

    Other precisions: log-probabilities are finite, and a batch, padding or a cache changes results by at most the mean
    KL from PyTorch. In a trained model, a wrong mask, position or cache changed them by 4.6 times (int4) or more.
    """
    failures = []
    if not math.isfinite(parity.max_logprob_diff):
        failures.append("log-probabilities that are NaN or infinite")
    exact = parity.precision == "fp32"
    if exact and parity.max_logprob_diff > MAX_LOGPROB_DIFF:
        failures.append(
            f"largest difference in log-probability {parity.max_logprob_diff:.3g}{_format_limit(MAX_LOGPROB_DIFF)}"
        )
    if exact and not parity.greedy_identical:
        failures.append("greedy text differs")
    limit = max(MIN_KL_LIMIT, parity.mean_kl)
    excess = _excess(parity.long_diff, parity.long_kl, None if exact else limit)
    if excess:
        failures.append(f"a text of more than {parity.lengths[-1]:,} tokens differs from PyTorch {excess}")
    for condition, difference, kl in (
        ("in a batch", parity.batch_diff, parity.batch_kl),
        ("padded on the left", parity.left_padding_diff, parity.left_padding_kl),
        ("token by token with the cache", parity.cache_diff, parity.cache_kl),
    ):
        excess = _excess(difference, kl, None if exact else limit)
        if excess:
            failures.append(f"a text {condition} differs from the same text alone {excess}")
    return failures


def quality_failures(parity: Parity) -> list[str]:
    """List the figures of quality whose intervals exceed the limits of the precision, or the user's own limit."""
    if parity.max_change is None:
        return [describe_figure(parity, name, parity.limits[name]) for name in parity.exceeded]
    if parity.quality["bits_per_byte_change"].high <= parity.max_change:
        return []
    return [describe_figure(parity, "bits_per_byte_change", parity.max_change)]


def _excess(difference: float, kl: float, kl_limit: float | None) -> str | None:
    """Describe by how much a result exceeds its limit, or None. With kl_limit None, MAX_LOGPROB_DIFF is the limit."""
    if not math.isfinite(difference) or (kl_limit is None and difference > MAX_LOGPROB_DIFF):
        return f"by {difference:.3g} in log-probability{_format_limit(MAX_LOGPROB_DIFF)}"
    if kl_limit is not None and kl > kl_limit:
        return f"by {kl:.3g} nats of KL{_format_limit(kl_limit)}"
    return None


def _format_limit(limit: float) -> str:
    return f" (at most {limit:.3g})"


def _load_reference(folder: Path, trust_remote_code: bool) -> tuple[Any, Any]:
    """Load the PyTorch model in float32, set to greedy decoding, and its tokenizer."""
    from transformers import GenerationConfig

    # Eager attention, since torch's fused attention ignores what it does not support, such as Gemma 2's soft cap.
    model = load_model(folder, trust_remote_code, attn_implementation="eager")
    # Without the penalties that the checkpoint's own generation settings may have.
    model.generation_config = GenerationConfig(
        eos_token_id=model.generation_config.eos_token_id, pad_token_id=0, do_sample=False
    )
    return model, load_tokenizer(folder, trust_remote_code)


def _reading(folder: Path) -> dict[str, str]:
    """What the loader's independent check of the checkpoint found. Returns `Parity.reading`."""
    facts = checked_facts(folder)
    return {"rotary": facts.rotary, "tokenizer": facts.tokenizer, "weights": facts.weights}


def _compare_long_text(model: Any, runtime: Runtime, rows: list[list[int]]) -> dict[str, Any]:
    """Compare a long text with PyTorch, if the model has a length to compare past. Returns fields of `Parity`."""
    lengths, not_reached = compared_lengths(model.config, runtime.max_length)
    fields: dict[str, Any] = {"lengths": tuple(lengths), "lengths_not_reached": tuple(not_reached)}
    if lengths:
        totals = _Totals()
        for reference, logits in long_rows(model, runtime, list(chain(*rows)), lengths):
            totals.compare(log_softmax(reference.astype(np.float64)), log_softmax(logits.astype(np.float64)))
        fields |= {"long_diff": totals.max_diff, "long_kl": float(np.mean(totals.kl))}
    return fields


def _completes_equally(model: Any, runtime: Runtime, prompts: list[list[int]], new_tokens: int) -> bool:
    """Return True if greedy completions are equal: one batch in the runtime, one by one in PyTorch."""
    import torch

    try:
        completions = runtime.generate(prompts, max_new_tokens=new_tokens)
    except BadInput:  # its logits are not numbers: the other figures say so
        return False
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.tensor([prompt])
        count = min(new_tokens, runtime.max_length - len(prompt))
        reference = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count)[0]
        if prompt + completion.token_ids != reference.tolist():
            return False
    return True


@dataclass
class _Totals:
    """Running totals over tokens. `kl` has one entry per token, in nats."""

    documents: list[Document] = field(default_factory=list)
    tokens: int = 0
    max_diff: float = 0.0
    kl: list[float] = field(default_factory=list)
    top1_matches: int = 0
    nats_reference: float = 0.0
    nats: float = 0.0

    def add(self, row: list[int], reference: np.ndarray, logits: np.ndarray) -> None:
        """Add one text: its T token ids, and (T, V) logits of reference and artifact."""
        p, q = log_softmax(reference.astype(np.float64)), log_softmax(logits.astype(np.float64))
        self.tokens += len(row)
        self.compare(p, q)
        matches = int((p.argmax(axis=1) == q.argmax(axis=1)).sum())
        steps = np.arange(len(row) - 1)
        nats_reference, nats = -float(p[steps, row[1:]].sum()), -float(q[steps, row[1:]].sum())
        self.documents.append(Document(np.array(self.kl[-len(row) :]), matches, nats_reference, nats))
        self.top1_matches += matches
        self.nats_reference += nats_reference
        self.nats += nats

    def compare(self, p: np.ndarray, q: np.ndarray) -> None:
        """Add (T, V) log-probabilities of reference and artifact."""
        # Comparisons with NaN are false: without nan_to_num a broken graph would pass.
        self.max_diff = max(self.max_diff, float(np.nan_to_num(np.abs(p - q), nan=np.inf).max()))
        self.kl += (np.exp(p) * (p - q)).sum(axis=1).tolist()


def _token_rows(
    tokenizer: Any, runtime: Runtime, texts: Sequence[str], max_documents: int, max_tokens: int
) -> list[list[int]]:
    """Tokenize the beginnings of the texts with the checkpoint's tokenizer. Raises Refused if the artifact differs."""
    rows: list[list[int]] = []
    for text in texts:
        text = text[: 16 * max_tokens]  # enough characters for `max_tokens` tokens; a whole book takes long
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
    """Return beginnings of the first rows, each half as long as the one before."""
    longest = min(48, max_length // 2)
    return [row[: max(1, longest >> step)] for step, row in enumerate(rows[:PROMPTS])]


def _rows_of_unequal_length(rows: list[list[int]]) -> list[list[int]]:
    """Return beginnings of the first rows, of unequal length."""
    return [row[: max(2, len(row) * (PROMPTS - step) // PROMPTS)] for step, row in enumerate(rows[:PROMPTS])]


def _pad(rows: list[list[int]], left: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Return token ids and mask, each (B, T) int64."""
    width = max(map(len, rows))
    ids, mask = np.zeros((len(rows), width), np.int64), np.zeros((len(rows), width), np.int64)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[index, place] = row
        mask[index, place] = 1
    return ids, mask


def _invariance(runtime: Runtime, rows: list[list[int]]) -> dict[str, float]:
    """Measure how far texts alone are from the same texts in batches and with caches. Returns fields of `Parity`."""
    alone = [log_softmax(runtime.logits(*_pad([row]))[0].astype(np.float64)) for row in rows]
    together = runtime.logits(*_pad(rows))
    fields: dict[str, float] = {}
    for name, results in (
        ("batch", ((row, 0, together[row, : len(ids)]) for row, ids in enumerate(rows))),
        ("left_padding", _run_left_padded(runtime, rows)),
        ("cache", _run_token_by_token(runtime, rows)),
    ):
        totals = _Totals()
        for row, start, logits in results:
            totals.compare(alone[row][start : start + len(logits)], log_softmax(logits.astype(np.float64)))
        fields |= {f"{name}_diff": totals.max_diff, f"{name}_kl": float(np.mean(totals.kl))}
    return fields


def _run_left_padded(runtime: Runtime, rows: list[list[int]]) -> Iterator[tuple[int, int, np.ndarray]]:
    """Run rows padded on the left, the last tokens one by one. Yields (row, token, (1, V) logits after that token).

    Uses the bare graph as other runtimes do: the cache outputs of a run are the inputs of the next one.
    """
    session = runtime.onnx_session
    tokens, mask = _pad(rows, left=True)
    place = positions_from_mask(mask)
    width = tokens.shape[1]
    inputs = session.get_inputs()
    cache = [item for item in inputs if item.name.startswith("past_key_values.")]
    past = [np.zeros(empty_past_shape(item, len(rows)), NUMPY_TYPES[item.type]) for item in cache]
    outputs = ["logits", *(item.name.replace("past_key_values.", "present.", 1) for item in cache)]
    first = width - min(CACHE_STEPS, min(map(len, rows)) - 1)
    for start, end in pairwise([0, *range(first, width + 1)]):
        feeds = {
            "input_ids": tokens[:, start:end],
            "attention_mask": mask[:, :end],
            "position_ids": place[:, start:end],
            **{item.name: value for item, value in zip(cache, past, strict=True)},
        }
        logits, *past = session.run(outputs, {item.name: feeds[item.name] for item in inputs})
        for row in range(len(rows)):
            for column in range(start, end):
                if mask[row, column]:
                    yield row, int(place[row, column]), logits[row, column - start, None]


def _run_token_by_token(runtime: Runtime, rows: list[list[int]]) -> Iterator[tuple[int, int, np.ndarray]]:
    """Run the first half of each row as a prompt, the rest as a batch, token by token, with the runtime's cache.

    Yields (row, token, (1, V) logits after that token).
    """
    batch = Batch(runtime)
    halves = [len(row) // 2 for row in rows]
    slots = [batch.add_prompt(row[:half]) for row, half in zip(rows, halves, strict=True)]
    for row, slot in enumerate(slots):
        logits = None
        while logits is None:
            [logits] = batch.prefill([slot], len(rows[row]))
        yield row, halves[row] - 1, logits[None]
    for step in range(max(len(row) - half for row, half in zip(rows, halves, strict=True))):
        unfinished = [row for row, ids in enumerate(rows) if halves[row] + step < len(ids)]
        tokens = [rows[row][halves[row] + step] for row in unfinished]
        results = batch.step([slots[row] for row in unfinished], tokens)
        for row, logits in zip(unfinished, results, strict=True):
            yield row, halves[row] + step, logits[None].copy()
    for slot in slots:
        batch.remove_slot(slot)


@contextmanager
def _torch_threads(count: int | None) -> Iterator[None]:
    """Run PyTorch on `count` threads within the block; None changes nothing."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _predicted_bytes(runtime: Runtime, row: list[int]) -> int:
    """Return the UTF-8 length of the predicted text: that of all tokens but the first."""
    whole, first = (runtime.tokenizer.decode(ids, skip_special_tokens=False) for ids in (row, row[:1]))
    return len(whole.encode()) - len(first.encode())
