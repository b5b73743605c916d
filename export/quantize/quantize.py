"""A float32 graph in another precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np

from limbeck.export.quantize.evaluate import CandidateEvaluator, save_graph
from limbeck.export.quantize.float16 import convert_to_float16, load_as_float16
from limbeck.export.quantize.int8 import quantize_dynamic_int8, quantize_static_int8
from limbeck.export.quantize.mixed_precision import choose_plan
from limbeck.export.quantize.sample_texts import SAMPLE_TEXTS
from limbeck.export.quantize.weight_only import GraphWeights
from limbeck.export.runtime.runtime import Runtime
from limbeck.export.runtime.session import GRAPH, NUMPY_TYPES, empty_past_shape
from limbeck.registry.core.errors import BadInput

CALIBRATION_TEXTS = 16  # texts whose activations are looked at
CUDA_PRECISIONS = ("fp32", "fp16", "int4", "int8-weight")


@dataclass(frozen=True)
class QuantizationSettings:
    """What quantization goes by.

    Attributes:
        texts: to calibrate with and to choose by; not the ones that parity is measured on, where there are others.
        source: where they are from, as the manifest says it.
        max_change: most that the bits per byte may grow by, as a share; parts of an int4 model are given 8 bits until
            it holds.
        device: where the artifact will run.
        tell: takes a line on what is done.
    """

    texts: Sequence[str] = SAMPLE_TEXTS
    text_source: str = "passages that come with Limbeck"
    max_change: float = 0.01
    device: Literal["cpu", "cuda"] = "cpu"
    report: Callable[[str], None] = lambda text: None

    def requested_settings(self, precision: str) -> dict[str, Any]:
        """What a variant made before must have been asked to be, to be this one."""
        if precision == "int4":
            return {"device": self.device, "max_change": self.max_change}
        return {"device": self.device}


def quantize(
    artifact: Path, folder: Path, precision: str, settings: QuantizationSettings | None = None
) -> dict[str, Any]:
    """Write `folder/model.onnx`, the float32 artifact's graph in `precision`. Returns what the manifest says of it.

    Args:
        artifact: folder with a float32 graph, its configuration and its tokenizer; may be `folder` itself.

    Raises:
        BadInput: a precision that the device or the graph cannot have.
    """
    settings = settings or QuantizationSettings()
    check_device([precision], settings.device)
    record = _quantize(artifact, folder, precision, settings)
    return {**record, "requested_settings": settings.requested_settings(precision)}


def check_device(precisions: Sequence[str], device: str) -> None:
    """Raise BadInput where one of the precisions is not for the device."""
    for precision in precisions:
        if device == "cuda" and precision not in CUDA_PRECISIONS:
            raise BadInput(f"{precision} is for the CPU", fix=f"on CUDA use one of: {', '.join(CUDA_PRECISIONS)}")


def _quantize(artifact: Path, folder: Path, precision: str, settings: QuantizationSettings) -> dict[str, Any]:
    if precision == "fp16":
        _replace(folder, load_as_float16(artifact / GRAPH))
        return {"method": "float16"}
    if precision == "int8":
        quantize_dynamic_int8(artifact / GRAPH, folder)
        return {"method": "dynamic int8"}
    if precision == "int8-static":
        runtime = Runtime.load(artifact, verify=False)
        if not any(runtime.encode(text) for text in settings.texts[:CALIBRATION_TEXTS]):
            raise BadInput("no text to calibrate with: every document is empty")
        quantize_static_int8(artifact / GRAPH, folder, _inputs(runtime, settings.texts))
        return {"method": "static int8", "calibration": settings.text_source}
    return _quantize_weights(artifact, folder, 4 if precision == "int4" else 8, settings)


def _quantize_weights(artifact: Path, folder: Path, bits: int, settings: QuantizationSettings) -> dict[str, Any]:
    weights = GraphWeights.from_graph(artifact / GRAPH)
    if not weights.weight_nodes:
        raise BadInput(
            f"{artifact.name}: its graph has no product with a constant weight to store in {bits} bits",
            fix="use fp32 or fp16",
        )
    with TemporaryDirectory(dir=folder, prefix=".try-") as scratch:
        trial = CandidateEvaluator(artifact, Path(scratch), settings.texts)
        choice = choose_plan(
            weights, trial, bits, max_loss=settings.max_change, on_cpu=settings.device == "cpu", report=settings.report
        )
    model = weights.quantize(choice.plan)
    if settings.device == "cuda":
        model = convert_to_float16(model)
    _replace(folder, model)
    return {
        "method": "weight-only",
        "chosen_on": settings.text_source,
        "chosen_on_tokens": trial.tokens,
        **choice.record,
    }


def _replace(folder: Path, model: Any) -> None:
    for path in folder.glob(f"{GRAPH}*"):
        path.unlink()
    save_graph(model, folder / GRAPH)


def _inputs(runtime: Runtime, texts: Sequence[str]) -> Iterator[dict[str, np.ndarray]]:
    """The graph's inputs for the beginnings of some texts, with an empty cache."""
    most = min(128, runtime.max_length)
    for text in texts[:CALIBRATION_TEXTS]:
        row = runtime.encode(text[: 16 * most])[:most]
        if not row:
            continue
        ids = np.array([row], np.int64)
        known = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(len(row))[None]}
        cache = {
            name: np.zeros(empty_past_shape(item, 1), NUMPY_TYPES[item.type])
            for name, item in runtime.past_inputs.items()
        }
        yield {name: known[name] for name in runtime.input_names} | cache
