"""Parity: compare an ONNX artifact with the PyTorch model it was made from, token by token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO

import numpy as np

from limbeck.export.artifact.invariance import measure_invariance, pad
from limbeck.export.artifact.long_texts import LongText, compare_long_text, compared_lengths, run_long_text
from limbeck.export.artifact.quality import describe_figure, estimate_quality, exceeded_figures
from limbeck.export.artifact.torch_threads import torch_threads
from limbeck.export.artifact.totals import Totals
from limbeck.export.quantize.precisions import PRECISIONS
from limbeck.export.quantize.sample_texts import SAMPLE_CONVERSATIONS, SAMPLE_TEXTS, render_conversations
from limbeck.export.runtime.runtime import Runtime
from limbeck.registry.checkpoints.checked import checked_facts
from limbeck.registry.checkpoints.load import load_config, load_model, load_tokenizer
from limbeck.registry.core.digest import folder_digest, read_manifest
from limbeck.registry.core.errors import BadInput, Refused
from limbeck.registry.core.machine import return_freed_memory
from limbeck.registry.records import Parity

MAX_LOGPROB_DIFF = 1e-3  # nats: limit of an fp32 graph against PyTorch, and against itself
MIN_KL_LIMIT = 1e-5  # nats: the limit of other precisions is never below it
SMALL_MODEL_BYTES = 80_000_000  # smaller models run on one thread: more would mostly wait for each other
PROMPTS = 4  # texts whose beginnings are completed greedily


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
    tokenizer = load_tokenizer(torch_folder, trust_remote_code)
    config = load_config(torch_folder, trust_remote_code)
    threads = 1 if _weight_bytes(torch_folder) < SMALL_MODEL_BYTES else None
    # First the artifact alone, then PyTorch alone: both sets of weights are never in memory together.
    return_freed_memory()
    with TemporaryFile(dir=onnx_folder) as file, torch_threads(threads):
        artifact = _run_artifact(
            onnx_folder, threads, tokenizer, config, texts, (max_documents, max_tokens, new_tokens), file
        )
        return_freed_memory()
        totals, fields = _compare_with_torch(torch_folder, trust_remote_code, artifact, file)
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
        bits_per_byte_reference=totals.nats_reference / math.log(2) / artifact.predicted_bytes,
        bits_per_byte=totals.nats / math.log(2) / artifact.predicted_bytes,
        documents=len(artifact.rows),
        conversations=artifact.conversations,
        quality=estimate_quality(totals.documents),
        limits=PRECISIONS[precision].limits,
        max_change=manifest.get("quantization", {}).get("requested", {}).get("max_change"),
        **artifact.fields,
        **fields,
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


def _load_reference(folder: Path, trust_remote_code: bool) -> Any:
    """Load the PyTorch model in float32, set to greedy decoding."""
    from transformers import GenerationConfig

    # Eager attention, since torch's fused attention ignores what it does not support, such as Gemma 2's soft cap.
    model = load_model(folder, trust_remote_code, attn_implementation="eager")
    # Without the penalties that the checkpoint's own generation settings may have.
    model.generation_config = GenerationConfig(
        eos_token_id=model.generation_config.eos_token_id, pad_token_id=0, do_sample=False
    )
    return model


def _reading(folder: Path) -> dict[str, str]:
    """What the loader's independent check of the checkpoint found. Returns `Parity.reading`."""
    facts = checked_facts(folder)
    return {"rotary": facts.rotary, "tokenizer": facts.tokenizer, "weights": facts.weights}


@dataclass(frozen=True)
class _ArtifactResults:
    """What the artifact computed, but for the logits of the rows, which are in a file.

    Attributes:
        rows: token ids of the texts and conversations.
        vocab_size: width of the logits.
        completions: prompt and greedy completion, as token ids; None if the logits are not numbers.
        long_text: None if the model has no length to compare past.
        fields: of `Parity`.
    """

    rows: list[list[int]]
    conversations: int
    vocab_size: int
    predicted_bytes: int
    completions: list[tuple[list[int], list[int]]] | None
    long_text: LongText | None
    fields: dict[str, Any]


