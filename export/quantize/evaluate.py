"""How a candidate graph compares with the float32 one, and how fast it decodes: what quantization chooses by."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.export.graph.decoder import MAX_SINGLE_FILE_BYTES
from limbeck.export.runtime.runtime import Runtime
from limbeck.export.runtime.sampling import log_softmax
from limbeck.export.runtime.session import GRAPH
from limbeck.registry.core.errors import BadInput

PROMPT, STEPS, TURNS = 32, 32, 2  # tokens read and decoded to time a step, and how often


@dataclass(frozen=True)
class CandidateScore:
    """A candidate against the float32 graph."""

    kl: float  # KL(float32 || candidate), mean over tokens, nats
    bits_per_byte_change: float  # of the bits per byte, as a share of the float32 graph's
    expected_change: (
        float  # the same, were the float32 graph right about its text: `kl` as a share; it varies much less
    )
    bytes: int

    @property
    def loss(self) -> float:
        """What is held against a limit: the larger of the two."""
        return max(self.bits_per_byte_change, self.expected_change)

    def to_manifest(self) -> dict[str, Any]:
        """As the manifest says it."""
        return {
            "kl": self.kl,
            "bits_per_byte_change": self.bits_per_byte_change,
            "expected_change": self.expected_change,
            "bytes": self.bytes,
        }


class CandidateEvaluator:
    """Texts to choose by, with the float32 graph's log-probabilities of them.

    Args:
        artifact: folder with the float32 graph, its configuration and tokenizer.
        scratch: an empty folder for the candidates.
        texts: the beginnings of the first ones are taken, `tokens` from all of them together.

    Raises:
        BadInput: no text has two tokens.
    """

    def __init__(self, artifact: Path, scratch: Path, texts: Sequence[str], *, tokens: int = 512) -> None:
        self._scratch = scratch
        for path in artifact.iterdir():
            if path.is_file() and not path.name.startswith(GRAPH) and path.suffix in (".json", ".jinja"):
                shutil.copyfile(path, scratch / path.name)
        runtime = Runtime.load(artifact, verify=False)
        self._rows = _rows(runtime, texts, tokens)
        self._reference = [self._logprobs(runtime, row) for row in self._rows]
        self.tokens = sum(map(len, self._rows))

    def score(self, model: Any) -> CandidateScore:
        """Run the candidate over the texts. `model`: onnx.ModelProto."""
        size = self._write(model)
        runtime = Runtime.load(self._scratch, verify=False)
        kl, nats, reference = 0.0, 0.0, 0.0
        for row, p in zip(self._rows, self._reference, strict=True):
            q = self._logprobs(runtime, row)
            kl += float((np.exp(p) * (p - q)).sum())
            steps = np.arange(len(row) - 1)
            nats -= float(q[steps, row[1:]].sum())
            reference -= float(p[steps, row[1:]].sum())
        return CandidateScore(kl / self.tokens, nats / reference - 1, kl / reference, size)

    def decode_ms(self, model: Any) -> float:
        """Milliseconds to decode a token, batch 1: the faster of two turns."""
        self._write(model)
        runtime = Runtime.load(self._scratch, verify=False)
        room = runtime.max_length
        prompt = self._rows[0][: min(PROMPT, room // 2)]
        steps = min(STEPS, room - len(prompt) - 1)
        turns = [
            runtime.generate([prompt], max_new_tokens=steps + 1, ignore_eos=True)[0].decode_s for _ in range(TURNS)
        ]
        return 1000 * min(turns) / steps

    def _write(self, model: Any) -> int:
        for path in self._scratch.glob(f"{GRAPH}*"):
            path.unlink()
        return save_graph(model, self._scratch / GRAPH)

    def _logprobs(self, runtime: Runtime, row: list[int]) -> np.ndarray:
        """(T, V) float32 log-probabilities of one text."""
        ids = np.array([row], np.int64)
        return log_softmax(runtime.logits(ids, np.ones_like(ids))[0].astype(np.float64)).astype(np.float32)


def save_graph(model: Any, path: Path) -> int:
    """Write a graph, from 16 MB of weights on with these beside it. Returns the bytes of its weights."""
    import onnx

    size = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    whole = onnx.ModelProto()  # saving with external data takes the weights out of what it is given
    whole.CopyFrom(model)
    onnx.save_model(
        whole,
        path,
        save_as_external_data=size > MAX_SINGLE_FILE_BYTES,
        location=f"{path.name}_data",
        size_threshold=1024,
    )
    return size


def _rows(runtime: Runtime, texts: Sequence[str], tokens: int) -> list[list[int]]:
    """Token ids of beginnings of the texts, at most `tokens` in all; each has two or more."""
    most = min(128, runtime.max_length)
    rows: list[list[int]] = []
    for text in texts:
        row = runtime.encode(text[: 16 * most])[: min(most, tokens - sum(map(len, rows)))]
        if len(row) >= 2:
            rows.append(row)
    if not rows:
        raise BadInput("no text to quantize by: every document has fewer than two tokens")
    return rows
