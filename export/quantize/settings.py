"""What quantization needs besides the graph: text, limits, the target device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from limbeck.export.quantize.sample_texts import SAMPLE_TEXTS
from limbeck.registry.core.errors import BadInput
from limbeck.registry.core.jsonl import find_training_text, read_rows
from limbeck.registry.records import Version


@dataclass(frozen=True)
class QuantizationSettings:
    """Text, limits and device of a quantization.

    Attributes:
        texts: text for calibration and for choosing a format; should differ from the text that parity is measured on.
        text_source: where the texts come from, recorded in the manifest.
        max_change: largest relative increase of the bits per byte; parts of an int4 model get 8 bits until it is met.
        device: the device that will run the artifact.
        report: called with a line of progress.
    """

    texts: Sequence[str] = SAMPLE_TEXTS
    text_source: str = "passages that come with Limbeck"
    max_change: float = 0.01
    device: Literal["cpu", "cuda"] = "cpu"
    report: Callable[[str], None] = lambda text: None


def quantization_settings(
    version: Version | None,
    *,
    calibration: Path | None = None,
    texts: Path | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    max_change: float = QuantizationSettings.max_change,
    report: Callable[[str], None] = QuantizationSettings.report,
) -> QuantizationSettings:
    """Choose the text to quantize with.

    The first that exists of: the file `calibration`, the text that `version` was trained on if it is on this machine,
    the held-out file `texts`, the passages that come with Limbeck. Raises BadInput if a file cannot be read.
    """
    training_text = find_training_text(version.data_digest) if version and version.data_digest else None
    for corpus, source in (
        (calibration, "--calibration"),
        (training_text, "the recipe's training text"),
        (texts, "--texts"),
    ):
        if corpus:
            return QuantizationSettings(read_texts(corpus), source, max_change, device, report)
    return QuantizationSettings(max_change=max_change, device=device, report=report)


def read_texts(corpus: Path, limit: int = 64) -> list[str]:
    """Read the first texts of a JSON Lines file with {"path": ..., "text": ...} per line.

    Raises BadInput, naming the line, or if there is no text.
    """
    texts = [text for (text,) in read_rows(corpus, ("text",), limit)]
    if not texts:
        raise BadInput(f"{corpus} is empty")
    return texts