def _run_artifact(
    folder: Path,
    threads: int | None,
    tokenizer: Any,
    config: Any,
    texts: Sequence[str],
    sizes: tuple[int, int, int],
    file: BinaryIO,
) -> _ArtifactResults:
    """Run the artifact on everything that is compared, and write the (T, V) float32 logits of each row to `file`.

    Args:
        sizes: documents, tokens of each, new tokens of a completion.
    """
    runtime = Runtime.load(folder, threads=threads)
    max_documents, max_tokens, new_tokens = sizes
    max_tokens = min(max_tokens, runtime.max_length)
    rows = _token_rows(tokenizer, runtime, texts, max_documents, max_tokens)
    conversations = render_conversations(folder, SAMPLE_CONVERSATIONS)
    chat_rows = [runtime.encode(text, add_special_tokens=False)[:max_tokens] for text in conversations]
    for row in rows + chat_rows:
        file.write(runtime.logits(*pad([row]))[0].astype(np.float32).tobytes())
    lengths, not_reached = compared_lengths(config, runtime.max_length)
    return _ArtifactResults(
        rows=rows + chat_rows,
        conversations=len(chat_rows),
        vocab_size=runtime.vocab_size,
        predicted_bytes=sum(_predicted_bytes(runtime, row) for row in rows + chat_rows),
        completions=_complete(runtime, _prompts(rows, runtime.max_length), new_tokens),
        long_text=run_long_text(runtime, list(chain(*rows)), lengths) if lengths else None,
        fields={
            "lengths": tuple(lengths),
            "lengths_not_reached": tuple(not_reached),
            **measure_invariance(runtime, rows),
        },
    )


def _compare_with_torch(
    folder: Path, trust_remote_code: bool, artifact: _ArtifactResults, file: BinaryIO
) -> tuple[Totals, dict[str, Any]]:
    """Compare what the artifact computed with PyTorch. Returns the totals over all rows, and fields of `Parity`."""
    import torch

    model, totals = _load_reference(folder, trust_remote_code), Totals()
    width = artifact.vocab_size
    fields: dict[str, Any] = {}
    file.seek(0)
    with torch.inference_mode():
        for row in artifact.rows:
            logits = np.frombuffer(file.read(4 * len(row) * width), np.float32).reshape(-1, width)
            totals.add(row, model(torch.tensor([row])).logits[0].numpy(), logits)
        fields["greedy_identical"] = _completes_equally(model, artifact.completions)
        if artifact.long_text:
            long_totals = Totals()
            for reference, logits in compare_long_text(model, artifact.long_text):
                long_totals.compare_logits(reference, logits)
            fields |= {"long_diff": long_totals.max_diff, "long_kl": float(np.mean(long_totals.kl))}
    return totals, fields


def _complete(runtime: Runtime, prompts: list[list[int]], new_tokens: int) -> list[tuple[list[int], list[int]]] | None:
    """Complete prompts greedily, as one batch; None if the logits are not numbers, which the other figures show."""
    try:
        completions = runtime.generate(prompts, max_new_tokens=new_tokens)
    except BadInput:
        return None
    return [(prompt, prompt + completion.token_ids) for prompt, completion in zip(prompts, completions, strict=True)]


def _completes_equally(model: Any, completions: list[tuple[list[int], list[int]]] | None) -> bool:
    """Return True if PyTorch completes each prompt, alone, with the same tokens."""
    import torch

    for prompt, completed in completions or []:
        ids = torch.tensor([prompt])
        count = len(completed) - len(prompt)
        reference = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count)[0]
        if completed != reference.tolist():
            return False
    return completions is not None


def _weight_bytes(folder: Path) -> int:
    """Return the bytes of the checkpoint's weights."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


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


def _predicted_bytes(runtime: Runtime, row: list[int]) -> int:
    """Return the UTF-8 length of the predicted text: that of all tokens but the first."""
    whole, first = (runtime.tokenizer.decode(ids, skip_special_tokens=False) for ids in (row, row[:1]))
    return len(whole.encode()) - len(first.encode())
