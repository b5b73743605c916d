"""What quantization needs besides the graph: text, limits, the target device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from limbeck.export.quantize.sample_texts import CHOICE_TEXTS, SAMPLE_TEXTS
from limbeck.registry.core.errors import BadInput
from limbeck.registry.core.jsonl import find_training_text, read_rows
from limbeck.registry.records import Version

MIN_DOCUMENTS = 16  # of --texts, to choose on one half of them and judge on the other
MIN_JUDGED = 8


@dataclass(frozen=True)
class QuantizationSettings:
    """Text, limits and device of a quantization.

    Attributes:
        texts: text for calibration and for choosing a format; never the text that the variant is judged on.
        text_source: where the texts come from, recorded in the manifest.
        max_change: the user's own limit of the relative increase of the bits per byte; None: the precision's.
        device: the device that will run the artifact.
        report: called with a line of progress.
    """

    texts: Sequence[str] = CHOICE_TEXTS
    text_source: str = "passages that come with Limbeck"
    max_change: float | None = None
    device: Literal["cpu", "cuda"] = "cpu"
    report: Callable[[str], None] = lambda text: None


def quantization_settings(
    version: Version | None,
    *,
    calibration: Path | None = None,
    texts: Path | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    max_change: float | None = None,
    report: Callable[[str], None] = QuantizationSettings.report,
) -> QuantizationSettings:
    """Choose the text to quantize with.

    The first that exists of: the file `calibration`, the text that `version` was trained on if it is on this machine,
    every second document of the file `texts` if it has at least MIN_DOCUMENTS, the passages that come with Limbeck.
    Raises BadInput if a file cannot be read.
    """
    training_text = find_training_text(version.data_digest) if version and version.data_digest else None
    for corpus, source in ((calibration, "--calibration"), (training_text, "the recipe's training text")):
        if corpus:
            return QuantizationSettings(read_texts(corpus), source, max_change, device, report)
    documents = list(dict.fromkeys(read_texts(texts))) if texts else []
    if len(documents) >= MIN_DOCUMENTS:
        source = "every second document of --texts"
        return QuantizationSettings(documents[1::2], source, max_change, device, report)
    return QuantizationSettings(max_change=max_change, device=device, report=report)


def held_out_texts(texts: Path | None, chosen_on: Sequence[str]) -> list[str]:
    """Return the texts to judge a variant on: those of the file `texts` on which no format was chosen.

    Fewer than MIN_JUDGED documents get the passages that come with Limbeck beside them, since the error of a figure is
    estimated from the differences between documents.

    Raises BadInput if the file cannot be read, or if nothing of it is left.
    """
    chosen = set(chosen_on)
    documents = [text for text in read_texts(texts) if text not in chosen] if texts else []
    if texts and not documents:
        raise BadInput(f"{texts}: each of its texts is in --calibration too", fix="give other texts with --texts")
    return documents if len(set(documents)) >= MIN_JUDGED else [*documents, *SAMPLE_TEXTS]


def read_texts(corpus: Path, limit: int = 64) -> list[str]:
    """Read the first texts of a JSON Lines file with {"path": ..., "text": ...} per line.

    Raises BadInput, naming the line, or if there is no text.
    """
    texts = [text for (text,) in read_rows(corpus, ("text",), limit)]
    if not texts:
        raise BadInput(f"{corpus} is empty")
    return texts
