"""Compare a candidate graph with the float32 graph: the numbers that the format search uses."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.export.graph.save import save_graph
from limbeck.export.quantize.sample_texts import CHOICE_CONVERSATIONS, render_conversations
from limbeck.export.quantize.switches import SWITCHES, SwitchedGraph
from limbeck.export.runtime.runtime import Runtime
from limbeck.export.runtime.sampling import log_softmax
from limbeck.export.runtime.session import GRAPH, NUMPY_TYPES, empty_past_shape
from limbeck.registry.core.errors import BadInput
from limbeck.registry.core.machine import return_freed_memory

ROW_TOKENS = 128  # at most, per text


@dataclass(frozen=True)
class CandidateScore:
    """A candidate compared with the float32 graph.

    Attributes:
        kl: KL(float32 || candidate), mean over tokens, nats.
        bits_per_byte_change: relative increase of the bits per byte.
        expected_change: the increase to expect if the text followed the float32 graph's distribution: `kl` relative to
            its loss. It varies much less between texts than the measured one.
        bytes: size of the weights.
    """

    kl: float
    bits_per_byte_change: float
    expected_change: float
    bytes: int

    @property
    def loss(self) -> float:
        """The number to compare with a limit: the larger of the two changes."""
        return max(self.bits_per_byte_change, self.expected_change)

    def to_manifest(self) -> dict[str, Any]:
        """Return the fields for the manifest."""
        return {
            "kl": self.kl,
            "bits_per_byte_change": self.bits_per_byte_change,
            "expected_change": self.expected_change,
            "bytes": self.bytes,
        }


class CandidateEvaluator:
    """Scores candidates on texts whose float32 log-probabilities it holds.

    Args:
        artifact: folder with the float32 graph, its configuration and tokenizer.
        scratch: an empty folder, where candidates are written.
        texts: text to score on; only beginnings are used. Conversations are added if there is a chat template.
        tokens: at most this many tokens from all texts together.

    Raises:
        BadInput: every text has fewer than two tokens.
    """

    def __init__(self, artifact: Path, scratch: Path, texts: Sequence[str], *, tokens: int = 512) -> None:
        self._scratch = scratch
        for path in artifact.iterdir():
            if path.is_file() and not path.name.startswith(GRAPH) and path.suffix in (".json", ".jinja"):
                shutil.copyfile(path, scratch / path.name)
        runtime = Runtime.load(artifact, verify=False)
        conversations = render_conversations(artifact, CHOICE_CONVERSATIONS)
        self._rows = _rows(runtime, texts, tokens)
        self._rows += [runtime.encode(text, add_special_tokens=False)[:ROW_TOKENS] for text in conversations]
        self._reference = [self._logprobs(runtime, row) for row in self._rows]
        self.tokens = sum(map(len, self._rows))

    def score(self, model: Any) -> CandidateScore:
        """Score the candidate `model`, an onnx.ModelProto, on the texts."""
        runtime, size = self._load(model)
        return self._score(runtime, size)

    def open_switches(self, graph: SwitchedGraph, size: int) -> Callable[..., CandidateScore]:
        """Load a graph with switches once. Returns a function that scores it with the second form of some parts.

        The function takes the parts and `step`, to use every `step`-th text only.

        Args:
            size: bytes of the weights with the first form of every part.
        """
        runtime, _ = self._load(graph.model)

        def score(parts: Iterable[str], step: int = 1) -> CandidateScore:
            taken = set(parts)
            bytes_ = size + sum(graph.added_bytes[part] for part in taken)
            return self._score(runtime, bytes_, {SWITCHES: graph.switches(taken)}, step)

        return score

    def _load(self, model: Any) -> tuple[Runtime, int]:
        """Load the candidate. Returns its runtime and the bytes of its weights."""
        for path in self._scratch.glob(f"{GRAPH}*"):
            path.unlink()
        size = save_graph(model, self._scratch / GRAPH)
        return_freed_memory()
        return Runtime.load(self._scratch, verify=False), size

    def _score(
        self, runtime: Runtime, size: int, more_inputs: Mapping[str, np.ndarray] | None = None, step: int = 1
    ) -> CandidateScore:
        kl, nats, reference = 0.0, 0.0, 0.0
        tokens = sum(map(len, self._rows[::step]))
        for row, p in zip(self._rows[::step], self._reference[::step], strict=True):
            q = self._logprobs(runtime, row, more_inputs)
            kl += float((np.exp(p) * (p - q)).sum())
            steps = np.arange(len(row) - 1)
            nats -= float(q[steps, row[1:]].sum())
            reference -= float(p[steps, row[1:]].sum())
        return CandidateScore(kl / tokens, nats / reference - 1, kl / reference, size)

    def _logprobs(
        self, runtime: Runtime, row: list[int], more_inputs: Mapping[str, np.ndarray] | None = None
    ) -> np.ndarray:
        """Return (T, V) float32 log-probabilities of one text."""
        ids = np.array([row], np.int64)
        values = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(len(row))[None]}
        feeds = {name: values[name] for name in runtime.input_names} | dict(more_inputs or {})
        for name, item in runtime.past_inputs.items():
            feeds[name] = np.zeros(empty_past_shape(item, 1), NUMPY_TYPES[item.type])
        [logits] = runtime.onnx_session.run(["logits"], feeds)
        return log_softmax(logits[0].astype(np.float64)).astype(np.float32)


def _rows(runtime: Runtime, texts: Sequence[str], tokens: int) -> list[list[int]]:
    """Return the token ids of the beginning of each text, at least two per text and at most `tokens` in total."""
    max_length = min(ROW_TOKENS, runtime.max_length)
    rows: list[list[int]] = []
    for text in texts:
        row = runtime.encode(text[: 16 * max_length])[: min(max_length, tokens - sum(map(len, rows)))]
        if len(row) >= 2:
            rows.append(row)
    if not rows:
        raise BadInput("no text to quantize with: every document has fewer than two tokens")
    return rows
